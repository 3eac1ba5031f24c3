"""Runs of mixed precision hold what is frozen as autocast would round it; what they leave has it as it was read."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from animatelcm import recipes, stages, training
from animatelcm.bundle import load
from animatelcm.rng import generator
from animatelcm.sources import open_source
from animatelcm.stages import round_frozen, rounded
from animatelcm.training import train

RECIPES = {
    "style": recipes.style_lora_emoji,
    "stage 1": recipes.image_lcm_emoji,
    "stage 2": recipes.video_lcm_emoji,
    "adapter": recipes.t2i_adapter_lora_emoji,
}


def _config(recipe, model, out, **changes):
    config = replace(recipe(), model=str(model), out=out, steps=2, batch_size=2, warmup_steps=1, sample_prompts=())
    config = replace(config, log_every=1, save_every=1000, mixed_precision="bf16", **changes)
    return replace(config, data=replace(config.data, length=4, cache=False))


def _gradients(config, *, rounds, half):
    model = stages.starting_model(config)
    state = training._fresh_state(config, model)
    assert round_frozen(replace(config, mixed_precision="bf16" if rounds else "no"), model) is rounds
    objective, batch = stages.objective(config, model, state), open_source(config, model).batches(range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = objective(batch, partial(generator, 0, 0, 0)).loss.mean()
    loss.backward()
    return torch.cat([value.grad.flatten() for value in state.parameters.values() if value.grad is not None])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_gradients_are_as_near_to_those_of_float32(recipe, narrow_folder, tmp_path):
    config = _config(recipe, narrow_folder, tmp_path)
    exact = _gradients(config, rounds=False, half=False)
    cast = _gradients(config, rounds=False, half=True)
    found = _gradients(config, rounds=True, half=True)
    assert not torch.equal(cast, exact)
    assert (found - exact).norm() < 1.3 * (cast - exact).norm()


def test_all_but_small_layers_is_held_so_and_nothing_that_trains(narrow_folder, tmp_path):
    config = _config(recipes.video_lcm_emoji, narrow_folder, tmp_path)
    model = stages.starting_model(config)
    trains = {name.removeprefix("unet.") for name, _ in stages.named_trainable(model, config)}
    assert round_frozen(config, model)
    for name, parameter in model.unet.named_parameters():
        assert (parameter.dtype == torch.bfloat16) is (rounded(name, parameter) and name not in trains), name
    assert {value.dtype for name, value in model.teacher_motion.items() if value.ndim > 1} == {torch.bfloat16}
    held = [p for name, p in model.unet.named_parameters() if name not in trains and p.dtype == torch.float32]
    assert sum(p.numel() for p in held) < 0.2 * sum(p.numel() for p in model.unet.parameters())


def test_a_network_that_trains_whole_is_left_alone(tmp_path):
    config = _config(recipes.base_emoji, "new", tmp_path)
    model = stages.starting_model(config)
    assert not round_frozen(config, model)
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("recipe", [recipes.image_lcm_emoji, recipes.video_lcm_emoji])
def test_the_model_that_is_left_has_frozen_weights_as_they_were(recipe, narrow_folder, tmp_path):
    config = _config(recipe, narrow_folder, tmp_path, sample_every=1)
    folder = train(replace(config, sample_prompts=("a fox",)))
    before = load(narrow_folder, teacher=True, image_scale=0.0, adapters=()).unet.state_dict()
    after = load(folder, image_scale=0.0, adapters=()).unet.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    if recipe is recipes.image_lcm_emoji:
        assert not changed
    else:
        assert changed
        assert all("motion_modules" in name for name in changed)
        (last,) = (config.folder / "checkpoints").iterdir()
        averages = load_file(last / "ema.safetensors")
        assert all(torch.equal(after[name], averages[f"unet.{name}"]) for name in changed)
    assert len([*(config.folder / "samples").iterdir()]) == 2


def test_runs_of_one_process_have_each_their_own_precision(narrow_folder, tmp_path):
    losses = []
    for precision in ("no", "bf16", "no"):
        config = replace(_config(recipes.image_lcm_emoji, narrow_folder, tmp_path / str(len(losses))), steps=1)
        train(replace(config, mixed_precision=precision))
        losses.append(json.loads((config.folder / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_three_steps_are_one_and_two_bit_for_bit(narrow_folder, tmp_path):
    found = []
    for name, stops in (("whole", (None,)), ("parts", (1, None))):
        config = _config(recipes.video_lcm_emoji, narrow_folder, tmp_path, name=name)
        for i, stop in enumerate(stops):
            folder = train(replace(config, steps=3), resume=i > 0, stop_after=stop)
        found.append(load(folder, adapters=()).unet.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_model_that_was_exchanged_meanwhile_is_refused(narrow_folder, tmp_path, monkeypatch):
    config, begun = _config(recipes.video_lcm_emoji, narrow_folder, tmp_path), training._start
    said = []
    monkeypatch.setattr(training, "_start", lambda model: said.append(begun(model)) or str(len(said)))
    with pytest.raises(ValueError, match=r"is not what this run began with; put that back, and add --resume"):
        train(config)
