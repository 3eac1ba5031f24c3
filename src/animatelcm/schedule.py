"""How noisy timestep t is, and which timesteps a solver or a sampler visits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear"]
Spacing = Literal["leading", "trailing"]
SchedulerClass = Literal["DDIMScheduler", "LCMScheduler"]


class Level(NamedTuple):
    """A noise level: x_t = alpha * x_0 + sigma * eps, with alpha^2 + sigma^2 = 1.

    The paper writes alpha_t for the cumulative product; `alpha` here is its square root.
    """

    alpha: Tensor
    sigma: Tensor

    def over(self, x: Tensor) -> Level:
        """Append axes of length one, so that one level a clip broadcasts over x (B, ...)."""
        shape = (*self.alpha.shape, *(1,) * (x.ndim - self.alpha.ndim))
        return Level(self.alpha.reshape(shape), self.sigma.reshape(shape))

    def mix(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """x_0 (B, ...) with noise eps at this level: float32, even where both come in half precision."""
        alpha, sigma = self.over(x_0)
        return alpha * x_0 + sigma * eps


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The variance-preserving noise of Stable Diffusion, and the sparse grid that is distilled.

    "linear" is AnimateDiff's and AnimateLCM's, "scaled_linear" (linear in the square root) that of
    Stable Diffusion's image models. `solver_steps` is the papers' N, 50 there; LCM pipelines call it
    `original_inference_steps`, and the weights released with AnimateLCM use 100 (text) and 200 (image).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "linear"
    num_train_timesteps: int = 1000
    solver_steps: int = 50

    def __post_init__(self) -> None:
        if self.beta_schedule not in get_args(BetaSchedule):
            allowed = " or ".join(map(repr, get_args(BetaSchedule)))
            raise ValueError(f"beta_schedule={self.beta_schedule!r} is not known; choose {allowed}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must satisfy 0 < beta_start <= beta_end < 1"
            )
        _check_steps("solver_steps", self.solver_steps, self.num_train_timesteps)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64, CPU: prod(1 - beta), the square of `Level.alpha`. Shared: do not write to it."""
        return _alphas_cumprod(self)

    def level(self, t: Tensor) -> Level:
        """The level of each timestep: float32, with the shape and on the device of t (int64, 0..T-1)."""
        tables = _tables(self, t.device)
        # take, not [t]: indexing with a 0-dim tensor would read it back to the host.
        return Level(tables.alpha.take(t), tables.sigma.take(t))

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The forward process: x_t (B, ...) float32 from x_0, eps (B, ...) and t (B,)."""
        return self.level(t).mix(x_0, eps)

    def sparse_timesteps(self, n: int | None = None) -> Tensor:
        """n of the T timesteps, ascending: every (T // n)-th (section 4.1; n = 50: 19, 39, ... 999)."""
        n = self.solver_steps if n is None else n
        _check_steps("n", n, self.num_train_timesteps)
        return torch.arange(1, n + 1, device="cpu") * (self.num_train_timesteps // n) - 1

    def lcm_timesteps(self, steps: int, strength: float = 1.0) -> Tensor:
        """The timesteps a consistency sampler visits, descending, all on the distilled grid.

        Those of diffusers' `LCMScheduler.set_timesteps(steps, original_inference_steps=solver_steps)`; `strength`
        below 1 leaves out the noisiest share of the grid, for a video to begin from.
        """
        grid = self.sparse_timesteps()[: int(self.solver_steps * strength)].flip(0)
        _check_steps("steps", steps, len(grid))
        # In floating point and rounded down on purpose, as there: the exact fraction differs for some pairs.
        stride = len(grid) / steps
        indices = (torch.arange(steps, dtype=torch.float64, device="cpu") * stride).long()
        return grid[indices]

    def ddim_timesteps(self, steps: int, spacing: Spacing = "leading") -> Tensor:
        """The timesteps a DDIM sampler visits, descending; after the last it goes to timestep 0.

        "leading" is what Stable Diffusion's configuration asks of diffusers (steps_offset=1): it ends at 1
        and begins below T - 1, at 1 itself for a single step. "trailing" begins at T - 1, where pure noise
        lives, and is therefore the fair baseline below about ten steps.
        """
        T = self.num_train_timesteps
        _check_steps("steps", steps, T - 1)
        if spacing == "leading":
            return torch.arange(steps - 1, -1, -1, device="cpu") * (T // steps) + 1
        if spacing == "trailing":
            left = torch.arange(steps, 0, -1, device="cpu")
            return (2 * T * left + steps) // (2 * steps) - 1  # T * left / steps to the nearest, half up
        raise ValueError(f"spacing={spacing!r} is not known; choose 'leading' or 'trailing'")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a scheduler_config.json of any diffusers scheduler that predicts noise.

        Raises ValueError where the file asks for something this schedule cannot be.
        """
        asked = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}
        for key, allowed in asked.items():
            if config.get(key, allowed) != allowed:
                raise ValueError(f"the scheduler has {key}={config[key]!r}; only {allowed!r} is supported")
        names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
        if missing := [name for name in names if name not in config]:
            raise ValueError(f"the scheduler's configuration lacks {', '.join(missing)}")
        return cls(
            **{name: config[name] for name in names},
            solver_steps=config.get("_solver_steps", config.get("original_inference_steps", cls.solver_steps)),
        )

    def to_diffusers(self, scheduler: SchedulerClass = "DDIMScheduler") -> dict[str, Any]:
        """What scheduler_config.json holds, so that diffusers' scheduler agrees with this one step for step.

        Only "LCMScheduler" has a place for `solver_steps`; the underscore carries it through the others,
        where a public key would raise a warning.
        """
        config = {
            "_class_name": scheduler,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": "epsilon",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "_solver_steps": self.solver_steps,
        }
        if scheduler == "LCMScheduler":
            config["original_inference_steps"] = self.solver_steps
        return config


def _check_steps(name: str, steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"{name}={steps} is out of range; choose 1..{most}")


@lru_cache(maxsize=64)
def _alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    # A table first needed while sampling must still serve training: never an inference tensor.
    with torch.inference_mode(False):
        betas = torch.linspace(
            schedule.beta_start**power,
            schedule.beta_end**power,
            schedule.num_train_timesteps,
            dtype=torch.float64,
            device="cpu",
        )
        return (1 - betas ** (1 / power)).cumprod(0)


@lru_cache(maxsize=64)
def _tables(schedule: NoiseSchedule, device: torch.device) -> Level:
    """Both columns for every timestep: computed in float64, rounded once, kept on the device."""
    product = schedule.alphas_cumprod
    return Level(*(column.sqrt().float().to(device) for column in (product, 1 - product)))
