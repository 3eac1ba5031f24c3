"""Text embeddings that are kept are those of the captions, and a step that takes them is the step without."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open

from animatelcm import objectives, recipes, stages, training
from animatelcm.data.batches import ClipBatch
from animatelcm.data.texts import embed_pieces, with_text
from animatelcm.rng import generator
from animatelcm.sources import open_source
from animatelcm.weights.files import read_metadata, read_safetensors, write_safetensors

SAID = [["a fox", "a cat", "a fox"], ["a dog", "a cat", ""]]


def _embed(said):
    """(B, 2, 3) that tells captions apart."""
    return torch.tensor([[[len(text), sum(map(ord, text)) % 61, 1.0]] * 2 for text in said])


@pytest.fixture
def pieces(tmp_path):
    paths = [tmp_path / f"{number:05}.safetensors" for number in range(len(SAID))]
    for path, said in zip(paths, SAID, strict=True):
        write_safetensors({"latents": torch.zeros(len(said), 1, 1, 1, 1)}, path, {"captions": json.dumps(said)})
    return paths


def test_each_caption_is_embedded_once_a_piece_and_comes_back(pieces, tmp_path):
    calls = []
    paths = embed_pieces(pieces, lambda said: calls.append(list(said)) or _embed(said), tmp_path / "texts")
    assert calls == [["", "a cat", "a fox"], ["", "a cat", "a dog"]]
    flat = [caption for said in SAID for caption in said]
    batches = with_text(lambda indices: ClipBatch(captions=tuple(flat[i] for i in indices)), paths)
    found = batches([4, 0, 3, 5])
    assert torch.equal(found.text, _embed(["a cat", "a fox", "a dog", ""]))
    assert torch.equal(found.no_text, _embed([""]))
    again = embed_pieces(pieces, lambda said: pytest.fail("they are there"), tmp_path / "texts")
    assert again == paths


def test_processes_share_the_pieces(pieces, tmp_path):
    mine = []
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "00000.safetensors").write_bytes(b"another process made it")
    embed_pieces(pieces, lambda said: mine.append(said) or _embed(said), tmp_path / "texts", rank=1, processes=2)
    assert mine == [["", "a cat", "a dog"]]


RECIPES = {"motion": recipes.teacher_emoji, "style": recipes.style_lora_emoji, "stage 2": recipes.video_lcm_emoji}


def _config(recipe, model, out, **changes):
    config = replace(recipe(), model=str(model), motion=None, out=out, batch_size=3, **changes)
    return replace(config, data=replace(config.data, length=3, cache=True))


def _gradients(config, model, batch):
    state = training._fresh_state(config, model)
    objective = stages.objective(config, model, state)
    objective(batch, partial(generator, 0, 0, 0)).loss.mean().backward()
    return torch.cat([value.grad.flatten() for value in state.parameters.values() if value.grad is not None])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_step_is_the_one_without(recipe, narrow_folder, tmp_path, monkeypatch):
    config = _config(recipe, narrow_folder, tmp_path)
    model = stages.starting_model(config)
    kept = open_source(config, model).batches(range(3))
    with torch.no_grad():
        exact = model.embed(kept.captions)
    torch.testing.assert_close(kept.text, exact, atol=4e-3, rtol=1e-3)  # of fp16
    assert not torch.equal(kept.text[0], kept.no_text[0])
    said = {"": kept.no_text[0], **dict(zip(kept.captions, kept.text, strict=True))}
    found = {}
    for name, batch in {"kept": kept, "made": replace(kept, text=None, no_text=None)}.items():
        asked = []
        monkeypatch.setattr(
            type(model), "embed", lambda _, texts, a=asked: a.append(texts) or torch.stack([said[t] for t in texts])
        )
        found[name] = _gradients(config, stages.starting_model(config), batch)
        assert bool(asked) is (name == "made")
    assert found["made"].norm() > 0
    assert torch.equal(found["kept"], found["made"])


def test_dropped_captions_are_the_empty_one(narrow_folder, tmp_path):
    model = stages.starting_model(_config(recipes.style_lora_emoji, narrow_folder, tmp_path))
    batch = ClipBatch(captions=("a fox", "a cat"), text=torch.ones(2, 4, 3), no_text=torch.zeros(1, 4, 3))
    found = objectives.embedded(model, batch, ["", "a cat"])
    assert found[:, 0, 0].tolist() == [0.0, 1.0]


def test_nothing_is_kept_of_a_text_encoder_that_trains(narrow_folder, tmp_path):
    config = _config(recipes.base_emoji, narrow_folder, tmp_path)
    model = stages.starting_model(config)
    assert any(parameter.requires_grad for parameter in model.text_encoder.parameters())
    assert open_source(config, model).batches([0]).text is None
    assert not [*(tmp_path / "cache").glob("texts-*")]


def test_another_text_encoder_has_another_place_and_latents_stay(narrow_folder, tmp_path):
    config = _config(recipes.style_lora_emoji, narrow_folder, tmp_path)
    model = stages.starting_model(config)
    first = open_source(config, model).batches([0])
    with torch.no_grad():
        next(model.text_encoder.parameters()).mul_(1.5)
    second = open_source(config, model).batches([0])
    assert not torch.equal(first.text, second.text)
    assert len([*(tmp_path / "cache").glob("texts-*")]) == 2
    (latents,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("texts-"))
    with safe_open(str(latents / "00000.safetensors"), framework="pt") as file:
        assert set(file.keys()) == {"latents"}


def test_texts_follow_the_captions_that_latents_have_now(narrow_folder, tmp_path):
    """A clip that another stood in for, and that can be read now that latents are made again, has its own caption."""
    config = _config(recipes.style_lora_emoji, narrow_folder, tmp_path)
    model = stages.starting_model(config)
    open_source(config, model)
    (piece,) = (path for path in (tmp_path / "cache").glob("*/*") if not path.parent.name.startswith("texts-"))
    said = {**read_metadata(piece), "captions": json.dumps(["a walrus", "a kite", "a walrus"])}
    write_safetensors(read_safetensors(piece), piece, said)
    found = open_source(config, model).batches(range(3))
    assert found.captions == ("a walrus", "a kite", "a walrus")
    with torch.no_grad():
        torch.testing.assert_close(found.text, model.embed(found.captions), atol=4e-3, rtol=1e-3)  # of fp16
