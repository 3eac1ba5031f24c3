"""UNets small enough to compare number by number, and the comparison of all that networks hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from animatelcm.nets.unet import UNetConfig

SMALL = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=6,
    attention_head_dim=2,
    norm_num_groups=4,
)
"""A level with attention and one without, as Stable Diffusion has."""

TWO = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=8,
)
"""As the miniature: attention on both levels."""

NARROW = replace(TWO, in_channels=16, out_channels=16, cross_attention_dim=128, attention_head_dim=2)
"""Beside the miniature's text encoder and autoencoder."""


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter is zero."""
    source = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return network


def same_state(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """The same names, and under each the same numbers."""
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
