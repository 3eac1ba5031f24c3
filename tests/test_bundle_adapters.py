"""Adapters beside a model on disk: kept by name, checked, and read by diffusers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from animatelcm.adapters import Beside, read
from animatelcm.bundle import load
from animatelcm.condition import Condition, Control
from animatelcm.fusion import baked, fuse
from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample_steps
from animatelcm.saving import save
from animatelcm.weights.files import read_safetensors
from networks import same_state
from test_bundle_sums import random_lora, weights
from test_condition import beside, clip


@pytest.fixture(scope="module")
def steered_folder(fresh_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("steered") / "model"
    save(beside(fresh_model), path, dtype=torch.float32)
    return path


def test_adapters_are_saved_and_loaded_by_name(fresh_model, steered_folder, tmp_path):
    before, after = beside(fresh_model), load(steered_folder)
    assert list(after.adapters) == ["edge", "i2v", "pose"]
    for name, network in after.adapters.items():
        assert type(network) is type(before.adapters[name])
        assert same_state(network.state_dict(), before.adapters[name].state_dict())
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert same_state(
            read(steered_folder / "adapters" / name, name, Beside.of(before), torch.float32).state_dict(),
            network.state_dict(),
        )
    assert list(load(steered_folder, adapters=("edge",)).adapters) == ["edge"]
    assert load(steered_folder, adapters=()).adapters == {}
    assert {p.dtype for p in load(steered_folder, dtype=torch.float16).adapters["pose"].parameters()} == {torch.float16}
    save(after, tmp_path / "again", dtype=torch.float32)
    assert weights(tmp_path / "again").keys() == weights(steered_folder).keys()
    for name in after.adapters:
        configs = [folder / "adapters" / name / "config.json" for folder in (tmp_path / "again", steered_folder)]
        assert json.loads(configs[0].read_text()) == json.loads(configs[1].read_text())


def test_sums_leave_adapters_alone(steered_folder, tmp_path):
    model = load(steered_folder)
    fuse(model, style=(random_lora(model, 1), 0.5))
    save(baked(model), tmp_path / "sum", dtype=torch.float32)
    before, after = load(steered_folder), load(tmp_path / "sum")
    assert list(after.adapters) == list(before.adapters)
    assert all(same_state(after.adapters[k].state_dict(), v.state_dict()) for k, v in before.adapters.items())
    assert not same_state(after.unet.state_dict(), before.unet.state_dict())


@pytest.mark.parametrize(
    "damage", ["no weights", "no json", "another class", "no end of layers", "a key less", "not finite"]
)
def test_a_damaged_adapter_is_named(steered_folder, tmp_path, damage):
    shutil.copytree(steered_folder, tmp_path / "model")
    folder = tmp_path / "model" / "adapters" / "edge"
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    state = read_safetensors(weights)
    if damage == "no weights":
        weights.unlink()
    elif damage == "no json":
        config.write_text("[1, 2")
    elif damage == "another class":
        config.write_text('{"_class_name": "os.system"}')
    elif damage == "no end of layers":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_res_blocks": 10**9}))
    else:
        state.pop("adapter.conv_in.bias") if damage == "a key less" else state["adapter.conv_in.bias"].fill_(torch.nan)
        save_file(state, weights)
    with pytest.raises(ValueError, match=r"adapters.edge"):
        load(tmp_path / "model")
    assert list(load(tmp_path / "model", adapters=("pose",)).adapters) == ["pose"]


def test_diffusers_draws_the_same_controlled_picture(tmp_path):
    """The shipped model with a ControlNet that acts, in stock diffusers and here, from the same folder."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    save(beside(load("emoji", teacher=True), "pose"), tmp_path / "model", dtype=torch.float32)
    model = load(tmp_path / "model", image_scale=0.0)
    control = ControlNetModel.from_pretrained(tmp_path / "model" / "adapters" / "pose", local_files_only=True)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path / "model", controlnet=control, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    request = SampleRequest(prompt="a parrot", num_frames=1, num_inference_steps=3, guidance_scale=3.0, seed=3)
    request = request.resolved(model.facts)
    maps = clip(1)

    def picture(condition: Condition) -> np.ndarray:
        with torch.inference_mode():
            *_, last = sample_steps(model, request, condition=condition)
            drawn = model.vae.decode(last.latents[:, :, 0] / model.vae.config.scaling_factor)[0]
        return (drawn.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)

    def theirs(scale: float, start: float, end: float) -> np.ndarray:
        return pipe(
            "a parrot",
            image=torch.from_numpy(maps).permute(0, 3, 1, 2) / 255,
            num_inference_steps=3,
            guidance_scale=3.0,
            latents=initial_noise(model, request)[:, :, 0],
            height=64,
            width=64,
            controlnet_conditioning_scale=scale,
            control_guidance_start=start,
            control_guidance_end=end,
            output_type="np",
        ).images[0]

    plain = picture(Condition())
    for settings in ((0.2, 0.0, 1.0), (0.1, 0.0, 0.5)):
        ours = picture(Condition(controls=(Control("pose", maps, *settings),)))
        assert ours.std() > 0.05
        assert np.abs(ours - plain).max() > 0.1
        assert np.abs(theirs(*settings) - ours).max() < 1e-3
