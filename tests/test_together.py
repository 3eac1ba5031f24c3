"""Videos of one prompt that are denoised in one batch: each is what it would be alone."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from animatelcm import memory, sampling
from animatelcm.condition import Condition, Control
from animatelcm.request import SampleRequest
from animatelcm.sampling import drafts, initial_noise, sample, sample_steps
from test_condition import beside, clip


def _request(**fields) -> SampleRequest:
    known = {"prompt": "a parrot", "num_frames": 2, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "lcm"}
    return SampleRequest(**known | {"seed": 5, "num_videos_per_prompt": 3} | fields)


def _last(model, request, **options) -> torch.Tensor:
    *_, preview = sample_steps(model, request, **options)
    return preview.latents


def _each(model, request, **options) -> torch.Tensor:
    return torch.cat([_last(model, single, **options) for single in request.singles()])


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(ours))


@pytest.fixture(scope="module")
def steered(fresh_model):
    return beside(fresh_model)


@pytest.fixture
def asked(fresh_model):
    """Videos in each batch that the network is given."""
    seen: list[int] = []
    hook = fresh_model.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_is_each_of_its_videos_alone(fresh_model, sampler, guidance):
    request = _request(sampler=sampler, guidance_scale=guidance, num_inference_steps=3, negative_prompt="a fox")
    _same(_last(fresh_model, request), _each(fresh_model, request))


def test_noise_is_each_seeds_own_to_the_bit(fresh_model):
    for frames in (3, 9):
        request = _request(num_frames=frames, context_length=4).resolved(fresh_model.facts)
        alone = [initial_noise(fresh_model, single) for single in request.singles()]
        assert torch.equal(initial_noise(fresh_model, request), torch.cat(alone))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "condition",
    [
        Condition(image=clip(7)[0]),
        Condition(controls=(Control("edge", clip(7)), Control("pose", clip(7), 0.5))),
        Condition(video=clip(7)),
    ],
    ids=["picture", "layouts", "video"],
)
def test_what_steers_steers_every_video_and_window(steered, guidance, condition):
    """Windows of 4 frames that share one: each video's own follow their own part of a layout."""
    length = {"num_frames": 7, "context_length": 4, "context_overlap": 1}
    request = _request(num_videos_per_prompt=2, guidance_scale=guidance, strength=0.9, **length)
    made = _last(steered, request, condition=condition)
    _same(made, _each(steered, request, condition=condition))
    assert (made - _last(steered, request, condition=Condition())).abs().max() > 0.01


def test_windows_of_several_videos_may_be_asked_together(steered, monkeypatch):
    request = _request(num_videos_per_prompt=2, num_frames=7, context_length=4, context_overlap=1, guidance_scale=3.0)
    condition = Condition(controls=(Control("edge", clip(7)), Control("pose", clip(7))))
    alone = _each(steered, request, condition=condition)
    monkeypatch.setattr(sampling, "_batch", lambda *_: 2)
    _same(_last(steered, request, condition=condition), alone)


def test_given_latents_are_those_of_all_or_of_each(fresh_model):
    request = _request(num_videos_per_prompt=2, num_inference_steps=1)
    noise = initial_noise(fresh_model, request.resolved(fresh_model.facts))
    _same(_last(fresh_model, request, latents=noise), _last(fresh_model, request))
    both = _last(fresh_model, request, latents=noise[1:])
    torch.testing.assert_close(both, both[1:].expand(2, -1, -1, -1, -1), rtol=1e-4, atol=1e-4)


# How many at a time


def test_as_many_as_the_device_evaluates_at_best(fresh_model, asked, monkeypatch):
    monkeypatch.setattr(sampling, "CPU_CELLS", 4 * 2 * 8 * 8)  # of four such videos
    seeds = [draft.request.seed for draft in drafts(fresh_model, _request(num_videos_per_prompt=9))]
    assert seeds == list(range(5, 14))
    assert asked == [4, 4, 4, 4, 1, 1]
    asked.clear()
    list(drafts(fresh_model, _request(num_frames=9, context_length=4, context_overlap=0)))  # two fit, in windows
    assert asked == [2] * 6 + [1] * 6
    asked.clear()
    list(drafts(fresh_model, _request(num_frames=16)))  # more than fit, alone
    assert asked == [1] * 6


def test_no_more_than_free_memory_holds(fresh_model, monkeypatch):
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    monkeypatch.setattr(memory, "needed", lambda *_: 10)
    for free, most in ((9, 1), (10, 1), (25, 2), (1000, 3)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.at_a_time(fresh_model, _request()) == most


def test_fewer_at_a_time_where_memory_does_not_suffice(fresh_model, asked, monkeypatch):
    """A network with room for two: five at a time, then two, the next ones too; every video is what it was."""
    expected = torch.cat([draft.latents for draft in drafts(fresh_model, _request(num_videos_per_prompt=5))])
    asked.clear()
    forward = fresh_model.unet.forward

    def short(x, *rest, **options):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(x, *rest, **options)

    monkeypatch.setattr(fresh_model.unet, "forward", short)
    made = list(drafts(fresh_model, _request(num_videos_per_prompt=5)))
    assert asked == [5, 2, 2, 2, 2, 1, 1]
    assert [draft.request.seed for draft in made] == [5, 6, 7, 8, 9]
    _same(torch.cat([draft.latents for draft in made]), expected)


def test_networks_wait_on_the_cpu_only_where_one_video_alone_does_not_fit(fresh_model, monkeypatch):
    model, turns = replace(fresh_model), []
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**15)
    forward = fresh_model.unet.forward

    def short(x, *rest, **options):
        turns.append((len(x), model.runs_on is not None))
        if len(x) > 1 or model.runs_on is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(x, *rest, **options)

    monkeypatch.setattr(fresh_model.unet, "forward", short)
    assert len(sample(model, _request())) == 3
    assert turns == [(3, False), (1, False), *[(1, True)] * 6]


# What is told, and when


def test_every_step_shows_all_videos_of_a_batch(fresh_model, monkeypatch):
    monkeypatch.setattr(sampling, "CPU_CELLS", 2 * 2 * 8 * 8)
    shown = []
    made = list(drafts(fresh_model, _request(), progress=shown.append))
    assert [(preview.step, preview.total, len(preview.latents)) for preview in shown] == [
        (1, 2, 2),
        (2, 2, 2),
        (1, 2, 1),
        (2, 2, 1),
    ]
    assert torch.equal(torch.cat([draft.latents for draft in made]), torch.cat([p.latents for p in shown[1::2]]))


def test_seconds_are_shares_and_evaluations_each_videos_own(fresh_model):
    began = time.perf_counter()
    made = list(drafts(fresh_model, _request()))
    passed = time.perf_counter() - began
    assert len({draft.seconds["denoise"] for draft in made}) == 1
    assert 0.3 * passed < sum(draft.seconds["denoise"] for draft in made) <= passed
    assert [draft.evaluations for draft in made] == [2, 2, 2]


def test_a_batch_is_denoised_when_its_first_video_is_wanted(fresh_model, asked, monkeypatch):
    """Who stops after two videos has paid for no third batch."""
    monkeypatch.setattr(sampling, "CPU_CELLS", 2 * 2 * 8 * 8)
    with closing(drafts(fresh_model, _request(num_videos_per_prompt=6))) as coming:
        assert not asked
        assert len(list(islice(coming, 2))) == 2
        assert asked == [2, 2]
        next(coming)
        assert asked == [2] * 4
