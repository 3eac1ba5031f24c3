"""What only a GPU shows: memory, streams, graphs, and numbers in its own order. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from animatelcm import decoding, recipes, stages, training
from animatelcm.bundle import load
from animatelcm.data.batches import ClipBatch
from animatelcm.decoding import Draft
from animatelcm.evaluate.likeness import psnr
from animatelcm.fusion import fuse
from animatelcm.model import VideoModel
from animatelcm.model_source import Compile
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.sampling import sample

DEVICE = torch.device("cuda")
REQUEST = SampleRequest(prompt="a cartoon fox bouncing on a blue background", seed=3)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def embedded(dtype: torch.dtype = torch.float32, compile: Compile = "auto") -> VideoModel:  # noqa: A002 - the field's name
    return replace(load("emoji", device=DEVICE, dtype=dtype), compile=compile)


def drawn(model: VideoModel, **options) -> np.ndarray:
    return sample(model, REQUEST, **options)[0].frames


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("recipe", "frames"), [(recipes.base_emoji, 1), (recipes.teacher_emoji, 4)])
def test_a_step_trains_all_that_it_should(recipe, frames) -> None:
    config = replace(recipe(), model="new")
    model = stages.starting_model(config).to(DEVICE)
    state = training._fresh_state(config, model)
    batch = ClipBatch(captions=("a parrot", "a red fox"), latents=noise(2, 16, frames, 8, 8))
    stages.objective(config, model, state)(batch, partial(generator, 0, 0, 0)).loss.mean().backward()
    trained = {name: value.grad for name, value in state.parameters.items()}
    assert trained
    assert not [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-4
    state.optimizer.step()
    assert all(value.isfinite().all() for value in state.parameters.values())


def test_a_step_of_distillation_is_made_without_waiting_for_it() -> None:
    config = replace(recipes.video_lcm_emoji(), model="emoji")
    model = stages.starting_model(config).to(DEVICE)
    state = training._fresh_state(config, model)
    step, batch = stages.objective(config, model, state), ClipBatch(captions=("a fox",), latents=noise(1, 16, 4, 8, 8))
    step(batch, partial(generator, 0, 0, 0))  # tables go there once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, partial(generator, 0, 1, 0)).loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_float32_is_as_exact_as_on_a_cpu() -> None:
    model, given = embedded(), (noise(1, 16, 4, 8, 8), torch.tensor([500]))
    text = model.embed(["a parrot"])
    ours = model.predict(*(part.to(DEVICE) for part in given), text).cpu()
    theirs = model.to("cpu").predict(*given, text.cpu())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_half_precision_in_graphs_draws_the_same() -> None:
    fast = embedded(torch.float16)
    assert psnr(drawn(fast), drawn(embedded(compile="none"))) >= 40
    assert len(fast._graphs) == 1
    assert fast._graphs.forget()


def test_a_sum_of_weights_reaches_graphs() -> None:
    results = []
    for compile in ("auto", "none"):  # noqa: A001
        model = embedded(compile=compile)
        before = drawn(model)
        fuse(model, style=(next(iter(model.styles)), 1.0))
        results.append(drawn(model))
        assert psnr(before, results[-1]) < 40
        assert bool(model._graphs) == (compile == "auto")
    assert psnr(*results) >= 50


def test_networks_that_take_turns_draw_the_same() -> None:
    model = embedded()
    plain = drawn(model, offload="none")
    for offload in ("model", "none"):
        assert psnr(drawn(model, offload=offload), plain) >= 50
    assert all(p.device.type == DEVICE.type for network in model.networks.values() for p in network.parameters())


@torch.inference_mode()
def test_a_stream_of_its_own_decodes_the_same() -> None:
    model, latents = embedded(torch.float16), noise(1, 16, 22, 8, 8).to(DEVICE)
    request = replace(REQUEST, num_frames=22, width=64, height=64).resolved(model.facts)
    draft = Draft(latents=latents, request=request, model="emoji", fps=8.0, evaluations=4)
    frames, expected = decoding.whole(model, draft).frames, model.decode(latents)[0]
    assert np.abs(frames.astype(int) - expected).max() <= 2


def test_one_clip_more_takes_no_more_memory() -> None:
    model = embedded(torch.float16)
    for _ in range(2):  # what the first one had is given back before its graph is recorded
        drawn(model)
    before = torch.cuda.memory_reserved()
    drawn(model)
    assert torch.cuda.memory_reserved() <= before
