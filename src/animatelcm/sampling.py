"""From a request to videos: one loop over timesteps for every sampler, as a generator that shows each step."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from animatelcm import decoding, memory
from animatelcm.condition import Condition, Steering, read, steering
from animatelcm.consistency import consistency_function, renoise
from animatelcm.data.batches import to_pixels
from animatelcm.decoding import Draft
from animatelcm.model import VideoModel
from animatelcm.model_source import Offload
from animatelcm.provenance import Video
from animatelcm.request import SampleRequest, steps_walked, unused
from animatelcm.rng import generator, sent
from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import ddim_step, guided
from animatelcm.windows import freenoise, in_windows, windows

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

LOG = logging.getLogger(__name__)
Eps = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, F, h, w) float32, t (B,) int64, all the same) -> predicted noise, guidance included."""


WINDOW_CELLS = 16 * 64 * 64
"""Latent cells of a window of Stable Diffusion's usual size: what a GPU evaluates at a time."""
CPU_CELLS = 4 * 16 * 8 * 8
"""What a CPU does: with fewer, calls cost as much as arithmetic; with more, what they work on leaves the caches."""


PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Preview(NamedTuple):
    """The state after one step of ``total`` of the videos that are made together: their latents so far,
    (B, C, F, h, w); ``model.decode`` shows them."""

    step: int
    total: int
    latents: Tensor


def sample(
    model: VideoModel,
    request: SampleRequest,
    *,
    latents: Tensor | None = None,
    condition: Condition | None = None,
    offload: Offload = "auto",
    progress: Callable[[Preview], None] = lambda preview: None,
) -> list[Video]:
    """Make the videos of a request; ``progress`` is shown every step.

    ``latents`` replaces the initial noise: (1, C, F, h, w) of variance 1. ``condition`` is what the request's files
    hold, where they are read already, or pixels of no file. Each video depends on its own seed alone, whatever
    ``num_videos_per_prompt`` is, but for rounding: videos of a batch may differ in their last bits from the same ones
    made alone. What the request asks for in vain is warned of (``request.unused``). Raises ValueError where memory
    suffices in no way.
    """
    warn_of(request.resolved(model.facts, model.downscale), condition, stacklevel=3)
    options = {"latents": latents, "condition": condition, "offload": offload, "progress": progress}
    with closing(drafts(model, request, **options)) as made:
        return [decoding.whole(model, draft) for draft in made]


def warn_of(request: SampleRequest, condition: Condition | None, *, stacklevel: int = 2) -> None:
    """A UserWarning for each setting of a resolved request that changes nothing."""
    seen = {}
    if condition is not None:
        seen = {name: getattr(condition, name) is not None for name in ("image", "video")}
        seen["controls"] = condition.controls
    for said in unused(request, **seen):
        warnings.warn(said, stacklevel=stacklevel)


def drafts(
    model: VideoModel,
    request: SampleRequest,
    *,
    latents: Tensor | None = None,
    condition: Condition | None = None,
    offload: Offload = "auto",
    progress: Callable[[Preview], None] = lambda preview: None,
) -> Iterator[Draft]:
    """As ``sample``, each video as soon as it is denoised, for ``decoding``: small ones several at a time, and fewer
    where memory does not suffice for them. Until the generator is closed, networks take turns on the device where
    ``offload`` or its memory asks for it (``memory.offloaded``)."""
    request = request.resolved(model.facts, model.downscale)
    condition = read(request, model) if condition is None else condition
    with ExitStack() as stack:
        if offload == "model" or (offload == "auto" and memory.is_short(model, request)):
            stack.enter_context(memory.offloaded(model))
        steer = steering(model, request, condition)
        start = _begun_from(model, condition)
        waiting = request.split(_together(model, request))
        while waiting:
            group = waiting.pop(0)
            denoise = partial(_denoised, model, group, latents, condition, (steer, start), progress)
            made = memory.attempt(denoise)
            if made is None and group.num_videos_per_prompt > 1:
                most = group.num_videos_per_prompt // 2
                waiting = [part for each in (group, *waiting) for part in each.split(most)]
                LOG.warning("%s is out of memory: %d videos at a time", model.device, most)
                continue
            if made is None and offload == "auto" and memory.can_offload(model):
                stack.enter_context(memory.offloaded(model))
                made = memory.attempt(denoise)
            if made is None:
                short = f"{model.device} has too little memory to denoise this video"
                raise ValueError(f"{short}; {memory.smaller(model, group)} may fit")
            yield from made


def _together(model: VideoModel, request: SampleRequest) -> int:
    """Videos of a resolved request that are denoised in one batch."""
    _, height, width = request.shape
    cells = len(_windows(request)[0]) * (height // model.downscale) * (width // model.downscale)
    most = (CPU_CELLS if model.device.type == "cpu" else WINDOW_CELLS) // cells
    return max(1, min(most, memory.at_a_time(model, request)))


def _denoised(
    model: VideoModel,
    request: SampleRequest,
    latents: Tensor | None,
    condition: Condition,
    shared: tuple[Steering, Tensor | None],
    progress: Callable[[Preview], None],
) -> list[Draft]:
    """All videos of a request, in one batch; the seconds of each are its share."""
    began, (steer, start) = time.perf_counter(), shared
    for preview in sample_steps(model, request, latents=latents, condition=condition, steer=steer, start=start):
        progress(preview)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    share = (time.perf_counter() - began) / len(preview.latents)
    return [
        Draft(
            latents=latents,
            request=single,
            model=model.facts.name,
            fps=single.fps or model.facts.fps,
            evaluations=preview.total * len(_windows(request)) * (2 if request.guidance_scale != 1 else 1),
            seconds={"denoise": share},
            precision=PRECISIONS.get(model.unet.dtype, ""),
            picture=condition.image,
        )
        for single, latents in zip(request.singles(), preview.latents.split(1), strict=True)
    ]


def sample_steps(
    model: VideoModel,
    request: SampleRequest,
    *,
    latents: Tensor | None = None,
    condition: Condition | None = None,
    steer: Steering | None = None,
    start: Tensor | None = None,
) -> Iterator[Preview]:
    """The steps of a request's videos as they happen, all in one batch; the last preview holds the finished latents.

    ``latents``: (1, C, F, h, w) for all of them, or one for each. Where several requests share them, ``steer`` is
    ``condition.steering`` of this model and condition, and ``start`` the latents of the video to begin from.
    """
    request = request.resolved(model.facts, model.downscale)
    condition = read(request, model) if condition is None else condition
    times = _timesteps(model.schedule, request, begun=condition.video is not None)
    x = initial_noise(model, request) if latents is None else latents.float()
    x = x.to(model.device).expand(request.num_videos_per_prompt, *x.shape[1:])
    with torch.inference_mode():
        steer = steering(model, request, condition) if steer is None else steer
        eps = _guided_eps(model, request, steer, times)
        start = _begun_from(model, condition) if start is None else start
        if start is not None:  # SDEdit, Meng et al. 2022
            x = model.schedule.add_noise(start, x, torch.full((len(x),), times[0], device=x.device))
        walking = SAMPLERS[request.sampler or "ddim"](eps, model.schedule, x, request, times)
    for step in range(len(times)):
        with torch.inference_mode():  # not around the yield: the mode must not leak into the caller
            x = next(walking)
        yield Preview(step + 1, len(times), x)


def _begun_from(model: VideoModel, condition: Condition) -> Tensor | None:
    """Latents (1, C, F, h, w) of the video to begin from."""
    if condition.video is None:
        return None
    with torch.inference_mode():
        return memory.encoded(model, to_pixels([condition.video]))


def _timesteps(schedule: NoiseSchedule, request: SampleRequest, *, begun: bool) -> list[int]:
    """The timesteps that are walked, the noisiest first.

    Where it is ``begun`` from a video, a sampler of many steps leaves out those before its noise, as diffusers'
    video-to-video does; one of few steps spreads all of them over the rest.
    """
    steps = request.num_inference_steps
    assert steps is not None
    if request.sampler == "lcm":
        return schedule.lcm_timesteps(steps, request.strength if begun else 1.0).tolist()
    if request.sampler == "dpm++":
        times = _dpm_scheduler(schedule, request).timesteps.tolist()
    else:
        times = schedule.ddim_timesteps(steps, request.spacing).tolist()
    return times[-steps_walked(request, begun=begun) :]


def initial_noise(model: VideoModel, request: SampleRequest) -> Tensor:
    """x_T of a resolved request: (B, C, F, h, w), standard normal, each of its B videos by its own seed."""
    frames, height, width = request.shape
    shape = (
        request.num_videos_per_prompt,
        model.vae.config.latent_channels,
        frames,
        height // model.downscale,
        width // model.downscale,
    )
    return _noise(shape, request, 0)


def _noise(shape: Sequence[int], request: SampleRequest, step: int) -> Tensor:
    """What is drawn for one step of a resolved request: (B, C, F, h, w), standard normal at each frame; of each of its
    B videos what would be drawn for it alone."""
    return torch.cat([_drawn((1, *shape[1:]), single, step) for single in request.singles()])


def _drawn(shape: Sequence[int], request: SampleRequest, step: int) -> Tensor:
    frames, length = shape[2], request.context_length
    assert length is not None
    source, alone = generator(request.seed, step, 0, "latents"), request.noise == "random" or frames <= length
    drawn = torch.randn((*shape[:2], frames if alone else length, *shape[3:]), generator=source)
    # One order for all steps: a frame whose noise is another's has it at every step.
    return drawn if alone else drawn[:, :, freenoise(frames, length, generator(request.seed, 0, 0, "frames"))]


def _windows(request: SampleRequest) -> list[range]:
    assert request.context_length is not None
    assert request.context_overlap is not None
    return windows(request.shape[0], request.context_length, request.context_overlap)


def _batch(x: Tensor, length: int) -> int:
    """Windows that are evaluated at a time: on GPUs, as many as are no larger than one of 16 frames of 512x512."""
    return 1 if x.device.type == "cpu" else max(1, WINDOW_CELLS // (len(x) * length * x.shape[3] * x.shape[4]))


def _guided_eps(model: VideoModel, request: SampleRequest, steer: Steering, times: list[int]) -> Eps:
    """The network with its text and what steers it, guided where asked: both halves in one batch, [without text, with
    text]. It is to be asked once for each of ``times``, in their order."""
    scale, total = request.guidance_scale, len(times)
    assert scale is not None
    motion, steps, spans = request.shape[0] > 1, count(), _windows(request)
    prompts = [request.prompt] if scale == 1 else [request.negative_prompt, request.prompt]
    text = model.embed_prompts(prompts, request.prompt_syntax, request.clip_skip)
    remembered = model.unet.remember(torch.tensor(times, device=model.device), text)

    def steered(x: Tensor, t: Tensor, step: int, spans: Sequence[range]) -> Tensor:
        words = text if len(x) == len(text) else text.repeat_interleave(len(x) // len(text), 0)
        options = steer(x, t, words, step / total, (step + 1) / total, spans).arguments(words)
        if options["text"] is words:  # an adapter may have put more into it
            options["remembered"] = remembered[step]
        return model.predict(x, t, **options, motion=motion).float()

    def eps(x: Tensor, t: Tensor) -> Tensor:
        step = next(steps)

        def predict(part: Tensor, spans: Sequence[range]) -> Tensor:
            spans = [span for span in spans for _ in range(len(part) // len(spans))]  # one for each video in each
            if scale == 1:
                return steered(part, t[:1].expand(len(part)), step, spans)
            uncond, cond = steered(torch.cat([part, part]), t[:1].expand(2 * len(part)), step, spans).chunk(2)
            return guided(cond, uncond, scale)

        return in_windows(predict, x, spans, _batch(x, len(spans[0])))

    return eps


Walk = Callable[[Eps, NoiseSchedule, Tensor, SampleRequest, list[int]], Iterator[Tensor]]
"""(eps, schedule, latents at the first of the timesteps, resolved request, timesteps) -> latents after each step."""


def _ddim(eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, times: list[int]) -> Iterator[Tensor]:
    for t, s in zip(times, [*times[1:], 0], strict=True):
        t_b, s_b = x.new_full((len(x),), t, dtype=torch.long), x.new_full((len(x),), s, dtype=torch.long)
        x = ddim_step(x, eps(x, t_b), schedule.level(t_b), schedule.level(s_b))
        yield x


def _consistency(
    eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, times: list[int]
) -> Iterator[Tensor]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to x_0, noise again, jump again."""
    for step, t in enumerate(times):
        t_b = x.new_full((len(x),), t, dtype=torch.long)
        x_0 = consistency_function(x, eps(x, t_b), t_b, schedule)
        if step + 1 < len(times):
            noise = sent(_noise(x.shape, request, step + 1), x.device)
            x = renoise(x_0, noise, x.new_full((len(x),), times[step + 1], dtype=torch.long), schedule)
        yield x_0


def _dpm(eps: Eps, schedule: NoiseSchedule, x: Tensor, request: SampleRequest, times: list[int]) -> Iterator[Tensor]:
    """DPM-Solver++ 2M, diffusers' scheduler."""
    scheduler = _dpm_scheduler(schedule, request)
    scheduler.set_begin_index(len(scheduler.timesteps) - len(times))
    for t in times:
        t_b = x.new_full((len(x),), t, dtype=torch.long)
        x = scheduler.step(eps(x, t_b), t, x).prev_sample
        yield x


def _dpm_scheduler(schedule: NoiseSchedule, request: SampleRequest) -> DPMSolverMultistepScheduler:
    from diffusers import DPMSolverMultistepScheduler

    config = {**schedule.to_diffusers(), "timestep_spacing": request.spacing}
    scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(request.num_inference_steps)
    return scheduler


def best_device() -> str:
    """The fastest kind of device that torch sees here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


SAMPLERS: dict[str, Walk] = {"ddim": _ddim, "lcm": _consistency, "dpm++": _dpm}
