"""Group norms, GEGLU and attention over time in one pass over memory each: Triton kernels for GPUs, without gradients.

Triton is imported at the first launch. Each kernel is behind an operator of torch's (``torch.ops.animatelcm``), which
torch.compile takes whole. Block sizes follow from shapes by formula: a tuner would time its candidates at a first call,
which a CUDA graph may be recording. Nothing waits for the device, and sums have the same order in every run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor

DTYPES, TRITON = (torch.float16, torch.bfloat16, torch.float32), find_spec("triton") is not None
MAX_FRAMES, MAX_WIDTH = 64, 160  # of the kernel for attention: the longest sequence, the widest head
TILE = 2**13  # values that a block of 256 threads normalises: 32 each, all on their way at once
tl = constexpr = None  # Triton's language, once it is needed


def usable(x: Tensor) -> bool:
    """Whether the kernels take x: a float of at most 32 bits, on a GPU where Triton works, no gradients wanted."""
    known = TRITON and x.is_cuda and x.dtype in DTYPES and not torch.is_grad_enabled()
    return known and (torch.compiler.is_compiling() or _works(x.device))  # who compiles for GPUs has Triton


@cache
def _works(device: torch.device) -> bool:
    """Tries the smallest kernel: Triton also needs a C compiler, Python's headers and a GPU that is not too old."""
    try:
        geglu(torch.zeros(1, 2, device=device))
    except Exception as error:  # Triton's, the compiler's, the driver's
        warnings.warn(f"Triton does not work on {device}, torch's own operations are used: {error}", stacklevel=3)
        return False
    return True


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True) -> Tensor:
    """GroupNorm of images (N, C, h, w), and SiLU behind it where asked -> the same shape and dtype, channels last.

    Means and variances are an image's and group's, in float32, in two passes over values that are on the chip: a mean
    far from zero costs no digits. Other memory orders are copied first. Raises ValueError where shapes do not fit.
    """
    if x.ndim != 4 or x.shape[1] % groups or not x.shape[1:2] == weight.shape == bias.shape:
        shapes = f"{[*x.shape]} in {groups} groups with {[*weight.shape]} and {[*bias.shape]}"
        raise ValueError(f"group norm of {shapes}; give (N, C, h, w), a divisor of C, and (C,) twice")
    return torch.ops.animatelcm.group_norm_silu(x, weight, bias, groups, eps, silu)


def geglu(x: Tensor) -> Tensor:
    """(..., 2 W) -> (..., W): the first half times the exact GELU of the second, in float32."""
    if x.shape[-1] % 2:
        raise ValueError(f"geglu of {x.shape[-1]} channels; give an even number, values before gates")
    return torch.ops.animatelcm.geglu(x)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q, k, v (B, P, H, F, d) -> (B, P, H, F, d) in the memory order (B, F, P, H, d).

    Strides may be any if the last is 1. Sums and softmax are in float32. Sequences longer than ``MAX_FRAMES`` and heads
    wider than ``MAX_WIDTH`` are left to torch, which has a memory order of its own. Raises ValueError for other shapes.
    """
    if q.ndim != 5 or not q.shape == k.shape == v.shape:
        shapes = f"{[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        raise ValueError(f"attention of {shapes}; give three of one shape (B, P, H, F, d)")
    if q.shape[3] > MAX_FRAMES or q.shape[4] > MAX_WIDTH:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return torch.ops.animatelcm.temporal_attention(q, k, v)


def _operator(arguments: str, empty: Callable[..., Tensor]) -> Callable[[Callable[..., None]], None]:
    """Makes an operator of torch's of the function that fills what ``empty`` allocates, and takes its name."""

    def declare(fill: Callable[..., None]) -> None:
        def run(*given: Any) -> Tensor:  # noqa: ANN401 - the arguments
            y = empty(*given)
            with torch.cuda.device_of(y):
                fill(y, *given)
            return y

        name = f"animatelcm::{fill.__name__.lstrip('_')}"
        torch.library.define(name, f"({arguments}) -> Tensor")
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(name, empty)

    return declare


@_operator(
    "Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu",
    lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last),
)
def _group_norm_silu(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> None:
    """A group that fits a block is read once; others twice, in tiles of whole cache lines, by three kernels."""
    x = x.contiguous(memory_format=torch.channels_last)
    N, C, S, K = *x.shape[:2], x.shape[2:].numel(), x.shape[1] // groups
    rows, cols = _power_of_two(S), _power_of_two(K)
    if rows * cols <= 2 * TILE:
        warps = max(1, rows * cols // 1024)
        _kernel(_one_group)[N * groups,](x, y, weight, bias, S, C, eps, K, silu, rows, cols, num_warps=warps)
        return
    cols = min(64, _power_of_two(C))
    rows = min(rows, TILE // cols)
    chunks = -(-S // rows)
    grid, block = (N * chunks, -(-C // cols)), {"ROWS": rows, "COLS": cols, "num_warps": 8}
    means, squares = torch.empty(2, N * chunks * C, device=x.device)
    mean, rstd = torch.empty(2, N * groups, device=x.device)
    _kernel(_channel_moments)[grid](x, means, squares, S, C, chunks, **block)
    _kernel(_group_moments)[N * groups,](means, squares, mean, rstd, S, C, chunks, eps, K, rows, BLOCK=1024)
    _kernel(_apply)[grid](x, y, weight, bias, mean, rstd, S, C, chunks, K, silu, **block)


@_operator("Tensor x", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def _geglu(y: Tensor, x: Tensor) -> None:
    """A thread has 16 values, in loads of 16 bytes; 256 columns divide the widths of the networks of the field."""
    W = y.shape[-1]
    M, cols = y.numel() // W, min(256, _power_of_two(W))
    rows = min(2048 // cols, _power_of_two(M))
    _kernel(_gate)[-(-M // rows), -(-W // cols)](x.contiguous(), y, M, W, rows, cols, num_warps=4)


@_operator("Tensor q, Tensor k, Tensor v", lambda q, *_: _by_frame(q))
def _temporal_attention(y: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """A block has 64 frames, of as many sequences as that makes: heads of a pixel are neighbours in memory.

    Strides travel in a unit that divides them all, of 16 bytes at most: so Triton knows how wide loads may be.
    Products in float32 are no work of tensor cores: registers, more of them, hold fewer channels at a time.
    """
    q, k, v = (part if part.stride(4) == 1 else part.contiguous() for part in (q, k, v))
    B, pixels, heads, frames, width = q.shape
    R, strides = pixels * heads, [stride for part in (q, k, v) for stride in part.stride()[:4]]
    unit = gcd(16 // q.element_size(), *strides)
    padded = max(16, _power_of_two(frames))
    rows, blocks = 64 // padded, -(-R * padded // 64)
    cols, warps = (16, 8) if q.dtype == torch.float32 else (min(64, max(16, _power_of_two(width))), 4)
    sizes = (R, heads, frames, blocks, width**-0.5, *(stride // unit for stride in strides), width, unit)
    _kernel(_attend)[B * blocks,](q, k, v, y, *sizes, rows, padded, cols, num_warps=warps)


def _by_frame(x: Tensor) -> Tensor:
    """Memory for (B, P, H, F, d) in the order (B, F, P, H, d)."""
    return x.new_empty(x.permute(0, 3, 1, 2, 4).shape).permute(0, 2, 3, 1, 4)


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


@cache
def _kernel(function: Callable[..., None]) -> Any:  # noqa: ANN401 - Triton's
    """The kernel that Triton makes of a function below, whose names are this module's."""
    global tl, constexpr
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr

    return jit(function)


# ruff: noqa: ANN001, ANN202, N803 - from here on it is Triton's language, where annotations are its compiler's
# fmt: off
def _one_group(x, y, weight, bias, S, C, eps, K: constexpr, SILU: constexpr, ROWS: constexpr, COLS: constexpr):
    """A block has a group of an image for itself: (ROWS, COLS) of S pixels and K channels."""
    n, g = tl.program_id(0) // (C // K), tl.program_id(0) % (C // K)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    corner, inside = n.to(tl.int64) * S * C + g * K, (row < S) & (col < K)
    # Distances from one of the values: equal values have the distance 0, and not what rounding leaves of it.
    pivot = tl.load(x + corner).to(tl.float32)
    away = tl.where(inside, tl.load(x + corner + row * C + col, inside, 0.0).to(tl.float32) - pivot, 0.0)
    away = tl.where(inside, away - tl.sum(away) / (S * K), 0.0)
    rstd = tl.rsqrt(tl.sum(away * away) / (S * K) + eps)
    z = away * rstd * tl.load(weight + g * K + col, col < K, 0.0).to(tl.float32)
    z += tl.load(bias + g * K + col, col < K, 0.0).to(tl.float32)
    z = z / (1.0 + tl.exp(-z)) if SILU else z
    tl.store(y + corner + row * C + col, z.to(y.dtype.element_ty), inside)

def _channel_moments(x, means, squares, S, C, chunks, ROWS: constexpr, COLS: constexpr):
    """ROWS pixels of COLS channels -> the mean of each channel and its sum of squared distances from it."""
    n, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS
    row, c = tl.arange(0, ROWS)[:, None], (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    corner, inside = (n.to(tl.int64) * S + first) * C, (row < S - first) & (c < C)
    pivot = tl.load(x + corner + c, c < C, 0.0).to(tl.float32)
    away = tl.where(inside, tl.load(x + corner + row * C + c, inside, 0.0).to(tl.float32) - pivot, 0.0)
    shift = tl.sum(away, 0)[None, :] / tl.minimum(S - first, ROWS)
    away = tl.where(inside, away - shift, 0.0)
    tl.store(means + tl.program_id(0) * C + c, pivot + shift, c < C)
    tl.store(squares + tl.program_id(0) * C + c, tl.sum(away * away, 0)[None, :], c < C)

def _group_moments(means, squares, mean, rstd, S, C, chunks, eps, K: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """The moments of a group's channels in all chunks of an image -> its mean and one over its deviation."""
    corner = tl.program_id(0) // (C // K) * chunks * C + tl.program_id(0) % (C // K) * K
    pivot = tl.load(means + corner)
    shift, square = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, chunks * K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.where(i < chunks * K, tl.minimum(S - i // K * ROWS, ROWS), 0)
        shift += count * (tl.load(means + corner + i // K * C + i % K, i < chunks * K, 0.0) - pivot)
    shift = tl.sum(shift) / (S * K)
    for first in range(0, chunks * K, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.where(i < chunks * K, tl.minimum(S - i // K * ROWS, ROWS), 0)
        away = tl.load(means + corner + i // K * C + i % K, i < chunks * K, 0.0) - pivot - shift
        square += tl.load(squares + corner + i // K * C + i % K, i < chunks * K, 0.0) + count * away * away
    tl.store(mean + tl.program_id(0), pivot + shift)
    tl.store(rstd + tl.program_id(0), tl.rsqrt(tl.sum(square) / (S * K) + eps))

def _apply(x, y, weight, bias, mean, rstd, S, C, chunks,
           K: constexpr, SILU: constexpr, ROWS: constexpr, COLS: constexpr):
    """ROWS pixels of COLS channels, each by its group's mean and deviation."""
    n, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS
    row, c = tl.arange(0, ROWS)[:, None], (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    corner, inside, g = (n.to(tl.int64) * S + first) * C, (row < S - first) & (c < C), n * (C // K) + c // K
    away = tl.load(x + corner + row * C + c, inside, 0.0).to(tl.float32) - tl.load(mean + g, c < C, 0.0)
    z = away * (tl.load(rstd + g, c < C, 0.0) * tl.load(weight + c, c < C, 0.0).to(tl.float32))
    z += tl.load(bias + c, c < C, 0.0).to(tl.float32)
    z = z / (1.0 + tl.exp(-z)) if SILU else z
    tl.store(y + corner + row * C + c, z.to(y.dtype.element_ty), inside)

def _gate(x, y, M, W, ROWS: constexpr, COLS: constexpr):
    """x (M, 2 W) -> y (M, W)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    at, inside = row.to(tl.int64) * W, (row < M) & (col < W)
    value = tl.load(x + 2 * at + col, inside, 0.0).to(tl.float32)
    gate = tl.load(x + 2 * at + W + col, inside, 0.0).to(tl.float32)
    z = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + at + col, z.to(y.dtype.element_ty), inside)

def _attend(q, k, v, y, R, heads, frames, blocks, scale, q_b, q_p, q_h, q_f, k_b, k_p, k_h, k_f, v_b, v_p, v_h, v_f,
            D: constexpr, UNIT: constexpr, ROWS: constexpr, FRAMES: constexpr, COLS: constexpr):
    """ROWS sequences of frames: their whole attention at once, COLS of D channels after COLS."""
    b, r = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    r, f, d = r.to(tl.int64)[:, None, None], tl.arange(0, FRAMES)[None, :, None], tl.arange(0, COLS)[None, None, :]
    p, h = r // heads, r % heads
    q += (b * q_b + p * q_p + h * q_h + f * q_f) * UNIT
    k += (b * k_b + p * k_p + h * k_h + f * k_f) * UNIT
    v += (b * v_b + p * v_p + h * v_h + f * v_f) * UNIT
    y += ((b * frames + f) * R + r) * D
    scores = tl.full([ROWS, FRAMES, FRAMES], 0.0, tl.float32)
    for first in tl.static_range(0, D, COLS):
        inside = (r < R) & (f < frames) & (first + d < D)
        queries, keys = tl.load(q + first + d, inside, 0.0), tl.load(k + first + d, inside, 0.0)
        scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)), scores, input_precision="ieee")
    scores = tl.where(tl.arange(0, FRAMES)[None, None, :] < frames, scores * scale, -float("inf"))
    scores = tl.exp(scores - tl.max(scores, 2)[:, :, None])
    total = tl.sum(scores, 2)[:, :, None]
    for first in tl.static_range(0, D, COLS):
        inside = (r < R) & (f < frames) & (first + d < D)
        values = tl.load(v + first + d, inside, 0.0)
        z = tl.dot(scores.to(values.dtype), values, input_precision="ieee") / total
        tl.store(y + first + d, z.to(y.dtype.element_ty), inside)
