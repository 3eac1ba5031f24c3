"""The consistency function, and one step of its multistep sampler."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import to_x0


class Scalings(NamedTuple):
    """c_skip and c_out of AnimateLCM's eq. 3: (1, 0) at t = 0, so that f is the identity there."""

    c_skip: Tensor
    c_out: Tensor


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> Scalings:
    """LCM's choice, float32 in the shape of t; c_skip is below 1e-5 from t = 16 on: f is almost x_theta."""
    scaled = t.float() * timestep_scaling
    total = scaled**2 + sigma_data**2
    return Scalings(sigma_data**2 / total, scaled / total.sqrt())


def consistency_function(x_t: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """f(x_t, t) = c_skip(t) * x_t + c_out(t) * x_theta (eq. 6) where a network predicted eps; t (B,)."""
    c_skip, c_out = (c.reshape(*c.shape, *(1,) * (x_t.ndim - c.ndim)) for c in boundary_scalings(t))
    return c_skip * x_t + c_out * to_x0(x_t, eps, schedule.level(t))


def renoise(x_0: Tensor, noise: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return to timestep s (B,) with fresh noise; with the clip's own noise it is eq. 12's earlier point."""
    return schedule.add_noise(x_0, noise, s)
