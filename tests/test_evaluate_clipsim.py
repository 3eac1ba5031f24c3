"""CLIPSIM is what transformers' CLIPModel and its image processor give, a hundredfold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from animatelcm.evaluate.clipsim import clipsim, load_clip, of_folders, pixels, similarities
from animatelcm.hub import ASSETS
from animatelcm.tokenizer import Tokenizer, read_merges
from animatelcm.video import write

SIDE = 32
PROMPTS = ["a parrot on a blue background", "a horse, galloping!", "word " * 100]


def part(**sizes):
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("clip"))


def random_clip(place):
    """A random CLIP whose embeddings differ, in the layout of the hub."""
    torch.manual_seed(0)
    text, vision = part(projection_dim=8), part(image_size=SIDE, patch_size=8, projection_dim=8, hidden_act="gelu")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(place)
    Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), 77).save(place)
    return place


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder)


def videos(count=3, frames=5, height=50, width=41):
    source = np.random.default_rng(0)
    return [source.integers(0, 256, (frames, height, width, 3), dtype=np.uint8) for _ in range(count)]


def smooth(height, width):
    """A picture without noise: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + i) + i) * np.cos(y / (7 - i)) for i in range(3)]
    return np.rint(127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (64, 64), (225, 301), (640, 360), (223, 333), (300, 1000)])
@pytest.mark.parametrize("noise", [False, True])
def test_pixels_are_those_of_transformers(size, noise):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8) if noise else smooth(*size)
    theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    level = 1 / 255 / 0.26
    torch.testing.assert_close(pixels(image[None]), theirs, atol=1.01 * level, rtol=0)
    assert (pixels(image[None]) - theirs).abs().mean() < 1e-4


def test_similarities_are_those_of_transformers(folder, clip):
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    words = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    found = similarities(clip, videos(), PROMPTS, batch=2)
    for i, video in enumerate(videos()):
        with torch.no_grad():
            seen = model(**words, pixel_values=processor(list(video), return_tensors="pt")["pixel_values"])
        cosines = seen.logits_per_image[:, i] / model.logit_scale.detach().exp()
        assert float(found[i]) / 100 == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert found.std() > 0.5


def test_a_video_is_the_mean_of_its_frames_whatever_the_batch(clip):
    (video,) = videos(1)
    alone = [similarities(clip, [video[i : i + 1]], PROMPTS[:1]) for i in range(5)]
    for batch in (1, 3, 9):
        found = similarities(clip, [video], PROMPTS[:1], batch=batch)
        torch.testing.assert_close(found, torch.stack(alone).mean(dim=0), atol=1e-4, rtol=0)


def test_half_precision_and_pickles_are_read_too(folder, clip, tmp_path):
    model = CLIPModel.from_pretrained(folder)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "pytorch_model.bin")
    other = load_clip(tmp_path)
    args = (videos(), PROMPTS)
    torch.testing.assert_close(similarities(other, *args), similarities(clip, *args), atol=0.5, rtol=0)
    assert other.facts["weights"] != clip.facts["weights"]
    assert other.network.dtype == torch.float32


def test_the_score_is_the_mean_over_videos_with_its_protocol(clip):
    values = torch.tensor([20.0, 30.0, 31.0, 25.0], dtype=torch.float64)
    score = clipsim(values, clip, resamples=200)
    assert (score.metric, score.value, score.n, score.rank) == ("CLIPSIM", 26.5, {"generated": 4}, None)
    assert score.interval.low < 26.5 < score.interval.high
    assert clipsim(values + 1, clip, resamples=2).protocol == score.protocol
    others = [clipsim(values[:3], clip, resamples=2), clipsim(values, clip, about={"seed": 1}, resamples=2)]
    others.append(clipsim(values, clip._replace(facts={**clip.facts, "weights": "w2"}), resamples=2))
    assert len({score.protocol, *(other.protocol for other in others)}) == 4


def test_as_many_prompts_as_videos(clip):
    with pytest.raises(ValueError, match="there are 2 videos, and more of the other"):
        similarities(clip, videos(2), PROMPTS)
    with pytest.raises(ValueError, match="there are 1 prompts, and more of the other"):
        similarities(clip, videos(2), PROMPTS[:1])
    assert similarities(clip, [], []).shape == (0,)


def test_a_video_whose_embedding_is_no_number_is_named(folder):
    spoilt = load_clip(folder)
    spoilt.network.logit_scale.data.fill_(torch.nan)  # takes no part
    assert similarities(spoilt, videos(1), PROMPTS[:1]).isfinite().all()
    words = spoilt.network.text_model.embeddings.token_embedding.weight
    words.data[spoilt.tokenizer(["galloping"])[0, 1]] = torch.nan
    with pytest.raises(ValueError, match="video 1: its embedding or its prompt's"):
        similarities(spoilt, videos(), PROMPTS)
    with pytest.raises(ValueError, match=r"b\.mp4: its embedding or its prompt's"):
        similarities(spoilt, videos(), PROMPTS, names=["a.mp4", "b.mp4", "c.mp4"])


def test_folders_without_a_clip_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="is a 'siglip'; give a CLIP"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="neither a folder, nor in the local cache, nor reachable"):
        load_clip()


# Folders


@pytest.fixture
def places(tmp_path):
    """Two folders of three videos that say what they were asked to show."""
    for name, order in (("one", 1), ("two", -1)):
        for number, (clip, prompt) in enumerate(zip(videos(), PROMPTS[::order], strict=True)):
            write(clip, tmp_path / name / f"{number}.webp", fps=8, quality=100, metadata={"prompt": prompt})
    return tmp_path


def test_folders_have_the_similarity_of_their_videos(clip, places):
    found = of_folders(clip, [places / "one", places / "two"]).scores
    values = [similarities(clip, videos(), PROMPTS[::order]) for order in (1, -1)]
    for name, expected in zip(("one", "two"), values, strict=True):
        (score,) = found[str(places / name)]
        assert score.value == pytest.approx(float(expected.mean()))
    assert len({score.protocol for (score,) in found.values()}) == 1  # the same prompts, whatever their order


def test_folders_of_other_prompts_do_not_compare(clip, places):
    write(videos(1)[0], places / "two" / "0.webp", fps=8, metadata={"prompt": "a fox"}, overwrite=True)
    folders = [places / "one", places / "two"]
    with pytest.raises(ValueError, match="have different prompts, so their figures do not compare"):
        of_folders(clip, folders)
    scores = of_folders(clip, folders, mixed=True).scores
    assert len({score.protocol for (score,) in scores.values()}) == 2


def test_a_second_run_embeds_nothing(clip, places, monkeypatch):
    first = of_folders(clip, [places / "one"], keep=places / "kept")

    def asked(*_, **__):
        raise AssertionError("it was asked")

    monkeypatch.setattr("animatelcm.evaluate.clipsim.similarities", asked)
    assert of_folders(clip, [places / "one"], keep=places / "kept") == first
    table = places / "other.jsonl"
    table.write_text("".join(f'{{"file": "{i}.webp", "prompt": "a fox"}}\n' for i in range(3)))
    with pytest.raises(AssertionError):  # other prompts are measured
        of_folders(clip, [places / "one"], prompts=table, keep=places / "kept")
