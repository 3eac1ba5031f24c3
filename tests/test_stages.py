"""What a stage begins with and what it leaves of the model that it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from animatelcm import recipes, stages
from animatelcm.bundle import load
from animatelcm.config import AdapterConfig, TrainConfig
from animatelcm.nets import sd15
from animatelcm.nets.unet import UNetConfig
from animatelcm.training import train
from networks import same_state

STAGES = {
    "decoder": (recipes.vae_decoder_emoji, True),
    "base": (recipes.base_emoji, False),
    "teacher": (recipes.teacher_emoji, True),
    "style": (recipes.style_lora_emoji, True),
    "image": (recipes.image_lcm_emoji, True),
    "video": (recipes.video_lcm_emoji, True),
}
"""Recipe, and whether adapters fit what it leaves."""


def _files(folder: Path) -> dict[str, bytes]:
    adapters = folder / "adapters"
    return {str(path.relative_to(adapters)): path.read_bytes() for path in adapters.rglob("*") if path.is_file()}


def _one_step(recipe, folder: Path, out: Path) -> TrainConfig:
    config = replace(recipe(), model=str(folder), out=out, steps=1, batch_size=1, warmup_steps=1)
    config = replace(config, save_every=1000, sample_prompts=())
    config = replace(config, data=replace(config.data, length=2, cache=False))
    train(config)
    return config


@pytest.mark.parametrize(("recipe", "keeps"), STAGES.values(), ids=STAGES.keys())
def test_adapters_are_not_read_and_stay_where_they_fit(recipe, keeps, narrow_folder, tmp_path):
    config = _one_step(recipe, narrow_folder, tmp_path)
    assert stages.starting_model(config).adapters == {}
    assert _files(config.folder / "model") == (_files(narrow_folder) if keeps else {})


def test_a_decoder_is_added_to_all_that_was_there(narrow_folder, tmp_path):
    config = _one_step(recipes.vae_decoder_emoji, narrow_folder, tmp_path)
    before, after = load(narrow_folder, image_scale=0.0), load(config.folder / "model", image_scale=0.0)
    for part in before.networks.keys() - {"vae"}:
        assert same_state(before.networks[part].state_dict(), after.networks[part].state_dict()), part
    assert same_state(before.teacher_motion, after.teacher_motion)
    assert before.image_lora.keys() == after.image_lora.keys() != set()
    assert before.styles.keys() == after.styles.keys() == {"drawn"}
    old, new = before.vae.state_dict(), after.vae.state_dict()
    moved = {key for key, value in old.items() if not torch.equal(value, new[key])}
    assert moved
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in moved)


def test_a_fresh_controlnet_of_stable_diffusion_has_the_shapes_that_other_tools_take_for_granted():
    """diffusers' default ones, its authors'."""
    config = AdapterConfig(name="canny", kind="controlnet")
    with torch.device("meta"):
        ours = stages.fresh_adapter(config, UNetConfig.from_diffusers(sd15.UNET), latent_channels=4, downscale=8)
        theirs = ControlNetModel(cross_attention_dim=768)
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
