"""Student, target and teacher: three views of one network. None of them owns spatial weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor
from torch.func import functional_call

from animatelcm.config import ConsistencyConfig
from animatelcm.ema import absorbed
from animatelcm.nets import lora
from animatelcm.nets.adapters import NOTHING, Adapter, Clues, Hints
from animatelcm.nets.unet import VideoUNet

NO_CLUES = Clues()


@dataclass(frozen=True)
class Role:
    """A network seen with some of its parameters replaced, by name, or without its LoRA layers, or as it is; with an
    adapter beside it, seen the same way."""

    network: VideoUNet
    overrides: Mapping[str, Tensor] = field(default_factory=dict)
    without_lora: bool = False
    adapter: Adapter | None = None
    adapter_overrides: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # functional_call ignores names that it does not know
        assert not self.overrides or self.overrides.keys() <= {name for name, _ in self.network.named_parameters()}
        known = {name for name, _ in self.adapter.named_parameters()} if self.adapter is not None else set()
        assert self.adapter_overrides.keys() <= known

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, *, motion: bool, clues: Clues = NO_CLUES) -> Tensor:
        """Predicted noise (B, C, F, h, w) for latents of that shape, timesteps (B,), text (B, L, D), and what the
        adapter looks at."""
        with ExitStack() as stack:
            if self.without_lora:
                stack.enter_context(lora.off(self.network))
                if self.adapter is not None:
                    stack.enter_context(lora.off(self.adapter))
            hints = self._hints(x, t, text, clues)
            options = {"motion": motion, **hints.arguments(text)}
            if not self.overrides:
                return self.network(x, t, **options)
            return functional_call(self.network, dict(self.overrides), (x, t), options)

    def _hints(self, x: Tensor, t: Tensor, text: Tensor, clues: Clues) -> Hints:
        if self.adapter is None:
            return NOTHING
        if not self.adapter_overrides:
            return self.adapter(x, t, text, clues)
        return functional_call(self.adapter, dict(self.adapter_overrides), (x, t, text, clues))


@dataclass(frozen=True)
class Roles:
    """Who takes part in a consistency distillation; without a teacher the clip's own noise takes its place."""

    student: Role
    target: Role
    teacher: Role | None
    guide: Role | None = None
    """Who says, frame by frame, which way the text leads: without a teacher, where guidance is asked for."""


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


def adapter_roles(
    unet: VideoUNet,
    adapter: Adapter,
    config: ConsistencyConfig,
    *,
    average: Mapping[str, Tensor],
    teacher_motion: Mapping[str, Tensor],
) -> Roles:
    """The views in the training of an adapter (section 4.3): the network stays, ``average`` is of what trains in the
    adapter, by its names there.

    A teacher, where ``config.earlier`` asks for one, is the many-step network with the adapter as it was; a guide the
    network of images alone: no LoRA, no adapter.
    """
    student = Role(unet, adapter=adapter)
    teacher = guide = None
    if config.earlier == "teacher":
        teacher = Role(unet, teacher_motion, without_lora=True, adapter=adapter)
    elif config.earlier == "guided-noise":
        guide = Role(unet, without_lora=True)
    if config.target == "online":
        return Roles(student, student, teacher, guide)
    dtype = next(adapter.parameters()).dtype
    held = {name: value.to(dtype) for name, value in average.items()}
    return Roles(student, Role(unet, adapter=adapter, adapter_overrides=held), teacher, guide)
