"""Bands are no approximation: every decoder makes of them what it makes at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from animatelcm.bundle import load
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.bands import decode_in_bands


def _spread(network: nn.Module) -> nn.Module:
    """Random weights whose layers all matter."""
    source = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        size = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.copy_(torch.randn(parameter.shape, generator=source) / size**0.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def kl():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return _spread(
        Autoencoder(AutoencoderConfig(block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4, **kinds))
    )


@pytest.fixture(scope="module")
def tiny():
    from diffusers import AutoencoderTiny

    return _spread(AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4))


@pytest.mark.parametrize("bands", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (1, 3), (17, 2)])
@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_a_decoder_in_bands_is_the_decoder(name, size, bands, request):
    network = request.getfixturevalue(name)
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    whole = network.decode(latents)
    whole = whole if name == "kl" else whole.sample
    assert (decode_in_bands(network, latents, bands) - whole).abs().max() < 1e-4 * whole.abs().max()


def test_the_shipped_decoder_too_where_tiles_would_change_its_colours():
    model = load("emoji", adapters=())
    latents = torch.randn(1, 16, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, parts = (model.decode(latents, bands=bands).astype(int) for bands in (1, 8))
    assert np.abs(whole - parts).max() <= 1


def test_statistics_hold_where_the_mean_is_large(kl):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 1000
    whole = kl.decode(latents)
    assert (decode_in_bands(kl, latents, 3) - whole).abs().max() < 1e-3 * whole.abs().max()


def test_no_layer_sees_more_than_its_band(kl):
    seen = []
    hook = kl.decoder.conv_out.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2]))
    decode_in_bands(kl, torch.randn(1, 4, 16, 16), 8)
    hook.remove()
    assert len(seen) == 8
    assert max(seen) <= 64 // 8 + 2
