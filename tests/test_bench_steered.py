"""Adapters are measured beside text alone, and by what they do to a clip."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from animatelcm.bench import workload
from animatelcm.bench.comparison import compare
from animatelcm.bench.steered import condition, costs
from animatelcm.bench.tables import table
from animatelcm.bench.workload import Case
from animatelcm.cli import main

SMALL = Case(steps=1, frames=2, size=32)


@pytest.fixture(scope="module")
def steered():
    return workload.subject("emoji", adapters=True)


def test_adapters_are_measured_beside_text_alone_in_one_run(steered):
    case = replace(SMALL, steer=("i2v", "edge"))
    seen = []
    hook = steered.adapters["edge"].register_forward_hook(lambda *_: seen.append("edge"))
    report = compare(steered, case, rounds=2)
    hook.remove()
    assert len(seen) == 1 + 2 + 1  # a first call, two rounds, memory
    timings = report["seconds"]["denoise"]
    assert list(timings) == ["text", "i2v", "edge"]
    assert next(iter(report)) == "denoise_times_text_i2v"
    assert report["denoise_times_text_edge"] == timings["edge"]["median"] / timings["text"]["median"]
    assert report["weights_bytes"]["text"] == workload.weights(workload.subject("emoji").networks.values())
    for name in case.steer:
        assert report["weights_bytes"][name] == workload.weights([steered.adapters[name]]) > 0
        assert report["peak_bytes_denoise"][name] > report["peak_bytes_denoise"]["text"] > 0
    shown = table(json.loads(json.dumps(report)))
    assert [line.split()[:3:2] for line in shown.splitlines()[3:]] == [["text", "i2v"], ["text", "edge"]]


def test_adapters_change_what_is_denoised(steered):
    plain = workload.denoised(steered, SMALL)[0]
    for name in ("i2v", "edge"):
        again = [workload.denoised(steered, SMALL, condition(name, SMALL))[0] for _ in range(2)]
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
        compare(steered, replace(SMALL, steer=("edge", "depth")), rounds=1)
    with pytest.raises(ValueError, match="leave out compiled"):
        compare(steered, replace(SMALL, steer=("edge",)), rounds=1, compiled=True)


def test_random_adapters_fit_the_model_that_they_stand_beside():
    model = workload.subject("emoji")
    beside = replace(model, adapters={name: workload.random_adapter(name, model) for name in workload.RANDOM})
    report = costs(beside, replace(SMALL, steer=tuple(workload.RANDOM)), rounds=1)
    assert report["seconds"]["denoise"].keys() == {"text", "i2v", "edge", "pose"}
