"""What a network's forward and backward pass cost, counted on tensors that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from animatelcm.nets.adapters import Clues
from animatelcm.nets.blocks import Stage
from animatelcm.roles import Role

ADAPTER = "adapter."
Inputs = tuple[Tensor, Tensor, Tensor]
"""Latents (B, C, F, h, w), timesteps (B,), text (B, L, D)."""


class _Flops(TorchDispatchMode):
    """A sum by torch's own formulas. Its ``FlopCounterMode`` also asks of each operation in which module it is, which
    takes as long again."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def parameters(role: Role) -> Iterator[tuple[str, nn.Parameter]]:
    """Of a network and, with ``ADAPTER`` before their names, of what stands beside it."""
    yield from role.network.named_parameters()
    if role.adapter is not None:
        yield from ((ADAPTER + name, parameter) for name, parameter in role.adapter.named_parameters())


def count(role: Role, inputs: Inputs, clues: Clues) -> tuple[int, int, int]:
    """FLOPs of a forward and of its backward pass, and the bytes in float32 that the first keeps for the second."""
    motion, weights = role.network.motion is not None, [parameter for _, parameter in parameters(role)]
    return counted(lambda: role(*inputs, motion=motion, clues=clues), weights)


def counted(forward: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> tuple[int, int, int]:
    """The same of any function with such weights."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with _Flops() as flops, _fused_attention():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward().sum()
        there = flops.total
        loss.backward()
    owned = {parameter.untyped_storage()._cdata for parameter in weights}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in owned)
    return there, flops.total - there, kept


def largest_layer(role: Role, inputs: Inputs, clues: Clues) -> int:
    """Bytes in float32 that the layer which keeps most of them keeps, when it is not spared: what is there beside the
    inputs of all others while its gradients are computed."""
    weights = {parameter.untyped_storage()._cdata for _, parameter in parameters(role)}
    stages = [module for module in role.network.modules() if isinstance(module, Stage)]
    kept: list[int] = []

    def counting(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:  # noqa: ANN401 - the layer's own
            saved: dict[int, torch.UntypedStorage] = {}

            def keep(tensor: Tensor) -> Tensor:
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor):
                result = layer(*arguments)
            kept.append(sum(storage.nbytes() for key, storage in saved.items() if key not in weights))
            return result

        return call

    role.network.enable_gradient_checkpointing(False)
    for stage in stages:
        stage._layer = counting(stage._layer)  # type: ignore[method-assign]
    with _fused_attention():
        role(*inputs, motion=role.network.motion is not None, clues=clues)
    return max(kept)


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as accelerators compute it, in one operation: on tensors without memory torch would spell it out in
    matrix products, which keep every attention weight for the backward pass."""
    spelled_out = F.scaled_dot_product_attention
    # A TorchFunctionMode would not reach what checkpointing computes again: it is off during a backward pass.
    F.scaled_dot_product_attention = _flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = spelled_out
