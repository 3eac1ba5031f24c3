"""Training in float16: a step that overflows moves nothing, and a run goes on with the scale that it left.

The scaler is torch's own, on the CPU; there autocast knows float16 too, slowly.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.amp import GradScaler

from animatelcm import processes, recipes, stages, training
from animatelcm.rng import generator
from animatelcm.sources import open_source
from animatelcm.training import learning_rate, train

GROWS = {"growth_interval": 2, "growth_factor": 4.0}
"""Twice as long as a scale is halved after an overflow, it is four times as large again."""


def _config(model, out, **changes):
    config = replace(recipes.image_lcm_emoji(), model=str(model), out=out, steps=6, batch_size=1, warmup_steps=4)
    config = replace(config, log_every=1, save_every=1000, sample_prompts=(), **changes)
    return replace(config, data=replace(config.data, length=8, cache=False))


@pytest.fixture
def scaled(monkeypatch):
    """Runs whose accelerator believes to be in float16, with a scaler that begins at 2^10."""
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))
    ordinary = processes.accelerator

    def with_scaler(config):
        found = ordinary(config)
        found.scaler, found.native_amp = GradScaler("cpu", init_scale=2.0**10, **GROWS), True
        found.prepare_model = lambda model, **_: model  # no autocast
        return found

    monkeypatch.setattr(processes, "accelerator", with_scaler)


def _watched(monkeypatch, broken=()):
    """The state after each step, in numbers; of steps in ``broken`` one gradient is infinite."""
    seen, moved = [], training.update

    def update(config, accelerator, optimizer, state):
        if state.step in broken:
            next(p.grad for p in state.parameters.values() if p.grad is not None).fill_(torch.inf)
        before = {name: value.detach().clone() for name, value in state.parameters.items()}
        averages = [{name: value.clone() for name, value in ema.shadows.items()} for ema in (state.ema, state.target)]
        norm = moved(config, accelerator, optimizer, state)
        still = all(torch.equal(before[name], value) for name, value in state.parameters.items())
        kept = all(
            torch.equal(old[name], ema.shadows[name])
            for old, ema in zip(averages, (state.ema, state.target), strict=True)
            for name in old
        )
        rate = optimizer.param_groups[0]["lr"]
        seen.append({"still": still, "kept": kept, "rate": rate, "scale": state.scale, "norm": float(norm)})
        return norm

    monkeypatch.setattr(training, "update", update)
    return seen


def _run(config, **options):
    train(config, **options)
    return {
        name: load_file(_last(config) / f"{name}.safetensors") for name in ("weights", "ema", "target", "optimizer")
    }


def _last(config):
    return sorted((config.folder / "checkpoints").iterdir())[-1]


def test_an_overflow_moves_nothing_and_halves_the_scale(narrow_folder, tmp_path, monkeypatch, scaled):
    shares, roles = [], stages.consistency_roles
    monkeypatch.setattr(stages, "consistency_roles", lambda *a, **k: shares.append(k["step"]) or roles(*a, **k))
    seen, config = _watched(monkeypatch, broken=(1, 2)), _config(narrow_folder, tmp_path)
    train(config)
    assert [each["still"] for each in seen] == [False, True, True, False, False, False]
    assert [each["kept"] for each in seen] == [each["still"] for each in seen]
    assert [each["scale"] for each in seen] == [2.0**e for e in (10, 9, 8, 8, 10, 10)]
    assert [each["rate"] for each in seen] == [learning_rate(config, updates) for updates in (0, 1, 1, 1, 2, 3)]
    assert shares == [0, 1, 1, 1, 2, 3]  # of a frozen LoRA that the target has taken in


def test_the_scale_leaves_no_trace_in_what_is_learned(narrow_folder, tmp_path, monkeypatch, scaled):
    """Powers of two are exact: weights, moments and norms are those of a run without a scaler."""
    seen = _watched(monkeypatch)
    with_scale = _run(_config(narrow_folder, tmp_path, name="scaled", steps=2))
    monkeypatch.undo()
    plain_seen = _watched(monkeypatch)
    plain = _run(_config(narrow_folder, tmp_path, name="plain", steps=2))
    for part, tensors in plain.items():
        assert all(torch.equal(with_scale[part][name], value) for name, value in tensors.items()), part
    assert [each["norm"] for each in seen] == [each["norm"] for each in plain_seen]


def test_a_resumed_run_has_the_scale_and_the_count_of_overflows(narrow_folder, tmp_path, monkeypatch, scaled):
    _watched(monkeypatch, broken=(1, 4))
    whole, parts = _config(narrow_folder, tmp_path, name="whole"), _config(narrow_folder, tmp_path, name="parts")
    wanted = _run(whole)
    train(parts, stop_after=3)
    found = _run(parts, resume=True)
    for part, tensors in wanted.items():
        assert all(torch.equal(found[part][name], value) for name, value in tensors.items()), part
    said, goes_on = (json.loads((_last(config) / "manifest.json").read_text()) for config in (whole, parts))
    assert said["scaler"] == goes_on["scaler"]
    assert said["skipped"] == goes_on["skipped"] == 2


def test_gradients_that_no_scale_makes_finite_end_the_run(narrow_folder, tmp_path, monkeypatch, scaled):
    seen = _watched(monkeypatch, broken=range(40))
    monkeypatch.setattr(training, "LEAST_SCALE", 2.0**7)
    with pytest.raises(ValueError, match=r"step 4: gradients are not finite in fp16 .*bf16"):
        train(_config(narrow_folder, tmp_path, steps=40))
    assert all(each["still"] for each in seen)


def test_float16_keeps_the_gradient_that_bfloat16_drowns():
    """Student and target differ by less than what bfloat16 makes of either, where the noise is strongest."""
    config = _config("emoji", Path(), batch_size=4, gradient_checkpointing=True, timestep_shift=1000.0)
    model = stages.starting_model(config)
    state = training._fresh_state(config, model)
    objective, batch = stages.objective(config, model, state), open_source(config, model).batches(range(4))
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaler = GradScaler("cpu", enabled=dtype == torch.float16)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective(batch, partial(generator, 0, 0, 0)).loss.mean()
        scaler.scale(loss).backward()
        scaler.unscale_(state.optimizer)
        gradients[dtype] = torch.cat([value.grad.flatten() for value in state.parameters.values()])
        state.optimizer.zero_grad(set_to_none=True)
    half, brain = (torch.cosine_similarity(gradients[torch.float32], gradients[d], 0) for d in list(gradients)[:0:-1])
    assert half > 0.9, half
    assert 1 - brain > 4 * (1 - half), (half, brain)  # it rounds eight times as coarsely


def test_float16_is_refused_without_a_gpu(narrow_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'"fp16" needs a GPU .* "bf16" or "no"'):
        train(_config(narrow_folder, tmp_path, mixed_precision="fp16"))
    assert not list(tmp_path.iterdir())
