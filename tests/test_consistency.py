from __future__ import annotations

import pytest
import torch
from torch import Tensor

from animatelcm.consistency import boundary_scalings, consistency_function, renoise
from animatelcm.losses import pseudo_huber
from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import DDIMSolver, to_eps, to_x0

BETAS = ["linear", "scaled_linear"]
SHAPE = (3, 4, 2, 6, 6)
MEAN, STD = 0.7, 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed random linear map over channels that leans on t, in place of a trained network."""
    weight = torch.eye(4) + 0.3 * normal(4, 4, seed=1)
    return torch.einsum("dc,bcfhw->bdfhw", weight, x) * (0.5 + t / 2000)


def flow(z: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The probability-flow trajectory of data N(MEAN, STD^2) through the standardised point z, at t."""
    alpha, sigma = schedule.level(t).over(z)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z


def end_of_flow(x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The exact solution of the ODE at timestep 0, from any point of a trajectory."""
    alpha, sigma = schedule.level(t).over(x_t)
    z = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
    return flow(z, torch.zeros_like(t), schedule)


def solution(x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The consistency function of a network that has learned the exact solution."""
    eps = to_eps(x_t, end_of_flow(x_t, t, schedule), schedule.level(t))
    return consistency_function(x_t, eps, t, schedule)


def best_eps(x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the perfect teacher predicts: E[eps | x_t] for data N(MEAN, STD^2)."""
    alpha, sigma = schedule.level(t).over(x_t)
    return (x_t - alpha * MEAN) * sigma / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("grid", [50, 100])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_multistep_sampling_is_that_of_diffusers_step_for_step(steps: int, grid: int, beta_schedule: str) -> None:
    from diffusers import LCMScheduler

    schedule = NoiseSchedule(beta_schedule=beta_schedule, solver_steps=grid)
    scheduler = LCMScheduler.from_config(schedule.to_diffusers("LCMScheduler"))
    scheduler.set_timesteps(steps)
    same_noise = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    ours = theirs = normal(*SHAPE)
    timesteps = schedule.lcm_timesteps(steps)
    for i, t in enumerate(timesteps):
        theirs, x_0_theirs = scheduler.step(
            linear_network(theirs, t), t, theirs, generator=same_noise[0], return_dict=False
        )
        x_0 = consistency_function(ours, linear_network(ours, t), t, schedule)
        last = i == steps - 1
        noise = torch.randn(SHAPE, generator=same_noise[1])
        ours = x_0 if last else renoise(x_0, noise, timesteps[i + 1], schedule)
        assert (x_0 - x_0_theirs).abs().max() <= 1e-5 * x_0_theirs.abs().max()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_scalings_are_those_of_diffusers_at_every_timestep() -> None:
    from diffusers import LCMScheduler

    t = torch.arange(1000)
    theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
    for mine, other in zip(boundary_scalings(t), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("sigma_data", "timestep_scaling"), [(0.5, 10.0), (1.0, 1.0), (0.1, 4.0)])
def test_scalings_meet_the_boundary_and_forget_it(sigma_data: float, timestep_scaling: float) -> None:
    c_skip, c_out = boundary_scalings(torch.arange(1000), sigma_data, timestep_scaling)
    assert (c_skip[0], c_out[0]) == (1, 0)
    assert (c_skip.diff() < 0).all()
    torch.testing.assert_close(c_skip + c_out**2, torch.ones(1000))


@pytest.mark.parametrize("network_output", [0.0, 1.0, 1e6])
def test_identity_at_timestep_zero_whatever_the_network_says(network_output: float) -> None:
    x, t = normal(*SHAPE), torch.tensor([0, 0, 0])
    eps = network_output * normal(*SHAPE, seed=1)
    assert torch.equal(consistency_function(x, eps, t, NoiseSchedule()), x)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_exact_solution_is_a_fixed_point_along_every_trajectory(beta_schedule: str) -> None:
    """Self-consistency (section 3): f(x_t, t) is one point for all t of a trajectory, its end at t = 0."""
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    z, zero = torch.linspace(-3, 3, 13), torch.tensor([0])
    t = torch.cat([zero, schedule.sparse_timesteps()])
    x_t = flow(z.expand(51, 13), t, schedule)
    predicted = solution(x_t, t, schedule)
    torch.testing.assert_close(predicted, x_t[:1].expand(51, 13), rtol=0, atol=5e-5)
    # The consistency loss between neighbours is nothing next to that of the teacher taken for a student.
    untrained = consistency_function(x_t, best_eps(x_t, t, schedule), t, schedule)
    assert pseudo_huber(predicted.diff(dim=0)).mean() < 1e-4 * pseudo_huber(untrained.diff(dim=0)).mean()


def test_distillation_with_a_perfect_teacher_costs_one_local_error_a_step() -> None:
    """Eq. 10 at its solution: f(x_t, t) and f at the teacher's earlier point differ by O(1 / N^2)."""
    schedule, t = NoiseSchedule(), torch.tensor([199, 519, 799])

    def gap(n: int) -> Tensor:
        solver, index = DDIMSolver(schedule, n), (t + 1) * n // 1000 - 1
        x_t = flow(torch.linspace(-3, 3, 13).expand(3, 13), t, schedule)
        eps = best_eps(x_t, t, schedule)
        x_s = solver.step(to_x0(x_t, eps, schedule.level(t)), eps, index)
        return (solution(x_t, t, schedule) - solution(x_s, solver.times(index)[1], schedule)).abs().amax(1)

    ratio = gap(25) / gap(50)
    assert (ratio > 3.4).all()
    assert (ratio < 4.6).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_exact_sampler_draws_from_the_data_in_any_number_of_steps(steps: int) -> None:
    schedule = NoiseSchedule(solver_steps=50)
    timesteps = schedule.lcm_timesteps(steps)
    count = 40_000
    x_0 = solution(normal(1, count), timesteps[:1], schedule)
    for i, s in enumerate(timesteps[1:]):
        noisy = renoise(x_0, normal(1, count, seed=i + 1), s[None], schedule)
        x_0 = solution(noisy, s[None], schedule)
    # The start, N(0, 1), misses N(0.04 * MEAN, 1) by 0.028, which costs half as much here.
    assert abs(x_0.mean().item() - MEAN) < 0.02 + 4 * STD / count**0.5
    assert abs(x_0.std().item() / STD - 1) < 0.02


def test_renoising_with_the_clips_own_noise_is_the_forward_process() -> None:
    schedule, t = NoiseSchedule(), torch.tensor([0, 499, 999])
    x_0, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert torch.equal(renoise(x_0, noise, t, schedule), schedule.add_noise(x_0, noise, t))


def test_a_clip_does_not_see_its_neighbours() -> None:
    schedule, t = NoiseSchedule(), torch.tensor([0, 19, 999])
    x, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    apart = [consistency_function(x[[i]], eps[[i]], t[[i]], schedule) for i in range(3)]
    torch.testing.assert_close(consistency_function(x, eps, t, schedule), torch.cat(apart))
