"""What a benchmark says, not how fast it is."""

from __future__ import annotations

import json

import pytest

from animatelcm.bench import inference
from animatelcm.bench.inference import Case
from animatelcm.cli import main

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
    for phase in ("denoise", "decode", "prompt_to_file"):
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
    for word in ("denoise", "decode", "prompt_to_file", "ours", "diffusers", "of machine"):
        assert word in table
    assert len(table.splitlines()) == 3 + 6


def test_shares_of_the_machine_are_work_over_time_and_peak(report):
    best = max(report["machine_flops_per_second"].values())
    expected = report["flops"]["denoise"] / report["seconds"]["denoise"]["ours"]["median"] / best
    assert report["share_of_machine"]["denoise"]["ours"] == pytest.approx(expected)
    assert 0 < expected < 1.05
