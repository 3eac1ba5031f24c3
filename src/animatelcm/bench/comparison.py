"""Ours beside diffusers' ``AnimateDiffPipeline`` with ``LCMScheduler``: one machine, one run, the same weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from animatelcm import video
from animatelcm.bench import machine, peers, steered, workload
from animatelcm.bench.timing import Memory, Timing, interleaved
from animatelcm.bench.workload import PROMPT, Case
from animatelcm.decoding import Draft
from animatelcm.model import VideoModel
from animatelcm.nets.motion import MotionModule
from animatelcm.nets.unet import VideoUNet
from animatelcm.sampling import drafts
from animatelcm.saving import save

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline


def compare(
    model: VideoModel, case: Case, *, rounds: int = 9, compiled: bool = False, process: bool = False
) -> dict[str, Any]:
    """One object with all figures of one case (``_report`` says which); seconds are medians, A B A B.

    ``compiled`` also times diffusers' network under ``torch.compile`` (minutes), ``process`` whole processes from
    nothing to a file. A case that steers is of ours alone (``steered.costs``).

    Raises ValueError for a case that steers, but by no adapter of the model's, or with rivals; Dynamo's
    FailOnRecompileLimitHit where a compiled network would go on uncompiled.
    """
    if case.steer:
        if compiled or process:
            raise ValueError("what steers is timed by itself, not beside diffusers; leave out compiled and process")
        return steered.costs(model, case, rounds=rounds)
    model.forget_graphs()  # of the case before
    pipe = peers.pipeline(model)
    agreement = {"network": network_difference(model, pipe), "decoder": decoder_difference(model, pipe)}
    rivals = {"diffusers": pipe}
    if compiled:
        rivals["diffusers_compiled"] = peers.compiled_pipeline(model)
    with tempfile.TemporaryDirectory() as folder, workload.compiled_or_failing(model, wanted=compiled):
        calls = {
            "denoise": (workload.denoised, peers.denoised),
            "prompt_to_frames": (workload.to_frames, peers.to_frames),
            "prompt_to_file": (partial(workload.to_file, folder=folder), partial(peers.to_file, folder=folder)),
        }
        phases = {
            phase: {"ours": partial(ours, model, case)}
            | {name: partial(theirs, rival, model, case) for name, rival in rivals.items()}
            for phase, (ours, theirs) in calls.items()
        }
        decoders = _decoders(model, pipe, list(drafts(model, case.request(model))))
        phases = {"denoise": phases.pop("denoise"), "decode": decoders, **phases}
        times = {
            phase: interleaved(sides, rounds=rounds, warmup=workload.warmup(model)) for phase, sides in phases.items()
        }
        taken = {
            phase: {name: workload.fresh_memory(model, call) for name, call in phases[phase].items()}
            for phase in ("denoise", "prompt_to_frames")
        }
        whole = _processes(model, pipe, case, Path(folder)) if process else None
    networks = {"ours": workload.networks(model)} | {name: peers.networks(rival) for name, rival in rivals.items()}
    loaded = {name: workload.weights(all_) for name, all_ in networks.items()}
    return _report(model, case, times | ({"process": whole} if whole else {}), taken, loaded, agreement)


def _decoders(
    model: VideoModel, pipe: AnimateDiffPipeline, made: Sequence[Draft]
) -> dict[str, Callable[[], Sequence[np.ndarray]]]:
    """Latents -> uint8 (F, H, W, 3) of each video, by each."""
    latents = torch.cat([draft.latents for draft in made])

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            pixels = pipe.decode_latents(latents.to(pipe.vae.dtype), decode_chunk_size=16)
            return video.to_uint8(pipe.video_processor.postprocess_video(pixels, output_type="np"))

    return {"ours": partial(workload.drawn, model, made), "diffusers": theirs}


def network_difference(model: VideoModel, pipe: AnimateDiffPipeline) -> float:
    """The largest difference of one evaluation between the two networks, in units of the prediction's deviation.

    Ours takes their kind of GroupNorm in motion modules for it: that they compute the same is what makes times
    comparable.
    """
    channels, cells = model.unet.config.in_channels, 8
    x = torch.randn(1, channels, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    x, t = x.to(model.device, model.unet.dtype), torch.tensor([999], device=model.device)
    with torch.inference_mode(), _joint(model.unet):
        text = model.embed([PROMPT])
        theirs = pipe.unet(x, t, text.repeat_interleave(x.shape[2], 0)).sample.float()
        return float((model.unet(x, t, text).float() - theirs).abs().max() / theirs.std())


def decoder_difference(model: VideoModel, pipe: AnimateDiffPipeline) -> int:
    """The largest difference of the two decoders' frames, in levels of 255."""
    cells, case = 8, Case(frames=2, size=8 * model.downscale)
    shape = (1, model.vae.config.latent_channels, case.frames, cells, cells)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    facts, request = model.facts, case.request(model)
    draft = Draft(latents=latents, request=request, model=facts.name, fps=facts.fps, evaluations=0)
    ours, theirs = (np.stack(list(call())).astype(int) for call in _decoders(model, pipe, [draft]).values())
    return int(np.abs(ours - theirs).max())


@contextmanager
def _joint(unet: VideoUNet) -> Iterator[None]:
    modules = [module for module in unet.modules() if isinstance(module, MotionModule)]
    before = [module.joint for module in modules]
    for module in modules:
        module.joint = True
    try:
        yield
    finally:
        for module, joint in zip(modules, before, strict=True):
            module.joint = joint


def _processes(model: VideoModel, pipe: AnimateDiffPipeline, case: Case, folder: Path) -> dict[str, Timing]:
    """Whole processes from nothing to a file; the model lies on the disk, and in its cache after the first."""
    save(model, folder / "ours", torch.float32)
    pipe.save_pretrained(folder / "theirs")
    size = str(case.size)
    flags = ["--steps", str(case.steps), "--frames", str(case.frames), "--size", f"{size}x{size}", "--force"]
    ours = [sys.executable, "-m", "animatelcm", "generate", PROMPT, "--model", str(folder / "ours"), *flags]
    numbers = [str(case.steps), str(case.frames), size, size]
    theirs = [sys.executable, "-c", peers.SCRIPT, str(folder / "theirs"), str(folder / "theirs.mp4"), PROMPT, *numbers]
    commands = {"ours": [*ours, "--out", str(folder / "ours.mp4")], "diffusers": theirs}
    return interleaved({name: lambda words=words: _ran(words) for name, words in commands.items()}, rounds=3)


def _ran(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[1]} failed: {done.stderr[-2000:]}")


def _report(
    model: VideoModel,
    case: Case,
    times: dict[str, dict[str, Timing]],
    taken: dict[str, dict[str, Memory]],
    loaded: dict[str, int],
    agreement: dict[str, float],
) -> dict[str, Any]:
    """Figures of each side by its name ("ours", "diffusers", "diffusers_compiled"), ratios first.

    ``weights_bytes``: what is loaded. ``peak_bytes_<phase>``: tensors beyond that at most, ours with the graphs of its
    evaluations made anew. ``process_bytes``: what a process of this side alone takes from prompt to frames, weights and
    all that torch's allocator holds for it; not what the driver and libraries take by themselves, as OpenVINO does.
    """
    ratios = {
        f"{phase}_speedup_vs_{rival}": timings[rival].median / timings["ours"].median
        for phase, timings in times.items()
        for rival in timings
        if rival != "ours"
    }
    work, best = workload.flops(model, case), machine.peak(model.device, model.unet.dtype)
    limit = max(best)
    shares = {
        phase: {name: work[phase] / timing.median / limit for name, timing in times[phase].items()} for phase in work
    }
    held = {name: most.held for name, most in taken["prompt_to_frames"].items()}
    return {
        **ratios,
        **workload.described(model, case),
        "seconds": {phase: {n: t._asdict() for n, t in timings.items()} for phase, timings in times.items()},
        "weights_bytes": loaded,
        **{
            f"peak_bytes_{phase}": {name: most.tensors for name, most in sides.items()}
            for phase, sides in taken.items()
        },
        "process_bytes": {name: loaded[name] + held[name] for name in held},
        "flops": work,
        "machine_flops_per_second": best._asdict(),
        "share_of_machine": shares,
        "differences": agreement,
        "machine": machine.facts(),
    }
