"""Long videos: what windows add up to, what they cost, and that they change nothing where nothing is to change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm.condition import Condition, Control
from animatelcm.model import VideoModel
from animatelcm.nets.unet import VideoUNet
from animatelcm.provenance import command
from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample, sample_steps
from animatelcm.windows import freenoise, in_windows, weights, windows
from test_condition import beside

SIZES = st.integers(1, 24).flatmap(lambda n: st.tuples(st.integers(1, 200), st.just(n), st.integers(0, n - 1)))


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Windows and their weights


@given(SIZES)
@settings(deadline=None)
def test_windows_cover_every_frame_and_share_what_they_should(size):
    frames, length, overlap = size
    spans = windows(*size)
    assert {frame for span in spans for frame in span} == set(range(frames))
    assert {len(span) for span in spans} == {min(frames, length)}
    shared = [before.stop - after.start for before, after in pairwise(spans)]
    assert all(share == overlap for share in shared[:-1])
    assert all(overlap <= share < length for share in shared[-1:])
    hop = length - overlap
    assert len(spans) == 1 + max(0, -(-(frames - length) // hop))


@given(SIZES)
@settings(deadline=None)
def test_weights_are_a_partition_of_unity(size):
    spans = windows(*size)
    total, shares = torch.zeros(size[0], dtype=torch.float64), weights(spans)
    for span, share in zip(spans, shares, strict=True):
        total[span.start : span.stop] += share
    assert shares.dtype == torch.float64
    assert (shares > 0).all()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


def test_weights_are_straight_lines_where_two_windows_meet():
    first, second = weights(windows(28, 16, 4))
    line = torch.arange(1, 5, dtype=torch.float64) / 5
    assert (first[:12] == 1).all()
    assert (second[4:] == 1).all()
    torch.testing.assert_close(second[:4], line, rtol=0, atol=1e-15)
    torch.testing.assert_close(first[12:], line.flip(0), rtol=0, atol=1e-15)


def test_an_overlap_must_leave_a_way_forward():
    for overlap in (-1, 16):
        with pytest.raises(ValueError, match=rf"^overlap={overlap}, .*choose 0\.\.15$"):
            windows(64, 16, overlap)


# Predictions in windows


@given(SIZES, st.integers(1, 4))
@settings(deadline=None)
def test_what_looks_at_each_frame_alone_is_left_exactly_as_it_was(size, batch):
    x = _noise(2, 3, size[0], 1, 2)
    assert (in_windows(lambda part, _: part.sin(), x, windows(*size), batch) == x.sin()).all()


def test_means_are_those_of_float64():
    """A prediction that depends on its window, against the sum that defines the mean."""
    x, spans = _noise(2, 3, 45, 4, 4), windows(45, 16, 7)

    def predict(part: torch.Tensor, _: object) -> torch.Tensor:
        return part * part.mean(2, keepdim=True) + torch.arange(part.shape[2])[:, None, None]

    expected = torch.zeros_like(x, dtype=torch.float64)
    for span, share in zip(spans, weights(spans), strict=True):
        found = predict(x[:, :, span.start : span.stop].double(), None)
        expected[:, :, span.start : span.stop] += share[:, None, None] * found
    for batch in (1, 2, 3, 100):
        made = in_windows(predict, x, spans, batch)
        torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_prediction_is_told_which_frames_it_sees():
    frames = torch.arange(60.0)[None, None, :, None, None]
    asked = []

    def predict(part: torch.Tensor, spans: list[range]) -> torch.Tensor:
        assert part.flatten().tolist() == [frame for span in spans for frame in span]
        asked.append(len(spans))
        return part

    in_windows(predict, frames, windows(60, 16, 4), 2)
    assert asked == [2, 2, 1]


def test_one_window_is_no_window():
    x = _noise(1, 2, 9, 2, 2)
    assert in_windows(lambda part, spans: part if spans == [range(9)] else None, x, windows(9, 16, 4)) is x


# Noise that windows share


@given(st.integers(1, 24), st.integers(1, 200), st.integers(0, 3))
@settings(deadline=None)
def test_every_window_that_begins_with_a_block_holds_every_noise_once(length, frames, seed):
    order = freenoise(frames, length, torch.Generator().manual_seed(seed)).tolist()
    assert order[:length] == list(range(min(frames, length)))
    assert len(order) == frames
    for start in range(0, frames - length + 1, max(1, length // 4)):
        assert sorted(order[start : start + length]) == list(range(length))


# In a sampler


def _request(**fields) -> SampleRequest:
    known = {"prompt": "a parrot", "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "lcm"}
    return SampleRequest(**known | {"context_length": 4, "context_overlap": 1} | fields)


def _latents(model: VideoModel, request: SampleRequest, **options) -> torch.Tensor:
    return list(sample_steps(model, request, **options))[-1].latents


def _asked(model: VideoModel, request: SampleRequest, **options) -> list[tuple[int, ...]]:
    """The shapes of what the network is given."""
    shapes = []
    hook = model.unet.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    _latents(model, request, **options)
    hook.remove()
    return shapes


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "dpm++"])
@pytest.mark.parametrize("noise", ["random", "freenoise"])
def test_a_video_of_one_window_is_what_it_was(fresh_model, sampler, noise):
    plain = _request(num_frames=4, sampler=sampler, context_length=None, context_overlap=None)
    windowed = replace(plain, context_length=4, context_overlap=2, noise=noise)
    assert (_latents(fresh_model, windowed) == _latents(fresh_model, plain)).all()
    assert {shape[2] for shape in _asked(fresh_model, windowed)} == {4}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_grow_with_frames_and_are_counted(fresh_model, guidance):
    halves = 2 if guidance != 1 else 1
    for hops in (1, 3):
        request = _request(num_frames=4 + 3 * hops, guidance_scale=guidance)
        asked = _asked(fresh_model, request)
        assert sum(shape[0] for shape in asked) == 2 * halves * (1 + hops)
        assert {shape[2] for shape in asked} == {4}
        assert sample(fresh_model, request)[0].evaluations == 2 * halves * (1 + hops)


def test_the_seed_decides(fresh_model):
    for noise in ("random", "freenoise"):
        first, again, other = (
            _latents(fresh_model, _request(noise=noise, seed=seed, num_inference_steps=1)) for seed in (1, 1, 2)
        )
        assert (first == again).all()
        assert (first != other).any()


def test_freenoise_begins_as_the_short_video_does(fresh_model):
    request = _request(num_frames=11).resolved(fresh_model.facts)
    long, short = (initial_noise(fresh_model, replace(request, num_frames=frames)) for frames in (11, 4))
    assert (long[:, :, :4] == short).all()
    assert {tuple(frame.flatten().tolist()) for frame in long[0].unbind(1)} == {
        tuple(frame.flatten().tolist()) for frame in short[0].unbind(1)
    }
    random = initial_noise(fresh_model, replace(request, noise="random"))
    assert len({tuple(frame.flatten().tolist()) for frame in random[0].unbind(1)}) == 11


def moving(frames: int) -> np.ndarray:
    """A clip whose frames all differ."""
    found = np.full((frames, 64, 64, 3), (40, 90, 160), np.uint8)
    for i, frame in enumerate(found):
        frame[8 : 24 + i, 4 * i : 4 * i + 16] = 250, 200, 10
    return found


@pytest.fixture(scope="module")
def still(fresh_model):
    """The model without temporal layers, to which windows make no difference, and adapters."""
    unet = VideoUNet(fresh_model.unet.config, None).eval()
    unet.load_state_dict({k: v for k, v in fresh_model.unet.state_dict().items() if "motion_modules" not in k})
    return beside(replace(fresh_model, unet=unet))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("names", [(), ("edge",), ("pose",), ("edge", "pose")])
def test_each_window_follows_its_own_part_of_a_layout(still, names, guidance):
    """A network that sees frames alone, steered by maps that differ: the same video whole and in windows."""
    condition = Condition(controls=tuple(Control(name, moving(9), 0.7) for name in names))
    windowed = _request(noise="random", guidance_scale=guidance)
    whole = replace(windowed, context_length=9)
    made, expected = (_latents(still, request, condition=condition) for request in (windowed, whole))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_windows_is_each_of_them(still, fresh_model, monkeypatch):
    from animatelcm import sampling

    model = replace(still, unet=fresh_model.unet)
    controls = tuple(Control(name, moving(9)) for name in ("edge", "pose"))
    condition = Condition(image=moving(1)[0], controls=controls)
    request = _request(guidance_scale=3.0)
    alone, batches = _latents(model, request, condition=condition), _asked(model, request, condition=condition)
    monkeypatch.setattr(sampling, "_batch", lambda *_: 2)
    together = _latents(model, request, condition=condition)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert [shape[0] for shape in batches] == [2] * 6
    assert [shape[0] for shape in _asked(model, request, condition=condition)] == [4, 2] * 2


def test_every_window_begins_from_the_picture(still, fresh_model):
    """The encoder of the picture is asked once, for one window's frames."""
    model, seen = replace(still, unet=fresh_model.unet), []
    hook = model.adapters["i2v"].register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    _latents(model, _request(), condition=Condition(image=moving(1)[0]))
    hook.remove()
    assert seen == [4]


def test_a_window_beyond_the_networks_positions_is_one_sentence(fresh_model):
    with pytest.raises(ValueError, match=r"frames=65: .* 1\.\.64"):
        _latents(fresh_model, _request(num_frames=70, context_length=65))


# In a request


def test_windows_come_from_the_models_clips(fresh_model):
    full = SampleRequest(prompt="a", num_frames=200).resolved(fresh_model.facts)
    assert (full.context_length, full.context_overlap) == (16, 4)
    assert full.resolved(fresh_model.facts) == full
    assert replace(full, context_length=6, context_overlap=None).resolved(fresh_model.facts).context_overlap == 1
    image = replace(fresh_model.facts, num_frames=1)  # a model of pictures draws each frame alone
    assert SampleRequest(prompt="a", num_frames=9).resolved(image).context_length == 9


def test_an_overlap_as_long_as_the_window_is_named(fresh_model):
    with pytest.raises(ValueError, match=r"^context_overlap=16 .* choose 0\.\.15$"):
        SampleRequest(prompt="a", context_overlap=16).resolved(fresh_model.facts)


def test_the_command_says_how_a_long_video_was_cut(fresh_model):
    from animatelcm.model_source import ModelSource

    def said(**fields) -> str:
        return command(SampleRequest(prompt="a", **fields).resolved(fresh_model.facts), ModelSource())

    assert "context" not in said(num_frames=16)
    assert "--context-length 16 --context-overlap 4" in said(num_frames=17)
    assert "--noise random" in said(num_frames=17, noise="random")
