"""VideoUNet: Stable Diffusion's UNet applied frame by frame, with attention over time between its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets.blocks import DownStage, MidStage, ResnetBlock, Stage, TransformerBlock, Upsampler, UpStage
from animatelcm.nets.fused import Kept
from animatelcm.nets.layers import GroupNorm, Memory, TimeEmbedding
from animatelcm.nets.motion import MotionConfig, TemporalAttention

FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": False,
}
"""Settings of diffusers' UNet2DConditionModel that have one value in the Stable Diffusion 1.5 family."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the spatial layers: the settings of diffusers' UNet2DConditionModel that vary."""

    sample_size: int | tuple[int, int] | None = None
    """Latents' usual height and width; the network takes any."""
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    """The NUMBER of heads, in spite of its name: diffusers' history."""
    use_linear_projection: bool = False
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        self._check_blocks("down_block_types", {"CrossAttnDownBlock2D", "DownBlock2D"})
        self._check_blocks("up_block_types", {"CrossAttnUpBlock2D", "UpBlock2D"})
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            numbers = _spread(getattr(self, name), levels)
            if len(numbers) != levels or not all(isinstance(number, int) for number in numbers):
                raise ValueError(f"{name}={getattr(self, name)}: give one number, or one for each of {levels} blocks")
        for name in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; give one whole number")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: "
                f"give multiples of norm_num_groups={self.norm_num_groups}"
            )

    def _check_blocks(self, name: str, known: set[str]) -> None:
        types = getattr(self, name)
        if len(types) != len(self.block_out_channels):
            raise ValueError(f"{name}={types}: give one for each of block_out_channels={self.block_out_channels}")
        if strange := sorted(set(types) - known):
            raise ValueError(f"{name}: {strange[0]!r} is not supported; choose from {', '.join(sorted(known))}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From ``unet/config.json``; ValueError names a setting that this network does not have."""
        names = {field.name for field in fields(cls)}
        for key, value in config.items():
            if key in names or key.startswith("_"):
                continue
            if key not in FIXED:
                raise ValueError(f"unet config: unknown setting {key}={value!r}")
            if (value or None) != (FIXED[key] or None):
                raise ValueError(f"unet config: {key}={value!r} is not supported, only {FIXED[key]!r}")
        return cls(**{key: _hashable(value) for key, value in config.items() if key in names})

    def to_diffusers(self) -> dict[str, Any]:
        """The contents of ``unet/config.json``."""
        return {"_class_name": "UNet2DConditionModel", **asdict(self)}

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads by level."""
        return _spread(self.attention_head_dim, len(self.block_out_channels))

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks in each spatial transformer, by level."""
        return _spread(self.transformer_layers_per_block, len(self.block_out_channels))

    @property
    def emb_channels(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def num_skips(self) -> int:
        """Skip connections: the first convolution, every layer down, every halving."""
        return (self.layers_per_block + 1) * len(self.block_out_channels)


def _spread(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


def _hashable(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    return tuple(value) if isinstance(value, list) else value


class Remembered(NamedTuple):
    """What a network makes of a timestep and of a text, whatever the video (``VideoUNet.remember``)."""

    emb: Memory
    text: Memory


class VideoUNet(nn.Module):
    """Noise prediction for videos, and for images as videos of one frame.

    Parameters have the names of diffusers' UNet2DConditionModel, in motion modules of its UNetMotionModel;
    positions are not part of the state. Gradient checkpointing computes again with the module's own
    parameters: leave it off to differentiate through ``torch.func.functional_call``.
    """

    def __init__(self, config: UNetConfig, motion: MotionConfig | None = None) -> None:
        super().__init__()
        self.config, self.motion = config, motion
        widths = config.block_out_channels
        levels = range(len(widths))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config)
        self.down_blocks = nn.ModuleList(DownStage(config, motion, level) for level in levels)
        self.mid_block = MidStage(config, motion)
        self.up_blocks = nn.ModuleList(UpStage(config, motion, level) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        features: Sequence[Tensor] | None = None,
        skip_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        motion: bool = True,
        remembered: Remembered | None = None,
    ) -> Tensor:
        """Noisy latents (B, C, F, h, w), timesteps (B,) or 0-dim -> prediction (B, C', F, h, w), dtype of x.

        text: (B, L, D), or (B * F, L, D) with one text for each frame.
        features: one (B, C, F, h, w) for each down block, added before the motion module of its second layer
            (of its only one where it has one), as AnimateLCM's image encoder does. diffusers adds T2I-Adapter
            features at the last layer of a ``CrossAttnDownBlock2D``, the same for up to two layers, and after
            the downsampling of a ``DownBlock2D``, the same for the last block.
        skip_residuals: one (B, C, F, h, w) for each skip connection, as ControlNet's, conv_in's first.
        mid_residual: (B, C, F, h, w), as ControlNet's.
        timestep_cond: (B, time_cond_proj_dim), added to the timestep's sinusoid.
        motion: False leaves the motion modules out: every frame is an image by itself.
        remembered: what ``remember`` made of this timestep and this text, in place of computing it again.

        Raises ValueError for wrong counts, and for more frames than the motion modules have positions.
        """
        B, _, frames, _, _ = x.shape
        self._check(B, frames, text, features, skip_residuals)
        if remembered is None:
            emb, text = self._emb(t.expand(B), timestep_cond), text.to(self.dtype)
        else:
            emb, text = remembered
        time = frames if motion and self.motion is not None else None
        if time is not None and frames > self.motion.max_frames:
            raise ValueError(f"frames={frames}: this network's motion modules take 1..{self.motion.max_frames}")

        h = self.conv_in(_flat(x.to(self.dtype)))
        skips = [h]
        for i, block in enumerate(self.down_blocks):
            feature = None if features is None else _flat(features[i]).to(h.dtype)
            skips += block(skips[-1], emb, text, time, feature)
        h = self.mid_block(skips[-1], emb, text, time)
        if skip_residuals is not None:
            skips = [skip + _flat(more).to(h.dtype) for skip, more in zip(skips, skip_residuals, strict=True)]
        if mid_residual is not None:
            h = h + _flat(mid_residual).to(h.dtype)
        for block in self.up_blocks:
            h = block(h, emb, text, time, skips)
        h = self.conv_out(self.conv_norm_out(h))
        return h.unflatten(0, (B, frames)).transpose(1, 2).to(x.dtype)

    def remember(self, t: Tensor, text: Tensor, timestep_cond: Tensor | None = None) -> list[Remembered]:
        """What all layers make of each of the timesteps t (S,) and of a text (B, L, D), for ``forward``: one for each
        timestep, the text's shared. timestep_cond: (1, time_cond_proj_dim). Of no use once weights change.
        """
        emb, text = self._emb(t, timestep_cond), text.to(self.dtype)
        texts = {m.attn2: m.attn2.fold(text) for m in self.modules() if isinstance(m, TransformerBlock)}
        shifts = {m: m.fold(emb) for m in self.modules() if isinstance(m, ResnetBlock)}
        kernels = {m: Kept() for m in self.modules() if isinstance(m, Upsampler)}
        return [Remembered({m: s[i] for m, s in shifts.items()} | kernels, texts) for i in range(len(t))]

    def _emb(self, t: Tensor, timestep_cond: Tensor | None) -> Tensor:
        """Timesteps (B,) -> (B, E), after its activation."""
        return F.silu(self.time_embedding(t, timestep_cond))

    def _check(
        self,
        batch: int,
        frames: int,
        text: Tensor,
        features: Sequence[Tensor] | None,
        skip_residuals: Sequence[Tensor] | None,
    ) -> None:
        if text.shape[0] not in (batch, batch * frames):
            raise ValueError(f"text: {text.shape[0]} given for {batch} videos of {frames} frames; give one a video")
        if features is not None and len(features) != len(self.down_blocks):
            raise ValueError(f"features: {len(features)} given; give {len(self.down_blocks)}, one a down block")
        skips = self.config.num_skips
        if skip_residuals is not None and len(skip_residuals) != skips:
            raise ValueError(f"skip_residuals: {len(skip_residuals)} given; give {skips}, one a skip connection")

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the inputs of each layer, spatial and temporal; compute it again in the backward pass."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.checkpointing = enabled

    def join_projections(self) -> None:
        """Lay the weights for queries, keys and values of attention to themselves beside each other: one product of
        pixels or frames, not three."""
        for module in self.modules():
            if isinstance(module, TransformerBlock | TemporalAttention):
                (module.attn1 if isinstance(module, TransformerBlock) else module).join()

    def positions(self) -> dict[str, Tensor]:
        """The motion modules' positions as diffusers' MotionAdapter names them, each (1, max_frames, C)."""
        return {
            f"{name.removesuffix('.positions')}.transformer_blocks.{i}.pos_embed.pe": buffer[None]
            for name, buffer in self.named_buffers()
            if name.endswith(".positions")
            for i in range(self.motion.layers)
        }


def _flat(video: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B * F, C, h, w) in channels-last order."""
    return video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
