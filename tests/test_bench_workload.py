"""A request's work, weights and memory are counted whole, and nothing but a lack of memory passes for one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from animatelcm import decoding
from animatelcm.bench import workload
from animatelcm.bench.timing import peak_memory
from animatelcm.bench.workload import Case
from animatelcm.decoding import Draft

SMALL = Case(steps=1, frames=2, size=32)


@pytest.fixture(scope="module")
def model():
    return workload.subject("emoji")


def test_flops_grow_with_steps_guidance_and_batch(model):
    once = workload.flops(model, SMALL)
    assert workload.flops(model, Case(steps=3, frames=2, size=32))["denoise"] == 3 * once["denoise"]
    twice = workload.flops(model, Case(steps=1, frames=2, size=32, batch=2))
    assert twice == {name: 2 * value for name, value in once.items()}
    guided = workload.flops(model, Case(steps=1, frames=2, size=32, guidance=1.5))
    assert guided["denoise"] == pytest.approx(2 * once["denoise"])


def test_flops_of_a_convolution_are_those_of_its_formula(model):
    """The decoder's last layer alone: 2 x 9 x channels in x channels out x pixels x frames."""
    config = model.vae.config
    whole, wider = (workload.flops(model, Case(steps=1, frames=frames, size=32))["decode"] for frames in (1, 3))
    assert wider == 3 * whole
    assert whole > 2 * 9 * config.block_out_channels[0] * 3 * 32 * 32


def test_weights_that_are_shared_or_lie_in_one_piece_count_once():
    joined, tied, alone = torch.zeros(3, 8), nn.Linear(4, 4, bias=False), nn.Linear(2, 2)
    parts = nn.ParameterList([nn.Parameter(part) for part in joined])
    assert workload.weights([parts, nn.ModuleList([tied, tied]), tied, alone]) == 4 * (24 + 16 + 6)


def test_a_gpu_records_before_it_is_timed_and_while_its_memory_is_measured(monkeypatch):
    """At the second evaluation of a kind: of a sampler of one step, in its second call."""
    called, on_gpu = [], SimpleNamespace(device=torch.device("cuda"), forget_graphs=list)
    monkeypatch.setattr(workload, "memory_of", lambda call, _: call())
    workload.fresh_memory(on_gpu, lambda: called.append(1))
    assert len(called) == workload.warmup(on_gpu) == 2


def test_frames_for_a_file_are_let_go(model, monkeypatch):
    def peaks(frames):
        case = Case(frames=frames, size=32)
        latents = torch.zeros(1, model.vae.config.latent_channels, frames, 4, 4)
        draft = Draft(latents=latents, request=case.request(model), model="", fps=8, evaluations=0)
        monkeypatch.setattr(workload, "drafts", lambda *_: [draft])
        calls = (lambda: workload.in_chunks(model, case), lambda: list(decoding.frames(model, draft)))
        return map(peak_memory, calls)

    frame = 32 * 32 * 3
    (short, _), (long, kept) = peaks(48), peaks(80)
    assert long < short + frame
    assert kept > long + 16 * frame


@pytest.mark.parametrize(("wanted", "how"), [(True, "auto"), (False, "full")])
def test_too_many_compilations_are_an_error(model, wanted, how):
    network = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled = replace(model, compile=how)
    network(torch.zeros(1))
    with workload.compiled_or_failing(compiled, wanted=wanted), torch._dynamo.config.patch(recompile_limit=1):
        network(torch.zeros(1))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            network(torch.zeros(2))


def test_what_memory_does_not_suffice_for_is_none_and_other_errors_are_errors():
    def failing(error):
        raise error

    assert workload.fitting(lambda: 3) == 3
    for error in (torch.OutOfMemoryError("CUDA out of memory."), ValueError("cuda has too little memory to denoise")):
        assert workload.fitting(lambda error=error: failing(error)) is None
    for error in (RuntimeError("an illegal memory access was encountered"), ValueError("a file is missing")):
        with pytest.raises(type(error), match=str(error)):
            workload.fitting(lambda error=error: failing(error))
