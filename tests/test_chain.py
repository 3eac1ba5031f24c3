"""The stages one after the other, small: style, image consistency, video consistency, and the bundle at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from animatelcm import recipes
from animatelcm.bundle import load, load_sum
from animatelcm.nets.lora import layers
from animatelcm.request import ModelSource, SampleRequest
from animatelcm.sampling import sample
from animatelcm.training import train

STAGES = {
    recipes.style_lora_emoji: {"steps": 45, "batch_size": 8, "warmup_steps": 5},
    recipes.image_lcm_emoji: {"steps": 40, "batch_size": 8, "warmup_steps": 5},
    recipes.video_lcm_emoji: {"steps": 24, "batch_size": 2, "warmup_steps": 5},
}
COUPLED = {"steps": 2, "batch_size": 2}


def _small(recipe, model, out, **changes):
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


def test_every_stage_improves_its_loss(chain):
    for name, folder in chain.items():
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        third = len(losses) // 3
        assert fmean(losses[-third:]) < 0.9 * fmean(losses[:third]), name


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


def test_a_distillation_resumes_bit_for_bit(chain, tmp_path):
    model = chain["image_lcm_emoji"] / "model"

    def run(config, **options):
        train(config, **options)
        (last,) = sorted((config.folder / "checkpoints").iterdir())[-1:]
        return {file.stem: load_file(file) for file in last.glob("*.safetensors")}

    whole = run(_small(recipes.video_lcm_emoji, model, tmp_path / "whole", steps=6))
    halves = _small(recipes.video_lcm_emoji, model, tmp_path / "halves", steps=6)
    run(halves, stop_after=3)
    resumed = run(halves, resume=True)
    assert set(whole) == {"weights", "ema", "target", "optimizer"}
    assert all(torch.equal(whole[part][key], resumed[part][key]) for part in whole for key in whole[part])


def test_without_stage_one_there_is_nothing_to_build_on(chain, tmp_path):
    with pytest.raises(ValueError, match="image_lcm"):
        train(_small(recipes.video_lcm_emoji, chain["style_lora_emoji"] / "model", tmp_path))


def test_both_can_be_learned_at_once(chain, tmp_path):
    config = _small(recipes.video_lcm_coupled_emoji, chain["style_lora_emoji"] / "model", tmp_path)
    model = load(train(config))
    assert model.image_lora
    assert model.teacher_motion
