"""The autoencoder of Stable Diffusion, frame by frame, with the parameter names of diffusers' AutoencoderKL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets import fused
from animatelcm.nets.layers import GroupNorm, Linear, PointwiseConv

EPS = 1e-6
FIXED: dict[str, Any] = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}
"""Settings of diffusers' AutoencoderKL that have one value in the Stable Diffusion family."""
LIMITS = {
    **dict.fromkeys(("block_out_channels", "norm_num_groups"), 8192),
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), 1024),
    "layers_per_block": 64,
}
"""What decides how much is built before any weight is seen; a stranger's config may ask for any number."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The settings of diffusers' AutoencoderKL that vary."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    """Pictures' usual height and width; the network takes any."""
    scaling_factor: float = 0.18215
    """Latents are multiplied by it, which gives them a variance near 1."""
    force_upcast: bool = True
    """For diffusers' pipelines: whether float16 is too narrow for these weights."""
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.block_out_channels, tuple) or not self.block_out_channels:
            raise ValueError(f"autoencoder config: block_out_channels={self.block_out_channels!r}; give one a level")
        for name, most in LIMITS.items():
            value = getattr(self, name)
            for number in value if name == "block_out_channels" else (value,):
                if type(number) is not int or not 0 < number <= most:
                    raise ValueError(f"autoencoder config: {name}={value!r} is out of range; choose from 1..{most}")
        levels = len(self.block_out_channels)
        for name, kind in {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}.items():
            found = getattr(self, name)
            if found != (kind,) * levels:
                raise ValueError(f"autoencoder config: {name}={found!r} is not supported, only {kind!r} for each level")
        if not isinstance(self.scaling_factor, int | float) or not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"autoencoder config: scaling_factor={self.scaling_factor!r}; give a positive number")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"autoencoder config: block_out_channels={self.block_out_channels}; "
                f"give multiples of norm_num_groups={self.norm_num_groups}"
            )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """From ``vae/config.json``; ValueError names a setting that this network does not have."""
        names = {field.name for field in fields(cls)}
        for key, value in config.items():
            if key in names or key.startswith("_"):
                continue
            if key not in FIXED:
                raise ValueError(f"autoencoder config: unknown setting {key}={value!r}")
            if value != FIXED[key]:
                raise ValueError(f"autoencoder config: {key}={value!r} is not supported, only {FIXED[key]!r}")
        known = {key: value for key, value in config.items() if key in names}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})

    def to_diffusers(self) -> dict[str, Any]:
        """The contents of ``vae/config.json``."""
        return {"_class_name": "AutoencoderKL", **asdict(self), **FIXED}


class Posterior(NamedTuple):
    """What pictures were encoded to: a normal distribution of each latent, mean and log variance (N, C, h, w)."""

    mean: Tensor
    logvar: Tensor


class Autoencoder(nn.Module):
    """Pictures to latents, of an eighth of their sides where there are four levels, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = PointwiseConv(2 * latents, 2 * latents, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = PointwiseConv(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; pictures and latents have it too."""
        return self.encoder.conv_in.weight.dtype

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels (N, 3, H, W) in [-1, 1] -> latents' distribution, before ``scaling_factor``."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w), after division by ``scaling_factor`` -> pixels (N, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    """Convolutions on the way down, then attention at the coarsest resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                [widths[max(level - 1, 0)], *[width] * (config.layers_per_block - 1)],
                width,
                groups,
                downsamplers=Halver(width) if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> means and log variances (N, 2 C, h, w)."""
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Attention at the coarsest resolution, then convolutions on the way up."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(
                [widths[max(i - 1, 0)], *[width] * config.layers_per_block],
                width,
                groups,
                upsamplers=Doubler(width) if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> pixels (N, 3, H, W)."""
        x = self.mid_block(self.conv_in(x.contiguous(memory_format=torch.channels_last)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class Level(nn.Module):
    """Residual blocks at one resolution, and the way to the next; ``inputs`` are the channels that each receives."""

    def __init__(self, inputs: Sequence[int], channels: int, groups: int, **ways: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, channels, groups) for width in inputs)
        for name, way in ways.items():
            self.add_module(name, nn.ModuleList([] if way is None else [way]))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, and attention between them."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm, added to their input."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, EPS, silu=True)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, EPS, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else PointwiseConv(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w)."""
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h + self.conv_shortcut(x) if torch.is_grad_enabled() else h.add_(self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """Attention of a picture's cells to each other, of one head, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w), in channels-last order."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        seen = self.to_out(fused.attention(q, k, v)[:, 0])
        return x + seen.transpose(1, 2).unflatten(2, x.shape[2:])


class Halver(nn.Module):
    """Halve height and width by a strided convolution, which looks beyond the right and lower edge alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Doubler(nn.Module):
    """Repeat every pixel in both directions, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, 2 h, 2 w)."""
        return fused.doubled(x, self.conv.weight, self.conv.bias)
