"""From a request to videos: one loop over timesteps for every sampler, as a generator that shows each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from animatelcm.colour import aligned
from animatelcm.condition import Condition, Steering, read, steering
from animatelcm.consistency import consistency_function, renoise
from animatelcm.data.batches import to_pixels
from animatelcm.model import VideoModel
from animatelcm.request import SampleRequest, Video
from animatelcm.rng import generator
from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import ddim_step, guided

Eps = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, F, h, w) float32, t (B,) int64) -> predicted noise, guidance included."""


class Preview(NamedTuple):
    """The state after one step of ``total``: the latents so far, (B, C, F, h, w); ``model.decode`` shows them."""

    step: int
    total: int
    latents: Tensor


def sample(
    model: VideoModel,
    request: SampleRequest,
    *,
    latents: Tensor | None = None,
    condition: Condition | None = None,
    progress: Callable[[Preview], None] = lambda preview: None,
) -> list[Video]:
    """Make the videos of a request; ``progress`` is shown every step.

    ``latents`` replaces the initial noise: (1, C, F, h, w) of variance 1. ``condition`` is what the request's files
    hold, where they are read already, or pixels of no file. Each video depends on its own seed alone, whatever
    ``num_videos_per_prompt`` is.
    """
    request = request.resolved(model.facts, model.downscale)
    condition = read(request, model) if condition is None else condition
    steer = steering(model, request, condition)
    return [_sample_one(model, single, latents, condition, steer, progress) for single in request.singles()]


def _sample_one(
    model: VideoModel,
    request: SampleRequest,
    latents: Tensor | None,
    condition: Condition,
    steer: Steering,
    progress: Callable[[Preview], None],
) -> Video:
    began = time.perf_counter()
    for preview in sample_steps(model, request, latents=latents, condition=condition, steer=steer):
        latents = preview.latents
        progress(preview)
    assert latents is not None
    denoised = time.perf_counter()
    with torch.inference_mode():
        frames = model.decode(latents)[0]
    if condition.image is not None:
        frames = aligned(frames, condition.image, request.colour_match)
    return Video(
        frames=frames,
        fps=model.facts.fps,
        request=request,
        model=model.facts.name,
        evaluations=_taken(request, condition.video) * (2 if request.guidance_scale != 1 else 1),
        seconds={"denoise": denoised - began, "decode": time.perf_counter() - denoised},
    )


def sample_steps(
    model: VideoModel,
    request: SampleRequest,
    *,
    latents: Tensor | None = None,
    condition: Condition | None = None,
    steer: Steering | None = None,
) -> Iterator[Preview]:
    """The steps of one video as they happen; the last preview holds the finished latents.

    ``steer``: ``condition.steering`` of this model and condition, where several videos share it.
    """
    request = request.resolved(model.facts, model.downscale)
    condition = read(request, model) if condition is None else condition
    total, walk = _taken(request, condition.video), SAMPLERS[request.sampler or "ddim"]
    x = initial_noise(model, request) if latents is None else latents.float()
    x = x.to(model.device)
    with torch.inference_mode():
        steer = steering(model, request, condition) if steer is None else steer
        eps = _guided_eps(model, request, steer, total)
        start = model.encode(to_pixels([condition.video])) if condition.video is not None else None
        walking = walk(eps, model.schedule, x, request, start)
    for step in range(total):
        with torch.inference_mode():  # not around the yield: the mode must not leak into the caller
            x = next(walking)
        yield Preview(step + 1, total, x)


def _taken(request: SampleRequest, start: object | None) -> int:
    """Steps that are walked: a sampler of many steps leaves out those before the noise of a video to begin from, as
    diffusers' video-to-video does; one of few steps spreads all of them over the rest."""
    steps = _steps(request)
    return steps if start is None or request.sampler == "lcm" else max(1, int(steps * request.strength))


def initial_noise(model: VideoModel, request: SampleRequest) -> Tensor:
    """x_T of a resolved request: (1, C, F, h, w), standard normal, by the request's seed."""
    frames, height, width = request.shape
    shape = (1, model.vae.config.latent_channels, frames, height // model.downscale, width // model.downscale)
    return torch.randn(shape, generator=generator(request.seed, 0, 0, "latents"))


def _guided_eps(model: VideoModel, request: SampleRequest, steer: Steering, total: int) -> Eps:
    """The network with its text and what steers it, guided where asked: both halves in one batch, [without text, with
    text]."""
    scale = request.guidance_scale
    assert scale is not None
    motion, steps = request.shape[0] > 1, count()

    def steered(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        step = next(steps)
        hints = steer(x, t, text, step / total, (step + 1) / total)
        return model.unet(x, t, **hints.arguments(text), motion=motion).float()

    if scale == 1:
        text = model.embed([request.prompt])
        return lambda x, t: steered(x, t, text)
    both = model.embed([request.negative_prompt, request.prompt])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = steered(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guided(cond, uncond, scale)

    return eps


Walk = Callable[[Eps, NoiseSchedule, Tensor, SampleRequest, Tensor | None], Iterator[Tensor]]
"""(eps, schedule, noise, resolved request, clean latents to begin from or None) -> the latents after each step."""


def _ddim(
    eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, start: Tensor | None
) -> Iterator[Tensor]:
    times = schedule.ddim_timesteps(_steps(request), request.spacing).tolist()[-_taken(request, start) :]
    x = _begun(x, start, times[0], schedule)
    for t, s in zip(times, [*times[1:], 0], strict=True):
        t_b, s_b = x.new_full((len(x),), t, dtype=torch.long), x.new_full((len(x),), s, dtype=torch.long)
        x = ddim_step(x, eps(x, t_b), schedule.level(t_b), schedule.level(s_b))
        yield x


def _consistency(
    eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, start: Tensor | None
) -> Iterator[Tensor]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to x_0, noise again, jump again."""
    times = schedule.lcm_timesteps(_steps(request), 1.0 if start is None else request.strength).tolist()
    x = _begun(x, start, times[0], schedule)
    for step, t in enumerate(times):
        t_b = x.new_full((len(x),), t, dtype=torch.long)
        x_0 = consistency_function(x, eps(x, t_b), t_b, schedule)
        if step + 1 < len(times):
            noise = torch.randn(x.shape, generator=generator(request.seed, step + 1, 0, "latents")).to(x.device)
            x = renoise(x_0, noise, x.new_full((len(x),), times[step + 1], dtype=torch.long), schedule)
        yield x_0


def _dpm(
    eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, start: Tensor | None
) -> Iterator[Tensor]:
    """DPM-Solver++ 2M, diffusers' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    config = {**schedule.to_diffusers(), "timestep_spacing": request.spacing}
    scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(_steps(request), device=x.device)
    first = len(scheduler.timesteps) - _taken(request, start)
    scheduler.set_begin_index(first)
    x = _begun(x, start, int(scheduler.timesteps[first]), schedule)
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(eps(x, t.expand(len(x))), t, x).prev_sample
        yield x


def _begun(noise: Tensor, start: Tensor | None, t: int, schedule: NoiseSchedule) -> Tensor:
    """Where a walk begins: noise, or a video under the noise of its first timestep (SDEdit, Meng et al. 2022)."""
    if start is None:
        return noise
    return schedule.add_noise(start, noise, noise.new_full((len(noise),), t, dtype=torch.long))


def _steps(request: SampleRequest) -> int:
    assert request.num_inference_steps is not None
    return request.num_inference_steps


def best_device() -> str:
    """The fastest kind of device that torch sees here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


SAMPLERS: dict[str, Walk] = {"ddim": _ddim, "lcm": _consistency, "dpm++": _dpm}
