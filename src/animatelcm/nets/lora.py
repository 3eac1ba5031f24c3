"""LoRA layers in a live network, for training: PEFT's, put in and taken out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from animatelcm.nets import fused
from animatelcm.weights.fuse import fused as summed
from animatelcm.weights.lora import Lora, LoraLayer, plain

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer as PeftLayer

ADAPTER = "lora"


def inject(network: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add fresh LoRA layers (A random, B zero: no effect yet) to the spatial layers whose names end in ``targets``.

    Parameters are then ``<module>.lora_A.lora.weight`` and ``lora_B``, the others ``<module>.base_layer.weight``; all
    are frozen. Raises ValueError where a target names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert not factors(network), "this network has LoRA layers already"
    maps = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    spatial = [name for name in maps if "motion_modules" not in name]
    if idle := [target for target in targets if not any(_ends(name, target) for name in spatial)]:
        raise ValueError(
            f"LoRA target {idle[0]!r} names no spatial layer of this network; give the end of a layer's name"
        )
    chosen = [name for name in spatial if any(_ends(name, target) for target in targets)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, chosen)))
    inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    del network.peft_config  # PEFT's own note, which would outlive the layers
    for _, layer in layers(network):
        layer.cast_input_dtype_enabled = False  # under autocast the layer's input has the right type already
        layer.forward = partial(_forward, layer)
    network.requires_grad_(False).to(memory_format=torch.channels_last)


def _forward(layer: PeftLayer, x: Tensor) -> Tensor:
    """The layer's result. Where its factors want no gradients, their product is added to the weight for this call: one
    map in place of three, and no second copy of the network's weights."""
    base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if layer.disable_adapters:
        return base(x)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return type(layer).forward(layer, x)
    weight = base.weight + layer.scaling[ADAPTER] * (b.flatten(1) @ a.flatten(1)).view_as(base.weight)
    if isinstance(base, nn.Linear):
        return fused.linear(x, weight, base.bias)
    return base._conv_forward(x, weight, base.bias)


@torch.no_grad()
def attach(network: nn.Module, lora: Lora) -> None:
    """Put a LoRA (its module paths begin with ``unet.``) into the network as layers, frozen, at scale 1.

    Raises ValueError where its layers differ in rank or alpha, or do not fit the network's spatial layers; nothing has
    changed then.
    """
    lora = plain(lora, Path("the LoRA to train with"))
    ranks = sorted({(layer.rank, layer.alpha) for layer in lora.values()})
    if len(ranks) != 1:
        raise ValueError(f"a LoRA to train with needs one rank and one alpha for all layers, got {ranks[:3]}")
    own = {f"unet.{name}": value for name, value in network.state_dict().items()}
    summed(own, [(lora, 0.0)])  # raises if it cannot
    paths = [path.removeprefix("unet.") for path in lora]
    inject(network, rank=ranks[0][0], alpha=ranks[0][1], targets=paths)
    for path, (a, b, _) in factors(network).items():
        layer = lora[f"unet.{path}"]
        a.copy_(layer.down.reshape(a.shape))
        b.copy_(layer.up.reshape(b.shape))


def eject(network: nn.Module, part: str = "unet") -> Lora:
    """Take the LoRA layers out and return copies, their paths beginning with ``part``; the network is what it was
    before, names and values."""
    live = factors(network).items()
    taken = {f"{part}.{path}": LoraLayer(a.detach().clone(), b.detach().clone(), alpha) for path, (a, b, alpha) in live}
    for path, layer in list(layers(network)):
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    return taken


@contextmanager
def off(network: nn.Module) -> Iterator[None]:
    """The network without its LoRA layers for a while: they are passed by, not multiplied by zero."""
    found = [layer for _, layer in layers(network)]
    for layer in found:
        layer._disable_adapters = True  # what enable_adapters(False) sets, without its changes to requires_grad
    try:
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False


def layers(network: nn.Module) -> Iterator[tuple[str, PeftLayer]]:
    """Module path -> LoRA layer."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, PeftLayer))


def factors(network: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
    """Module path -> (A (r, in[, k, k]), B (out, r[, 1, 1]), alpha): the live parameters."""
    return {
        name: (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, float(layer.lora_alpha[ADAPTER]))
        for name, layer in layers(network)
    }


def scaled(network: nn.Module, scale: float) -> dict[str, Tensor]:
    """Overrides that give every LoRA this scale without touching it: 0 is the network without them."""
    return {f"{name}.lora_B.{ADAPTER}.weight": scale * b.detach() for name, (_, b, _) in factors(network).items()}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
