"""From a request to videos: one loop over timesteps for every sampler, as a generator that shows each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from animatelcm.consistency import consistency_function, renoise
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
    progress: Callable[[Preview], None] = lambda preview: None,
) -> list[Video]:
    """Make the videos of a request; ``progress`` is shown every step.

    ``latents`` replaces the initial noise: (1, C, F, h, w) of variance 1. Each video depends on its own seed alone,
    whatever ``num_videos_per_prompt`` is.
    """
    singles = request.resolved(model.facts, model.downscale).singles()
    return [_sample_one(model, single, latents, progress) for single in singles]


def _sample_one(
    model: VideoModel, request: SampleRequest, latents: Tensor | None, progress: Callable[[Preview], None]
) -> Video:
    began = time.perf_counter()
    for preview in sample_steps(model, request, latents=latents):
        latents = preview.latents
        progress(preview)
    assert latents is not None
    assert request.num_inference_steps is not None
    denoised = time.perf_counter()
    with torch.inference_mode():
        frames = model.decode(latents)[0]
    return Video(
        frames=frames,
        fps=model.facts.fps,
        request=request,
        model=model.facts.name,
        evaluations=request.num_inference_steps * (2 if request.guidance_scale != 1 else 1),
        seconds={"denoise": denoised - began, "decode": time.perf_counter() - denoised},
    )


def sample_steps(model: VideoModel, request: SampleRequest, *, latents: Tensor | None = None) -> Iterator[Preview]:
    """The steps of one video as they happen; the last preview holds the finished latents."""
    request = request.resolved(model.facts, model.downscale)
    assert request.num_inference_steps is not None
    x = initial_noise(model, request) if latents is None else latents.float()
    x = x.to(model.device)
    walk = SAMPLERS[request.sampler or "ddim"]
    with torch.inference_mode():
        walking = walk(_guided_eps(model, request), model.schedule, x, request)
    for step in range(request.num_inference_steps):
        with torch.inference_mode():  # not around the yield: the mode must not leak into the caller
            x = next(walking)
        yield Preview(step + 1, request.num_inference_steps, x)


def initial_noise(model: VideoModel, request: SampleRequest) -> Tensor:
    """x_T of a resolved request: (1, C, F, h, w), standard normal, by the request's seed."""
    assert request.num_frames is not None
    assert request.height is not None
    assert request.width is not None
    cells = (request.height // model.downscale, request.width // model.downscale)
    shape = (1, model.vae.config.latent_channels, request.num_frames, *cells)
    return torch.randn(shape, generator=generator(request.seed, 0, 0, "latents"))


def _guided_eps(model: VideoModel, request: SampleRequest) -> Eps:
    """The network with its text, guided where asked: both halves in one batch, [without text, with text]."""
    scale = request.guidance_scale
    assert scale is not None
    assert request.num_frames is not None
    motion = request.num_frames > 1
    if scale == 1:
        text = model.embed([request.prompt])
        return lambda x, t: model.unet(x, t, text, motion=motion).float()
    both = model.embed([request.negative_prompt, request.prompt])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = model.unet(torch.cat([x, x]), torch.cat([t, t]), both, motion=motion).float().chunk(2)
        return guided(cond, uncond, scale)

    return eps


Walk = Callable[[Eps, NoiseSchedule, Tensor, SampleRequest], Iterator[Tensor]]
"""(eps, schedule, x_T, resolved request) -> the latents after each step."""


def _ddim(eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest) -> Iterator[Tensor]:
    times = schedule.ddim_timesteps(_steps(request), request.spacing).tolist()
    for t, s in zip(times, [*times[1:], 0], strict=True):
        t_b, s_b = x.new_full((len(x),), t, dtype=torch.long), x.new_full((len(x),), s, dtype=torch.long)
        x = ddim_step(x, eps(x, t_b), schedule.level(t_b), schedule.level(s_b))
        yield x


def _consistency(eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest) -> Iterator[Tensor]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to x_0, noise again, jump again."""
    count = _steps(request)
    times = schedule.lcm_timesteps(count).tolist()
    for step, t in enumerate(times):
        t_b = x.new_full((len(x),), t, dtype=torch.long)
        x_0 = consistency_function(x, eps(x, t_b), t_b, schedule)
        if step + 1 < count:
            noise = torch.randn(x.shape, generator=generator(request.seed, step + 1, 0, "latents")).to(x.device)
            x = renoise(x_0, noise, x.new_full((len(x),), times[step + 1], dtype=torch.long), schedule)
        else:
            x = x_0
        yield x if step + 1 == count else x_0


def _dpm(eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest) -> Iterator[Tensor]:
    """DPM-Solver++ 2M, diffusers' scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    config = {**schedule.to_diffusers(), "timestep_spacing": request.spacing}
    scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(_steps(request), device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t.expand(len(x))), t, x).prev_sample
        yield x


def _steps(request: SampleRequest) -> int:
    assert request.num_inference_steps is not None
    return request.num_inference_steps


def best_device() -> str:
    """The fastest kind of device that torch sees here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


SAMPLERS: dict[str, Walk] = {"ddim": _ddim, "lcm": _consistency, "dpm++": _dpm}
