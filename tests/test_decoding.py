"""Frames come in chunks, one ahead, in smaller ones where memory is short; latents outlive what fails after them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from animatelcm import decoding, memory, video
from animatelcm.colour import aligned
from animatelcm.decoding import Draft, ahead, frames, whole
from animatelcm.model_source import ModelSource
from animatelcm.request import SampleRequest
from test_condition import clip

SOURCE = ModelSource(model="some/model", decoder="tiny")


def draft(model, count: int = 20, height: int = 64, width: int = 64, **fields) -> Draft:
    cells = (height // model.downscale, width // model.downscale)
    latents = torch.randn(
        1, model.vae.config.latent_channels, count, *cells, generator=torch.Generator().manual_seed(0)
    )
    request = SampleRequest(prompt="a parrot", num_frames=count, width=width, height=height)
    known = {"latents": latents, "request": request.resolved(model.facts), "seconds": {"denoise": 1.5}}
    return Draft(model="mine", fps=8.0, evaluations=4, **known | fields)


@pytest.fixture(scope="module")
def plain(fresh_model):
    """Decoded by the autoencoder itself, all at once: diffusers' way to pixels."""
    made = draft(fresh_model)
    with torch.inference_mode():
        flat = made.latents[0].transpose(0, 1)
        pixels = fresh_model.vae.decode(flat / fresh_model.vae.config.scaling_factor)
    return video.to_uint8((pixels.permute(0, 2, 3, 1).numpy() + 1) / 2)


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a.astype(int) - b).max() <= 1)


def test_chunks_are_the_whole(fresh_model, plain):
    chunks = list(frames(fresh_model, draft(fresh_model)))
    assert [len(chunk) for chunk in chunks] == [16, 4]
    assert _near(np.concatenate(chunks), plain)
    made = whole(fresh_model, draft(fresh_model))
    assert _near(made.frames, plain)
    assert set(made.seconds) == {"denoise", "decode"}


def test_colours_are_matched_frame_by_frame(fresh_model):
    picture = clip(1)[0]
    request = replace(draft(fresh_model).request, colour_match=0.5)
    made = np.concatenate(list(frames(fresh_model, draft(fresh_model, picture=picture, request=request))))
    assert (made == aligned(whole(fresh_model, draft(fresh_model)).frames, picture, 0.5)).all()


def test_the_caller_keeps_its_grad_mode(fresh_model):
    for _ in frames(fresh_model, draft(fresh_model)):
        assert not torch.is_inference_mode_enabled()


# On a stream of its own


@pytest.fixture
def streams(monkeypatch):
    """The CPU passes for two CUDA devices; what happens to latents and streams, in order."""
    said, inside = [], []

    class Stream:
        def __init__(self, device):
            self.name = str(device)
            said.append(f"new {self.name}")

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other}")

    @contextmanager
    def current(stream):
        inside.append(stream.name)
        yield
        inside.pop()

    contiguous, empty = torch.Tensor.contiguous, torch.empty

    def copied(self, **options):
        said.append(f"{len(self)} copied on {inside}")
        return contiguous(self, **options)

    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(torch.Tensor, "contiguous", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, on: said.append(f"{len(self)} kept for {on.name}"))
    monkeypatch.setattr(decoding, "_stream", cache(decoding._stream.__wrapped__))
    return said


def _drawing(device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(device=device, draw=lambda x, bands: x[:, :3].permute(0, 2, 3, 1))


def test_a_chunk_is_copied_on_the_stream_that_decodes_it(fresh_model, streams):
    made = draft(fresh_model, 6)
    chunks = list(frames(_drawing(torch.device("cuda", 0)), made))
    assert [len(chunk) for chunk in chunks] == [4, 2]
    assert streams == [
        *("new cuda:0", "cuda:0 waits for the caller's"),
        *("4 kept for cuda:0", "4 copied on ['cuda:0']"),
        *("2 kept for cuda:0", "2 copied on ['cuda:0']"),
    ]
    expected = made.latents[0, :3].permute(1, 2, 3, 0).numpy()
    assert (np.concatenate(chunks) == expected).all()


def test_all_videos_of_a_device_share_a_stream(fresh_model, streams):
    for index in (0, 0, 1, 1):
        list(frames(_drawing(torch.device("cuda", index)), draft(fresh_model, 1)))
    assert [line for line in streams if line.startswith("new")] == ["new cuda:0", "new cuda:1"]


# One thread ahead


def test_the_next_item_is_made_while_one_is_used_and_no_further():
    made = []

    def items():
        for i in range(5):
            made.append((i, threading.current_thread()))
            yield i

    for i in ahead(items()):
        deadline = time.monotonic() + 5
        while len(made) < min(i + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(made) == min(i + 2, 5)
    assert {thread for _, thread in made} != {threading.main_thread()}


def test_what_fails_in_the_thread_fails_here_and_leaves_none():
    def items():
        yield 1
        raise KeyError("in the thread")

    before, coming = threading.active_count(), ahead(items())
    assert next(coming) == 1
    with pytest.raises(KeyError, match="in the thread"):
        next(coming)
    assert threading.active_count() == before


def test_closing_ends_both():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread())

    before, coming = threading.active_count(), ahead(items())
    next(coming)
    coming.close()
    assert len(closed) == 1
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "frames"])
def test_a_decoder_that_fails_in_the_middle_leaves_no_file(fresh_model, tmp_path, monkeypatch, name):
    calls, decode = [], fresh_model.vae.decode

    def failing(x):
        calls.append(len(x))
        if len(calls) == 2:
            raise RuntimeError("no more")
        return decode(x)

    monkeypatch.setattr(fresh_model.vae, "decode", failing)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no more"):
        decoding.write(fresh_model, draft(fresh_model), tmp_path / name, source=SOURCE)
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before


def test_a_file_is_what_was_decoded(fresh_model, tmp_path):
    seconds = decoding.write(fresh_model, draft(fresh_model), tmp_path / "frames", source=SOURCE)
    footage = video.read(tmp_path / "frames")
    assert (footage.frames == whole(fresh_model, draft(fresh_model)).frames).all()
    assert footage.fps == 8
    assert footage.metadata["decoder"] == "tiny"
    assert "--decoder tiny" in footage.metadata["command"]
    assert seconds["denoise"] == 1.5


# Too little memory


def _limited(model, monkeypatch, most: int, calls: list[tuple[int, ...]]) -> None:
    """Decoding more than ``most`` cells at once is too much."""
    decode = model.vae.decode

    def limited(x):
        calls.append((len(x), *x.shape[2:]))
        if x[:, 0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(x)

    monkeypatch.setattr(model.vae, "decode", limited)


@pytest.mark.parametrize(
    ("own", "most", "tried"),
    [
        (False, 16 * 64, [16, 4]),
        (False, 15 * 64, [16, 4, 4, 4, 4, 4]),
        (False, 64, [16, 4, *[1] * 20]),
        (True, 16 * 64, [4, 4, 4, 4, 4]),
        (True, 64, [4, *[1] * 20]),
    ],
)
def test_chunks_shrink_once_and_the_video_is_the_same(fresh_model, plain, monkeypatch, own, most, tried):
    monkeypatch.setattr(memory, "has_own_memory", lambda _: own)
    calls: list[tuple[int, ...]] = []
    _limited(fresh_model, monkeypatch, most, calls)
    assert _near(whole(fresh_model, draft(fresh_model)).frames, plain)
    assert [n for n, *_ in calls] == tried


def _limited_to_bands(model, monkeypatch, most: int) -> list[int]:
    """Whole frames are too much, and so are more than ``most`` pixels of the last layer."""
    _limited(model, monkeypatch, 0, [])
    last, seen = model.vae.decoder.conv_out.forward, []

    def limited(x):
        seen.append(x.shape[2] * x.shape[3])
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return last(x)

    monkeypatch.setattr(model.vae.decoder.conv_out, "forward", limited)
    return seen


@pytest.mark.parametrize(("most", "bands"), [(128 * 34, 4), (128 * 10, 16)])
def test_then_come_bands_and_the_video_is_the_same(fresh_model, monkeypatch, caplog, most, bands):
    made = draft(fresh_model, 2, 128, 128)
    expected = whole(fresh_model, made).frames
    seen = _limited_to_bands(fresh_model, monkeypatch, most)
    assert _near(whole(fresh_model, made).frames, expected)
    assert sum(cells <= most for cells in seen) == 2 * bands
    assert f"1 frames at a time, in {bands} bands" in caplog.text


def test_then_the_others_wait_and_whole_frames_are_tried_again(fresh_model, monkeypatch):
    model = replace(fresh_model)
    there = torch.device("cpu", 0)
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    monkeypatch.setattr(type(model), "device", property(lambda self: self.runs_on or there))
    made, turns, decode = draft(model, 2, 128, 128), [], model.vae.decode
    expected = whole(model, made).frames

    def full_beside_others(x):
        turns.append((len(x), *x.shape[2:], model.runs_on is not None))
        if model.runs_on is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(x)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.vae, "decode", full_beside_others)
    monkeypatch.setattr("animatelcm.model.decode_in_bands", full)
    assert _near(whole(model, made).frames, expected)
    assert turns == [
        *[(2, 16, 16, False), (1, 16, 16, False)],
        *[(1, 16, 16, True), (1, 16, 16, True)],
    ]
    assert model.runs_on is None


@pytest.mark.parametrize(
    ("most", "said"), [(32 * 8, "any number of frames of 32x32 fits"), (0, "end what else uses it")]
)
def test_at_last_one_sentence_says_what_fits(fresh_model, monkeypatch, most, said):
    _limited_to_bands(fresh_model, monkeypatch, most)
    with pytest.raises(ValueError, match=rf"^cpu has too little memory to decode even one frame of 128x128; {said}$"):
        whole(fresh_model, draft(fresh_model, 3, 128, 128))


# Latents that are kept


def test_latents_outlive_a_decoder_that_fails_and_are_decoded_later(fresh_model, tmp_path, monkeypatch):
    made = draft(fresh_model, 3, picture=clip(1)[0])
    target, kept = tmp_path / "my clip.webp", tmp_path / "my clip.latents.safetensors"
    with monkeypatch.context() as patch:
        _limited_to_bands(fresh_model, patch, 0)
        with pytest.raises(ValueError, match="too little memory") as caught, decoding.rescued(made, target, SOURCE):
            decoding.write(fresh_model, made, target, source=SOURCE)
    words = f"animatelcm decode '{kept}' --model some/model --decoder tiny --out '{target}'"
    assert str(caught.value).endswith(f"its latents are in {kept}; this goes on from there: {words}")
    assert list(tmp_path.iterdir()) == [kept]
    again = decoding.load(kept, fresh_model)
    assert torch.equal(again.latents, made.latents)
    assert (again.picture == made.picture).all()
    same = ("request", "model", "fps", "evaluations", "seconds")
    assert all(getattr(again, name) == getattr(made, name) for name in same)
    assert (whole(fresh_model, again).frames == whole(fresh_model, made).frames).all()


def test_errors_that_are_no_users_stay_what_they_are(fresh_model, tmp_path):
    with pytest.raises(KeyError) as caught, decoding.rescued(draft(fresh_model, 1), tmp_path / "frames", SOURCE):
        raise KeyError("ours")
    assert "frames.latents.safetensors" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("CUDA error: an illegal memory access")])
def test_a_full_disk_or_a_failed_device_keeps_the_first_error(fresh_model, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(decoding, "save", full)
    with (
        pytest.raises(ValueError, match=rf"the first; its latents could not be kept either \({error}\)"),
        decoding.rescued(draft(fresh_model, 1), tmp_path / "a.mp4", SOURCE),
    ):
        raise OSError("the first")


def test_other_files_and_other_models_are_refused(fresh_model, tmp_path):
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, tmp_path / "x.latents.safetensors")
    with pytest.raises(ValueError, match="holds no latents of a video"):
        decoding.load(tmp_path / "x.latents.safetensors", fresh_model)
    decoding.save(draft(fresh_model, 2), tmp_path / "y.latents.safetensors")
    config = SimpleNamespace(latent_channels=4, block_out_channels=(1, 1, 1, 1))
    other = replace(fresh_model, vae=SimpleNamespace(config=config))
    with pytest.raises(ValueError, match=r"latents \(1, 16, 2, 8, 8\) of 'mine'.*--model"):
        decoding.load(tmp_path / "y.latents.safetensors", other)


# Small decoders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random AutoencoderTiny of the miniature's latents, as diffusers saves it, and it."""
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = AutoencoderTiny(latent_channels=16, scaling_factor=0.5, **widths, **blocks).eval()
        for parameter in network.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("tiny") / "decoder"
    network.save_pretrained(folder)
    return folder, network


def _with(decoder) -> decoding.VideoModel:
    from animatelcm.assembly import load_sum

    return load_sum(ModelSource(model="emoji", decoder=str(decoder)), keep=False, adapters=())


def test_a_small_decoder_draws_what_diffusers_does(tiny):
    folder, network = tiny
    model = _with(folder)
    made = draft(model, 3)
    with torch.inference_mode():
        pixels = network.decode(made.latents[0].transpose(0, 1) / 0.5).sample
    expected = video.to_uint8((pixels.permute(0, 2, 3, 1).numpy() + 1) / 2)
    assert expected.std() > 5
    assert _near(whole(model, made).frames, expected)
    assert _near(model.decode(made.latents, bands=4)[0], expected)
    assert ModelSource(decoder=str(folder)).words()[-2:] == ["--decoder", str(folder)]


def test_a_small_decoder_that_does_not_fit_is_one_sentence(tiny, tmp_path):
    import shutil

    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(
        ValueError, match="latents with 4 channels in cells of 8 pixels, and this model's have 16 and 8"
    ):
        _with(tmp_path / "a")
    shutil.copytree(tiny[0], tmp_path / "b")
    (tmp_path / "b" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "b" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights are missing: .*safetensors"):
        _with(tmp_path / "b")
    shutil.copytree(tiny[0], tmp_path / "c")
    config = tmp_path / "c" / "config.json"
    text = config.read_text()
    for wrong in (text.replace("AutoencoderTiny", "AutoencoderKL"), text.replace('"relu"', "5")):
        config.write_text(wrong)
        with pytest.raises(ValueError, match="AutoencoderTiny"):
            _with(tmp_path / "c")
    config.write_text(text.replace('"latent_channels": 16', '"latent_channels": 100000'))
    with pytest.raises(ValueError, match="latent_channels=100000 is out of range"):
        _with(tmp_path / "c")
