"""What a training run will cost, before any weight is loaded: counted on tensors that have shapes and no memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from animatelcm.config import LCM_TARGETS, LoraConfig, TrainConfig
from animatelcm.nets import emoji, lora, sd15
from animatelcm.nets.adapters import Adapter, Clues
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.roles import Role
from animatelcm.stages import fresh_adapter, with_checkpointing

GIB = 2**30
ADAPTER = "adapter."
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
    if config.objective == "autoencoder":
        raise ValueError(f"{config.name} trains an autoencoder; plans are counted for what trains a UNet")
    shapes = EMOJI if _of_miniature(config) else SD15
    with torch.device("meta"):
        inputs = _inputs(config, shapes)
        role = _student(config, shapes, motion=inputs[0].shape[2] > 1)
        clues = _clues(config, inputs[0], shapes)
    forward, backward, kept = _count(role, inputs, clues)
    sizes = {name: parameter.numel() for name, parameter in _parameters(role)}
    trained = {name: size for name, size in sizes.items() if _trains(config, name)}
    distils = config.objective == "consistency"
    taught = distils and config.consistency.earlier == "teacher"
    # The student's, the target's, the teacher's two (a guide's two, which are smaller, are counted as large).
    evaluations = 1 if not distils else 2 if config.consistency.earlier == "noise" else 4
    copies = 5 if distils else 4  # gradient, two moments, the average that is sampled, and the target
    second = taught and config.trainable != "lora"  # temporal layers beside the live ones
    teacher = sum(size for name, size in sizes.items() if second and "motion_modules" in name)
    every, updated = sum(sizes.values()), sum(trained.values())
    return Plan(
        parameters=every,
        trainable=updated,
        flops=config.gradient_accumulation_steps * (evaluations * forward + backward),
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


def _student(config: TrainConfig, shapes: Shapes, *, motion: bool) -> Role:
    """The network of a run and its adapter, with what trains asking for gradients."""
    unet, adapter = VideoUNet(shapes.unet, shapes.motion if motion else None), None
    layers = _lora(config, shapes)
    if config.adapter is not None:
        options = {"latent_channels": shapes.unet.in_channels, "downscale": shapes.downscale}
        adapter = Adapter(fresh_adapter(config.adapter, shapes.unet, **options))
    elif layers is not None:
        lora.inject(unet, rank=layers.rank, alpha=layers.alpha, targets=layers.targets)
    if adapter is not None and config.lora is not None:
        lora.inject(adapter, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    if adapter is not None:
        with_checkpointing(adapter.network, config.gradient_checkpointing)
    role = Role(unet, adapter=adapter)
    for name, parameter in _parameters(role):
        parameter.requires_grad_(_trains(config, name))
    return role


def _parameters(role: Role) -> Iterator[tuple[str, nn.Parameter]]:
    yield from role.network.named_parameters()
    if role.adapter is not None:
        yield from ((ADAPTER + name, parameter) for name, parameter in role.adapter.named_parameters())


def _clues(config: TrainConfig, latents: Tensor, shapes: Shapes) -> Clues:
    batch, _, frames, height, width = latents.shape
    height, width = height * shapes.downscale, width * shapes.downscale
    return Clues(latents[:, :, 0], torch.empty(batch, 3, height, width), torch.empty(batch, 3, frames, height, width))


def _lora(config: TrainConfig, shapes: Shapes) -> LoraConfig | None:
    """The LoRA layers of a run: its own, or stage 1's, taken to be of the usual rank."""
    if config.lora is not None or config.objective != "consistency":
        return config.lora
    return LoraConfig(rank=shapes.rank, targets=LCM_TARGETS)


def _trains(config: TrainConfig, name: str) -> bool:
    if name.startswith(ADAPTER):
        return config.trainable == "adapter" and (config.lora is None or ".lora_" in name)
    if ".lora_A." in name or ".lora_B." in name:
        return config.trains_lora
    return config.trainable == ("motion" if "motion_modules" in name else "image")


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


def _count(role: Role, inputs: Inputs, clues: Clues) -> tuple[int, int, int]:
    """FLOPs of a forward and of its backward pass, and the bytes in float32 that the first keeps for the second."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with _Flops() as flops, _fused_attention():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = role(*inputs, motion=role.network.motion is not None, clues=clues).sum()
        forward = flops.total
        loss.backward()
    weights = {parameter.untyped_storage()._cdata for _, parameter in _parameters(role)}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    return forward, flops.total - forward, kept


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
