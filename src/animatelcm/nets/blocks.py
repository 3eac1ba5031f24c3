"""The stages of the UNet, with diffusers' parameter names; frames are (B * F, C, h, w), channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animatelcm.nets import fused
from animatelcm.nets.layers import Attention, FeedForward, GroupNorm, Linear, Memory, PointwiseConv, Shift
from animatelcm.nets.motion import MotionConfig, MotionModule

if TYPE_CHECKING:
    from animatelcm.nets.unet import UNetConfig


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps, silu=True)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(emb_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else PointwiseConv(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | Memory) -> Tensor:
        """Frames (N, C, h, w), time embedding after its activation (B, E) or what is remembered of it -> (N, C', h, w);
        N is a multiple of B."""
        shift = emb[self] if isinstance(emb, dict) else self.remember(emb)
        if isinstance(shift, Shift):
            h = fused.convolution(self.norm1(x), self.conv1.weight, shift.bias[0], shift.kept)
            h = fused.convolution(self.norm2(h), self.conv2.weight, self.conv2.bias, shift.kept)
            return self.conv_shortcut(x) + h
        h = self.conv1(self.norm1(x))
        h = h + (shift if len(shift) in (1, len(h)) else shift.repeat_interleave(len(h) // len(shift), 0))
        return self.conv_shortcut(x) + self.conv2(self.norm2(h))

    def remember(self, emb: Tensor) -> Tensor:
        """Time embedding (B, E) -> what it adds to every pixel, (B, C', 1, 1)."""
        return self.time_emb_proj(emb)[:, :, None, None]

    def fold(self, emb: Tensor) -> list[Shift] | list[Tensor]:
        """As ``remember``, for each of B timesteps by itself; with the convolution's bias where that is plain."""
        shift, kept = self.remember(emb), fused.Kept()
        if type(self.conv1) is not nn.Conv2d or type(self.conv2) is not nn.Conv2d:
            return list(shift.split(1))
        return [Shift(bias, kept) for bias in (shift.flatten(1) + self.conv1.bias).split(1)]


class TransformerBlock(nn.Module):
    """Attention of pixels to each other, to the text, and a feed-forward."""

    def __init__(self, channels: int, heads: int, text_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, text_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor | Memory) -> Tensor:
        """Tokens (N, P, C), text (B, L, D) -> (N, P, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of each frame, added to its input."""

    def __init__(
        self, channels: int, heads: int, text_channels: int, *, layers: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels) if linear else PointwiseConv(channels, channels, 1)
        blocks = (TransformerBlock(channels, heads, text_channels) for _ in range(layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(channels, channels) if linear else PointwiseConv(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor | Memory) -> Tensor:
        """Frames (N, C, h, w), text (B, L, D) -> (N, C, h, w)."""
        h, size = self.norm(x), x.shape[2:]
        tokens = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        h = _image(self.proj_out(tokens), size) if self.linear else self.proj_out(_image(tokens, size))
        return x + h


def _tokens(image: Tensor) -> Tensor:
    """(N, C, h, w) in channels-last order -> (N, h * w, C), a view."""
    return image.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(N, h * w, C) -> (N, C, h, w) in channels-last order, a view."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


class Downsampler(nn.Module):
    """Halve height and width by a strided convolution; odd sizes round up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    """Repeat pixels up to a given size, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int], emb: Tensor | Memory | None = None) -> Tensor:
        """``emb``: what is remembered, of this layer its kernels."""
        if type(self.conv) is nn.Conv2d and tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            kept = emb.get(self) if isinstance(emb, dict) else None
            return fused.doubled(x, self.conv.weight, self.conv.bias, kept)
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Stage(nn.Module):
    """Layers at one resolution: each convolves, then attends to space and text, then to time.

    ``level`` counts from the finest resolution; ``inputs`` are the channels that each layer receives.
    """

    checkpointing = False

    def __init__(
        self,
        config: UNetConfig,
        motion: MotionConfig | None,
        level: int,
        inputs: Sequence[int],
        *,
        attentions: int,
        motion_modules: int,
    ) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, config.emb_channels, groups, config.norm_eps) for width in inputs
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels,
                config.heads[level],
                config.cross_attention_dim,
                layers=config.depths[level],
                groups=groups,
                linear=config.use_linear_projection,
            )
            for _ in range(attentions)
        )
        self.motion_modules = nn.ModuleList()
        if motion is not None:
            self.motion_modules.extend(MotionModule(channels, motion) for _ in range(motion_modules))

    def run(
        self,
        i: int,
        x: Tensor,
        emb: Tensor | Memory,
        text: Tensor | Memory,
        frames: int | None,
        skip: Tensor | None = None,
        feature: Tensor | None = None,
    ) -> Tensor:
        """Layer i; ``frames`` of None leaves the motion module out. Checkpointing keeps only the inputs."""
        if self.checkpointing and torch.is_grad_enabled():
            arguments = (i, x, emb, text, frames, skip, feature)
            return checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._layer(i, x, emb, text, frames, skip, feature)

    def _layer(
        self,
        i: int,
        x: Tensor,
        emb: Tensor | Memory,
        text: Tensor | Memory,
        frames: int | None,
        skip: Tensor | None,
        feature: Tensor | None,
    ) -> Tensor:
        x = self.resnets[i](x if skip is None else torch.cat([x, skip], dim=1), emb)
        if i < len(self.attentions):
            x = self.attentions[i](x, text)
        if feature is not None:
            x = x + feature
        if frames is not None and i < len(self.motion_modules):
            x = self.motion_modules[i](x, frames)
        return x


class DownStage(Stage):
    """Stage on the way down; every layer's result is a skip connection, and so is the halved image."""

    def __init__(self, config: UNetConfig, motion: MotionConfig | None, level: int) -> None:
        before = config.block_out_channels[max(level - 1, 0)]
        inputs = [before, *[config.block_out_channels[level]] * (config.layers_per_block - 1)]
        attentions = len(inputs) if config.down_block_types[level] == "CrossAttnDownBlock2D" else 0
        super().__init__(config, motion, level, inputs, attentions=attentions, motion_modules=len(inputs))
        if level < len(config.block_out_channels) - 1:
            self.downsamplers = nn.ModuleList([Downsampler(config.block_out_channels[level])])
        else:
            self.downsamplers = None
        self.feature_layer = min(1, len(inputs) - 1)

    def forward(
        self, x: Tensor, emb: Tensor | Memory, text: Tensor | Memory, frames: int | None, feature: Tensor | None
    ) -> list[Tensor]:
        """-> skip connections, the last of which is the input of the next stage."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.run(i, x, emb, text, frames, None, feature if i == self.feature_layer else None)
            skips.append(x)
        if self.downsamplers is not None:
            skips.append(self.downsamplers[0](x))
        return skips


class MidStage(Stage):
    """Stage at the coarsest resolution: one whole layer and one that only convolves."""

    def __init__(self, config: UNetConfig, motion: MotionConfig | None) -> None:
        level = len(config.block_out_channels) - 1
        if motion is not None and not motion.use_mid_block:
            motion = None
        inputs = [config.block_out_channels[level]] * 2
        super().__init__(config, motion, level, inputs, attentions=1, motion_modules=1)

    def forward(self, x: Tensor, emb: Tensor | Memory, text: Tensor | Memory, frames: int | None) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.run(i, x, emb, text, frames)
        return x


class UpStage(Stage):
    """Stage on the way up; every layer takes one skip connection, the latest first."""

    def __init__(self, config: UNetConfig, motion: MotionConfig | None, level: int) -> None:
        widths = config.block_out_channels
        here, layers = widths[level], config.layers_per_block
        from_below = [widths[min(level + 1, len(widths) - 1)], *[here] * layers]
        from_skips = [*[here] * layers, widths[max(level - 1, 0)]]
        inputs = [a + b for a, b in zip(from_below, from_skips, strict=True)]
        attentions = len(inputs) if config.up_block_types[-1 - level] == "CrossAttnUpBlock2D" else 0
        super().__init__(config, motion, level, inputs, attentions=attentions, motion_modules=len(inputs))
        self.upsamplers = nn.ModuleList([Upsampler(here)]) if level > 0 else None

    def forward(
        self, x: Tensor, emb: Tensor | Memory, text: Tensor | Memory, frames: int | None, skips: list[Tensor]
    ) -> Tensor:
        """Takes its skip connections off the end of ``skips``; grows to the size of the next one."""
        for i in range(len(self.resnets)):
            x = self.run(i, x, emb, text, frames, skips.pop())
        if self.upsamplers is None:
            return x
        return self.upsamplers[0](x, skips[-1].shape[2:], emb)
