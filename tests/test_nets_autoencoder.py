"""The autoencoder is diffusers' AutoencoderKL: the same names, the same numbers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from animatelcm.nets import emoji, sd15
from animatelcm.nets.autoencoder import FIXED, Autoencoder, AutoencoderConfig

KINDS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
SMALL = {**KINDS, "block_out_channels": (8, 16, 24), "norm_num_groups": 4}
CONFIGS = {
    "miniature": emoji.VAE,
    "Stable Diffusion, narrow": {**sd15.VAE, "block_out_channels": (8, 16, 24, 24), "norm_num_groups": 8},
    "one layer": {**SMALL, "layers_per_block": 1},
    "bare": {
        **SMALL,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "latent_channels": 6,
    },
    "one level": {"block_out_channels": (16,), "norm_num_groups": 16, "in_channels": 4, "out_channels": 4},
}


def pair(settings: dict) -> tuple[Autoencoder, AutoencoderKL]:
    """Both with the same random weights; norms matter too."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(**settings).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape))
    ours = Autoencoder(AutoencoderConfig.from_diffusers(dict(theirs.config))).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """By the largest number; the order of a sum is not ours to keep."""
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) < tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_diffusers(name, size, grad):
    """With and without gradients wanted: there are faster ways for the second."""
    ours, theirs = pair(CONFIGS[name])
    cell = 2 ** (len(ours.config.block_out_channels) - 1)
    pixels = torch.randn(2, ours.config.in_channels, size[0] * cell, size[1] * cell)
    latents = torch.randn(2, ours.config.latent_channels, *size)
    with torch.set_grad_enabled(grad):
        posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
        drawn = ours.decode(latents)
        assert near(posterior.mean, expected.mean)
        assert near(posterior.logvar, expected.logvar)
        assert near(drawn, theirs.decode(latents).sample)
        assert drawn.is_contiguous(memory_format=torch.channels_last)


def test_neither_input_is_changed():
    ours, _ = pair(CONFIGS["one layer"])
    pixels, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    before = pixels.clone(), latents.clone()
    with torch.inference_mode():
        ours.encode(pixels)
        ours.decode(latents)
    assert torch.equal(pixels, before[0])
    assert torch.equal(latents, before[1])


def test_gradients_are_diffusers():
    ours, theirs = pair(CONFIGS["one layer"])
    for network in (ours, theirs):
        network.requires_grad_(True)
    pixels = torch.randn(2, 3, 16, 16)
    losses = []
    for network in (ours, theirs):
        posterior = network.encode(pixels) if network is ours else network.encode(pixels).latent_dist
        drawn = network.decode(posterior.mean) if network is ours else network.decode(posterior.mean).sample
        losses.append((drawn - pixels).square().mean() + posterior.logvar.square().mean())
        losses[-1].backward()
    expected = {name: value.grad for name, value in theirs.named_parameters()}
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in ours.named_parameters():  # some are 0 but for rounding: what a norm or a softmax takes out
        bound = 1e-3 * float(expected[name].abs().max()) + 1e-5 * largest
        assert float((value.grad - expected[name]).abs().max()) < bound, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_comes_near(dtype, tolerance):
    ours, _ = pair(CONFIGS["one layer"])
    latents = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        whole = ours.decode(latents)
        half = ours.to(dtype).decode(latents.to(dtype))
    assert ours.dtype == half.dtype == dtype
    assert near(half.float(), whole, tolerance)


def test_config_goes_there_and_back_and_covers_every_setting():
    for settings in CONFIGS.values():
        config = AutoencoderConfig.from_diffusers(settings)
        assert AutoencoderConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
        theirs = AutoencoderKL.from_config(config.to_diffusers())
        assert AutoencoderConfig.from_diffusers(dict(theirs.config)) == config
    default = {key: value for key, value in AutoencoderKL().config.items() if not key.startswith("_")}
    ours = {key: value for key, value in AutoencoderConfig().to_diffusers().items() if not key.startswith("_")}
    assert ours == default


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported, only None"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ({"flow": 1}, "unknown setting flow=1"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "only 'UpDecoderBlock2D'"),
        ({"block_out_channels": [64, 64]}, "for each level"),
        ({"block_out_channels": 64}, "give one a level"),
        ({"block_out_channels": []}, "give one a level"),
        ({"up_block_types": 5}, "for each level"),
        ({"scaling_factor": "1"}, "scaling_factor='1'; give a positive number"),
        ({"scaling_factor": float("nan")}, "give a positive number"),
        ({"block_out_channels": [10**9]}, "out of range"),
        ({"layers_per_block": 0}, "out of range"),
        ({"latent_channels": "4"}, "out of range"),
        ({"block_out_channels": [48]}, "multiples of norm_num_groups=32"),
    ],
)
def test_what_it_cannot_be_is_refused(settings, what):
    with pytest.raises(ValueError, match=what):
        AutoencoderConfig.from_diffusers(settings)


def test_every_fixed_setting_is_one_of_diffusers():
    assert FIXED.keys() <= dict(AutoencoderKL().config).keys()
