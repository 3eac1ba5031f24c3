"""A training step as public scripts of latent consistency distillation write it: three networks, each of them whole.

Teacher, student and target are copies of the UNet. The teacher is asked with the text and without it, one after the
other; pixels are encoded in every step; the target follows the student parameter by parameter, frozen ones too; AdamW
is torch's plain one. What AnimateLCM adds is written the same way: at stage 2 the student begins with the LoRA merged
into it and the target without. Loss, data, random numbers and trained parameters are those of ``animatelcm.training``
(tests/test_benchmarks_training.py), and so are the layers: this measures how a step is organised, not its networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from animatelcm.config import TrainConfig
from animatelcm.data.batches import ClipBatch
from animatelcm.model import VideoModel
from animatelcm.nets import lora
from animatelcm.nets.adapters import NOTHING, Adapter, Clues
from animatelcm.nets.unet import VideoUNet
from animatelcm.objectives import Draw, clues, shifted_draw
from animatelcm.rng import generator
from animatelcm.training import learning_rate


class Side(NamedTuple):
    """One way to train: what it trains, by state-file name, and the two halves of a step."""

    parameters: Mapping[str, nn.Parameter]
    backward: Callable[[ClipBatch, int], Tensor]
    """Batch, number of the step -> its loss (); the gradients are in the parameters."""
    update: Callable[[int], None]
    """Everything that follows from the gradients, which are gone afterwards."""

    def step(self, batch: ClipBatch, number: int) -> float:
        loss = self.backward(batch, number)
        self.update(number)
        return float(loss)


class Steered(nn.Module):
    """A UNet and, where there is one, the adapter beside it."""

    def __init__(self, unet: VideoUNet, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(self, x: Tensor, t: Tensor, text: Tensor, seen: Clues) -> Tensor:
        hints = NOTHING if self.adapter is None else self.adapter(x, t, text, seen)
        return self.unet(x, t, motion=x.shape[2] > 1, **hints.arguments(text))


class Networks(NamedTuple):
    """Three, or two where nobody teaches."""

    online: Steered
    target: Steered
    teacher: Steered | None


def reference(config: TrainConfig, model: VideoModel) -> Side:
    """The plain way to take a recipe's steps from ``stages.starting_model(config)``, which it leaves as it is."""
    networks = _networks(config, model)
    named = {_file_name(config, name): value for name, value in networks.online.named_parameters()}
    parameters = {name: value for name, value in named.items() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), betas=config.betas, weight_decay=config.weight_decay)
    with torch.no_grad():
        no_text = model.embed([""])

    def backward(batch: ClipBatch, number: int) -> Tensor:
        draw = partial(generator, config.seed, number, 0)
        with autocast(config, model):
            loss = _loss(config, model, networks, batch, draw, no_text)
        loss.backward()
        return loss.detach()

    def update(number: int) -> None:
        nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(config, number)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(networks.target.parameters(), networks.online.parameters(), config.consistency.mu)

    return Side(parameters, backward, update)


def autocast(config: TrainConfig, model: VideoModel) -> torch.autocast:
    """The precision of a recipe's steps."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


def _networks(config: TrainConfig, model: VideoModel) -> Networks:
    if config.adapter is not None:
        adapter = Adapter(deepcopy(model.adapters[config.adapter.name]), motion_scale=config.adapter.motion_scale)
        online = Steered(deepcopy(model.unet), adapter)
        return Networks(online, _frozen(deepcopy(online)), None)
    bare, online = deepcopy(model.unet), deepcopy(model.unet)
    lora.eject(bare)
    if config.trainable == "lora":
        online = Steered(without_motion(online))
        return Networks(online, _frozen(deepcopy(online)), _frozen(Steered(without_motion(bare))))
    for _, layer in lora.layers(online):
        layer.merge()
    lora.eject(online)
    teacher = deepcopy(bare)
    teacher.load_state_dict(model.teacher_motion, strict=False)
    return Networks(Steered(online), _frozen(Steered(bare)), _frozen(Steered(teacher)))


def _frozen(network: Steered) -> Steered:
    return network.requires_grad_(False)


def without_motion(unet: VideoUNet) -> VideoUNet:
    """The image model alone, in place: its temporal layers are taken out."""
    unet.motion = None
    for module in unet.modules():
        if hasattr(module, "motion_modules"):
            module.motion_modules = nn.ModuleList()
    return unet


def _file_name(config: TrainConfig, name: str) -> str:
    beside = "" if config.adapter is None else f"adapter_{config.adapter.name}."
    return name.replace("adapter.network.", beside, 1) if name.startswith("adapter.") else name


def _loss(
    config: TrainConfig, model: VideoModel, networks: Networks, batch: ClipBatch, draw: Draw, no_text: Tensor
) -> Tensor:
    settings, device = config.consistency, model.device
    with torch.no_grad():
        x_0 = batch.latents if batch.latents is not None else model.encode(batch.pixels)
    x_0 = x_0.to(device)
    size, seen = len(x_0), clues(batch, x_0)
    text = model.embed(batch.captions)

    index = shifted_draw(settings.solver_steps, size, config.timestep_shift, draw("timestep")).to(device)
    noise = torch.randn(x_0.shape, generator=draw("noise")).to(device)
    stride = model.schedule.num_train_timesteps // settings.solver_steps
    start = (index + 1) * stride - 1
    end = (start - (settings.k or stride)).clamp(min=0)
    alphas, sigmas = (table.to(device) for table in _tables(model.schedule.alphas_cumprod))
    x_start = alphas[start] * x_0 + sigmas[start] * noise

    eps = networks.online(x_start, start, text, seen)
    prediction = _consistent(x_start, eps, start, alphas, sigmas)
    with torch.no_grad():
        if networks.teacher is None:
            x_end = alphas[end] * x_0 + sigmas[end] * noise
        else:
            cond = networks.teacher(x_start, start, text, seen)
            uncond = networks.teacher(x_start, start, no_text.expand_as(text), seen)
            w = settings.w_min + (settings.w_max - settings.w_min) * torch.rand(size, generator=draw("guidance"))
            w = w.to(device).reshape(-1, 1, 1, 1, 1)
            eps = cond + w * (cond - uncond)
            cond_x0, uncond_x0 = ((x_start - sigmas[start] * e) / alphas[start] for e in (cond, uncond))
            x_end = alphas[end] * (cond_x0 + w * (cond_x0 - uncond_x0)) + sigmas[end] * eps
        aim = _consistent(x_end, networks.target(x_end, end, text, seen), end, alphas, sigmas)
    c = settings.huber_c
    return torch.mean(torch.sqrt((prediction.float() - aim.float()) ** 2 + c**2) - c)


def _tables(cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 1, 1, 1, 1) each: of signal and of noise, at every timestep."""
    product = cumprod.reshape(-1, 1, 1, 1, 1)
    return product.sqrt().float(), (1 - product).sqrt().float()


def _consistent(x: Tensor, eps: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    scaled = (10.0 * t.float()).reshape(-1, 1, 1, 1, 1)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    return c_skip * x + c_out * (x - sigmas[t] * eps) / alphas[t]


@torch.no_grad()
def update_ema(target: Iterable[Tensor], online: Iterable[Tensor], rate: float) -> None:
    """Every parameter of the target, one after the other."""
    for held, new in zip(target, online, strict=True):
        held.mul_(rate).add_(new, alpha=1 - rate)
