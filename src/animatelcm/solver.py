"""One step along the probability-flow ODE (DDIM), and guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from animatelcm.schedule import Level, NoiseSchedule


def to_x0(x_t: Tensor, eps: Tensor, level: Level) -> Tensor:
    """The clean sample that x_t and the predicted noise imply (x_theta below AnimateLCM's eq. 6)."""
    alpha, sigma = level.over(x_t)
    return (x_t - sigma * eps) / alpha


def to_eps(x_t: Tensor, x_0: Tensor, level: Level) -> Tensor:
    """The noise that x_t and the predicted clean sample imply."""
    alpha, sigma = level.over(x_t)
    return (x_t - alpha * x_0) / sigma


def ddim_step(x_t: Tensor, eps: Tensor, t: Level, s: Level) -> Tensor:
    """Move x_t from level t to level s along the probability-flow ODE (eq. 12 with eps in place of eps_0)."""
    return s.mix(to_x0(x_t, eps, t), eps)


def guided(eps_cond: Tensor, eps_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, float32; scale 1 is off, exactly. A tensor scale is (B,), one a clip."""
    if isinstance(scale, Tensor):
        scale = scale.float().reshape(-1, *(1,) * (eps_cond.ndim - 1))
    return torch.lerp(eps_uncond.float(), eps_cond.float(), scale)


def guided_eps(
    eps_cond: Tensor,
    eps_uncond: Tensor,
    *,
    scale: float | Tensor | None = None,
    w: float | Tensor | None = None,
) -> Tensor:
    """Guidance in the convention that is named: pipelines' `scale` (1 is off) or the papers' `w` (0 is off).

    Eq. 7: (1 + w) * eps_cond - w * eps_uncond, so scale = 1 + w. DDIM is affine in eps, so guiding eps is
    guiding the solver (eq. 8).
    """
    if (scale is None) == (w is None):
        raise ValueError("guidance needs exactly one of scale (1 is off) and w (0 is off; scale = 1 + w)")
    return guided(eps_cond, eps_uncond, 1 + w if scale is None else scale)


@dataclass(frozen=True)
class DDIMSolver:
    """The sparse solver that makes a consistency model's earlier point (AnimateLCM, section 4.1, eq. 5, 8).

    Step `index` leads from the grid's t_{n+1} to t_n (eq. 10, n = index): `n` steps of T // n timesteps each,
    the first of which is cut short at timestep 0.
    """

    schedule: NoiseSchedule
    n: int
    k: int | None = None
    """Timesteps that a step leads back, T // n where None; more or fewer leave the grid."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.schedule.num_train_timesteps:
            raise ValueError(f"n={self.n} solver steps; choose 1..{self.schedule.num_train_timesteps}")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k} timesteps back; choose 1 or more")

    def times(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s): where step `index` (B,) int64, 0..n-1, begins and ends."""
        stride = self.schedule.num_train_timesteps // self.n
        t = (index + 1) * stride - 1
        return t, (t - (stride if self.k is None else self.k)).clamp(min=0)

    def step(self, x_0: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """x_s (B, ...) from the (guided) predictions x_0 and eps at the beginning of step `index`."""
        _, s = self.times(index)
        return self.schedule.add_noise(x_0, eps, s)
