"""Single operations as fast as the device has them where no gradients are wanted; the plain ones are the truth.

On a GPU they are the kernels of ``nets.kernels``, on a CPU oneDNN's operations, which add a bias and multiply by a gate
while a product is still in the cache. Training steps take the operations of ``nets.lean`` where those keep less, and
everything else torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.nets import kernels, lean

ONEDNN = torch.backends.mkldnn.is_available()
CPU_TYPES = (torch.float32, torch.bfloat16)
"""What oneDNN's operations are fast with."""
MAX_ROWS = 65_535
"""Sequences in one attention call of torch's: more do not fit a dimension of a CUDA launch grid."""
SMALL_SCORES = 2**20
"""Attention weights in one call up to which a CPU is faster with them spelled out (4 MiB, what its caches hold)."""
SMALL_KERNEL = 2**20
"""Weights of a convolution up to which a CPU keeps them in its own order (4 MiB): the larger they are, the less it
takes to order them again, and the more to keep them."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x (..., C) by weight (C', C) and bias (C'), plus a residual (..., C') -> (..., C').

    torch would first write the bias out in full on a CPU, and add the residual in a pass of its own.
    """
    if _onednn(x):
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of images (N, C, h, w) with weight (C', C, 1, 1): a product of channels-last pixels."""
    if not _onednn(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias)
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Kept(dict[Tensor, list[Tensor]]):
    """Kernels that a convolution computes with in place of its weight, by the weight, once they were used."""


def convolution(x: Tensor, weight: Tensor, bias: Tensor, kept: Kept) -> Tensor:
    """A 3x3 convolution of images (N, C, h, w), padded by 1, with weight (C', C, 3, 3) and bias (C').

    oneDNN orders weights anew at each call; small ones are left in ``kept`` in its own order for the next.
    """
    if not _onednn(x) or x.dtype != torch.float32 or weight.numel() > SMALL_KERNEL:
        return F.conv2d(x, weight, bias, padding=1)
    if weight not in kept:
        kept[weight] = [_ordered(weight, x.shape, 1)]
    return _convolved(x, kept[weight][0], bias, 1)


def _ordered(weight: Tensor, shape: Sequence[int], padding: int) -> Tensor:
    """As oneDNN has it for images of a shape."""
    around = [padding, padding]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, around, [1, 1], [1, 1], 1, list(shape))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    around = [padding, padding]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, around, [1, 1], [1, 1], 1, "none", [], "")


def doubled(x: Tensor, weight: Tensor, bias: Tensor, kept: Kept | None = None) -> Tensor:
    """x (N, C, h, w) with every pixel repeated in both directions, convolved with weight (C', C, 3, 3) and bias (C').

    Where pixels are repeated, a window of 3x3 holds 2x2 different ones. So the four pixels that one becomes are four
    convolutions of 2x2, with weights summed beforehand: 4/9 of the products, and nothing is repeated in memory.
    """
    if not _onednn(x) or x.dtype != torch.float32:  # in half precision products are too cheap to be worth it
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    (batch, inputs, height, width), channels = x.shape, weight.shape[0]
    keeps = kept is not None and weight.numel() <= SMALL_KERNEL
    if keeps and weight not in kept:
        kept[weight] = [_ordered(kernel, (batch, inputs, height + 1, width + 1), 0) for kernel in _quarters(weight)]
    out = x.new_empty(batch, height, 2, width, 2, channels)
    for i, kernel in enumerate(kept[weight] if keeps else _quarters(weight)):
        below, right = divmod(i, 2)
        part = F.pad(x, (1 - right, right, 1 - below, below))
        part = _convolved(part, kernel, bias, 0) if keeps else F.conv2d(part, kernel, bias)
        out[:, :, below, :, right] = part.permute(0, 2, 3, 1)
    return out.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def _quarters(weight: Tensor) -> list[Tensor]:
    """(C', C, 3, 3) -> (C', C, 2, 2) for the pixel above left, above right, below left and below right."""
    first, middle, last = weight.unbind(2)
    found = []
    for row in (torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2)):
        first, middle, last = row.unbind(3)
        found += [torch.stack([first, middle + last], 3), torch.stack([first + middle, last], 3)]
    return [kernel.contiguous(memory_format=torch.channels_last) for kernel in found]


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., C) by weight (2 W, C) and bias (2 W): the first half times the GELU of the second -> (..., W)."""
    if _onednn(x):
        (value, gate), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
        gates = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, value_bias, "mul")
    return gated(linear(x, weight, bias))


def gated(x: Tensor) -> Tensor:
    """(..., 2 W) -> (..., W): the first half times the GELU of the second."""
    if kernels.usable(x):
        return kernels.geglu(x)
    if lean.usable():
        return lean.gated(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool) -> Tensor:
    """GroupNorm of channels-last images (N, C, h, w), and SiLU behind it where asked -> the same order."""
    if kernels.usable(x):
        return kernels.group_norm_silu(x, weight, bias, groups, eps, silu=silu)
    if silu and x.device.type == "cpu" and lean.usable() and not lean.casts(x):
        return lean.norm_silu(x, groups, weight, bias, eps)
    y = F.group_norm(x, groups, weight, bias, eps).contiguous(memory_format=torch.channels_last)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, ..., P, d), k and v (B, ..., L, d) -> softmax(q k^T / sqrt(d)) v, (B, ..., P, d)."""
    *many, length, width = q.shape
    scores = q.shape[:-1].numel() * k.shape[-2]
    if q.device.type != "cpu" or q.dtype not in CPU_TYPES or scores > SMALL_SCORES:
        if len(many) == 2:
            return F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(*(part.flatten(1, -3) for part in (q, k, v))).unflatten(1, many[1:])
    q, k, v = (part.flatten(0, -3) for part in (q, k, v))
    weights = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    return torch.bmm(weights.softmax(-1), v).view(*many, length, width)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for many short sequences, q, k and v (B, P, heads, F, d), of which torch gets at most ``MAX_ROWS`` at a
    time."""
    if kernels.usable(q) and q.shape[3] <= kernels.MAX_FRAMES and q.shape[4] <= kernels.MAX_WIDTH:
        return kernels.temporal_attention(q, k, v)
    pixels = max(1, MAX_ROWS // (q.shape[0] * q.shape[2]))
    if q.shape[1] <= pixels:
        return attention(q, k, v)
    parts = zip(*(x.split(pixels, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attention(*part) for part in parts], dim=1)


def foldable(x: Tensor) -> bool:
    """Whether maps that do not change are worth being multiplied beforehand: products cost a CPU what they are long."""
    return _onednn(x) and x.dtype == torch.float32


def _onednn(x: Tensor) -> bool:
    """oneDNN's fused operations know no gradients, no autocast, and no compiler, which fuses by itself."""
    return (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype in CPU_TYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )
