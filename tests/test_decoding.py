"""Frames come in chunks, one ahead, from a model's own autoencoder or a small decoder."""

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

from animatelcm import decoding, video
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


def at_once(model, made: Draft) -> np.ndarray:
    """Decoded by the autoencoder itself: diffusers' way to pixels."""
    with torch.inference_mode():
        flat = made.latents[0].transpose(0, 1)
        pixels = model.vae.decode(flat / model.vae.config.scaling_factor)
    return video.to_uint8((pixels.permute(0, 2, 3, 1).numpy() + 1) / 2)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a.astype(int) - b).max() <= 1)


def test_chunks_are_the_whole(fresh_model):
    plain = at_once(fresh_model, draft(fresh_model))
    chunks = list(frames(fresh_model, draft(fresh_model)))
    assert [len(chunk) for chunk in chunks] == [16, 4]
    assert near(np.concatenate(chunks), plain)
    made = whole(fresh_model, draft(fresh_model))
    assert near(made.frames, plain)
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
    assert near(whole(model, made).frames, expected)
    assert near(model.decode(made.latents, bands=4)[0], expected)
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
