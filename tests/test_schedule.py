from __future__ import annotations

import copy
import logging
import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from animatelcm.schedule import NoiseSchedule

BETAS = ["linear", "scaled_linear"]
EVERY_T = torch.arange(1000)


class HostReads(TorchDispatchMode):
    """Counts the operations that would make a GPU wait for the host to read a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_table_is_the_product_to_the_last_digits_of_float64(beta_schedule: str) -> None:
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    power = {"linear": 1.0, "scaled_linear": 0.5}[beta_schedule]
    low, high = 0.00085**power, 0.012**power
    logs = [math.log1p(-((low + (high - low) * i / 999) ** (1 / power))) for i in range(1000)]
    for t in (0, 1, 19, 500, 999):
        assert schedule.alphas_cumprod[t].item() == pytest.approx(math.exp(math.fsum(logs[: t + 1])), rel=1e-12)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_table_agrees_with_diffusers(beta_schedule: str) -> None:
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    theirs = DDIMScheduler.from_config(schedule.to_diffusers()).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_levels_preserve_variance_and_grow_noisier(beta_schedule: str) -> None:
    alpha, sigma = NoiseSchedule(beta_schedule=beta_schedule).level(EVERY_T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000), rtol=0, atol=2e-7)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert sigma[0].item() == pytest.approx(math.sqrt(0.00085), rel=1e-6)


def test_sigma_has_full_float32_precision_where_the_product_is_near_one() -> None:
    """1 - prod(1 - beta) cancels in float32; from the float64 table sigma(0) is right to one rounding."""
    alpha, sigma = NoiseSchedule(beta_start=1e-7).level(torch.tensor([0]))
    assert sigma.item() == pytest.approx(math.sqrt(1e-7), rel=1e-7)
    assert (1 - alpha**2).sqrt().item() != pytest.approx(math.sqrt(1e-7), rel=1e-2)


@pytest.mark.parametrize("shape", [(), (3,), (3, 5)])
def test_level_keeps_shape_and_reads_nothing_back(shape: tuple) -> None:
    schedule = NoiseSchedule()
    t = torch.randint(1000, shape, generator=torch.Generator().manual_seed(0))
    with HostReads() as reads:
        level = schedule.level(t)
        schedule.add_noise(torch.zeros(*shape, 4), torch.zeros(*shape, 4), t)
    assert reads.count == 0
    for value, square in zip(level, (schedule.alphas_cumprod, 1 - schedule.alphas_cumprod), strict=True):
        assert value.shape == t.shape
        assert value.dtype == torch.float32
        assert torch.equal(value, square.take(t).sqrt().float())


def test_level_follows_the_device_of_t() -> None:
    """The meta device has no numbers to read: what runs there cannot wait for one."""
    level = NoiseSchedule().level(torch.zeros(4, dtype=torch.int64, device="meta"))
    assert {value.device.type for value in level} == {"meta"}


def test_level_of_a_timestep_outside_the_schedule_is_an_error() -> None:
    with pytest.raises(IndexError):
        NoiseSchedule().level(torch.tensor([1000]))


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_add_noise_agrees_with_diffusers(beta_schedule: str) -> None:
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    rng = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 6, 4, 3, 5, 5, generator=rng)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    theirs = DDIMScheduler.from_config(schedule.to_diffusers()).add_noise(x_0, eps, t)
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_rounds_its_inputs_only(dtype: torch.dtype) -> None:
    schedule, t = NoiseSchedule(), torch.tensor([0, 999])
    x_0, eps = torch.randn(2, 2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    noisy = schedule.add_noise(x_0, eps, t)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, schedule.add_noise(x_0.float(), eps.float(), t))


def test_tables_made_while_sampling_serve_training() -> None:
    schedule = NoiseSchedule(beta_end=0.0123)  # used nowhere else, so its table is made here
    t = torch.tensor([5])
    with torch.inference_mode():
        assert not schedule.alphas_cumprod.is_inference()
        schedule.level(t)
    x = torch.ones(1, requires_grad=True)
    (x * schedule.alphas_cumprod[5]).backward()
    schedule.add_noise(x, torch.zeros(1), t).backward()
    expected = schedule.alphas_cumprod[5] + schedule.alphas_cumprod[5].sqrt()
    torch.testing.assert_close(x.grad[0].double(), expected, rtol=1e-6, atol=0)


def test_sparse_grid_of_the_papers() -> None:
    assert NoiseSchedule().sparse_timesteps().tolist() == list(range(19, 1000, 20))
    assert NoiseSchedule().sparse_timesteps(4).tolist() == [249, 499, 749, 999]
    assert NoiseSchedule(solver_steps=100).sparse_timesteps().tolist() == list(range(9, 1000, 10))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 25, 49, 50, 64, 98, 100, 128, 200, 333, 500, 1000])
def test_lcm_timesteps_are_those_of_diffusers_for_every_number_of_steps(total: int) -> None:
    from diffusers import LCMScheduler

    schedule, scheduler = NoiseSchedule(solver_steps=total), LCMScheduler()
    grid = set(schedule.sparse_timesteps().tolist())
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps, original_inference_steps=total)
        ours = schedule.lcm_timesteps(steps)
        assert torch.equal(ours, scheduler.timesteps)
        assert grid.issuperset(ours.tolist())


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.29, 0.3, 0.55, 0.6, 0.999, 1.0])
@pytest.mark.parametrize("total", [7, 50, 100, 200])
def test_lcm_timesteps_of_a_video_to_begin_from_are_those_of_diffusers(total: int, strength: float) -> None:
    from diffusers import LCMScheduler

    schedule, scheduler = NoiseSchedule(solver_steps=total), LCMScheduler()
    for steps in (*range(1, 9), 25, 50):
        try:
            scheduler.set_timesteps(steps, original_inference_steps=total, strength=strength)
        except ValueError:
            with pytest.raises(ValueError, match="steps="):
                schedule.lcm_timesteps(steps, strength)
        else:
            ours = schedule.lcm_timesteps(steps, strength)
            assert torch.equal(ours, scheduler.timesteps)
            assert ours[0] <= 1000 * strength


def test_four_steps_of_the_released_weights() -> None:
    assert NoiseSchedule(solver_steps=100).lcm_timesteps(4).tolist() == [999, 749, 499, 249]
    assert NoiseSchedule(solver_steps=50).lcm_timesteps(4).tolist() == [999, 759, 499, 259]


DDIM_STEPS = [*range(1, 130), 200, 250, 333, 500, 501, 750, 999]


def test_leading_ddim_timesteps_are_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule()
    scheduler = DDIMScheduler.from_config(schedule.to_diffusers())
    for steps in DDIM_STEPS:
        scheduler.set_timesteps(steps)
        ours = schedule.ddim_timesteps(steps)
        assert torch.equal(ours, scheduler.timesteps)
        assert ours[-1] == 1
        assert ours[0] <= 999


def test_trailing_ddim_timesteps_are_those_of_diffusers_but_for_ties() -> None:
    """At an exact half their floating point rounds either way, and at 61 steps it makes a 62nd, of -1."""
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule()
    scheduler = DDIMScheduler.from_config({**schedule.to_diffusers(), "timestep_spacing": "trailing"})
    for steps in DDIM_STEPS:
        scheduler.set_timesteps(steps)
        ours = schedule.ddim_timesteps(steps, "trailing")
        tie = 2000 * torch.arange(steps, 0, -1) % (2 * steps) == steps
        off = ours - scheduler.timesteps[:steps]
        assert not off[~tie].any()
        assert set(off[tie].tolist()) <= {0, 1}
        assert ours[0] == 999
        assert ours[-1] >= 0


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(beta_schedule="scaled_linear", solver_steps=25),
        NoiseSchedule(beta_end=0.014, solver_steps=200, num_train_timesteps=500),
    ],
)
def test_diffusers_configuration_round_trip(schedule: NoiseSchedule, tmp_path, monkeypatch, caplog) -> None:
    from diffusers import DDIMScheduler, LCMScheduler

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    for scheduler in (DDIMScheduler, LCMScheduler):
        config = schedule.to_diffusers(scheduler.__name__)
        assert NoiseSchedule.from_diffusers(config) == schedule
        scheduler.from_config(config).save_pretrained(tmp_path)
        theirs = scheduler.from_pretrained(tmp_path)
        assert NoiseSchedule.from_diffusers(theirs.config) == schedule
    assert theirs.config.original_inference_steps == schedule.solver_steps
    assert not caplog.records


def test_reads_the_configuration_of_stable_diffusion() -> None:
    published = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert NoiseSchedule.from_diffusers(published) == NoiseSchedule(beta_schedule="scaled_linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_diffusers({**NoiseSchedule().to_diffusers(), **change})


def test_a_configuration_without_betas_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks beta_start, beta_end, beta_schedule"):
        NoiseSchedule.from_diffusers({"num_train_timesteps": 1000})


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "cosine"},
        {"beta_start": 0.0},
        {"beta_start": 0.02},
        {"beta_end": 1.0},
        {"solver_steps": 0},
        {"solver_steps": 1001},
        {"num_train_timesteps": 0},
    ],
)
def test_impossible_schedules_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"choose|must satisfy"):
        NoiseSchedule(**wrong)


@pytest.mark.parametrize("steps", [0, -1, 51, 1000])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    schedule = NoiseSchedule()
    with pytest.raises(ValueError, match=rf"steps={steps} .*1\.\.50"):
        schedule.lcm_timesteps(steps)
    if steps != 51:
        with pytest.raises(ValueError, match=rf"steps={steps} .*1\.\.999"):
            schedule.ddim_timesteps(steps)
    with pytest.raises(ValueError, match="spacing='even'"):
        schedule.ddim_timesteps(10, "even")


def test_a_schedule_is_its_fields() -> None:
    one, other = NoiseSchedule(solver_steps=100), NoiseSchedule(**asdict(NoiseSchedule(solver_steps=100)))
    one.level(EVERY_T)
    assert one == other
    assert hash(one) == hash(other)
    assert copy.deepcopy(one) == other
    assert one != replace(one, beta_end=0.014)
    with pytest.raises(FrozenInstanceError):
        one.beta_end = 0.014
