"""Consistency distillation against what is known exactly: Gaussian data, and training steps worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from animatelcm import objectives, schedule
from animatelcm.config import ConsistencyConfig
from animatelcm.data.batches import ClipBatch
from animatelcm.ema import Ema
from animatelcm.nets import lora
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import VideoUNet
from animatelcm.rng import generator
from animatelcm.roles import Role, Roles, consistency_roles
from animatelcm.schedule import NoiseSchedule
from networks import SMALL

SCHEDULE = NoiseSchedule()
SHIFT = 3.0
SPREAD = 0.5


def _mean(text: Tensor) -> Tensor:
    """Of the data: 1 with text, 0.6 without; text (B, 1, 1) is 1 or 0."""
    return (0.6 + 0.4 * text).reshape(-1, 1, 1, 1, 1)


def _gaussian_eps(x: Tensor, t: Tensor, text: Tensor, *, motion: bool) -> Tensor:
    """The optimal prediction for data N(mean, SPREAD^2)."""
    alpha, sigma = SCHEDULE.level(t).over(x)
    return sigma * (x - alpha * _mean(text)) / (alpha**2 * SPREAD**2 + sigma**2)


def _exact(x: Tensor, t: Tensor, mean: float) -> Tensor:
    """The probability-flow ODE's end at timestep 0: it keeps the distance from the mean in standard deviations."""
    (a, s), (a_0, s_0) = SCHEDULE.level(t).over(x), SCHEDULE.level(torch.zeros_like(t)).over(x)
    scale = torch.sqrt((a_0**2 * SPREAD**2 + s_0**2) / (a**2 * SPREAD**2 + s**2))
    return a_0 * mean + scale * (x - a * mean)


class _Affine(nn.Module):
    """Predicts x_0 as an affine function of x, one for every timestep, and says it as noise.

    It sees x with mean 0 and variance 1, so that gradient descent converges as fast in both of its numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, *, motion: bool) -> Tensor:
        alpha, sigma = SCHEDULE.level(t).over(x)
        seen = (x - alpha) / torch.sqrt(alpha**2 * SPREAD**2 + sigma**2)
        slope, offset = (table[t].reshape(-1, 1, 1, 1, 1) for table in (self.slope, self.offset))
        return (x - alpha * (slope * seen + offset)) / sigma


def _distilled(n: int, w: float) -> tuple[Tensor, Tensor]:
    """What training reaches from pure noise, and the exact end."""
    model = SimpleNamespace(
        schedule=SCHEDULE,
        device=torch.device("cpu"),
        embed=lambda texts: torch.tensor([float(bool(text)) for text in texts]).reshape(-1, 1, 1),
    )
    config = ConsistencyConfig(solver_steps=n, w_min=w, w_max=w, huber_c=1.0)
    network = _Affine()
    roles = Roles(Role(network), Role(network), Role(_gaussian_eps))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.7 * n)  # each timestep has 1 / n of the batch
    for step in range(6 * n):
        draw = partial(generator, 0, step, 0)
        data = 1 + SPREAD * torch.randn(16 * n, 1, 1, 4, 4, generator=draw("data"))
        batch = ClipBatch(captions=("text",) * len(data), latents=data)
        objectives.consistency(model, roles, batch, draw, config=config).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    t = torch.full((64,), (1000 // n) * n - 1)
    guided = 1 + w * (1 - 0.6)
    x = SCHEDULE.add_noise(
        guided + SPREAD * torch.randn(64, 1, 1, 4, 4, generator=generator(0, 0, 0, "test")),
        torch.randn(64, 1, 1, 4, 4, generator=generator(0, 0, 0, "noise")),
        t,
    )
    with torch.no_grad():
        alpha, sigma = SCHEDULE.level(t).over(x)
        reached = (x - sigma * network(x, t, torch.ones(64, 1, 1), motion=False)) / alpha
    return reached, _exact(x, t, guided)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_distilling_gaussian_data_reaches_the_exact_consistency_function(w):
    """Closer with N, within 2 % at N = 100. Guided, the two Gaussians make a third, of mean m + w (m - m')."""
    errors = []
    for n in (25, 50, 100):
        reached, exact = _distilled(n, w)
        errors.append(float((reached - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


TINY = replace(SMALL, cross_attention_dim=8)
RANK, ALPHA, RATE = 4, 8.0, 0.05
TEXTS = {"": 0, "a parrot": 1, "a fox": 2}


@pytest.fixture
def model():
    """A float64 network with temporal layers that act and LoRA layers that act."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = VideoUNet(TINY, MotionConfig(num_attention_heads=2, norm_num_groups=4)).double()
        for name, parameter in unet.named_parameters():
            if "motion_modules" in name:
                nn.init.normal_(parameter, std=0.2)
        lora.inject(unet, rank=RANK, alpha=ALPHA, targets=("to_q", "to_v", "conv1", "proj_in"))
        for _, b, _ in lora.factors(unet).values():
            nn.init.normal_(b, std=0.2)
        unet.double()
        table = torch.randn(3, 5, 8, dtype=torch.float64)
    return SimpleNamespace(
        unet=unet,
        schedule=SCHEDULE,
        device=torch.device("cpu"),
        embed=lambda texts: table[[TEXTS[text] for text in texts]],
    )


def _plain(unet: VideoUNet) -> tuple[VideoUNet, dict[str, Tensor], dict[str, Tensor]]:
    """A network without LoRA layers, the base's weights by name, and what the LoRA adds to each."""
    plain = VideoUNet(unet.config, unet.motion).double()
    base = {name.replace(".base_layer", ""): value.detach().clone() for name, value in unet.named_parameters()}
    base = {name: value for name, value in base.items() if "lora_" not in name}
    change = {}
    for path, (a, b, alpha) in lora.factors(unet).items():
        product = b.detach().flatten(1) @ a.detach().flatten(1)
        change[f"{path}.weight"] = (alpha / a.shape[0] * product).reshape(base[f"{path}.weight"].shape)
    return plain, base, change


def _by_hand(plain, weights, x_0, captions, model, step, config):
    """The loss of one training step in float64: weights are (student, target, teacher), whole networks by name."""
    draw = partial(generator, 0, step, 0)
    n, size = config.solver_steps, len(x_0)
    u = torch.rand(size, generator=draw("timestep"), dtype=torch.float64)
    index = (n * SHIFT * u / (1 + (SHIFT - 1) * u)).long()
    noise = torch.randn(x_0.shape, generator=draw("noise")).double()
    w = torch.rand(size, generator=draw("guidance")) * (config.w_max - config.w_min) + config.w_min
    w = (1 + w).double() - 1  # as 1 + w was rounded
    t = (index + 1) * (1000 // n) - 1
    s = torch.where(index == 0, 0, t - 1000 // n)
    product = SCHEDULE.alphas_cumprod
    a_t, s_t, a_s, s_s = (v.reshape(-1, 1, 1, 1, 1) for v in (*_roots(product[t]), *_roots(product[s])))
    text, no_text = model.embed(captions), model.embed([""] * size)
    student, target, teacher = (lambda *inputs, state=state: functional_call(plain, state, inputs) for state in weights)

    def f(network, x, time, a, sigma):
        c = 10.0 * time.double().reshape(-1, 1, 1, 1, 1)
        skip, out = 0.25 / (c**2 + 0.25), c / (c**2 + 0.25).sqrt()
        return skip * x + out * (x - sigma * network(x, time, text)) / a

    x_t = a_t * x_0.double() + s_t * noise
    with torch.no_grad():
        cond, uncond = teacher(x_t, t, text), teacher(x_t, t, no_text)
        w = w.reshape(-1, 1, 1, 1, 1)
        eps = (1 + w) * cond - w * uncond
        x_s = a_s * (x_t - s_t * eps) / a_t + s_s * eps
        aim = f(target, x_s, s, a_s, s_s)
    difference = f(student, x_t, t, a_t, s_t) - aim
    huber = ((difference**2 + config.huber_c**2).sqrt() - config.huber_c).flatten(1).mean(1)
    return ((1 - config.delta * index.double() / n) ** config.gamma * huber).mean()


def _roots(product: Tensor) -> tuple[Tensor, Tensor]:
    return product.sqrt(), (1 - product).sqrt()


@pytest.fixture
def in_float64(monkeypatch):
    """The objective's own float32 arithmetic in float64, so that nothing but the formulas can differ."""
    schedule._tables.cache_clear()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    schedule._tables.cache_clear()


def _clips(step: int) -> tuple[Tensor, tuple[str, str]]:
    return torch.randn(2, 4, 3, 4, 4, generator=generator(9, step, 0, "clips")), ("a parrot", "a fox")


def test_two_training_steps_of_temporal_layers_equal_the_hand_calculation(model, in_float64):
    """Three networks, a merged LoRA, an average of merged weights: what the views must amount to."""
    config = ConsistencyConfig(solver_steps=50, mu=0.7, mu_lora=0.7, delta=0.3, gamma=2.0, w_min=1, w_max=3)
    plain, base, change = _plain(model.unet)
    live = {name: p.requires_grad_(True) for name, p in model.unet.named_parameters() if "motion_modules" in name}
    teacher_motion = {name: p.detach().clone() for name, p in live.items()}
    average = Ema(config.mu, live)
    average.shadows = {name: value.detach().clone() for name, value in live.items()}  # float64
    student = {name: value + change.get(name, 0) for name, value in base.items()}
    target, teacher = dict(base), dict(base)
    for step in range(2):
        x_0, captions = _clips(step)
        roles = consistency_roles(
            model.unet, config, step=step, average=average.state_dict(), teacher_motion=teacher_motion
        )
        batch = ClipBatch(captions=captions, latents=x_0.double())
        draw = partial(generator, 0, step, 0)
        terms = objectives.consistency(model, roles, batch, draw, config=config, timestep_shift=SHIFT)
        gradients = dict(zip(live, torch.autograd.grad(terms.loss.mean(), list(live.values())), strict=True))

        leaves = {name: value.clone().requires_grad_(name in live) for name, value in student.items()}
        loss = _by_hand(plain, (leaves, target, teacher), x_0, captions, model, step, config)
        by_hand = dict(zip(live, torch.autograd.grad(loss, [leaves[name] for name in live]), strict=True))

        assert abs(terms.loss.mean().item() - loss.item()) < 1e-9 * loss.item()
        scale = max(value.abs().max().item() for value in by_hand.values())
        assert all((gradients[name] - by_hand[name]).abs().max() < 1e-9 * scale for name in live)

        with torch.no_grad():
            for name in live:
                live[name] -= RATE * gradients[name]
                student[name] = student[name] - RATE * by_hand[name]
        average.update(live)
        target = {name: config.mu * target[name] + (1 - config.mu) * student[name] for name in target}
        shadows = average.state_dict()
        assert all((shadows[name] - target[name]).abs().max() < 1e-6 for name in live)


def test_two_training_steps_of_a_lora_equal_the_hand_calculation(model, in_float64):
    config = ConsistencyConfig(solver_steps=50, mu=0.8, w_min=1, w_max=3)
    plain, base, _ = _plain(model.unet)
    live = {name: p.requires_grad_(True) for name, p in model.unet.named_parameters() if "lora_" in name}
    average = Ema(config.mu, live)
    average.shadows = {name: value.detach().clone() for name, value in live.items()}  # float64
    factors = {name: value.detach().clone() for name, value in live.items()}
    averaged = dict(factors)
    for step in range(2):
        x_0, captions = _clips(step)
        x_0 = x_0[:, :, :1]
        roles = consistency_roles(model.unet, config, step=step, average=average.state_dict(), teacher_motion={})
        batch = ClipBatch(captions=captions, latents=x_0.double())
        draw = partial(generator, 0, step, 0)
        terms = objectives.consistency(model, roles, batch, draw, config=config, timestep_shift=SHIFT)
        gradients = dict(zip(live, torch.autograd.grad(terms.loss.mean(), list(live.values())), strict=True))

        leaves = {name: value.clone().requires_grad_(True) for name, value in factors.items()}
        still = {name: value * 0 if _outer(name) else value for name, value in base.items()}
        weights = (_merged(still, leaves), _merged(still, averaged), still)
        loss = _by_hand(plain, weights, x_0, captions, model, step, config)
        by_hand = dict(zip(live, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        assert abs(terms.loss.mean().item() - loss.item()) < 1e-9 * loss.item()
        scale = max(value.abs().max().item() for value in by_hand.values())
        assert all((gradients[name] - by_hand[name]).abs().max() < 1e-9 * scale for name in live)
        with torch.no_grad():
            for name in live:
                live[name] -= RATE * gradients[name]
                factors[name] = factors[name] - RATE * by_hand[name]
        average.update(live)
        averaged = {name: config.mu * averaged[name] + (1 - config.mu) * factors[name] for name in factors}


def _outer(name: str) -> bool:
    """The last map of a motion module: zero, it leaves the image model."""
    return "motion_modules" in name and "transformer_blocks" not in name and ".proj_out." in name


def _merged(base: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(base)
    for name, b in factors.items():
        if ".lora_B." in name:
            path, a = name.partition(".lora_B.")[0], factors[name.replace("lora_B", "lora_A")]
            product = ALPHA / RANK * (b.flatten(1) @ a.flatten(1))
            merged[f"{path}.weight"] = base[f"{path}.weight"] + product.reshape(base[f"{path}.weight"].shape)
    return merged


@pytest.mark.parametrize("steps", [0, 1, 7, 60])
def test_the_target_is_the_average_of_merged_weights_that_began_without_the_lora(model, steps):
    config = ConsistencyConfig(mu=0.9, mu_lora=0.9)
    plain, base, change = _plain(model.unet)
    live = {name: p for name, p in model.unet.named_parameters() if "motion_modules" in name}
    average = Ema(config.mu, live)
    merged = dict(base)
    for step in range(steps):
        with torch.no_grad():
            for name, parameter in live.items():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator(1, step, 0, name)).double()
        average.update(live)
        online = {name: live.get(name, value) + change.get(name, 0) for name, value in base.items()}
        merged = {name: config.mu * merged[name] + (1 - config.mu) * online[name] for name in merged}
    roles = consistency_roles(model.unet, config, step=steps, average=average.state_dict(), teacher_motion={})
    x, t, text = torch.randn(1, 4, 3, 4, 4).double(), torch.tensor([400]), model.embed(["a fox"])
    with torch.no_grad():
        ours, theirs = roles.target(x, t, text, motion=True), functional_call(plain, merged, (x, t, text))
    assert (ours - theirs).abs().max() < 1e-6


def test_a_fresh_student_of_stage_two_draws_the_images_of_stage_one(model):
    """One frame, no temporal layers: the network with its frozen LoRA is the accelerated image model."""
    plain, base, change = _plain(model.unet)
    accelerated = {name: value + change.get(name, 0) for name, value in base.items()}
    average = {name: p.detach() for name, p in model.unet.named_parameters() if "motion_modules" in name}
    roles = consistency_roles(model.unet, ConsistencyConfig(), step=0, average=average, teacher_motion={})
    x, t, text = torch.randn(2, 4, 1, 4, 4).double(), torch.tensor([400, 20]), model.embed(["a fox", ""])
    with torch.no_grad():
        ours = roles.student(x, t, text, motion=False)
        theirs = functional_call(plain, accelerated, (x, t, text), {"motion": False})
    assert (ours - theirs).abs().max() < 1e-12


def test_the_target_has_the_lora_at_once_or_is_the_student_where_that_is_asked_for(model):
    average = {name: p.detach() for name, p in model.unet.named_parameters() if "motion_modules" in name}
    views = {}
    for choice in ({"init": "direct"}, {"init": "ema"}, {"target": "online"}):
        roles = consistency_roles(model.unet, ConsistencyConfig(**choice), step=0, average=average, teacher_motion={})
        views[str(choice)] = roles
    x, t, text = torch.randn(1, 4, 2, 4, 4).double(), torch.tensor([700]), model.embed(["a fox"])
    with torch.no_grad():
        online = model.unet(x, t, text)
        direct, late, same = (roles.target(x, t, text, motion=True) for roles in views.values())
    assert torch.allclose(direct, online, atol=1e-12)
    assert torch.equal(same, online)
    assert (late - online).abs().max() > 1e-3
    plain, base, _ = _plain(model.unet)
    with torch.no_grad():
        bare = views["{'init': 'ema'}"].teacher(x, t, text, motion=True)
        assert torch.allclose(bare, functional_call(plain, base, (x, t, text)), atol=1e-12)
        assert torch.equal(model.unet(x, t, text), online)  # the LoRA layers act again
