from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from animatelcm.schedule import Level, NoiseSchedule
from animatelcm.solver import DDIMSolver, ddim_step, guided, guided_eps, to_eps, to_x0

BETAS = ["linear", "scaled_linear"]
SHAPE = (3, 4, 2, 6, 6)
SCHEDULE = NoiseSchedule()
STEPS = torch.tensor([0, 19, 500, 999])[:, None].expand(4, 3).reshape(-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed random linear map over channels that leans on t, in place of a trained network."""
    weight = torch.eye(4) + 0.3 * normal(4, 4, seed=1)
    return torch.einsum("dc,bcfhw->bdfhw", weight, x) * (0.5 + t / 2000)


class Gaussian:
    """Data N(m, s^2 I): here the best eps and the probability-flow ODE are known in closed form."""

    def __init__(self, schedule: NoiseSchedule, m: float = 0.7, s: float = 0.5) -> None:
        self.schedule, self.m, self.s = schedule, m, s

    def deviation(self, level: Level) -> Tensor:
        return (level.alpha**2 * self.s**2 + level.sigma**2).sqrt()

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        level = self.schedule.level(t).over(x_t)
        return (x_t - level.alpha * self.m) * level.sigma / self.deviation(level) ** 2

    def flow(self, z: Tensor, t: Tensor) -> Tensor:
        """Where the trajectory of the standardised point z is at t."""
        level = self.schedule.level(t).over(z)
        return level.alpha * self.m + self.deviation(level) * z


def solve(world: Gaussian, solver: DDIMSolver, z: Tensor) -> Tensor:
    """From the noisiest grid point to timestep 0, all n steps."""
    x = world.flow(z, solver.times(torch.tensor([solver.n - 1]))[0])
    for index in range(solver.n - 1, -1, -1):
        t, _ = solver.times(torch.tensor([index]))
        eps = world.eps(x, t)
        x = solver.step(to_x0(x, eps, world.schedule.level(t)), eps, torch.tensor([index]))
    return x


def solver_error(n: int, beta_schedule: str) -> float:
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    world, z = Gaussian(schedule), torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    return (solve(world, DDIMSolver(schedule, n), z) - world.flow(z, torch.tensor([0]))).abs().max().item()


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_ddim_is_that_of_diffusers_step_for_step(steps: int, spacing: str, beta_schedule: str) -> None:
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    scheduler = DDIMScheduler.from_config({**schedule.to_diffusers(), "timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    ours = theirs = normal(*SHAPE)
    for t, s in pairwise([*schedule.ddim_timesteps(steps, spacing), torch.tensor(0)]):
        theirs = scheduler.step(linear_network(theirs, t), t, theirs).prev_sample
        ours = ddim_step(ours, linear_network(ours, t), schedule.level(t), schedule.level(s))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_solver_is_of_first_order_on_a_gaussian(beta_schedule: str) -> None:
    coarse, middle, fine = (solver_error(n, beta_schedule) for n in (25, 50, 100))
    assert 1.8 < coarse / middle < 2.2
    assert 1.8 < middle / fine < 2.2
    assert fine < 0.05


@pytest.mark.parametrize("n", [1, 4, 50])
def test_solver_is_exact_on_a_point_mass(n: int) -> None:
    """With nothing to average over, eps is constant along a trajectory, and DDIM has no error at any step."""
    world, z = Gaussian(SCHEDULE, s=0.0), torch.linspace(-3, 3, 13)[:, None]
    exact = world.flow(z, torch.tensor([0]))
    torch.testing.assert_close(solve(world, DDIMSolver(SCHEDULE, n), z), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("s", [0, 19, 480, 999])
def test_with_the_clips_own_noise_ddim_is_the_forward_process(s: int) -> None:
    """Eq. 12: why teacher-free learning needs no teacher."""
    x_0, eps, s = normal(12, 4, 2, 6, 6), normal(12, 4, 2, 6, 6, seed=1), torch.full((12,), s)
    x_t = SCHEDULE.add_noise(x_0, eps, STEPS)
    stepped = ddim_step(x_t, eps, SCHEDULE.level(STEPS), SCHEDULE.level(s))
    torch.testing.assert_close(stepped, SCHEDULE.add_noise(x_0, eps, s), rtol=0, atol=2e-5)


def test_x0_and_eps_are_each_others_inverse() -> None:
    x_t, eps, level = normal(12, 4, 3, 5), normal(12, 4, 3, 5, seed=1), SCHEDULE.level(STEPS)
    x_0 = to_x0(x_t, eps, level)
    torch.testing.assert_close(level.mix(x_0, eps), x_t, rtol=0, atol=1e-5)
    # 1 / sigma is 34 at t = 0, so four digits are left there.
    torch.testing.assert_close(to_eps(x_t, x_0, level), eps, rtol=0, atol=1e-4)


def test_a_step_nowhere_stays_and_two_steps_with_one_eps_are_one() -> None:
    x, eps = normal(3, 4, 2, 6, 6), normal(3, 4, 2, 6, 6, seed=1)
    t, r, s = (SCHEDULE.level(torch.full((3,), t)) for t in (799, 399, 19))
    torch.testing.assert_close(ddim_step(x, eps, t, t), x, rtol=0, atol=1e-5)
    through = ddim_step(ddim_step(x, eps, t, r), eps, r, s)
    torch.testing.assert_close(through, ddim_step(x, eps, t, s), rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", [(12,), (12, 1, 1, 1, 1)])
def test_a_level_a_clip_is_that_clip_alone(shape: tuple) -> None:
    x, eps, t = normal(12, 4, 2, 6, 6), normal(12, 4, 2, 6, 6, seed=1), STEPS.reshape(shape)
    together = to_x0(x, eps, SCHEDULE.level(t))
    apart = [to_x0(x[i], eps[i], SCHEDULE.level(STEPS[i])) for i in range(12)]
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [torch.tensor(999), torch.tensor([999])])
def test_half_precision_networks_meet_float32_arithmetic(t: Tensor, dtype: torch.dtype) -> None:
    """At t = 999 one rounding of x_t in bfloat16 would be multiplied by 25."""
    x, eps, level = normal(1, 4, 2, 6, 6), normal(1, 4, 2, 6, 6, seed=1).to(dtype), SCHEDULE.level(t)
    for result in (to_x0(x.to(dtype), eps, level), ddim_step(x.to(dtype), eps, level, level)):
        assert result.dtype == torch.float32
    assert torch.equal(to_x0(x.to(dtype), eps, level), to_x0(x.to(dtype).float(), eps.float(), level))


@pytest.mark.parametrize(("total", "n"), [(1000, 50), (1000, 100), (1000, 30), (1000, 1), (1000, 1000), (20, 7)])
def test_solver_walks_the_sparse_grid_down_to_zero(total: int, n: int) -> None:
    schedule = NoiseSchedule(num_train_timesteps=total, solver_steps=1)
    t, s = DDIMSolver(schedule, n).times(torch.arange(n))
    assert torch.equal(t, schedule.sparse_timesteps(n))
    assert torch.equal(s[1:], t[:-1])
    assert s[0] == 0


def test_solver_steps_every_clip_from_its_own_index() -> None:
    solver, index = DDIMSolver(SCHEDULE, 50), torch.tensor([0, 7, 49])
    x_0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    t, s = solver.times(index)
    x_t = SCHEDULE.add_noise(x_0, eps, t)
    together = solver.step(x_0, eps, index)
    torch.testing.assert_close(together, ddim_step(x_t, eps, SCHEDULE.level(t), SCHEDULE.level(s)), rtol=0, atol=2e-5)
    assert torch.equal(together, torch.cat([solver.step(x_0[[i]], eps[[i]], index[[i]]) for i in range(3)]))


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_grids_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n={n} .*1\.\.1000"):
        DDIMSolver(SCHEDULE, n)


def test_guidance_at_one_is_off_and_at_zero_is_unconditional() -> None:
    cond, uncond = normal(*SHAPE), 1e4 * normal(*SHAPE, seed=1)
    for one, zero in ((1.0, 0.0), (torch.ones(3), torch.zeros(3))):
        assert torch.equal(guided(cond, uncond, one), cond)
        assert torch.equal(guided(cond, uncond, zero), uncond)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 6.5, 14.0])
def test_the_two_conventions_are_one_formula(w: float) -> None:
    """Eq. 7 in float64 against both names, for a number and for one number a clip."""
    cond, uncond = normal(*SHAPE), normal(*SHAPE, seed=1)
    papers = ((1 + w) * cond.double() - w * uncond.double()).float()
    for number in (w, torch.full((3,), w)):
        torch.testing.assert_close(guided_eps(cond, uncond, w=number), papers, rtol=0, atol=2e-5)
        torch.testing.assert_close(guided_eps(cond, uncond, scale=1 + number), papers, rtol=0, atol=2e-5)


def test_guidance_a_clip_is_that_clip_alone() -> None:
    cond, uncond, scale = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([1.0, 2.5, 14.0])
    apart = [guided(cond[i], uncond[i], scale[i].item()) for i in range(3)]
    torch.testing.assert_close(guided(cond, uncond, scale), torch.stack(apart), rtol=0, atol=1e-6)
    assert guided(cond.half(), uncond.half(), scale).dtype == torch.float32


def test_guiding_eps_is_guiding_the_solver() -> None:
    """Eq. 8: the solver is affine in eps, so both orders agree."""
    x, cond, uncond = normal(*SHAPE, seed=2), normal(*SHAPE), normal(*SHAPE, seed=1)
    t, s = SCHEDULE.level(torch.tensor([39, 519, 799])), SCHEDULE.level(torch.tensor([19, 499, 779]))
    eps_first = ddim_step(x, guided_eps(cond, uncond, w=6.5), t, s)
    solver_first = guided_eps(ddim_step(x, cond, t, s), ddim_step(x, uncond, t, s), w=6.5)
    torch.testing.assert_close(eps_first, solver_first, rtol=0, atol=1e-4)


@pytest.mark.parametrize("names", [{}, {"scale": 2.0, "w": 1.0}])
def test_guidance_must_say_its_convention_once(names: dict) -> None:
    with pytest.raises(ValueError, match="exactly one of scale"):
        guided_eps(torch.zeros(1), torch.zeros(1), **names)
