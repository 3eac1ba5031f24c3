"""What a benchmark says, not how fast it is."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from animatelcm import decoding
from animatelcm.bench import inference
from animatelcm.bench.inference import Case
from animatelcm.bench.timing import Memory, interleaved, peak_memory
from animatelcm.cli import main
from animatelcm.decoding import Draft

SMALL = Case(steps=1, frames=2, size=32)


@pytest.fixture(scope="module")
def model():
    return inference.subject("emoji")


@pytest.fixture(scope="module")
def report(model):
    return inference.compare(model, SMALL, rounds=1)


def test_the_command_prints_one_object_that_begins_with_the_ratio(capsys):
    main(["bench", "--steps", "1", "--frames", "2", "--size", "32", "--rounds", "1", "--device", "cpu", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert next(iter(shown)) == "denoise_speedup_vs_diffusers"
    assert {"torch", "diffusers", "cpu", "commit", "date"} <= shown["machine"].keys()


def test_several_clips_are_as_many_for_both(model):
    case = Case(steps=1, frames=2, size=32, batch=2)
    pipe = inference.peers.pipeline(model)
    ours, theirs = inference.denoised(model, case), inference.their_latents(pipe, model, case)
    assert sum(len(part) for part in ours) == len(theirs) == 2
    assert all(part.shape[1:] == theirs.shape[1:] for part in ours)


def test_ratios_are_of_the_medians(report):
    assert list(report["seconds"]) == ["denoise", "decode", "prompt_to_frames", "prompt_to_file"]
    for phase in report["seconds"]:
        seconds = report["seconds"][phase]
        ratio = seconds["diffusers"]["median"] / seconds["ours"]["median"]
        assert report[f"{phase}_speedup_vs_diffusers"] == pytest.approx(ratio)


def test_both_networks_compute_the_same(report):
    assert report["differences"]["network"] < 1e-4


def test_both_decoders_draw_the_same(report):
    assert report["differences"]["decoder"] <= 1


def test_a_wrong_weight_would_be_told(model):
    pipe = inference.peers.pipeline(model)
    pipe.unet.conv_in.weight.data.mul_(1.1)
    assert inference.network_difference(model, pipe) > 1e-3


def test_flops_grow_with_steps_guidance_and_batch(model):
    once = inference.flops(model, SMALL)
    assert inference.flops(model, Case(steps=3, frames=2, size=32))["denoise"] == 3 * once["denoise"]
    twice = inference.flops(model, Case(steps=1, frames=2, size=32, batch=2))
    assert twice == {name: 2 * value for name, value in once.items()}
    guided = inference.flops(model, Case(steps=1, frames=2, size=32, guidance=1.5))
    assert guided["denoise"] == pytest.approx(2 * once["denoise"])


def test_flops_of_a_convolution_are_those_of_its_formula(model):
    """The decoder's last layer alone: 2 x 9 x channels in x channels out x pixels x frames."""
    config = model.vae.config
    whole, wider = (inference.flops(model, Case(steps=1, frames=frames, size=32))["decode"] for frames in (1, 3))
    assert wider == 3 * whole
    assert whole > 2 * 9 * config.block_out_channels[0] * 3 * 32 * 32


def test_the_table_names_every_phase_and_rival(report):
    table = inference.table(report)
    for word in ("denoise", "decode", "prompt_to_frames", "prompt_to_file", "ours", "diffusers", "of machine"):
        assert word in table
    for name, held in report["process_bytes"].items():
        assert f"{name} {report['weights_bytes'][name] / 2**20:.0f} + " in table
        assert f"({held / 2**20:.0f} held)" in table
    assert len(table.splitlines()) == 4 + 8


def test_shares_of_the_machine_are_work_over_time_and_peak(report):
    best = max(report["machine_flops_per_second"].values())
    expected = report["flops"]["denoise"] / report["seconds"]["denoise"]["ours"]["median"] / best
    assert report["share_of_machine"]["denoise"]["ours"] == pytest.approx(expected)
    assert 0 < expected < 1.05


def test_weights_stand_apart_from_what_a_call_takes(model, report):
    parameters = sum(p.numel() for network in (model.unet, model.vae, model.text_encoder) for p in network.parameters())
    for name, loaded in report["weights_bytes"].items():
        assert 4 * parameters <= loaded < 4.2 * parameters, name  # and buffers
        assert report["process_bytes"][name] == loaded + report["peak_bytes_prompt_to_frames"][name]  # on a CPU
        assert report["peak_bytes_prompt_to_frames"][name] >= 0.9 * report["peak_bytes_denoise"][name] > 0


def test_weights_that_are_shared_or_lie_in_one_piece_count_once():
    joined, tied, alone = torch.zeros(3, 8), nn.Linear(4, 4, bias=False), nn.Linear(2, 2)
    parts = nn.ParameterList([nn.Parameter(part) for part in joined])
    assert inference.weights([parts, nn.ModuleList([tied, tied]), tied, alone]) == 4 * (24 + 16 + 6)


class _Graphs:
    """Stands for the graphs that a model has recorded; one is there already."""

    def __init__(self) -> None:
        self.known = 1

    def forget(self):
        self.known = 0


@pytest.fixture(scope="module")
def watched(model):
    """A report with a rival that would be compiled, the graphs that are there each time that memory is measured,
    whether Dynamo may go on uncompiled each time that the rival is called, and the warm-up of each phase."""
    graphs, found, lax, warm = _Graphs(), [], [], []

    def timed(calls, *, rounds, warmup):
        warm.append(warmup)
        return interleaved(calls, rounds=rounds)

    def memory_of(call, device):
        found.append(graphs.known)
        graphs.known += 1
        assert device == model.device
        return Memory(5, 7)

    def pipeline(model):
        pipe = inference.peers.pipeline(model)
        said = torch._dynamo.config
        pipe.unet.register_forward_pre_hook(lambda *_: lax.append(not said.fail_on_recompile_limit_hit))
        return pipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "memory_of", memory_of)
        patch.setattr(inference, "interleaved", timed)
        patch.setattr(inference, "warmup", lambda _: 7)
        patch.setattr(inference, "compiled_pipeline", pipeline)
        patch.setattr(model, "_graphs", graphs)
        return inference.compare(model, SMALL, rounds=1, compiled=True), found, lax, warm


def test_memory_is_measured_without_the_graphs_of_earlier_calls(watched):
    """A replayed graph allocates nothing, and one that is there is held beside whatever else is measured."""
    report, found, *_ = watched
    assert found == [0] * 6
    assert set(report["peak_bytes_denoise"].values()) == set(report["peak_bytes_prompt_to_frames"].values()) == {5}
    assert report["process_bytes"] == {name: loaded + 7 for name, loaded in report["weights_bytes"].items()}


def test_a_compiled_rival_is_timed_and_may_not_go_on_uncompiled(watched):
    report, _, lax, _ = watched
    assert lax
    assert not any(lax)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    sides = {"ours", "diffusers", "diffusers_compiled"}
    assert [set(timings) == sides for timings in report["seconds"].values()] == [True, False, True, True]
    assert report["denoise_speedup_vs_diffusers_compiled"] > 0
    assert report["process_bytes"].keys() == sides


def test_each_phase_is_warmed_up_as_the_device_asks(watched):
    assert watched[-1] == [7] * 4


def test_a_gpu_records_before_it_is_timed_and_while_its_memory_is_measured(monkeypatch):
    """At the second evaluation of a kind: of a sampler of one step, in its second call."""
    called, on_gpu = [], SimpleNamespace(device=torch.device("cuda"), forget_graphs=list)
    monkeypatch.setattr(inference, "memory_of", lambda call, _: call())
    inference.fresh_memory(on_gpu, lambda: called.append(1))
    assert len(called) == inference.warmup(on_gpu) == 2


def test_ours_is_decoded_as_it_is_shipped(model, monkeypatch):
    drawn, frames = [], decoding.frames
    monkeypatch.setattr(decoding, "frames", lambda m, draft: drawn.append(draft) or frames(m, draft))
    case = replace(SMALL, batch=2)
    made = list(inference.drafts(model, case.request(model)))
    ours, theirs = (call() for call in inference._decoders(model, inference.peers.pipeline(model), made).values())
    assert drawn == made
    assert np.abs(np.stack(ours).astype(int) - theirs).max() <= 1
    assert all(np.array_equal(*pair) for pair in zip(inference.to_frames(model, case), ours, strict=True))
    assert len(drawn) == 4


def test_frames_for_a_file_are_let_go(model, monkeypatch):
    def peaks(frames):
        case = Case(frames=frames, size=32)
        latents = torch.zeros(1, model.vae.config.latent_channels, frames, 4, 4)
        draft = Draft(latents=latents, request=case.request(model), model="", fps=8, evaluations=0)
        monkeypatch.setattr(inference, "drafts", lambda *_: [draft])
        calls = (lambda: inference.in_chunks(model, case), lambda: list(decoding.frames(model, draft)))
        return map(peak_memory, calls)

    frame = 32 * 32 * 3
    (short, _), (long, kept) = peaks(48), peaks(80)
    assert long < short + frame
    assert kept > long + 16 * frame


def test_a_network_is_compiled_anew_for_each_case(model, monkeypatch):
    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda network, **options: done.append(options) or network)
    inference.compiled_pipeline(model)
    assert done == ["reset", {"dynamic": False}]


@pytest.mark.parametrize(("wanted", "how"), [(True, "auto"), (False, "full")])
def test_too_many_compilations_are_an_error(model, wanted, how):
    network = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled = replace(model, compile=how)
    network(torch.zeros(1))
    with inference.compiled_or_failing(compiled, wanted=wanted), torch._dynamo.config.patch(recompile_limit=1):
        network(torch.zeros(1))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            network(torch.zeros(2))


def test_what_memory_does_not_suffice_for_is_none_and_other_errors_are_errors():
    def failing(error):
        raise error

    assert inference.fitting(lambda: 3) == 3
    for error in (torch.OutOfMemoryError("CUDA out of memory."), ValueError("cuda has too little memory to denoise")):
        assert inference.fitting(lambda error=error: failing(error)) is None
    for error in (RuntimeError("an illegal memory access was encountered"), ValueError("a file is missing")):
        with pytest.raises(type(error), match=str(error)):
            inference.fitting(lambda error=error: failing(error))


# What steers


@pytest.fixture(scope="module")
def steered():
    return inference.subject("emoji", adapters=True)


def test_adapters_are_measured_beside_text_alone_in_one_run(steered, capsys):
    case = replace(SMALL, steer=("i2v", "edge"))
    seen = []
    hook = steered.adapters["edge"].register_forward_hook(lambda *_: seen.append("edge"))
    report = inference.compare(steered, case, rounds=2)
    hook.remove()
    assert len(seen) == 1 + 2 + 1  # a first call, two rounds, memory
    timings = report["seconds"]["denoise"]
    assert list(timings) == ["text", "i2v", "edge"]
    assert next(iter(report)) == "denoise_times_text_i2v"
    assert report["denoise_times_text_edge"] == timings["edge"]["median"] / timings["text"]["median"]
    assert report["weights_bytes"]["text"] == inference.weights(inference.subject("emoji").networks.values())
    for name in case.steer:
        assert report["weights_bytes"][name] == inference.weights([steered.adapters[name]]) > 0
        assert report["peak_bytes_denoise"][name] > report["peak_bytes_denoise"]["text"] > 0
    table = inference.table(json.loads(json.dumps(report)))
    assert [line.split()[:3:2] for line in table.splitlines()[3:]] == [["text", "i2v"], ["text", "edge"]]


def test_adapters_change_what_is_denoised(steered):
    plain = inference.denoised(steered, SMALL)[0]
    for name in ("i2v", "edge"):
        again = [inference.denoised(steered, SMALL, inference.condition(name, SMALL))[0] for _ in range(2)]
        assert torch.equal(*again)
        assert not torch.allclose(again[0], plain, atol=1e-2)


def test_the_command_measures_adapters(capsys):
    small = ["--steps", "1", "--frames", "2", "--size", "32", "--rounds", "1", "--device", "cpu"]
    main(["bench", *small, "--steer", "edge", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["case"]["steer"] == ["edge"]
    assert shown["seconds"]["denoise"].keys() == {"text", "edge"}


def test_an_adapter_that_is_not_there_and_rivals_beside_adapters_are_refused(steered):
    with pytest.raises(ValueError, match="no adapter 'depth' to steer with; its adapters are: edge, i2v"):
        inference.compare(steered, replace(SMALL, steer=("edge", "depth")), rounds=1)
    with pytest.raises(ValueError, match="leave out compiled"):
        inference.compare(steered, replace(SMALL, steer=("edge",)), rounds=1, compiled=True)


def test_random_adapters_fit_the_model_that_they_stand_beside(model):
    beside = replace(model, adapters={name: inference.random_adapter(name, model) for name in inference.RANDOM})
    report = inference.costs(beside, replace(SMALL, steer=tuple(inference.RANDOM)), rounds=1)
    assert report["seconds"]["denoise"].keys() == {"text", "i2v", "edge", "pose"}
