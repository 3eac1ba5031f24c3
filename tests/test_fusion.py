from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer as PeftLayer
from torch.utils.flop_counter import FlopCounterMode

from animatelcm.fusion import base_state, fuse, unfuse
from animatelcm.model import VideoModel
from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample_steps
from animatelcm.saving import save
from animatelcm.weights.facts import MotionFacts
from animatelcm.weights.files import State, write_safetensors
from animatelcm.weights.lora import Lora, LoraLayer, write_lora


@pytest.fixture
def model(fresh_model) -> VideoModel:
    return copy.deepcopy(fresh_model)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_lora(model: VideoModel, seed: int, parts: tuple[str, ...] = ("unet", "text_encoder")) -> Lora:
    """For every third of the spatial and text layers, different ones for each of three seeds in a row."""
    weights = base_state(model)
    paths = [path for path in model.modules() if path.startswith(parts) and "motion_modules" not in path]
    part: Lora = {}
    for path in (path for path in paths[seed % 3 :: 3] if "embed" not in path):
        out, *rest = weights[f"{path}.weight"].shape
        up = 0.1 * noise(out, 4, *[1] * (len(rest) - 1), seed=seed)
        part[path] = LoraLayer(0.1 * noise(4, *rest, seed=seed + 100), up, alpha=6.0)
    return part


def temporal(model: VideoModel) -> State:
    return {key: value for key, value in model.unet.state_dict().items() if "motion_modules" in key}


def other_motion(model: VideoModel) -> State:
    return {key: 0.1 * noise(*value.shape, seed=i) for i, (key, value) in enumerate(temporal(model).items())}


def copied(model: VideoModel) -> State:
    return {
        f"{part}.{name}": value.clone()
        for part, network in model.networks.items()
        for name, value in network.state_dict().items()
    }


def differing(model: VideoModel, state: State) -> set[str]:
    """Names of the tensors that are not these, bit for bit."""
    now = copied(model)
    assert now.keys() == state.keys()
    return {key for key, value in now.items() if not torch.equal(value, state[key])}


def test_what_is_taken_out_leaves_the_base_bit_for_bit(model):
    before, part = copied(model), random_lora(model, 0)
    fuse(model, style=(part, 0.7), motion=(other_motion(model), 0.5))
    expected = {f"{path}.weight" for path in part} | {f"unet.{key}" for key in temporal(model)}
    assert differing(model, before) == expected == model.kept.keys()
    assert all(torch.equal(value, before[key]) for key, value in base_state(model).items())
    unfuse(model)
    assert differing(model, before) == set()
    assert model.kept == {}
    unfuse(model)
    assert differing(model, before) == set()


def test_the_second_call_replaces_the_first(model):
    twin = copy.deepcopy(model)
    a, b = random_lora(model, 0), random_lora(model, 1)
    fuse(model, style=(a, 0.7), motion=(other_motion(model), 1.0))
    fuse(model, style=(b, 1.3))
    fuse(twin, style=(b, 1.3))
    assert differing(model, copied(twin)) == set()
    assert model.kept.keys() == twin.kept.keys()


def test_styles_and_acceleration_add_up(model):
    before, parts = copied(model), [random_lora(model, seed) for seed in (0, 3, 1)]
    model.image_lora = parts[2]
    model.styles = {"soft": parts[0]}
    fuse(model, style=[("soft", 0.7), (parts[1], -0.4)], image=0.8)
    after = copied(model)
    shared = parts[0].keys() & parts[1].keys()
    assert shared
    for key in before:
        path, delta = key.removesuffix(".weight"), 0.0
        for part, scale in zip(parts, (0.7, -0.4, 0.8), strict=True):
            if path in part:
                layer = part[path]
                product = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
                delta = delta + scale * 6.0 / 4 * product.reshape(before[key].shape)
        torch.testing.assert_close(after[key], (before[key].double() + delta).to(before[key].dtype), rtol=0, atol=1e-6)
    fuse(model, style=("soft", 0.7))
    alone = copied(model)
    fuse(model, style=[("soft", 0.7)], image=0.8)
    assert differing(model, alone) == set()  # the acceleration that was there stayed
    fuse(model, style=("soft", 0.7), image=0.0)
    assert differing(model, alone)


def test_gamma_goes_from_the_image_model_to_the_file(model, tmp_path):
    x, t, text = noise(1, 16, 3, 8, 8), torch.tensor([500]), model.embed(["a parrot"])
    motion = other_motion(model)
    positions = model.unet.positions()
    write_safetensors(motion | positions, tmp_path / "motion.safetensors")
    with torch.inference_mode():
        image = model.unet(x, t, text, motion=False)
        assert not torch.equal(model.unet(x, t, text), image)
    fuse(model, motion=(tmp_path / "motion.safetensors", 0.0))
    with torch.inference_mode():
        assert torch.equal(model.unet(x, t, text), image)
    fuse(model, motion=(tmp_path / "motion.safetensors", 1.0))
    assert all(torch.equal(value, motion[key]) for key, value in temporal(model).items())
    fuse(model, motion=(motion, 0.5))
    outer = {key for key, value in temporal(model).items() if not torch.equal(value, motion[key])}
    assert outer == {k for k in motion if k.endswith(("proj_out.weight", "proj_out.bias")) and "transformer" not in k}
    assert all(torch.equal(temporal(model)[key], 0.5 * motion[key]) for key in outer)


def test_a_sum_costs_what_the_base_costs(model):
    def operations() -> int:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.unet(noise(1, 16, 2, 8, 8), torch.tensor([500]), noise(1, 32, 128))
        return counter.get_total_flops()

    before = operations()
    fuse(model, style=(random_lora(model, 0), 1.0))
    assert operations() == before > 0
    assert not any(isinstance(module, PeftLayer) for network in model.networks.values() for module in network.modules())


def test_a_file_is_what_was_written_into_it(model, tmp_path):
    part = random_lora(model, 2)
    write_lora(part, tmp_path / "style.safetensors", metadata={}, dtype=torch.float32)
    fuse(model, style=(part, 0.7))
    expected = copied(model)
    for path in (tmp_path / "style.safetensors", str(tmp_path / "style.safetensors")):
        unfuse(model)
        fuse(model, style=(path, 0.7))
        assert differing(model, expected) == set()


def _wrong(kind: str, model: VideoModel, folder: Path) -> dict[str, object]:
    part, motion = random_lora(model, 0), other_motion(model)
    path, key = min(part), min(motion)
    if kind == "shape":
        part[path] = LoraLayer(part[path].down[:, :-1], part[path].up, 1.0)
    if kind == "architecture":
        foreign = {"unet.down_blocks.7.to_q": LoraLayer(noise(2, 4), noise(4, 2), 2.0)}
        write_lora(part | foreign, folder / "other.safetensors", metadata={})
        return {"style": (folder / "other.safetensors", 1.0)}
    changes = {
        "motion missing": {k: v for k, v in motion.items() if k != key},
        "motion unknown": motion | {"a.motion_modules.0.b": noise(2)},
        "motion spatial": motion | {"conv_in.weight": model.unet.conv_in.weight},
        "motion shape": motion | {key: motion[key][:-1]},
        "motion numbers": motion | {key: motion[key] * math.nan},
    }
    others = {
        "name": {"style": ("nobody", 1.0)},
        "scale": {"style": (part, math.nan)},
        "gamma": {"motion": (motion, math.inf)},
        "shape": {"style": [(random_lora(model, 1), 1.0), (part, 1.0)]},
    }
    return others[kind] if kind in others else {"style": (part, 1.0), "motion": (changes[kind], 1.0)}


FIRST_MOTION = r"unet\.down_blocks\.0\.motion_modules\.0\.norm\.bias"


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("shape", r"\.weight is \(.*\) in the model, and the LoRA is for"),
        ("architecture", r"other\.safetensors: lora_unet_down_blocks_7_to_q\.alpha is for a module"),
        ("name", "no LoRA 'nobody': give a .safetensors file, or one of the model's styles: soft"),
        ("scale", "scale=nan"),
        ("gamma", "gamma=inf"),
        ("motion missing", FIRST_MOTION + " is missing in the file"),
        ("motion unknown", r"unet\.a\.motion_modules\.0\.b is no temporal layer"),
        ("motion spatial", r"unet\.conv_in\.weight is no temporal layer"),
        ("motion shape", FIRST_MOTION + r" is \(95,\) in the file, \(96,\) in the model"),
        ("motion numbers", FIRST_MOTION + " holds numbers that are not finite"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(kind, named, model, tmp_path):
    model.styles = {"soft": random_lora(model, 2)}
    arguments = _wrong(kind, model, tmp_path)
    fuse(model, style=("soft", 0.5))
    before, kept = copied(model), dict(model.kept)
    with pytest.raises(ValueError, match=named):
        fuse(model, **arguments)
    assert differing(model, before) == set()
    assert model.kept.keys() == kept.keys()


def test_diffusers_draws_the_same_picture_from_the_same_file(model, tmp_path):
    from diffusers import StableDiffusionPipeline

    save(model, tmp_path / "model", dtype=torch.float32)
    every = random_lora(model, 0) | random_lora(model, 1) | random_lora(model, 2)
    # diffusers 0.42 does not find the text encoder's attention layers in transformers 5.
    part = {path: layer for path, layer in every.items() if "self_attn" not in path}
    assert {path.split(".")[0] for path in part} == {"unet", "text_encoder"}
    write_lora(part, tmp_path / "style.safetensors", metadata={}, dtype=torch.float32)
    request = SampleRequest(prompt="a parrot", num_frames=1, num_inference_steps=4, guidance_scale=2.0)
    request = request.resolved(model.facts)
    start = initial_noise(model, request)

    def ours() -> np.ndarray:
        with torch.inference_mode():
            *_, last = sample_steps(model, request)
            picture = model.vae.decode(last.latents[:, :, 0] / model.vae.config.scaling_factor)[0]
        return (picture.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)

    before = ours()
    fuse(model, style=(tmp_path / "style.safetensors", 0.7))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style", local_files_only=True)
    pipe.set_adapters(["style"], [0.7])
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 64, "width": 64, "output_type": "np"}
    theirs = pipe("a parrot", latents=start[:, :, 0], **options).images[0]
    assert np.abs(theirs - ours()).max() < 1e-4
    assert np.abs(theirs - before).max() > 0.05


def test_temporal_layers_that_say_they_were_made_otherwise_are_refused(model, tmp_path):
    """Heads and norm are in no shape: other ones would give other videos, and no error."""
    file = tmp_path / "motion.safetensors"
    for said, named in (
        ({"motion_num_attention_heads": 2}, "num_attention_heads=2"),
        ({"motion_norm": "joint"}, "norm"),
    ):
        own = {"motion_num_attention_heads": model.unet.motion.num_attention_heads, "motion_norm": "per_frame"}
        write_safetensors(other_motion(model), file, MotionFacts(motion=own).to_metadata())
        fuse(model, motion=(file, 1.0))
        write_safetensors(other_motion(model), file, MotionFacts(motion=own | said).to_metadata())
        with pytest.raises(ValueError, match=f"temporal layers do not fit: .*{named}.*--motion"):
            fuse(model, motion=(file, 1.0))


def test_an_acceleration_that_is_not_there_cannot_be_scaled(model):
    assert not model.image_lora
    with pytest.raises(ValueError, match=r"image=0\.8: this model has no image acceleration; give image=\(LoRA"):
        fuse(model, image=0.8)
    fuse(model, image=0.0)


def test_temporal_layers_are_rounded_once_to_half_precision(model):
    """Scaled, with a LoRA on them, they are summed up in float32 first."""
    key = next(key for key in temporal(model) if ".transformer_blocks." not in key and ".proj_out.weight" in key)
    layer = LoraLayer(
        noise(4, temporal(model)[key].shape[1]), noise(temporal(model)[key].shape[0], 4, seed=1), alpha=4.0
    )
    other = other_motion(model)
    exact = 0.37 * other[key].float() + 0.5 * layer.delta(other[key].shape)
    model.unet.half()
    fuse(model, motion=(other, 0.37), style=({f"unet.{key.removesuffix('.weight')}": layer}, 0.5))
    assert torch.equal(temporal(model)[key], exact.half())
