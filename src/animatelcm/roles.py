"""Student, target and teacher: three views of one network. None of them owns spatial weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor
from torch.func import functional_call

from animatelcm.config import ConsistencyConfig
from animatelcm.ema import absorbed
from animatelcm.nets import lora
from animatelcm.nets.unet import VideoUNet


@dataclass(frozen=True)
class Role:
    """A network seen with some of its parameters replaced, by name, or without its LoRA layers, or as it is."""

    network: VideoUNet
    overrides: Mapping[str, Tensor] = field(default_factory=dict)
    without_lora: bool = False

    def __post_init__(self) -> None:
        # functional_call ignores names that it does not know
        assert not self.overrides or self.overrides.keys() <= {name for name, _ in self.network.named_parameters()}

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, *, motion: bool) -> Tensor:
        """Predicted noise (B, C, F, h, w) for latents of that shape, timesteps (B,) and text (B, L, D)."""
        with lora.off(self.network) if self.without_lora else nullcontext():
            if not self.overrides:
                return self.network(x, t, text, motion=motion)
            return functional_call(self.network, dict(self.overrides), (x, t, text), {"motion": motion})


@dataclass(frozen=True)
class Roles:
    """Who takes part in a consistency distillation."""

    student: Role
    target: Role
    teacher: Role


def consistency_roles(
    unet: VideoUNet,
    config: ConsistencyConfig,
    *,
    step: int,
    average: Mapping[str, Tensor],
    teacher_motion: Mapping[str, Tensor],
) -> Roles:
    """The three views after ``step`` updates of a network with injected LoRA layers.

    student: the live network. teacher: no LoRA, the teacher's temporal layers. target: ``average`` of what trains;
    a frozen LoRA reaches it by the same averaging, that is at scale 1 - mu_lora^step (initialisation strategy,
    AnimateLCM, section 4.2 and fig. 3), or is there at once (``init="direct"``).
    """
    student = Role(unet)
    teacher = Role(unet, teacher_motion, without_lora=True)
    if config.target == "online":
        return Roles(student, student, teacher)
    trains = any(".lora_A." in name for name in average)
    late = not trains and config.init == "ema"
    share = lora.scaled(unet, absorbed(step, config.mu if config.mu_lora is None else config.mu_lora)) if late else {}
    held = {name: value.to(unet.dtype) for name, value in average.items()}  # kept in float32, whatever the network is
    return Roles(student, Role(unet, {**share, **held}), teacher)
