"""The sum of weights, w' = w0 + alpha style + beta image_acceleration (AnimateLCM, technical communication, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from animatelcm.weights.files import State
from animatelcm.weights.lora import Layer, Lora


def fused(base: Mapping[str, Tensor], parts: Sequence[tuple[Lora, float]]) -> State:
    """The tensors of ``base`` that (LoRA, scale) pairs change, by name, with base + sum(scale * delta) in them.

    The sum is float32 and rounded once; the result has the base's dtype, device and memory format. A scale of 0 is
    as if the part were not there; a negative one takes it away. Raises ValueError with the first key that does not fit.
    """
    check(base, parts)
    return dict(sums(base, parts))


def check(base: Mapping[str, Tensor], parts: Iterable[tuple[Lora, float]]) -> None:
    """Raises ValueError with the first key of a LoRA that does not fit."""
    for lora, scale in parts:
        _check(base, lora, scale)


def sums(base: Mapping[str, Tensor], parts: Sequence[tuple[Lora, float]]) -> Iterator[tuple[str, Tensor]]:
    """What ``fused`` returns, one (name, tensor) at a time and without its check: no second copy of all weights."""
    acting = [(lora, scale) for lora, scale in parts if scale]
    for module in sorted({module for lora, _ in acting for module in lora}):
        name = f"{module}.weight"
        yield name, _sum(base[name], ((lora[module], scale) for lora, scale in acting if module in lora))


@torch.no_grad()
def _sum(weight: Tensor, layers: Iterable[tuple[Layer, float]]) -> Tensor:
    total = weight.to(torch.float32, copy=True)
    for layer, scale in layers:
        total.add_(layer.to(weight.device).delta(weight.shape), alpha=scale)
    return total.to(weight.dtype)


def _check(base: Mapping[str, Tensor], lora: Lora, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} of a LoRA is no number to multiply by; 1 adds all of it, 0 nothing")
    for module in sorted(lora):
        key = f"{module}.weight"
        if key not in base:
            raise ValueError(f"{key} is changed by the LoRA and missing in the model; take one for this architecture")
        if not lora[module].fits(base[key].shape):
            raise ValueError(
                f"{key} is {tuple(base[key].shape)} in the model, and the LoRA is for {lora[module].shape}; "
                "take one for this architecture"
            )
