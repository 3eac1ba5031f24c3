"""LoRA layers in a live network, for training: PEFT's, put in and taken out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from animatelcm.nets.unet import VideoUNet
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import Lora, LoraLayer

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer as PeftLayer

ADAPTER = "lora"


def inject(unet: VideoUNet, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add fresh LoRA layers (A random, B zero: no effect yet) to the spatial layers whose names end in ``targets``.

    Parameters are then ``<module>.lora_A.lora.weight`` and ``lora_B``, the others ``<module>.base_layer.weight``; all
    are frozen. Raises ValueError where a target names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert not factors(unet), "this network has LoRA layers already"
    maps = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    spatial = [name for name in maps if "motion_modules" not in name]
    if idle := [target for target in targets if not any(_ends(name, target) for name in spatial)]:
        raise ValueError(
            f"LoRA target {idle[0]!r} names no spatial layer of this network; give the end of a layer's name"
        )
    chosen = [name for name in spatial if any(_ends(name, target) for target in targets)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, chosen)))
    inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    del unet.peft_config  # PEFT's own note, which would outlive the layers
    for _, layer in layers(unet):
        layer.cast_input_dtype_enabled = False  # under autocast the layer's input has the right type already
    unet.requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def attach(unet: VideoUNet, lora: Lora) -> None:
    """Put a LoRA (its module paths begin with ``unet.``) into the network as layers, frozen, at scale 1.

    Raises ValueError where its layers differ in rank or alpha, or do not fit the network's spatial layers; nothing has
    changed then.
    """
    ranks = sorted({(layer.rank, layer.alpha) for layer in lora.values()})
    if len(ranks) != 1:
        raise ValueError(f"a LoRA to train with needs one rank and one alpha for all layers, got {ranks[:3]}")
    fused({f"unet.{name}": value for name, value in unet.state_dict().items()}, [(lora, 0.0)])  # raises if it cannot
    paths = [path.removeprefix("unet.") for path in lora]
    inject(unet, rank=ranks[0][0], alpha=ranks[0][1], targets=paths)
    for path, (a, b, _) in factors(unet).items():
        layer = lora[f"unet.{path}"]
        a.copy_(layer.down.reshape(a.shape))
        b.copy_(layer.up.reshape(b.shape))


def eject(unet: VideoUNet) -> Lora:
    """Take the LoRA layers out and return copies; the network is what it was before, names and values."""
    live = factors(unet).items()
    taken = {f"unet.{path}": LoraLayer(a.detach().clone(), b.detach().clone(), alpha) for path, (a, b, alpha) in live}
    for path, layer in list(layers(unet)):
        parent, _, child = path.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    return taken


@contextmanager
def off(unet: VideoUNet) -> Iterator[None]:
    """The network without its LoRA layers for a while: they are passed by, not multiplied by zero."""
    found = [layer for _, layer in layers(unet)]
    for layer in found:
        layer._disable_adapters = True  # what enable_adapters(False) sets, without its changes to requires_grad
    try:
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False


def layers(unet: VideoUNet) -> Iterator[tuple[str, PeftLayer]]:
    """Module path -> LoRA layer."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    return ((name, module) for name, module in unet.named_modules() if isinstance(module, PeftLayer))


def factors(unet: VideoUNet) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
    """Module path -> (A (r, in[, k, k]), B (out, r[, 1, 1]), alpha): the live parameters."""
    return {
        name: (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, float(layer.lora_alpha[ADAPTER]))
        for name, layer in layers(unet)
    }


def scaled(unet: VideoUNet, scale: float) -> dict[str, Tensor]:
    """Overrides that give every LoRA this scale without touching it: 0 is the network without them."""
    return {f"{name}.lora_B.{ADAPTER}.weight": scale * b.detach() for name, (_, b, _) in factors(unet).items()}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
