"""Operations of training that keep less for their backward pass: what is quickly made again is made again.

Values and gradients are those of the plain operations; none can be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def usable() -> bool:
    """Where gradients are wanted; compilers decide by themselves what they keep."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def casts(x: Tensor) -> bool:
    """Whether autocast chooses types for operations on x: ``norm_silu`` would pass it by."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def gated(h: Tensor) -> Tensor:
    """(..., 2 W) -> (..., W): the first half times the GELU of the second. Keeps h alone; plainly, the GELU too."""
    return _Gated.apply(h)


def gated_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gated`` h (..., 2 W) by weight (C, W) and bias (C) -> (..., C). Keeps h alone; plainly, twice as much."""
    return _GatedLinear.apply(h, weight, bias)


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm of channels-last images (N, C, h, w) with SiLU behind it, on CPUs: CUDA's bare operation refuses their
    order. Keeps x and its statistics; plainly, what is between too."""
    return _NormSilu.apply(x, weight, bias, groups, eps)


def _gate(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def _gate_backward(grad: Tensor, h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    found = torch.empty_like(h)
    to_value, to_gate = found.chunk(2, dim=-1)
    torch.mul(grad, F.gelu(gate), out=to_value)
    to_gate.copy_(torch.ops.aten.gelu_backward(grad * value, gate))
    return found


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.save_for_backward(h)
        return _gate(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return _gate_backward(grad, *ctx.saved_tensors)


class _GatedLinear(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(h, weight)
        return F.linear(_gate(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (h, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        to_weight = (flat.T @ _gate(h).flatten(0, -2).to(grad.dtype)).to(weight.dtype) if wanted[1] else None
        to_bias = flat.sum(0).to(weight.dtype) if wanted[2] else None
        to_h = _gate_backward((grad @ weight.to(grad.dtype)).to(h.dtype), h) if wanted[0] else None
        return to_h, to_weight, to_bias


class _NormSilu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:  # noqa: ANN401
        (batch, channels), pixels = x.shape[:2], x.shape[2:].numel()
        y, mean, deviation = torch.native_group_norm(x, weight, bias, batch, channels, pixels, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.groups = groups
        return F.silu(y.contiguous(memory_format=torch.channels_last), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, bias, mean, deviation = ctx.saved_tensors
        (batch, channels), pixels = x.shape[:2], x.shape[2:].numel()
        scale = (deviation[..., None] * weight.view(ctx.groups, -1)).view(batch, channels, 1, 1)
        shift = bias.view(ctx.groups, -1) - mean[..., None] * scale.view(batch, ctx.groups, -1)
        y = torch.addcmul(shift.view(batch, channels, 1, 1), x, scale)
        grad, order = torch.ops.aten.silu_backward(grad, y), torch.channels_last
        grad = grad.contiguous(memory_format=order if x.is_contiguous(memory_format=order) else torch.contiguous_format)
        found = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, deviation, weight, batch, channels, pixels, ctx.groups, list(ctx.needs_input_grad[:3])
        )
        return *found, None, None
