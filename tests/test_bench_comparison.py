"""What a benchmark says, not how fast it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from animatelcm import decoding
from animatelcm.bench import comparison, peers, workload
from animatelcm.bench.comparison import compare
from animatelcm.bench.tables import table
from animatelcm.bench.timing import Memory, interleaved
from animatelcm.bench.workload import Case
from animatelcm.cli import main
from animatelcm.sampling import drafts

SMALL = Case(steps=1, frames=2, size=32)


@pytest.fixture(scope="module")
def model():
    return workload.subject("emoji")


@pytest.fixture(scope="module")
def report(model):
    return compare(model, SMALL, rounds=1)


def test_the_command_prints_one_object_that_begins_with_the_ratio(capsys):
    main(["bench", "--steps", "1", "--frames", "2", "--size", "32", "--rounds", "1", "--device", "cpu", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert next(iter(shown)) == "denoise_speedup_vs_diffusers"
    assert {"torch", "diffusers", "cpu", "commit", "date"} <= shown["machine"].keys()


def test_several_clips_are_as_many_for_both(model):
    case = Case(steps=1, frames=2, size=32, batch=2)
    pipe = peers.pipeline(model)
    ours, theirs = workload.denoised(model, case), peers.denoised(pipe, model, case)
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
    pipe = peers.pipeline(model)
    pipe.unet.conv_in.weight.data.mul_(1.1)
    assert comparison.network_difference(model, pipe) > 1e-3


def test_the_table_names_every_phase_and_rival(report):
    shown = table(report)
    for word in ("denoise", "decode", "prompt_to_frames", "prompt_to_file", "ours", "diffusers", "of machine"):
        assert word in shown
    for name, held in report["process_bytes"].items():
        assert f"{name} {report['weights_bytes'][name] / 2**20:.0f} + " in shown
        assert f"({held / 2**20:.0f} held)" in shown
    assert len(shown.splitlines()) == 4 + 8


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

    def compiled(model):
        pipe = peers.pipeline(model)
        said = torch._dynamo.config
        pipe.unet.register_forward_pre_hook(lambda *_: lax.append(not said.fail_on_recompile_limit_hit))
        return pipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "memory_of", memory_of)
        patch.setattr(comparison, "interleaved", timed)
        patch.setattr(workload, "warmup", lambda _: 7)
        patch.setattr(peers, "compiled_pipeline", compiled)
        patch.setattr(model, "_graphs", graphs)
        return compare(model, SMALL, rounds=1, compiled=True), found, lax, warm


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


def test_ours_is_decoded_as_it_is_shipped(model, monkeypatch):
    drawn, frames = [], decoding.frames
    monkeypatch.setattr(decoding, "frames", lambda m, draft: drawn.append(draft) or frames(m, draft))
    case = replace(SMALL, batch=2)
    made = list(drafts(model, case.request(model)))
    ours, theirs = (call() for call in comparison._decoders(model, peers.pipeline(model), made).values())
    assert drawn == made
    assert np.abs(np.stack(ours).astype(int) - theirs).max() <= 1
    assert all(np.array_equal(*pair) for pair in zip(workload.to_frames(model, case), ours, strict=True))
    assert len(drawn) == 4
