"""Motion modules: attention over time, each pixel by itself, as in AnimateDiff."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from animatelcm.nets import fused
from animatelcm.nets.layers import Attention, FeedForward, GroupNorm, Linear

if TYPE_CHECKING:
    from animatelcm.nets.unet import UNetConfig

NORMS = ("per_frame", "joint")

LIMITS = {
    "num_attention_heads": (128, "motion_num_attention_heads"),
    "norm_num_groups": (1024, "motion_norm_num_groups"),
    "max_frames": (1024, "motion_max_seq_length"),
    "layers": (8, "motion_transformer_layers_per_block"),
}
"""The largest that a number may be, and what diffusers calls it; a stranger's config may ask for any."""


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Shape and semantics of the motion modules."""

    num_attention_heads: int = 8
    norm: Literal["per_frame", "joint"] = "per_frame"
    """What GroupNorm sees: a frame (AnimateDiff, AnimateLCM) or all at once (diffusers' UNetMotionModel)."""
    norm_num_groups: int = 32
    use_mid_block: bool = True
    max_frames: int = 64
    layers: int = 1
    """Transformer blocks in each module."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"motion norm {reprlib.repr(self.norm)} is unknown; choose one of {', '.join(NORMS)}")
        if not isinstance(self.use_mid_block, bool):
            said = reprlib.repr(self.use_mid_block)
            raise ValueError(f"motion use_mid_block (use_motion_mid_block) is {said}; give true or false")
        for name, (most, theirs) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                said = reprlib.repr(value)
                raise ValueError(f"motion {name} ({theirs}) is {said}; give a whole number from 1 to {most}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> MotionConfig:
        """From a diffusers ``MotionAdapter``'s config; ``motion_norm`` is ours, and per frame where absent.

        Raises ValueError naming a setting that differs from block to block, that is not supported or out of bounds.
        """
        layers = _single(config, "motion_transformer_layers_per_block", 1)
        fixed = {
            "motion_mid_block_layers_per_block": 1,
            "motion_transformer_layers_per_mid_block": layers,
            "conv_in_channels": None,
        }
        for key, value in fixed.items():
            if key in config and (found := _single(config, key, value)) != value:
                raise ValueError(f"motion adapter config: {key}={reprlib.repr(found)} is not supported, only {value!r}")
        return cls(
            num_attention_heads=_single(config, "motion_num_attention_heads", 8),
            norm=config.get("motion_norm", "per_frame"),
            norm_num_groups=config.get("motion_norm_num_groups", 32),
            use_mid_block=config.get("use_motion_mid_block", True),
            max_frames=config.get("motion_max_seq_length", 32),
            layers=layers,
        )

    def to_diffusers(self, unet: UNetConfig) -> dict[str, Any]:
        """The config of a diffusers ``MotionAdapter`` for this UNet, and ``motion_norm``."""
        return {
            "_class_name": "MotionAdapter",
            "block_out_channels": list(unet.block_out_channels),
            "motion_layers_per_block": unet.layers_per_block,
            "motion_transformer_layers_per_block": self.layers,
            "motion_mid_block_layers_per_block": 1,
            "motion_transformer_layers_per_mid_block": self.layers,
            "motion_num_attention_heads": self.num_attention_heads,
            "motion_norm_num_groups": self.norm_num_groups,
            "motion_max_seq_length": self.max_frames,
            "use_motion_mid_block": self.use_mid_block,
            "motion_norm": self.norm,
        }


def _single(config: Mapping[str, Any], key: str, default: int | None) -> Any:  # noqa: ANN401 - a JSON value
    """The one value of a setting that diffusers allows to be a list by blocks, of numbers or of lists by layers."""
    value = config.get(key, default)
    if not isinstance(value, list | tuple):
        return value
    flat = [each for row in value for each in (row if isinstance(row, list | tuple) else [row])]
    if not flat or any(isinstance(each, list | tuple | dict) for each in flat) or any(x != flat[0] for x in flat):
        said = reprlib.repr(value)
        raise ValueError(f"motion adapter config: {key}={said} is not supported; give one value for all blocks")
    return flat[0]


def sinusoid(rows: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Positions (rows, channels): waves of 2 pi to 20000 pi rows, sines on even, cosines on odd channels."""
    rates = torch.exp(torch.arange(0, channels, 2, device=device) * (-math.log(10_000.0) / channels))
    angles = torch.arange(rows, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class TemporalAttention(Attention):
    """Each pixel's attention to itself in other frames."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, F, P, C) -> (B, F, P, C); (B, P, heads, F, C / heads) is a view of a projection of them."""
        heads = (self.heads, x.shape[3] // self.heads)
        q, k, v = (part.unflatten(3, heads).permute(0, 2, 3, 1, 4) for part in self.project(x))
        return self.to_out(fused.temporal_attention(q, k, v).permute(0, 3, 1, 2, 4).reshape(x.shape))


class TemporalBlock(nn.Module):
    """Two attentions over time and a feed-forward; positions are added to what each attention sees."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = TemporalAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = TemporalAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, F, P, C), positions (F, 1, C) -> (B, F, P, C)."""
        x = x + self.attn1(self.norm1(x) + positions)
        x = x + self.attn2(self.norm2(x) + positions)
        return x + self.ff(self.norm3(x))


class MotionModule(nn.Module):
    """z + T(z) with a temporal transformer T whose last map starts at zero: fresh, it changes nothing."""

    def __init__(self, channels: int, config: MotionConfig) -> None:
        super().__init__()
        self.joint = config.norm == "joint"
        self.norm = GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        heads = config.num_attention_heads
        self.transformer_blocks = nn.ModuleList(TemporalBlock(channels, heads) for _ in range(config.layers))
        self.proj_out = Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.register_buffer("positions", sinusoid(config.max_frames, channels), persistent=False)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Frames (B * F, C, h, w) in channels-last order -> the same shape and order; F = ``frames``."""
        tokens = self.proj_in(self._normalised(x, frames))
        positions = self.positions[:frames, None].to(tokens.dtype)
        for block in self.transformer_blocks:
            tokens = block(tokens, positions)
        return x + self.proj_out(tokens).view(-1, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)

    def _normalised(self, x: Tensor, frames: int) -> Tensor:
        """(B * F, C, h, w) -> tokens (B, F, h * w, C). A joint norm sees the frames stacked in height."""
        _, channels, height, width = x.shape
        if self.joint:
            x = x.permute(0, 2, 3, 1).reshape(-1, frames * height, width, channels).permute(0, 3, 1, 2)
        return self.norm(x).permute(0, 2, 3, 1).reshape(-1, frames, height * width, channels)
