"""The stages one after the other, small: style, image consistency, video consistency, and the bundle at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from animatelcm import objectives, recipes, training
from animatelcm.assembly import load_sum
from animatelcm.bundle import load
from animatelcm.config import TrainConfig
from animatelcm.data.batches import draw_indices
from animatelcm.model_source import ModelSource
from animatelcm.nets.lora import layers
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.roles import consistency_roles
from animatelcm.sampling import sample
from animatelcm.saving import save
from animatelcm.sources import open_source
from animatelcm.stages import named_trainable, starting_model
from animatelcm.training import learning_rate, train

STAGES = {
    recipes.style_lora_emoji: {"steps": 15, "batch_size": 4, "warmup_steps": 3, "learning_rate": 2e-3},
    recipes.image_lcm_emoji: {"steps": 15, "batch_size": 4, "warmup_steps": 3, "learning_rate": 3e-4},
    recipes.video_lcm_emoji: {"steps": 12, "batch_size": 1, "warmup_steps": 2, "learning_rate": 5e-5},
}
COUPLED = {"steps": 1, "batch_size": 1}


def _small(recipe, model, out, **changes):
    """Runs with one ``out`` encode their clips once."""
    changes = {"save_every": 1000, "sample_prompts": (), "log_every": 1, **STAGES.get(recipe, COUPLED), **changes}
    config = replace(recipe(), model=str(model), out=out, **changes)
    return replace(config, data=replace(config.data, length=12))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Stage -> its folder; each begins with what the one before left, the first with the embedded teacher."""
    out = tmp_path_factory.mktemp("chain")
    folders, model = {}, "emoji"
    for recipe in STAGES:
        config = _small(recipe, model, out)
        model = train(config)
        folders[recipe.__name__] = config.folder
    return folders


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", STAGES, ids=lambda recipe: recipe.__name__)
def test_a_stage_improves_its_loss(recipe, chain):
    """Against the same draws at a rate of nothing: what the loss does by itself, as from noise to noise, or while the
    LoRA reaches the target."""
    config = TrainConfig.from_json((chain[recipe.__name__] / "config.json").read_text())
    idle = replace(config, name=f"idle {config.name}", learning_rate=1e-12)
    train(idle)
    learned, still = _losses(chain[recipe.__name__]), _losses(idle.folder)
    assert learned[0] == still[0]
    late = config.steps // 2
    assert sum(learned[late:]) < 0.98 * sum(still[late:])  # measured: 0.94, 0.91, 0.96


def test_a_fresh_student_of_stage_two_draws_the_images_of_stage_one(chain):
    folder = chain["image_lcm_emoji"] / "model"
    first, second = load(folder), starting_model(_small(recipes.video_lcm_emoji, folder, folder))
    x, t, text = torch.randn(2, 16, 1, 8, 8), torch.tensor([900, 40]), first.embed(["a fox", ""])
    with torch.no_grad():
        ours, theirs = (model.unet(x, t, text, motion=False) for model in (second, first))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("recipe", [recipes.image_lcm_emoji, recipes.video_lcm_emoji], ids=["stage 1", "stage 2"])
def test_no_role_average_or_moment_is_a_second_copy_of_spatial_weights(recipe, chain):
    """Everything that a step of distillation holds beside the network is of what trains, of the teacher's temporal
    layers, or of the batch."""
    folder = chain["style_lora_emoji" if recipe is recipes.image_lcm_emoji else "image_lcm_emoji"]
    config = _small(recipe, folder / "model", folder.parent)
    model = starting_model(config)
    state = training._fresh_state(config, model)
    roles = consistency_roles(
        model.unet,
        config.consistency,
        step=1,
        average={name.removeprefix("unet."): value for name, value in state.target.shadows.items()},
        teacher_motion=model.teacher_motion,
    )
    views = [role for role in (roles.student, roles.target, roles.teacher) if role is not None]
    assert all(view.network is model.unet for view in views)
    held = {name for view in views for name in view.overrides} | {*state.target.shadows, *state.ema.shadows}
    held |= {*model.teacher_motion, *state.parameters}
    spatial = [name for name in held if "motion_modules" not in name and "lora_" not in name]
    assert held
    assert spatial == []
    trained = {id(parameter) for parameter in state.parameters.values()}
    assert {id(p) for group in state.optimizer.param_groups for p in group["params"]} == trained


def test_training_is_the_objective_an_optimiser_and_two_averages(chain):
    """Two steps of the loop against the same by hand: the order of updates, and what each of them sees."""
    stage_1 = chain["image_lcm_emoji"]
    options = {"name": "two steps", "steps": 2, "batch_size": 2}
    config = _small(recipes.video_lcm_emoji, stage_1 / "model", stage_1.parent, **options)
    train(config)
    (saved,) = (config.folder / "checkpoints").iterdir()
    model = starting_model(config)
    live = dict(named_trainable(model, config))
    bare = {name.removeprefix("unet."): parameter for name, parameter in live.items()}
    optimizer = torch.optim.AdamW(live.values(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    start = {name: parameter.detach().clone() for name, parameter in bare.items()}
    target = start
    source = open_source(config, model)
    for step in range(2):
        indices = draw_indices(12, config.batch_size, seed=config.seed, step=step, rank=0)
        roles = consistency_roles(
            model.unet, config.consistency, step=step, average=target, teacher_motion=model.teacher_motion
        )
        draw = partial(generator, config.seed, step, 0)
        settings = {"config": config.consistency, "timestep_shift": config.timestep_shift}
        terms = objectives.consistency(model, roles, source.batches(indices), draw, **settings)
        optimizer.zero_grad()
        terms.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(live.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        optimizer.step()
        mu = config.consistency.mu
        target = {name: mu * target[name] + (1 - mu) * bare[name].detach() for name in target}
    weights, averages = (load_file(saved / f"{part}.safetensors") for part in ("weights", "target"))
    for name, first in start.items():  # Adam makes whole steps of gradients that are rounding, so not bit for bit
        assert (weights[f"unet.{name}"] - bare[name]).norm() <= 1e-2 * (bare[name] - first).norm()
        assert (averages[f"unet.{name}"] - target[name]).norm() <= 1e-2 * (target[name] - first).norm() + 1e-6


def test_the_last_bundle_holds_it_all(chain):
    first, last = load("emoji", teacher=True), chain["video_lcm_emoji"] / "model"
    teacher, fast = load(last, teacher=True), load(last)
    for part, network in first.networks.items():
        ours = teacher.networks[part].state_dict()
        assert all(torch.equal(ours[key], value) for key, value in network.state_dict().items()), part
    assert (teacher.facts.num_inference_steps, teacher.facts.sampler) == (25, "ddim")
    assert (fast.facts.num_inference_steps, fast.facts.guidance_scale, fast.facts.sampler) == (4, 1.0, "lcm")
    assert fast.schedule.solver_steps == 50
    assert not list(layers(fast.unet))
    slow = teacher.unet.state_dict()
    moved = [key for key, value in fast.unet.state_dict().items() if not torch.equal(value, slow[key])]
    assert any("motion_modules" in key for key in moved)
    assert any("motion_modules" not in key for key in moved)  # the image acceleration, fused
    assert set(fast.facts.trained) > {"style_lora_emoji", "image_lcm_emoji", "video_lcm_emoji"}


def test_four_evaluations_in_a_style_without_guidance(chain):
    source = ModelSource(model=str(chain["video_lcm_emoji"] / "model"), style=("twemoji:0.8",))
    plain, styled = load_sum(replace(source, style=())), load_sum(source)
    (video,) = sample(plain, SampleRequest(prompt="a parrot"))
    (other,) = sample(styled, SampleRequest(prompt="a parrot"))
    assert video.evaluations == other.evaluations == 4
    assert (video.frames != other.frames).any()


def test_a_lora_is_a_file_of_its_own_too(chain):
    folder = chain["style_lora_emoji"]
    file = str(folder / "twemoji.safetensors")
    named, filed = (
        load_sum(ModelSource(model=str(folder / "model"), style=(style,), teacher=True)) for style in ("twemoji", file)
    )
    ours, theirs = named.unet.state_dict(), filed.unet.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-3) for key in ours)  # the file is float16
    with safe_open(file, "pt") as opened:  # kohya's names, and what ModelSpec asks for
        keys, said = set(opened.keys()), opened.metadata()
        layers_of = {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")}
        assert all(key.startswith(("lora_unet_", "lora_te_")) for key in keys)
        assert keys == {
            f"{layer}.{end}" for layer in layers_of for end in ("alpha", "lora_down.weight", "lora_up.weight")
        }
        config = recipes.style_lora_emoji().lora
        assert {float(opened.get_tensor(f"{layer}.alpha")) for layer in layers_of} == {config.alpha}
    assert said["modelspec.title"] == "twemoji"
    assert {"modelspec.sai_model_spec", "modelspec.architecture", "modelspec.date"} <= said.keys()


def test_a_distillation_resumes_bit_for_bit(chain):
    stage_1 = chain["image_lcm_emoji"]

    def named(name):
        return _small(recipes.video_lcm_emoji, stage_1 / "model", stage_1.parent, name=name, steps=4)

    def run(config, **options):
        train(config, **options)
        (last,) = sorted((config.folder / "checkpoints").iterdir())[-1:]
        return {file.stem: load_file(file) for file in last.glob("*.safetensors")}

    whole = run(named("whole"))
    run(named("halves"), stop_after=2)
    resumed = run(named("halves"), resume=True)
    assert set(whole) == {"weights", "ema", "target", "optimizer"}
    assert all(torch.equal(whole[part][key], resumed[part][key]) for part in whole for key in whole[part])


def test_without_stage_one_there_is_nothing_to_build_on(tmp_path):
    save(replace(load("emoji", teacher=True), image_lora={}), tmp_path / "teacher")
    with pytest.raises(ValueError, match="image_lcm"):
        train(_small(recipes.video_lcm_emoji, tmp_path / "teacher", tmp_path))


def test_a_style_leaves_the_rest_of_a_bundle_alone(chain):
    first, styled = load("emoji"), load(chain["style_lora_emoji"] / "model")
    assert replace(styled.facts, trained={}) == replace(first.facts, trained={})
    assert styled.fingerprint("unet") == first.fingerprint("unet")
    assert styled.styles.keys() >= {"twemoji"}


def test_a_run_is_not_continued_with_other_settings_or_from_another_model(chain, tmp_path):
    stage_1 = chain["image_lcm_emoji"]
    config = _small(recipes.video_lcm_emoji, stage_1 / "model", stage_1.parent, name="one step", steps=2)
    assert train(config, stop_after=1) is None
    with pytest.raises(ValueError, match="another learning_rate"):
        train(replace(config, learning_rate=1.0), resume=True)
    other = load(config.model)
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    save(other, tmp_path / "moved")
    (saved,) = (config.folder / "checkpoints").iterdir()
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["config"]["model"] = str(tmp_path / "moved")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another model"):
        train(replace(config, model=str(tmp_path / "moved")), resume=True)


def test_both_can_be_learned_at_once(chain, tmp_path):
    config = _small(recipes.video_lcm_coupled_emoji, chain["style_lora_emoji"] / "model", tmp_path)
    model = load(train(config))
    assert model.image_lora
    assert model.teacher_motion
