"""Training without a teacher (AnimateLCM, section 4.3): eq. 12, what one sample of the score costs, a run's result."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from animatelcm import objectives, recipes, stages
from animatelcm.bundle import load, save
from animatelcm.config import ConsistencyConfig
from animatelcm.consistency import renoise
from animatelcm.data.batches import ClipBatch
from animatelcm.ema import Ema
from animatelcm.losses import pseudo_huber, pseudo_huber_norm
from animatelcm.nets import lora
from animatelcm.nets.adapters import Adapter, Clues, Hints, controlnet, t2i_adapter
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.rng import generator
from animatelcm.roles import Role, Roles, adapter_roles
from animatelcm.schedule import Level, NoiseSchedule
from animatelcm.solver import DDIMSolver, ddim_step
from animatelcm.training import train
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import LoraLayer

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


def _asked(x_0: Tensor, config: ConsistencyConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, x_s, s): what the objective asks student and target, where nobody teaches."""
    heard = []

    def role(x, t, text, *, motion, clues):
        heard.append((x, t))
        return torch.zeros_like(x)

    model = SimpleNamespace(
        schedule=SCHEDULE, device=torch.device("cpu"), embed=lambda texts: torch.zeros(len(texts), 1, 1)
    )
    batch = ClipBatch(captions=("",) * len(x_0), latents=x_0)
    objectives.consistency(model, Roles(role, role, None), batch, DRAW, config=config)
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


# Gaussian data N(MEAN, SPREAD^2): with phi = atan2(sigma, SPREAD alpha) everything is an angle.


def _angle(t: Tensor, spread: float = SPREAD) -> Tensor:
    alpha, sigma = _level(t)
    return torch.atan2(sigma, spread * alpha)


def _scale(t: Tensor, spread: float = SPREAD) -> Tensor:
    """The standard deviation of x_t."""
    alpha, sigma = _level(t)
    return torch.hypot(spread * alpha, sigma)


def _deviation(t: Tensor, s: Tensor, spread: float = SPREAD) -> Tensor:
    """Of one sample's earlier point from the exact DDIM point, root mean square."""
    return _scale(s, spread) * torch.sin(_angle(t, spread) - _angle(s, spread))


def _best_eps(x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t]."""
    alpha, sigma = _level(t).over(x)
    return sigma * (x - alpha * MEAN) / _scale(t).reshape(alpha.shape) ** 2


def _marginal(t: Tensor, count: int) -> Tensor:
    return _level(t).over(t[:, None]).alpha * MEAN + _scale(t)[:, None] * _normal(len(t), count)


def _chain(n: int, k: int | None = None) -> Tensor:
    """The timesteps through which what is learned at the noisiest one comes from the data, ascending from 0."""
    stride = 1000 // n
    links = [n * stride - 1]
    while links[-1]:
        links.append(max(links[-1] - (k or stride), 0))
    return torch.tensor(links[::-1])


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
    model = SimpleNamespace(
        schedule=SCHEDULE, device=torch.device("cpu"), embed=lambda texts: torch.zeros(len(texts), 1, 1)
    )
    config = ConsistencyConfig(solver_steps=n, w_min=0, w_max=0, huber_c=1.0)
    network = _Affine()
    teacher = Role(lambda x, t, text, *, motion: _best_eps(x.double(), t).float())
    roles = Roles(Role(network), Role(network), teacher if taught else None)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.7 * n)  # each timestep has 1 / n of the batch
    late = []
    for step in range(8 * n):
        draw = partial(generator, 0, step, 0)
        data = MEAN + SPREAD * torch.randn(800, 1, 1, 4, 4, generator=draw("data"))
        batch = ClipBatch(captions=("",) * len(data), latents=data)
        objectives.consistency(model, roles, batch, draw, config=config).loss.mean().backward()
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
        wanted = _scale(zero) * torch.cos(_angle(_chain(n)).diff()).prod()
        for taught in (True, False):
            mean, spread = _distilled(n, taught=taught)
            assert mean == pytest.approx(float(_level(zero).alpha) * MEAN, abs=0.01)
            assert spread == pytest.approx(float(wanted), rel=0.01), (n, taught)
        lost.append(1 - spread / float(_scale(zero)))
    assert np.polyfit(np.log(counts), np.log(lost), 1)[0] == pytest.approx(-1, abs=0.15)


def test_k_links_the_data_to_noise_in_fewer_steps_and_loses_as_a_coarser_grid_does():
    def lost(n: int, k: int | None = None, spread: float = SPREAD) -> float:
        return 1 - torch.cos(_angle(_chain(n, k), spread).diff()).prod().item()

    assert lost(50, 100) == lost(10)
    assert lost(50, 20) == lost(50)
    assert lost(50, 1000) > 0.9  # one link: the mean of all clips
    losses = [lost(n) for n in (10, 25, 50, 100, 200)]
    assert np.polyfit(np.log((10, 25, 50, 100, 200)), np.log(losses), 1)[0] == pytest.approx(-1, abs=0.1)
    for spread in (1.0, 0.3, 0.1):  # the finer the detail, the more of it
        assert lost(50, spread=spread) < lost(50, spread=spread / 2)


# Data with two modes, 30 % at -1 and 70 % at 1: f bends, and the posterior leans to one side.

SHARES, PLACES, WIDTH = np.array([0.3, 0.7]), np.array([-1.0, 1.0]), 0.5
GRID = np.linspace(-7, 7, 2001)
PARTS = 32


def _cdf(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(x))).numpy()


QUANTILES = torch.special.ndtri((torch.arange(PARTS, dtype=torch.float64) + 0.5) / PARTS).numpy()
QUANTILES /= QUANTILES.std()


def _posterior(t: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Of x_0 given x_t = GRID: the modes' shares (2, G), means (2, G) and their standard deviation."""
    alpha, sigma = (float(v) for v in _level(torch.tensor(t)))
    scale = math.hypot(alpha * WIDTH, sigma)
    away = GRID - alpha * PLACES[:, None]
    weights = SHARES[:, None] * np.exp(-0.5 * (away / scale) ** 2)
    return weights / weights.sum(0), PLACES[:, None] + alpha * WIDTH**2 / scale**2 * away, WIDTH * sigma / scale


def _median(shares: np.ndarray, means: np.ndarray, spread: float) -> np.ndarray:
    low, high = means.min(0) - 8 * spread, means.max(0) + 8 * spread
    for _ in range(50):
        middle = (low + high) / 2
        below = (shares * _cdf((middle - means) / spread)).sum(0) < 0.5
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _learned(n: int, how: str | float) -> np.ndarray:
    """f at the noisiest timestep, on GRID: link after link, what minimises the loss given the f before.

    ``how``: "teacher", a perfect one; or the clip's own noise under "squared" or "absolute" errors, or under
    pseudo-Huber with that c.
    """
    f, links = GRID.copy(), _chain(n).tolist()
    for s, t in pairwise(links):
        (a_t, s_t), (a_s, s_s) = (map(float, _level(torch.tensor(i))) for i in (t, s))
        shares, means, spread = _posterior(t)
        keep, add = s_s / s_t * GRID, a_s - a_t * s_s / s_t
        if how == "teacher":
            f = np.interp(keep + add * (shares * means).sum(0), GRID, f)
        elif how == "absolute":  # f rises: the median of f(x_s) is f at the median
            f = np.interp(keep + add * _median(shares, means, spread), GRID, f)
        else:
            x_0 = means[:, None] + spread * QUANTILES[:, None]
            f = _least(np.interp(keep + add * x_0, GRID, f), np.repeat(shares[:, None], PARTS, 1) / PARTS, how)
    return f


def _least(values: np.ndarray, weights: np.ndarray, how: str | float) -> np.ndarray:
    """The point (G,) of the least mean loss from values (2, PARTS, G)."""
    if how == "squared":
        return (weights * values).sum((0, 1))
    low, high = values.min((0, 1)), values.max((0, 1))
    for _ in range(25):
        middle = (low + high) / 2
        away = values - middle
        rises = (weights * away / np.sqrt(away**2 + how**2)).sum((0, 1)) > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return middle


def _error(f: np.ndarray, t: int) -> tuple[float, float]:
    """(root mean square distance from the exact f, mean of f) over x_t; the exact one keeps every quantile."""

    def cdf(x: np.ndarray, at: int) -> np.ndarray:
        alpha, sigma = (float(v) for v in _level(torch.tensor(at)))
        return (SHARES[:, None] * _cdf((x - alpha * PLACES[:, None]) / math.hypot(alpha * WIDTH, sigma))).sum(0)

    fine = np.linspace(-5, 5, 100_001)
    exact = np.interp(cdf(GRID, t), cdf(fine, 0), fine)
    density = np.gradient(cdf(GRID, t))
    return float(np.sqrt((density * (f - exact) ** 2).sum())), float((density * f).sum())


def test_where_f_bends_the_clips_own_noise_costs_more_than_a_perfect_teacher_and_both_vanish_with_n():
    counts, errors = (10, 25, 50, 100, 200), {}
    for how in ("teacher", "squared"):
        errors[how], means = zip(*(_error(_learned(n, how), n * (1000 // n) - 1) for n in counts), strict=True)
    slopes = {how: np.polyfit(np.log(counts), np.log(e), 1)[0] for how, e in errors.items()}
    assert slopes["teacher"] == pytest.approx(-0.95, abs=0.05)
    assert slopes["squared"] == pytest.approx(-0.78, abs=0.05)
    ratios = np.divide(errors["squared"], errors["teacher"])
    assert (ratios > 1.2).all()
    assert (ratios < 2.5).all()
    assert means == pytest.approx([0.4 * float(_level(torch.tensor(0)).alpha)] * 5, abs=1e-3)  # with squares: exactly


def test_with_absolute_errors_the_clips_own_noise_is_biased_at_every_n():
    """Medians, link by link: the limit is another flow, which makes 30 % into fewer."""
    (coarse, _), (fine, mean) = (_error(_learned(n, "absolute"), n * (1000 // n) - 1) for n in (25, 200))
    assert fine > 0.9 * coarse > 0.25
    assert mean > 0.55


def test_a_c_above_what_one_sample_misses_by_is_as_good_as_squares():
    errors = [_error(_learned(25, how), 999)[0] for how in (1e-3, 0.1, 1.0, "squared")]
    assert errors[0] > 3 * errors[3]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] == pytest.approx(errors[3], rel=0.02)


def test_which_of_both_a_loss_asks_for_is_a_matter_of_its_c():
    """Given x_t: below what one sample misses by, pseudo-Huber of elements asks for the median, above it for the mean;
    that of the whole clip asks for the mean, where its elements are many and independent."""
    t = torch.tensor([519])
    shares, means, spread = _posterior(519)
    at = int(np.abs(GRID - 0.2).argmin())
    share, middle = torch.from_numpy(shares[:, at]), torch.from_numpy(means[:, at])
    modes = torch.multinomial(share, 2_000 * 256, replacement=True, generator=DRAW("modes"))
    x_0 = (middle[modes] + spread * _normal(2_000 * 256)).reshape(2_000, 256)
    (a_t, s_t), (a_s, s_s) = _level(t), _level(t - 100)
    x_s = s_s / s_t * GRID[at] + (a_s - a_t * s_s / s_t) * x_0
    mean, median, misses = x_s.mean(), x_s.flatten().quantile(0.5), x_s.std()
    assert median - mean > 0.2 * misses

    def best(loss) -> float:
        points = torch.linspace(float(mean - misses), float(median + misses), 201, dtype=torch.float64)
        return float(points[torch.stack([loss(x_s - point).mean() for point in points]).argmin()])

    def near(value: Tensor) -> object:
        return pytest.approx(float(value), abs=0.03 * float(misses))

    assert best(partial(pseudo_huber, c=1e-3)) == near(median)
    assert best(partial(pseudo_huber, c=1.0)) == near(mean)
    assert best(pseudo_huber_norm) == near(mean)


# The miniature made narrow: who is asked, what learns, what a run leaves.

NARROW = UNetConfig(
    in_channels=16,
    out_channels=16,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=128,
    attention_head_dim=2,
)


@torch.no_grad()
def _shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter is zero."""
    source = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return network


@pytest.fixture(scope="module")
def bundle(fresh_model, tmp_path_factory):
    """A distilled model with an acceleration, two adapters that read maps, and no teacher's folder any more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = _shaken(VideoUNet(NARROW, MotionConfig(num_attention_heads=2, norm_num_groups=8)))
        edge, pose = t2i_adapter(NARROW, 8), controlnet(NARROW, (4, 8, 8, 16))
    lora.inject(unet, rank=2, alpha=2.0, targets=("to_q",))
    acceleration = lora.eject(_shaken(unet, seed=1))
    motion = {name: 2 * value for name, value in unet.state_dict().items() if "motion_modules" in name}
    model = replace(fresh_model, unet=unet, image_lora=acceleration, teacher_motion=motion)
    model.adapters = {"edge": _shaken(edge), "pose": _shaken(pose)}
    folder = tmp_path_factory.mktemp("base") / "model"
    save(model, folder, dtype=torch.float32)
    shutil.rmtree(folder / "motion_adapter_teacher")
    return folder


def _config(recipe, bundle, out, **changes):
    config = replace(recipe(), model=str(bundle), out=out, batch_size=1, save_every=1000, log_every=1, **changes)
    return replace(config, data=replace(config.data, length=3, cache=False))


def _batch(size: int = 2, frames: int = 3) -> ClipBatch:
    source = torch.Generator().manual_seed(0)
    return ClipBatch(
        captions=("a fox", "a parrot")[:size],
        latents=torch.randn(size, 16, frames, 8, 8, generator=source),
        first=torch.rand(size, 3, 64, 64, generator=source) * 2 - 1,
        maps=torch.rand(size, 3, frames, 64, 64, generator=source),
    )


ADAPTERS = {
    "latents": recipes.i2v_emoji,
    "pixels": lambda: replace(recipes.i2v_emoji(), adapter=replace(recipes.i2v_emoji().adapter, sees="pixels")),
    "tokens": lambda: replace(recipes.i2v_emoji(), adapter=replace(recipes.i2v_emoji().adapter, kind="image_tokens")),
    "t2i lora": recipes.t2i_adapter_lora_emoji,
    "controlnet lora": recipes.controlnet_lora_emoji,
}


@pytest.mark.parametrize("recipe", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_nobody_teaches_and_all_of_the_adapter_learns_and_nothing_else(recipe, bundle, tmp_path, monkeypatch):
    config = _config(recipe, bundle, tmp_path)
    model = stages.starting_model(config)
    assert not model.teacher_motion
    _shaken(model.adapters[config.adapter.name])
    live = dict(stages.named_trainable(model, config))
    assert all((".lora_" in name) == (config.lora is not None) for name in live)
    state = SimpleNamespace(step=0, target=Ema(config.consistency.mu, live))
    met, asked, method = [], [], objectives.consistency
    monkeypatch.setattr(
        objectives,
        "consistency",
        lambda model, roles, *rest, **named: met.append(roles) or method(model, roles, *rest, **named),
    )
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    terms = stages.objective(config, model, state)(_batch(), DRAW)
    hook.remove()
    terms.loss.mean().backward()
    assert met[0].teacher is None
    assert asked == [2, 2]  # student and target, no guidance
    for part, network in model.networks.items():
        for name, parameter in network.named_parameters():
            if f"{part}.{name}" in live:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_target_sees_the_average_and_not_the_live_adapter(bundle, with_lora):
    model = load(bundle)
    network = ImageEncoder(ImageEncoderConfig(channels=(16, 32), in_channels=16))
    if with_lora:
        lora.inject(network, rank=2, alpha=2.0, targets=("block1", "block2"))
    adapter, x_0 = Adapter(_shaken(network)), _batch().latents
    names = [name for name, _ in adapter.named_parameters() if not with_lora or ".lora_" in name]
    other = _shaken(deepcopy(adapter), seed=1)
    average = {name: value.detach() for name, value in other.named_parameters() if name in names}
    by_hand = deepcopy(adapter)
    by_hand.load_state_dict(average, strict=False)
    config = ConsistencyConfig(earlier="noise")
    roles = adapter_roles(model.unet, adapter, config, average=average, teacher_motion={})
    text, t, clues = model.embed(["a fox", "a parrot"]), torch.tensor([40, 900]), Clues(image=x_0[:, :, 0])
    with torch.no_grad():
        student, target = (role(x_0, t, text, motion=True, clues=clues) for role in (roles.student, roles.target))
        wanted = model.unet(x_0, t, motion=True, **by_hand(x_0, t, text, clues).arguments(text))
        assert torch.equal(target, wanted)
        assert (student - target).abs().max() > 1e-3
        _shaken(adapter, seed=2)
        assert torch.equal(roles.target(x_0, t, text, motion=True, clues=clues), target) == (not with_lora)
        for name, parameter in adapter.named_parameters():  # a LoRA's own layers are frozen and shared
            parameter.copy_(by_hand.get_parameter(name) if name not in names else parameter)
        assert torch.equal(roles.target(x_0, t, text, motion=True, clues=clues), target)
        assert not torch.equal(roles.student(x_0, t, text, motion=True, clues=clues), student)
    online = adapter_roles(model.unet, adapter, replace(config, target="online"), average=average, teacher_motion={})
    assert online.target is online.student


@pytest.fixture(scope="module")
def run(bundle, tmp_path_factory):
    """Four steps of image-to-video in one go, from a bundle without a teacher."""
    config = _config(recipes.i2v_emoji, bundle, tmp_path_factory.mktemp("run"), steps=4)
    train(config)
    return config


def _checkpoint(config) -> dict[str, dict[str, Tensor]]:
    last = config.folder / "checkpoints" / "step-00000004"
    return {path.stem: load_file(path) for path in sorted(last.glob("*.safetensors"))}


def test_two_steps_and_two_more_are_four_bit_for_bit(run, bundle, tmp_path):
    config = _config(recipes.i2v_emoji, bundle, tmp_path, steps=4)
    assert train(config, stop_after=2) is None
    train(config, resume=True)
    ours, theirs = _checkpoint(config), _checkpoint(run)
    assert ours.keys() == theirs.keys() == {"weights", "ema", "target", "optimizer"}
    for part in theirs:
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items()), part


def test_a_run_moves_the_encoder_keeps_the_bundle_and_adds_to_it(run, bundle):
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    before, after = load(bundle), load(run.folder / "model")
    assert before.adapters.keys() == {"edge", "pose"}
    assert after.adapters.keys() == {"edge", "i2v", "pose"}
    for part, network in before.networks.items():
        ours = after.networks[part].state_dict()
        assert all(torch.allclose(ours[key], value, atol=1e-6) for key, value in network.state_dict().items()), part
    for base in ((load(folder, image_scale=0.0) for folder in (bundle, run.folder / "model")),):
        first, last = (model.unet.state_dict() for model in base)
        assert all(torch.equal(last[key], value) for key, value in first.items())
    assert not after.teacher_motion
    assert after.image_lora.keys() == before.image_lora.keys()
    assert after.facts.num_inference_steps == before.facts.num_inference_steps
    averages = _checkpoint(run)["ema"]
    ours = after.adapters["i2v"].state_dict()
    assert all(torch.equal(ours[name.removeprefix("adapter_i2v.")], value) for name, value in averages.items())
    start = stages.starting_model(run).adapters["i2v"].state_dict()
    assert any(not torch.equal(start[name], value) for name, value in ours.items())


@pytest.mark.parametrize(
    "recipe", [recipes.t2i_adapter_lora_emoji, recipes.controlnet_lora_emoji], ids=["t2i_adapter", "controlnet"]
)
def test_a_merged_lora_is_the_adapter_with_the_live_one(recipe, bundle, tmp_path):
    config = _config(recipe, bundle, tmp_path)
    model, name, batch = stages.starting_model(config), config.adapter.name, _batch()
    network, x, t = model.adapters[name], batch.latents, torch.tensor([40, 900])
    text, clues = model.embed(batch.captions), Clues(maps=batch.maps)

    def hints(network) -> list[Tensor]:
        found: Hints = Adapter(deepcopy(network).double())(x, t, text, clues)
        return [*found.features, *found.skip_residuals, *([] if found.mid_residual is None else [found.mid_residual])]

    with torch.no_grad():
        plain = hints(network)
        for _, b, _ in lora.factors(network).values():
            nn.init.normal_(b, std=0.05)
        live = hints(network)
        merged = stages.result(config, model).adapters[name]
        base = load(bundle).adapters[name]
        state = {f"{name}.{key}": value for key, value in base.state_dict().items()}
        file = load_file(config.folder / f"{config.name}.safetensors")
        alpha, downs = config.lora.alpha, [key for key in file if ".lora_A." in key]
        kept = {
            key.partition(".lora_A.")[0]: LoraLayer(file[key], file[key.replace("lora_A", "lora_B")], alpha)
            for key in downs
        }
        read = {key.removeprefix(f"{name}."): value for key, value in fused(state, [(kept, 1.0)]).items()}
        base.load_state_dict(read, strict=False)
        pairs = list(zip(live, hints(merged), plain, hints(base), strict=True))
    assert all((ours - theirs).norm() <= 1e-6 * ours.norm() for ours, theirs, _, _ in pairs)
    assert all((ours - halved).norm() <= 1e-3 * ours.norm() for ours, _, _, halved in pairs)  # the file is fp16
    assert all((ours - bare).norm() > 0.05 * bare.norm() for ours, _, bare, _ in pairs[1:])
