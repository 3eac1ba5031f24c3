"""The layers that every stage is made of, with diffusers' parameter names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from animatelcm.nets.unet import UNetConfig


class GroupNorm(nn.GroupNorm):
    """GroupNorm of channels-last images to channels-last images, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        # The first trained layer behind frozen ones: where weights need a gradient and the input does not,
        # the backward pass of torch's channels-last CPU kernel crashes (2.13 does); its other kernel works.
        if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
            x = x.contiguous()
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split into {heads} attention heads; choose a divisor")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens x (N, P, C), context (B, L, D) -> (N, P, C); N is a multiple of B.

        The N / B frames of a video become one long query, so that a text's keys and values are computed once.
        """
        context = x if context is None else context
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.reshape(context.shape[0], -1, self.heads, y.shape[-1] // self.heads) for y in projected)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out(y.transpose(1, 2).reshape(x.shape))


class GatedGelu(nn.Module):
    """Linear map to twice the width; one half gates the other (GEGLU)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear maps with a gated GELU between; four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 4 * channels
        # The identity keeps diffusers' numbering: net.0.proj and net.2, with a dropout between them.
        self.net = nn.Sequential(GatedGelu(channels, width), nn.Identity(), nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TimeEmbedding(nn.Module):
    """Timesteps, and optionally a second condition such as guidance, as one vector."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[0]
        self.cosine_first, self.shift = config.flip_sin_to_cos, config.freq_shift
        self.linear_1 = nn.Linear(channels, config.emb_channels)
        self.cond_proj = None
        if config.time_cond_proj_dim is not None:
            self.cond_proj = nn.Linear(config.time_cond_proj_dim, channels, bias=False)
            nn.init.zeros_(self.cond_proj.weight)
        self.linear_2 = nn.Linear(config.emb_channels, config.emb_channels)

    def forward(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """Timesteps (B,), condition (B, K) -> (B, E)."""
        x = self._sinusoid(t).to(self.linear_1.weight.dtype)
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond was given to a network without time_cond_proj_dim; leave it out")
            x = x + self.cond_proj(condition.to(x.dtype))
        return self.linear_2(F.silu(self.linear_1(x)))

    def _sinusoid(self, t: Tensor) -> Tensor:
        """Timesteps (B,) -> (B, C) in float32: float16 cannot tell neighbouring angles apart."""
        half = self.linear_1.in_features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.shift)
        angles = t[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        waves = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return torch.cat(waves, dim=-1)
