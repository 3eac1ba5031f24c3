"""Training without a teacher (AnimateLCM, section 4.3): eq. 12, what one sample of the score costs, a run's result."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
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
from animatelcm.solver import DDIMSolver, ddim_step, to_eps, to_x0
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


def _i2v(**changes):
    """Image-to-video from an encoder that has learned nothing yet."""
    config = recipes.i2v_emoji()
    return replace(config, adapter=replace(config.adapter, start="fresh", **changes))


ADAPTERS = {
    "latents": _i2v,
    "pixels": partial(_i2v, sees="pixels"),
    "tokens": partial(_i2v, kind="image_tokens"),
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
    config = _config(_i2v, bundle, tmp_path_factory.mktemp("run"), steps=4)
    train(config)
    return config


def _checkpoint(config) -> dict[str, dict[str, Tensor]]:
    last = config.folder / "checkpoints" / "step-00000004"
    return {path.stem: load_file(path) for path in sorted(last.glob("*.safetensors"))}


def test_two_steps_and_two_more_are_four_bit_for_bit(run, bundle, tmp_path):
    config = _config(_i2v, bundle, tmp_path, steps=4)
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
