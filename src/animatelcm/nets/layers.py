"""The layers that every stage is made of, with diffusers' parameter names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets import fused, lean

if TYPE_CHECKING:
    from animatelcm.nets.unet import UNetConfig


class Linear(nn.Linear):
    """Linear map over the last dimension."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., C), and what to add to the result (..., C') -> (..., C')."""
        return fused.linear(x, self.weight, self.bias, residual)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution; ``nn.Conv2d``'s arguments, with a kernel of 1."""

    def forward(self, x: Tensor) -> Tensor:
        return fused.pointwise(x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of channels-last images to channels-last images, on every device; with SiLU behind it where asked."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        # The first trained layer behind frozen ones: where weights need a gradient and the input does not,
        # the backward pass of torch's channels-last CPU kernel crashes (2.13 does); its other kernel works.
        if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
            x = x.contiguous()
        return fused.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu)


class KeysValues(NamedTuple):
    """What a context is to one attention layer: keys and values, each (B, heads, L, C / heads)."""

    keys: Tensor
    values: Tensor


class Folded(NamedTuple):
    """The same, with the maps to queries and from values multiplied in: tokens (B, P, C) times ``keys`` are attention
    weights before their softmax over L, and those times ``values`` the layer's result without its bias."""

    keys: Tensor
    """(B, C, heads * L)."""
    values: Tensor
    """(B, heads * L, C)."""


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split into {heads} attention heads; choose a divisor")
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels or channels, channels, bias=False)
        self.to_v = Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | Memory | None = None) -> Tensor:
        """Tokens x (N, P, C), context (B, L, D) or what is remembered of it -> (N, P, C); N is a multiple of B.

        The N / B frames of a video become one long query, so that a text's keys and values are computed once.
        """
        if context is None:
            q, k, v = (self._split(part, x.shape[0]) for part in self.project(x))
        else:
            remembered = context[self] if isinstance(context, dict) else self.remember(context)
            if isinstance(remembered, Folded):
                return self._folded(x, remembered)
            k, v = remembered
            q = self._split(self.to_q(x), k.shape[0])
        return self.to_out(fused.attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (..., C) -> queries, keys and values of the tokens themselves, each (..., C)."""
        weight = self._joined()
        if weight is None:
            return self.to_q(x), self.to_k(x), self.to_v(x)
        return fused.linear(x, weight, None).chunk(3, dim=-1)

    @torch.no_grad()
    def join(self) -> None:
        """Lay the weights of queries, keys and values beside each other in memory, for one product instead of three.

        They stay parameters of their own; what moves one of them away ends it, and nothing else.
        """
        layers = (self.to_q, self.to_k, self.to_v)
        if self.to_k.weight.shape == self.to_q.weight.shape:
            whole = torch.cat([layer.weight for layer in layers])
            for layer, part in zip(layers, whole.chunk(3), strict=True):
                layer.weight.data = part

    def _joined(self) -> Tensor | None:
        """The three weights as one (3 C, C), a view of the queries', where they lie beside each other and none of them
        is trained: gradients would all be the queries'."""
        layers = (self.to_q, self.to_k, self.to_v)
        if torch.compiler.is_compiling() or any(type(layer) is not Linear for layer in layers):
            return None
        q, k, v = (layer.weight for layer in layers)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return None
        start, size = q.storage_offset(), q.numel()
        if (k.storage_offset(), v.storage_offset()) != (start + size, start + 2 * size):
            return None
        if not q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
            return None
        return q.as_strided((3 * q.shape[0], q.shape[1]), (q.shape[1], 1))

    def remember(self, context: Tensor) -> KeysValues:
        """Context (B, L, D) -> its keys and values."""
        return KeysValues(*(self._split(project(context), context.shape[0]) for project in (self.to_k, self.to_v)))

    def fold(self, context: Tensor) -> Folded | KeysValues:
        """As ``remember``, folded where that is less work: on CPUs, without gradients, for short contexts."""
        known, (channels, length) = self.remember(context), (self.to_q.in_features, context.shape[1])
        plain = type(self.to_q) is Linear and type(self.to_out[0]) is Linear
        if not plain or (self.heads - 1) * length > channels or not fused.foldable(context):
            return known
        queries = known.keys.shape[-1] ** -0.5 * self.to_q.weight.unflatten(0, (self.heads, -1))
        out = self.to_out[0].weight.unflatten(1, (self.heads, -1))
        keys = torch.einsum("bhld,hdc->bchl", known.keys, queries).flatten(2)
        return Folded(keys.contiguous(), torch.einsum("bhld,chd->bhlc", known.values, out).flatten(1, 2).contiguous())

    def _folded(self, x: Tensor, known: Folded) -> Tensor:
        scores = torch.bmm(x.reshape(len(known.keys), -1, x.shape[-1]), known.keys)
        weights = scores.unflatten(2, (self.heads, -1)).softmax(-1).flatten(2)
        return torch.baddbmm(self.to_out[0].bias, weights, known.values).view(x.shape)

    def _split(self, tokens: Tensor, batch: int) -> Tensor:
        """(N, P, C) -> (B, heads, N P / B, C / heads), a view."""
        return tokens.reshape(batch, -1, self.heads, tokens.shape[-1] // self.heads).transpose(1, 2)


class Shift(NamedTuple):
    """What a convolution adds to every pixel at a timestep: its bias and the embedding's share, (1, C)."""

    bias: Tensor
    kept: fused.Kept


Memory = dict[nn.Module, "KeysValues | Folded | Shift | Tensor | fused.Kept"]
"""What a layer made of the text, of the timestep or of its weights before, by the layer."""


class GatedGelu(nn.Module):
    """Linear map to twice the width; one half gates the other (GEGLU)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.proj) is Linear:
            return fused.geglu(x, self.proj.weight, self.proj.bias)
        return fused.gated(self.proj(x))  # LoRA layers stand there in training


class FeedForward(nn.Module):
    """Two linear maps with a gated GELU between; four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 4 * channels
        # The identity keeps diffusers' numbering: net.0.proj and net.2, with a dropout between them.
        self.net = nn.Sequential(GatedGelu(channels, width), nn.Identity(), Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        last = self.net[2]
        if lean.usable() and type(last) is Linear:
            return lean.gated_linear(self.net[0].proj(x), last.weight, last.bias)
        return self.net(x)


class TimeEmbedding(nn.Module):
    """Timesteps, and optionally a second condition such as guidance, as one vector."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[0]
        self.cosine_first, self.shift = config.flip_sin_to_cos, config.freq_shift
        self.linear_1 = Linear(channels, config.emb_channels)
        self.cond_proj = None
        if config.time_cond_proj_dim is not None:
            self.cond_proj = Linear(config.time_cond_proj_dim, channels, bias=False)
            nn.init.zeros_(self.cond_proj.weight)
        self.linear_2 = Linear(config.emb_channels, config.emb_channels)

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
