"""What a training run will cost, before any weight is loaded: counted on tensors that have shapes and no memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from animatelcm.config import LCM_TARGETS, LoraConfig, TrainConfig
from animatelcm.nets import emoji, lora, sd15
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet

GIB = 2**30
Inputs = tuple[Tensor, Tensor, Tensor]
"""Latents (B, C, F, h, w), timesteps (B,), text (B, L, D)."""


class Shapes(NamedTuple):
    """What a UNet of a family is built with and fed with."""

    unet: UNetConfig
    motion: MotionConfig
    tokens: int
    downscale: int
    """Pixels a latent cell covers on each side."""
    rank: int
    """Of stage 1's LoRA, as its recipe has it."""


EMOJI = Shapes(UNetConfig.from_diffusers(emoji.UNET), emoji.MOTION, emoji.TOKENS, downscale=8, rank=16)
SD15 = Shapes(UNetConfig.from_diffusers(sd15.UNET), sd15.MOTION, sd15.TOKENS, sd15.DOWNSCALE, rank=64)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the UNet costs in one optimiser step on one device; autoencoder and text encoder are small beside it."""

    parameters: int
    """Spatial layers, LoRA layers, and temporal ones where clips are seen."""
    trainable: int
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention, of every role."""
    weights_gib: float
    """Weights, gradients, Adam's two moments, averages, the teacher's temporal layers, all in float32."""
    activations_gib: float
    """What the student's forward pass keeps for the backward pass, taken to be of the run's precision. What gradient
    checkpointing computes again, one layer at a time, comes on top."""

    def text(self) -> str:
        """One line a cost."""
        return "\n".join(
            f"{name:>16}  {value:,.2f}" if isinstance(value, float) else f"{name:>16}  {value:,}"
            for name, value in asdict(self).items()
        )


def plan(config: TrainConfig) -> Plan:
    """Count a run of the miniature or, where the data is a folder, of Stable Diffusion 1.5. Weights are not needed.

    Raises ValueError for an autoencoder, whose size is not counted.
    """
    if config.trainable == "autoencoder":
        raise ValueError(f"{config.name} trains an autoencoder; plans are counted for what trains a UNet")
    shapes = EMOJI if _of_miniature(config) else SD15
    with torch.device("meta"):
        inputs = _inputs(config, shapes)
        unet = _network(config, shapes, motion=inputs[0].shape[2] > 1)
    forward, backward, kept = _count(unet, inputs)
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    trained = {name: size for name, size in sizes.items() if _trains(config, name)}
    distils = config.objective == "consistency"
    evaluations = 4 if distils else 1  # the student's, the target's, the teacher's with and without text
    copies = 5 if distils else 4  # gradient, two moments, the average that is sampled, and the target
    teacher = sum(size for name, size in trained.items() if distils and "motion_modules" in name)
    every, updated = sum(sizes.values()), sum(trained.values())
    return Plan(
        parameters=every,
        trainable=updated,
        flops=evaluations * forward + backward,
        weights_gib=4 * (every + copies * updated + teacher) / GIB,
        activations_gib=kept / (1 if config.mixed_precision == "no" else 2) / GIB,
    )


def _of_miniature(config: TrainConfig) -> bool:
    if config.model in ("emoji", "new") or config.data.kind != "folder":
        return True
    facts = Path(config.model) / "unet" / "config.json"
    return facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["sample_size"] == emoji.UNET["sample_size"]


def _inputs(config: TrainConfig, shapes: Shapes) -> Inputs:
    frames = 1 if config.data.kind == "emoji-images" else config.data.num_frames
    cells = (config.data.height // shapes.downscale, config.data.width // shapes.downscale)
    return (
        torch.empty(config.batch_size, shapes.unet.in_channels, frames, *cells),
        torch.empty(config.batch_size, dtype=torch.long),
        torch.empty(config.batch_size, shapes.tokens, shapes.unet.cross_attention_dim),
    )


def _network(config: TrainConfig, shapes: Shapes, *, motion: bool) -> VideoUNet:
    """The network of a run, with what trains asking for gradients."""
    unet = VideoUNet(shapes.unet, shapes.motion if motion else None)
    if (layers := _lora(config, shapes)) is not None:
        lora.inject(unet, rank=layers.rank, alpha=layers.alpha, targets=layers.targets)
    unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(_trains(config, name))
    return unet


def _lora(config: TrainConfig, shapes: Shapes) -> LoraConfig | None:
    """The LoRA layers of a run: its own, or stage 1's, taken to be of the usual rank."""
    if config.lora is not None or config.objective != "consistency":
        return config.lora
    return LoraConfig(rank=shapes.rank, targets=LCM_TARGETS)


def _trains(config: TrainConfig, name: str) -> bool:
    if ".lora_A." in name or ".lora_B." in name:
        return config.trains_lora
    return config.trainable == ("motion" if "motion_modules" in name else "image")


def _count(unet: VideoUNet, inputs: Inputs) -> tuple[int, int, int]:
    """FLOPs of a forward and of its backward pass, and the bytes in float32 that the first keeps for the second."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter, _fused_attention():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet(*inputs, motion=unet.motion is not None).sum()
        forward = counter.get_total_flops()
        loss.backward()
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    return forward, counter.get_total_flops() - forward, kept


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as accelerators compute it, in one operation: on tensors without memory torch would spell it out in
    matrix products, which keep every attention weight for the backward pass."""
    spelled_out = F.scaled_dot_product_attention
    # A TorchFunctionMode would not reach what checkpointing computes again: it is off during a backward pass.
    F.scaled_dot_product_attention = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = spelled_out
