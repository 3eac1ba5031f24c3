"""Training without a teacher (AnimateLCM, section 4.3): eq. 12, what one sample of the score costs, a run's result."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from animatelcm import objectives
from animatelcm.config import ConsistencyConfig
from animatelcm.consistency import boundary_scalings, renoise
from animatelcm.data.batches import ClipBatch
from animatelcm.losses import pseudo_huber, pseudo_huber_norm
from animatelcm.rng import generator
from animatelcm.roles import Role, Roles
from animatelcm.schedule import Level, NoiseSchedule
from animatelcm.solver import DDIMSolver, ddim_step, to_eps, to_x0

SCHEDULE = NoiseSchedule()
MEAN, SPREAD = 0.7, 0.5
DRAW = partial(generator, 0, 0, 0)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _level(t: Tensor) -> Level:
    """In float64."""
    product = SCHEDULE.alphas_cumprod[t]
    return Level(product.sqrt(), (1 - product).sqrt())


# Eq. 12: a DDIM step with the clip's own noise is the clip with less of it.


@pytest.mark.parametrize("k", [1, 20, 100, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_ddim_step_with_the_clips_own_noise_is_the_clip_with_less_of_it(dtype, bound, k):
    t = torch.arange(1000)
    s = (t - k).clamp(min=0)
    x_0, eps = (_normal(1000, 4, 2, 3, 3, seed=seed).to(dtype) for seed in (1, 2))
    stepped = ddim_step(SCHEDULE.add_noise(x_0, eps, t), eps, SCHEDULE.level(t), SCHEDULE.level(s))
    wanted = renoise(x_0, eps, s, SCHEDULE)
    assert stepped.dtype == dtype
    assert ((stepped - wanted).flatten(1).norm(dim=1) <= bound * wanted.flatten(1).norm(dim=1)).all()


MODEL = SimpleNamespace(
    schedule=SCHEDULE, device=torch.device("cpu"), embed=lambda texts: torch.zeros(len(texts), 1, 1)
)


def _asked(x_0: Tensor, config: ConsistencyConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, x_s, s): what the objective asks student and target, where nobody teaches."""
    heard = []

    def role(x, t, text, *, motion, clues):
        heard.append((x, t))
        return torch.zeros_like(x)

    batch = ClipBatch(captions=("",) * len(x_0), latents=x_0)
    objectives.consistency(MODEL, Roles(role, role, None), batch, DRAW, config=config)
    (x_t, t), (x_s, s) = heard
    return x_t, t, x_s, s


@pytest.mark.parametrize("k", [None, 7, 100, 1000])
def test_the_objective_asks_its_target_at_the_ddim_point(k):
    x_0 = _normal(200, 4, 3, 2, 2).float()
    x_t, t, x_s, s = _asked(x_0, ConsistencyConfig(solver_steps=50, k=k, earlier="noise"))
    assert torch.equal(s, (t - (k or 20)).clamp(min=0))
    eps = torch.randn(x_0.shape, generator=DRAW("noise"))
    wanted = ddim_step(x_t.double(), eps.double(), SCHEDULE.level(t), SCHEDULE.level(s))
    assert ((x_s - wanted).flatten(1).norm(dim=1) <= 1e-5 * wanted.flatten(1).norm(dim=1)).all()


def test_the_first_frame_counts_as_often_as_the_config_says():
    """Where everybody predicts no noise at all, the loss is of x_t / alpha - x_s / alpha_s, frame by frame."""
    x_0 = _normal(40, 4, 3, 2, 2).float()
    silent = Roles(*(lambda x, t, text, **_: torch.zeros_like(x) for _ in range(2)), None)
    batch = ClipBatch(captions=("",) * len(x_0), latents=x_0)

    def losses(first: float, clip: ClipBatch) -> Tensor:
        config = ConsistencyConfig(k=300, earlier="noise", huber_c=0.3, first_frame=first)
        return objectives.consistency(MODEL, silent, clip, DRAW, config=config).loss

    x_t, t, x_s, s = _asked(x_0, ConsistencyConfig(k=300, earlier="noise", huber_c=0.3))
    skips, outs = zip(*(boundary_scalings(time) for time in (t, s)), strict=True)
    ends = [
        (skip[:, None, None, None, None] + out[:, None, None, None, None] / _level(time).over(x).alpha) * x
        for x, time, skip, out in zip((x_t, x_s), (t, s), skips, outs, strict=True)
    ]
    huber = ((ends[0] - ends[1]).double().square() + 0.09).sqrt() - 0.3
    frames = huber.mean(dim=(1, 3, 4))
    for first in (1.0, 5.0):
        wanted = (frames * torch.tensor([first, 1.0, 1.0])).sum(1) / (first + 2)
        assert torch.allclose(losses(first, batch).double(), wanted, rtol=1e-4)


# Gaussian data N(MEAN, SPREAD^2): with phi = atan2(sigma, SPREAD alpha) everything is an angle.


def _angle(t: Tensor) -> Tensor:
    alpha, sigma = _level(t)
    return torch.atan2(sigma, SPREAD * alpha)


def _scale(t: Tensor) -> Tensor:
    """The standard deviation of x_t."""
    alpha, sigma = _level(t)
    return torch.hypot(SPREAD * alpha, sigma)


def _deviation(t: Tensor, s: Tensor) -> Tensor:
    """Of one sample's earlier point from the exact DDIM point, root mean square."""
    return _scale(s) * torch.sin(_angle(t) - _angle(s))


def _best_eps(x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t]."""
    alpha, sigma = _level(t).over(x)
    return sigma * (x - alpha * MEAN) / _scale(t).reshape(alpha.shape) ** 2


def _marginal(t: Tensor, count: int) -> Tensor:
    return _level(t).over(t[:, None]).alpha * MEAN + _scale(t)[:, None] * _normal(len(t), count)


T, S = torch.tensor([39, 199, 519, 799, 999]), torch.tensor([19, 99, 499, 699, 979])


def _sampled(x_t: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(x_0, x_s), each (5, P, count): x_0 from the exact posterior given x_t (5, P), one DDIM step with its noise."""
    alpha, sigma = _level(T).over(x_t)
    scale = _scale(T)[:, None]
    mean = MEAN + alpha * SPREAD**2 / scale**2 * (x_t - alpha * MEAN)
    x_0 = mean[..., None] + (SPREAD * sigma / scale)[..., None] * _normal(*x_t.shape, count, seed=seed)
    x_t = x_t[..., None].expand_as(x_0)
    alpha, sigma = _level(T).over(x_t)
    return x_0, ddim_step(x_t, (x_t - alpha * x_0) / sigma, _level(T), _level(S))


def test_one_sample_of_the_score_is_right_on_average():
    """Eq. 11, and the earlier point that it leads to: z of 5 x 400 means of 1,000 samples is N(0, 1)."""
    x_t, count = _marginal(T, 400), 1_000
    x_0, x_s = _sampled(x_t, count, seed=5)
    alpha, sigma = _level(T).over(x_0)
    exact = ddim_step(x_t, _best_eps(x_t, T), _level(T), _level(S))
    z = (x_s.mean(-1) - exact) / _deviation(T, S)[:, None] * count**0.5
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / z.numel()) ** 0.5
    score = -(x_t[..., None] - alpha * x_0) / sigma**2
    error = score.mean(-1) + (x_t - _level(T).over(x_t).alpha * MEAN) / _scale(T)[:, None] ** 2
    z = error / score.std(-1) * count**0.5
    assert abs(z.mean()) < 4 / z.numel() ** 0.5


def test_its_mean_converges_as_one_over_the_root_of_the_samples():
    x_t = _marginal(T, 400)
    exact = ddim_step(x_t, _best_eps(x_t, T), _level(T), _level(S))
    counts = (16, 64, 256, 1024)
    x_s = [_sampled(x_t, count, seed=count)[1].mean(-1) for count in counts]
    errors = torch.stack([(mean - exact).square().mean(1).sqrt() for mean in x_s])
    slope = np.polyfit(np.log(counts), errors.log().numpy(), 1)[0]
    assert np.abs(slope + 0.5).max() < 0.03


def test_one_sample_misses_by_the_posteriors_spread_times_what_the_step_makes_of_it():
    """(alpha_s - alpha_t sigma_s / sigma_t) std(x_0 | x_t) = std(x_s) sin(phi_t - phi_s)."""
    t = torch.arange(1, 1000)
    for back in (5, 20, 100, 1000):
        s = (t - back).clamp(min=0)
        (a_t, s_t), (a_s, s_s) = _level(t), _level(s)
        posterior = SPREAD * s_t / _scale(t)
        torch.testing.assert_close((a_s - a_t * s_s / s_t) * posterior, _deviation(t, s), rtol=1e-9, atol=1e-12)
    x_t = _marginal(T, 400)
    x_s = _sampled(x_t, 1_000, seed=7)[1]
    exact = ddim_step(x_t, _best_eps(x_t, T), _level(T), _level(S))
    measured = (x_s - exact[..., None]).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(measured, _deviation(T, S), rtol=4 / (2 * 400_000) ** 0.5, atol=0)


def test_the_objectives_pairs_have_that_regression_and_that_spread():
    """Without conditioning on anything by hand: x_s on x_t, as the objective draws them."""
    x_0 = MEAN + SPREAD * _normal(20_000, 1, 1, 4, 4).float()
    x_t, t, x_s, _ = (v.double() for v in _asked(x_0, ConsistencyConfig(solver_steps=10, earlier="noise")))
    for end in (99, 499, 999):
        chosen, begin = t == end, torch.tensor([max(end - 100, 0)])
        end = torch.tensor([end])
        u, v = ((x[chosen].flatten() - _level(i).alpha * MEAN) / _scale(i) for x, i in ((x_t, end), (x_s, begin)))
        turn, sigmas = _angle(end) - _angle(begin), 4 / len(u) ** 0.5
        correlation = (u * v).mean() / u.square().mean()
        assert abs(correlation - torch.cos(turn)) < sigmas * torch.sin(turn)
        assert abs((v - correlation * u).std() / torch.sin(turn) - 1) < sigmas


def test_the_bias_of_one_step_is_of_second_order():
    """1 - cos(phi_t - phi_s) of the distance from the mean: E f(x_s) - f(x_t) for the exact, affine f."""

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return MEAN + (x - _level(t).over(x).alpha * MEAN) / _scale(t)[:, None] * SPREAD

    t, counts = torch.tensor([199, 599, 999]), (10, 20, 25, 50, 100, 200)
    x_t = _marginal(t, 200)
    distance = x_t - _level(t).over(x_t).alpha * MEAN
    errors = []
    for n in counts:
        s = DDIMSolver(SCHEDULE, n).times((t + 1) * n // 1000 - 1)[1]
        x_s = ddim_step(x_t, _best_eps(x_t, t), _level(t), _level(s))  # f is affine: E f(x_s) = f(E x_s)
        lost = (exact(x_t, t) - exact(x_s, s)) / (SPREAD * distance / _scale(t)[:, None])
        torch.testing.assert_close(lost, (1 - torch.cos(_angle(t) - _angle(s)))[:, None].expand_as(lost))
        errors.append(lost.mean(1))
    slopes = np.polyfit(np.log(counts), torch.stack(errors).log().numpy(), 1)[0]
    assert np.abs(slopes + 2).max() < 0.15


def _loss(network: nn.Module, x_0: Tensor, step: int, config: ConsistencyConfig, teacher: Role | None = None) -> Tensor:
    """Of a training step on clips x_0, with the student itself as the target."""
    roles, batch = Roles(Role(network), Role(network), teacher), ClipBatch(captions=("",) * len(x_0), latents=x_0)
    return objectives.consistency(MODEL, roles, batch, partial(generator, 0, step, 0), config=config).loss.mean()


class _Affine(nn.Module):
    """Predicts x_0 as an affine function of x, one for every timestep, and says it as noise."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, *, motion: bool) -> Tensor:
        alpha, sigma = SCHEDULE.level(t).over(x)
        seen = (x - alpha * MEAN) / torch.sqrt(alpha**2 * SPREAD**2 + sigma**2)
        slope, offset = (table[t].reshape(-1, 1, 1, 1, 1) for table in (self.slope, self.offset))
        return (x - alpha * (slope * seen + offset)) / sigma


def _distilled(n: int, *, taught: bool) -> tuple[float, float]:
    """(mean, spread) of what training draws from pure noise."""
    config = ConsistencyConfig(solver_steps=n, w_min=0, w_max=0, huber_c=1.0)
    network = _Affine()
    teacher = Role(lambda x, t, text, *, motion: _best_eps(x.double(), t).float()) if taught else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.7 * n)  # each timestep has 1 / n of the batch
    late = []
    for step in range(8 * n):
        data = MEAN + SPREAD * torch.randn(800, 1, 1, 4, 4, generator=generator(0, step, 0, "data"))
        _loss(network, data, step, config, teacher).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 4 * n:
            late.append((network.offset[n * (1000 // n) - 1].item(), network.slope[n * (1000 // n) - 1].item()))
    mean, spread = np.mean(late, axis=0)
    return float(mean), float(spread)


def test_on_gaussian_data_the_clips_own_noise_teaches_what_a_perfect_teacher_does():
    """Noise in an affine target averages out; what is left is DDIM's own error, a product of cosines."""
    zero, counts, lost = torch.tensor(0), (10, 20, 40), []
    for n in counts:
        links = torch.cat([zero[None], SCHEDULE.sparse_timesteps(n)])
        wanted = _scale(zero) * torch.cos(_angle(links).diff()).prod()
        for taught in (True, False):
            mean, spread = _distilled(n, taught=taught)
            assert mean == pytest.approx(float(_level(zero).alpha) * MEAN, abs=0.01)
            assert spread == pytest.approx(float(wanted), rel=0.01), (n, taught)
        lost.append(1 - spread / float(_scale(zero)))
    assert np.polyfit(np.log(counts), np.log(lost), 1)[0] == pytest.approx(-1, abs=0.15)


# Data with two modes, 30 % at -1 and 70 % at 1: f bends, and the posterior leans to one side. What every N and c come
# to is worked out by scripts/study_teacher_free.py.

SHARES, PLACES, WIDTH = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([-1, 1]), 0.5


def _below(x: Tensor, t: int) -> Tensor:
    """The share of x_t below x (P,)."""
    alpha, sigma = _level(torch.tensor(t))
    away = (x[:, None] - alpha * PLACES) / torch.hypot(alpha * WIDTH, sigma)
    return (SHARES * torch.special.ndtr(away)).sum(1)


class _Bent(nn.Module):
    """Predicts x_0 as a function of x, for every timestep a line through 65 knots, and says it as noise; x at first."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-4, 4, 65).repeat(1000, 1))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, *, motion: bool) -> Tensor:
        place = (8 * x.flatten(1) + 32).clamp(0, 63.99)  # from -4 to 4
        left, values = place.long(), self.values[t]
        x_0 = torch.lerp(values.gather(1, left), values.gather(1, left + 1), place - left).reshape(x.shape)
        alpha, sigma = SCHEDULE.level(t).over(x)
        return (x - alpha * x_0) / sigma


def _bent(c: float, n: int = 10, steps: int = 500) -> tuple[float, float]:
    """(root mean square distance from the exact f, mean) of what training without a teacher draws from pure noise."""
    network, config = _Bent(), ConsistencyConfig(solver_steps=n, earlier="noise", huber_c=c)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))

    def data(step: int) -> Tensor:
        source = generator(0, step, 0, "data")
        right = torch.rand(256, 1, 1, 8, 8, generator=source) < SHARES[1]
        return PLACES[right.long()] + WIDTH * torch.randn(right.shape, generator=source)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        _loss(network, data(step), step, config).backward()
        optimizer.step()
    t = SCHEDULE.sparse_timesteps(n)[-1:]
    x = SCHEDULE.add_noise(data(-1), torch.randn(256, 1, 1, 8, 8, generator=DRAW("test")), t)
    fine = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    with torch.no_grad():
        drawn = to_x0(x, network(x, t.expand(len(x)), x, motion=False), SCHEDULE.level(t)).flatten().double()
    exact = np.interp(_below(x.flatten().double(), int(t)), _below(fine, 0), fine)  # it keeps every quantile
    return float(np.sqrt(np.square(drawn.numpy() - exact).mean())), float(drawn.mean())


def test_where_f_bends_a_c_above_what_one_sample_misses_by_comes_nearer_to_the_exact_f():
    """Below it, pseudo-Huber asks for medians, and these add up to another flow, which makes 30 % into fewer."""
    (far, high), (near, mean) = _bent(1e-3), _bent(0.3)
    assert near < 0.2 < 0.3 < far
    assert abs(mean - 0.4) < 0.05  # the data's
    assert high > 0.5


def test_which_of_both_a_loss_asks_for_is_a_matter_of_its_c():
    """Given x_t: below what one sample misses by, pseudo-Huber of elements asks for the median, above it for the mean;
    that of the whole clip asks for the mean, where its elements are many and independent."""
    x_t, t, clips = 0.2, torch.tensor(519), (500, 256)
    alpha, sigma = _level(t)
    away, scale = x_t - alpha * PLACES, torch.hypot(alpha * WIDTH, sigma)
    share, middle = SHARES * torch.exp(-0.5 * (away / scale) ** 2), PLACES + alpha * WIDTH**2 / scale**2 * away
    modes = torch.multinomial(share, clips[0] * clips[1], replacement=True, generator=DRAW("modes")).reshape(clips)
    x_0 = middle[modes] + WIDTH * sigma / scale * _normal(*clips)
    begin, end = SCHEDULE.level(t), SCHEDULE.level(t - 100)
    x_s = ddim_step(torch.tensor(x_t), to_eps(torch.tensor(x_t), x_0, begin), begin, end)
    mean, median, misses = x_s.mean(), x_s.flatten().quantile(0.5), x_s.std()
    assert median - mean > 0.2 * misses

    def best(loss) -> float:
        points = torch.linspace(float(mean - misses), float(median + misses), 101, dtype=torch.float64)
        return float(points[torch.stack([loss(x_s - point).mean() for point in points]).argmin()])

    def near(value: Tensor) -> object:
        return pytest.approx(float(value), abs=0.03 * float(misses))

    assert best(partial(pseudo_huber, c=1e-3)) == near(median)
    assert best(partial(pseudo_huber, c=1.0)) == near(mean)
    assert best(pseudo_huber_norm) == near(mean)
