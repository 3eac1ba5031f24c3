"""Exponential moving averages, kept by name in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Ema:
    """theta^- <- decay * theta^- + (1 - decay) * theta (AnimateLCM, above eq. 4).

    It starts from the tensors it is given, which need not be the online ones, and never replaces them by the
    online ones. The shadows are float32: in half precision small steps would round to nothing.
    """

    def __init__(self, decay: float, named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} is not a fraction; choose 0 (copy) to 1 (never move)")
        self.decay = decay
        self.shadows = {name: value.detach().to(torch.float32, copy=True) for name, value in dict(named).items()}

    @torch.no_grad()
    def update(self, named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Move every shadow towards the online tensor of its name; the names must be those of the start."""
        online = dict(named)
        _check_names(self.shadows, online)
        if self.shadows:
            values = [online[name].detach().float() for name in self.shadows]
            torch._foreach_lerp_(list(self.shadows.values()), values, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows themselves, by name."""
        return dict(self.shadows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved average of the same names and shapes."""
        _check_names(self.shadows, state)
        for name, shadow in self.shadows.items():
            if state[name].shape != shadow.shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)} in the file, {tuple(shadow.shape)} here")
            shadow.copy_(state[name])


def absorbed(step: int, decay: float) -> float:
    """The share of a constant that an average, started without it, holds after `step` updates.

    AnimateLCM's initialisation strategy (section 4.2, fig. 3): the target begins without the frozen spatial
    LoRA and takes it in by EMA, so at any step it holds exactly this share, and no second copy is needed.
    """
    return 1 - decay**step


def _check_names(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    if odd := ours.keys() ^ theirs.keys():
        where = "unknown to the average" if min(odd) in theirs else "missing"
        raise ValueError(f"{len(odd)} names differ from the average's, e.g. {min(odd)!r} is {where}")
