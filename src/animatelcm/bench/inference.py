"""Ours beside diffusers' ``AnimateDiffPipeline`` with ``LCMScheduler``: one machine, one run, the same weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from animatelcm import bundle, decoding, video
from animatelcm.bench import machine, peers
from animatelcm.bench.timing import Timing, interleaved, peak_memory
from animatelcm.hub import ASSETS
from animatelcm.model import Facts, VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.nets import sd15
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.motion import MotionModule
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.request import SampleRequest
from animatelcm.sampling import drafts, initial_noise
from animatelcm.saving import save
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer, read_merges

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline

Subject = Literal["emoji", "sd15-random"]
PROMPT = "a parrot"
THEIR_PROCESS = """
import sys
import torch
from diffusers import AnimateDiffPipeline
from animatelcm import video
folder, out, prompt, steps, frames, height, width = sys.argv[1:]
pipe = AnimateDiffPipeline.from_pretrained(folder)
made = pipe(prompt, num_frames=int(frames), num_inference_steps=int(steps), height=int(height), width=int(width),
            guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
video.write(video.to_uint8(made), out, fps=8, overwrite=True)
"""
"""A script of a user of diffusers, from a folder to a file; the file is written as ours is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: one request."""

    steps: int = 4
    guidance: float = 1.0
    frames: int = 16
    size: int = 64
    """Height and width in pixels."""
    batch: int = 1
    """Videos of one prompt: ours as many at a time as ``sampling.drafts`` has it, theirs at once."""
    context: int | None = None
    """Frames of a window. Default: all of them in one, as theirs."""

    def request(self, model: VideoModel) -> SampleRequest:
        """What is asked for, resolved."""
        asked = SampleRequest(
            prompt=PROMPT,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            num_frames=self.frames,
            height=self.size,
            width=self.size,
            num_videos_per_prompt=self.batch,
            context_length=min(self.frames, self.context or self.frames),
            sampler="lcm",
        )
        return asked.resolved(model.facts, model.downscale)


def subject(name: Subject, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoModel:
    """The embedded model, or one of Stable Diffusion 1.5's size with AnimateDiff's layers and random weights."""
    if name == "emoji":
        return bundle.load("emoji", device=device, dtype=dtype, adapters=(), keep_teacher=False)
    torch.manual_seed(0)
    with torch.device(device):
        unet = VideoUNet(UNetConfig.from_diffusers(sd15.UNET), sd15.MOTION)
        for module in unet.modules():
            if isinstance(module, MotionModule):  # or they would add nothing, and prove nothing
                torch.nn.init.normal_(module.proj_out.weight, std=0.01)
        vae, text = Autoencoder(AutoencoderConfig(**sd15.VAE)), TextEncoder(TextConfig(**sd15.TEXT))
    model = VideoModel(
        unet=unet.to(dtype).eval().requires_grad_(False),
        vae=vae.to(dtype).eval().requires_grad_(False),
        text_encoder=text.to(dtype).eval().requires_grad_(False),
        tokenizer=Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS),
        schedule=NoiseSchedule(solver_steps=100),
        facts=Facts(name=name, sampler="lcm", num_inference_steps=4, guidance_scale=1.0),
    )
    return model.to(device)


def compare(
    model: VideoModel, case: Case, *, rounds: int = 9, compiled: bool = False, process: bool = False
) -> dict[str, Any]:
    """One object with all figures of one case; seconds are medians, A B A B.

    ``compiled`` also times diffusers' network under ``torch.compile`` (minutes), ``process`` whole processes from
    nothing to a file.
    """
    pipe = peers.pipeline(model)
    agreement = {"network": network_difference(model, pipe), "decoder": decoder_difference(model, pipe)}
    rivals = {"diffusers": pipe}
    if compiled:
        rivals["diffusers_compiled"] = twin = peers.pipeline(model)
        twin.unet = torch.compile(twin.unet)
    with tempfile.TemporaryDirectory() as folder:
        phases = {
            "denoise": {"ours": lambda: denoised(model, case)}
            | {name: lambda rival=rival: their_latents(rival, model, case) for name, rival in rivals.items()},
            "decode": _decoders(model, pipe, torch.cat(denoised(model, case))),
            "prompt_to_file": {"ours": lambda: _to_file(model, case, folder)}
            | {name: lambda rival=rival: _their_file(rival, model, case, folder) for name, rival in rivals.items()},
        }
        times = {phase: interleaved(calls, rounds=rounds) for phase, calls in phases.items()}
        memory = {name: peak_memory(call) for name, call in phases["denoise"].items()}
        whole = _processes(model, pipe, case, Path(folder)) if process else None
    return _report(model, case, times, memory, agreement, whole)


def denoised(model: VideoModel, case: Case) -> list[torch.Tensor]:
    """Latents of a case, from the prompt."""
    return [draft.latents for draft in drafts(model, case.request(model))]


def their_latents(pipe: AnimateDiffPipeline, model: VideoModel, case: Case) -> torch.Tensor:
    """The same by diffusers."""
    return pipe(**_their_arguments(model, case), output_type="latent").frames


def _their_arguments(model: VideoModel, case: Case) -> dict[str, Any]:
    noise = initial_noise(model, case.request(model))
    return {
        "prompt": [PROMPT] * case.batch,  # it ignores num_videos_per_prompt
        "num_frames": case.frames,
        "height": case.size,
        "width": case.size,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "latents": noise.to(model.device, model.unet.dtype),
        "generator": torch.Generator(model.device).manual_seed(0),
    }


def _decoders(
    model: VideoModel, pipe: AnimateDiffPipeline, latents: torch.Tensor
) -> dict[str, Callable[[], np.ndarray]]:
    """Latents (B, C, F, h, w) -> uint8 (B, F, H, W, 3), by each."""

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            pixels = pipe.decode_latents(latents.to(pipe.vae.dtype), decode_chunk_size=16)
            return video.to_uint8(pipe.video_processor.postprocess_video(pixels, output_type="np"))

    def ours() -> np.ndarray:
        with torch.inference_mode():
            return model.decode(latents)

    return {"ours": ours, "diffusers": theirs}


def _to_file(model: VideoModel, case: Case, folder: str) -> None:
    for i, draft in enumerate(drafts(model, case.request(model))):
        decoding.write(model, draft, Path(folder) / f"ours-{i}.mp4", source=ModelSource(), overwrite=True)


def _their_file(pipe: AnimateDiffPipeline, model: VideoModel, case: Case, folder: str) -> None:
    made = pipe(**_their_arguments(model, case), output_type="np").frames
    for i, frames in enumerate(made):
        video.write(video.to_uint8(frames), Path(folder) / f"theirs-{i}.mp4", fps=model.facts.fps, overwrite=True)


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
    shape = (1, model.vae.config.latent_channels, 2, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    ours, theirs = (call() for call in _decoders(model, pipe, latents).values())
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


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


def flops(model: VideoModel, case: Case) -> dict[str, int]:
    """Multiplications and additions of matrix products, convolutions and attention; counted on shapes alone."""
    cells, latents = case.size // model.downscale, model.vae.config.latent_channels
    rows = 2 if case.guidance != 1 else 1
    with torch.device("meta"), FlopCounterMode(display=False) as network:
        unet = VideoUNet(model.unet.config, model.unet.motion)
        text = torch.empty(rows, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim)
        x = torch.empty(rows, model.unet.config.in_channels, case.frames, cells, cells)
        unet(x, torch.empty(rows, dtype=torch.long), text)
    with torch.device("meta"), FlopCounterMode(display=False) as decoder:
        Autoencoder(model.vae.config).requires_grad_(False).decode(torch.empty(case.frames, latents, cells, cells))
    return {
        "denoise": network.get_total_flops() * case.steps * case.batch,
        "decode": decoder.get_total_flops() * case.batch,
    }


def _processes(model: VideoModel, pipe: AnimateDiffPipeline, case: Case, folder: Path) -> dict[str, Timing]:
    """Whole processes from nothing to a file; the model lies on the disk, and in its cache after the first."""
    save(model, folder / "ours", torch.float32)
    pipe.save_pretrained(folder / "theirs")
    size = str(case.size)
    flags = ["--steps", str(case.steps), "--frames", str(case.frames), "--size", f"{size}x{size}", "--force"]
    ours = [sys.executable, "-m", "animatelcm", "generate", PROMPT, "--model", str(folder / "ours"), *flags]
    numbers = [str(case.steps), str(case.frames), size, size]
    theirs = [sys.executable, "-c", THEIR_PROCESS, str(folder / "theirs"), str(folder / "theirs.mp4"), PROMPT, *numbers]
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
    memory: dict[str, int],
    agreement: dict[str, float],
    whole: dict[str, Timing] | None,
) -> dict[str, Any]:
    every = times | ({"process": whole} if whole else {})
    ratios = {
        f"{phase}_speedup_vs_{rival}": timings[rival].median / timings["ours"].median
        for phase, timings in every.items()
        for rival in timings
        if rival != "ours"
    }
    work, best = flops(model, case), machine.peak(model.device, model.unet.dtype)
    limit = max(best)
    shares = {
        phase: {name: work[phase] / timing.median / limit for name, timing in times[phase].items()} for phase in work
    }
    return {
        **ratios,
        "model": model.facts.name,
        "case": asdict(case),
        "device": str(model.device),
        "dtype": str(model.unet.dtype).removeprefix("torch."),
        "seconds": {phase: {n: t._asdict() for n, t in timings.items()} for phase, timings in every.items()},
        "peak_bytes_denoise": memory,
        "flops": work,
        "machine_flops_per_second": best._asdict(),
        "share_of_machine": shares,
        "differences": agreement,
        "machine": machine.facts(),
    }


def table(report: dict[str, Any]) -> str:
    """A report as lines: phase, who, median, p95, times faster, share of what the machine does at best."""
    case, facts = report["case"], report["machine"]
    lines = [
        f"{report['model']}: {case['frames']} frames of {case['size']}x{case['size']}, {case['steps']} steps, "
        f"guidance {case['guidance']:g}, batch {case['batch']}; {report['dtype']} on "
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads",
        f"{'phase':<16}{'':<20}{'median':>10}{'p95':>10}{'first':>10}{'faster':>9}{'of machine':>12}",
    ]
    for phase, timings in report["seconds"].items():
        for name, timing in timings.items():
            times = f"{timing['median'] / timings['ours']['median']:.2f}"
            share = report["share_of_machine"].get(phase, {}).get(name)
            lines.append(
                f"{phase:<16}{name:<20}{timing['median']:>9.3f}s{timing['p95']:>9.3f}s{timing['first']:>9.3f}s"
                f"{'' if name == 'ours' else times:>9}{'' if share is None else f'{share:.0%}':>12}"
            )
    differences = report["differences"]
    lines.append(
        f"largest differences on the same input: network {differences['network']:.1e} deviations, "
        f"decoder {differences['decoder']:.0f} of 255 levels"
    )
    return "\n".join(lines)
