"""The benchmark of training compares equal work: three whole networks, written plainly, give our loss and gradients."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import training as benchmark

import animatelcm.training
from animatelcm import schedule
from animatelcm.data.batches import ClipBatch
from animatelcm.ema import Ema

TINY = benchmark.Shape(
    widths=(32, 64), text_width=48, vae_widths=(32,) * 4, rank=4, frames=4, side=64, layers=1, text_layers=1
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return str(benchmark.write_random(TINY, tmp_path_factory.mktemp("random") / "model"))


def _case(place, stage, **changes):
    options = benchmark.Options(size="sd15", batch_size=2, gradient_checkpointing=False, mixed_precision="no")
    case = benchmark.case(options, stage, place, TINY)
    return case._replace(config=replace(case.config, learning_rate=1e-3, **changes))


class _Ema(Ema):
    """An average in the precision of what is averaged."""

    def __init__(self, decay, named):
        super().__init__(decay, named)
        self.shadows = {name: value.detach().clone() for name, value in named.items()}


@pytest.fixture
def in_float64(monkeypatch):
    """Also what asks for float32, so that guidance and the noisiest timestep do not multiply what is rounded."""
    schedule._tables.cache_clear()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(animatelcm.training, "Ema", _Ema)
    yield
    schedule._tables.cache_clear()


def _double(model):
    for network in model.networks.values():
        network.double()
    return replace(model, teacher_motion={name: value.double() for name, value in model.teacher_motion.items()})


@pytest.mark.parametrize("stage", ["image", "video", "adapter"])
def test_the_reference_has_our_loss_and_gradients(stage, place, in_float64):
    """For three steps, in which averages take in what was learned, and the LoRA that stage 2 began without."""
    case = _case(place, stage)
    model = _double(benchmark.starting(case))
    clips = benchmark.batches(case, model)[0]
    ours, theirs = (make(case.config, benchmark.copied(case, model)) for make in benchmark.SIDES.values())
    assert ours.parameters.keys() == theirs.parameters.keys()
    losses = []
    for number in range(3):
        one, other = ours.backward(clips, number), theirs.backward(clips, number)
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
        losses.append(one.item())
        gradients = {name: (value.grad, theirs.parameters[name].grad) for name, value in ours.parameters.items()}
        largest = max(wanted.norm() for _, wanted in gradients.values())
        assert largest > 0
        for got, wanted in gradients.values():
            assert (got - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7 * largest
        for side in (ours, theirs):
            side.update(number)
        with torch.no_grad():  # Adam makes whole steps of gradients that are rounding: begin alike again
            for name, value in theirs.parameters.items():
                value.copy_(ours.parameters[name])
    assert len(set(losses)) == 3


@pytest.mark.parametrize("stage", ["image", "video", "adapter"])
def test_both_sides_train_what_the_recipe_names_and_nothing_else(stage, place):
    case = _case(place, stage)
    model = benchmark.starting(case)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    latents, pixels = benchmark.batches(case, model)
    torch.testing.assert_close(model.encode(pixels.pixels).cpu(), latents.latents, rtol=1e-3, atol=1e-3)
    for make in benchmark.SIDES.values():
        side = make(case.config, benchmark.copied(case, model))
        side.step(pixels, 0)
        assert side.parameters
        assert all(value.grad is None for value in side.parameters.values())
        assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


def test_memory_is_measured_in_a_fresh_process():
    assert benchmark.alone(os.getpid) != os.getpid()


def test_a_report_has_every_figure(monkeypatch, capsys):
    """In this process: fresh ones take seconds to load."""
    monkeypatch.setattr(benchmark, "HALF", TINY)
    monkeypatch.setattr(benchmark, "Shape", lambda: TINY)
    monkeypatch.setattr(benchmark, "alone", lambda call, *arguments: call(*arguments))
    options = benchmark.Options(size="sd15", stages=("video",), steps=1, batch_size=1, mixed_precision="no", json=True)
    benchmark.main(options)
    found = json.loads(capsys.readouterr().out)
    (video,) = found["stages"].values()
    assert found["machine"]["torch"] == torch.__version__
    for side in benchmark.SIDES:
        row = video[side]
        assert row["rounds"] == 1
        assert 0 < row["least"] <= row["median"] <= row["p95"]
        assert row["steps_per_second"] == 1 / row["median"]
        assert row["memory_bytes"] > 4 * video["trainable"]
    assert video["speedup"] == pytest.approx(video["reference"]["median"] / video["ours"]["median"])
    assert 0 < video["memory_ratio"] < 1
    assert video["memory_ratio"] == video["ours"]["memory_bytes"] / video["reference"]["memory_bytes"]
    assert video["ours"]["first_loss"] == pytest.approx(video["reference"]["first_loss"], rel=0.05)
    assert "video" in benchmark.table(found)


def test_parts_of_a_batch_are_all_of_it_and_equal():
    batch = ClipBatch(captions=("a", "b", "c", "d"), latents=torch.arange(8.0).view(4, 2, 1, 1, 1))
    one, two = benchmark.parts(batch, 2)
    assert one.captions + two.captions == batch.captions
    assert torch.equal(torch.cat([one.latents, two.latents]), batch.latents)
    assert len(one.captions) == len(one.latents) == 2
    with pytest.raises(SystemExit, match="choose --accumulation"):
        benchmark.parts(batch, 3)
