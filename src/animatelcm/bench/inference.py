"""Ours beside diffusers' ``AnimateDiffPipeline`` with ``LCMScheduler``: one machine, one run, the same weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from animatelcm import bundle, decoding, memory, video
from animatelcm.adapters import IMAGE
from animatelcm.bench import machine, peers
from animatelcm.bench.timing import Memory, Timing, interleaved, memory_of
from animatelcm.condition import Condition, Control
from animatelcm.config import AdapterConfig, AdapterKind
from animatelcm.decoding import Draft
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

_T = TypeVar("_T")
Subject = Literal["emoji", "sd15-random"]
PROMPT = "a parrot"
RANDOM: dict[str, AdapterKind] = {IMAGE: "image", "edge": "t2i_adapter", "pose": "controlnet"}
"""Adapters that stand beside random weights, by name."""
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
    steer: tuple[str, ...] = ()
    """Adapters, each of which steers a clip of its own: what they cost is measured, of ours alone."""

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


def subject(
    name: Subject, device: str = "cpu", dtype: torch.dtype = torch.float32, *, adapters: bool = False
) -> VideoModel:
    """The embedded model, or one of Stable Diffusion 1.5's size with AnimateDiff's layers and random weights; with
    ``adapters`` all of its own, or those of ``RANDOM``."""
    if name == "emoji":
        own = None if adapters else ()
        return bundle.load("emoji", device=device, dtype=dtype, adapters=own, keep_teacher=False)
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
    if adapters:
        model.adapters = {name: random_adapter(name, model).to(dtype) for name in RANDOM}
    return model.to(device)


def random_adapter(name: str, model: VideoModel) -> nn.Module:
    """One of ``RANDOM`` for a model, with random weights."""
    from animatelcm.stages import fresh_adapter  # trainers and their data come with it

    latents, cell = model.vae.config.latent_channels, model.downscale
    config = AdapterConfig(name=name, kind=RANDOM[name])
    network = fresh_adapter(config, model.unet.config, latent_channels=latents, downscale=cell)
    return network.eval().requires_grad_(False)


def compare(
    model: VideoModel, case: Case, *, rounds: int = 9, compiled: bool = False, process: bool = False
) -> dict[str, Any]:
    """One object with all figures of one case (``_report`` says which); seconds are medians, A B A B.

    ``compiled`` also times diffusers' network under ``torch.compile`` (minutes), ``process`` whole processes from
    nothing to a file. A case that steers is of ours alone (``costs``).

    Raises ValueError for a case that steers, but by no adapter of the model's, or with rivals; Dynamo's
    FailOnRecompileLimitHit where a compiled network would go on uncompiled.
    """
    if case.steer:
        if compiled or process:
            raise ValueError("what steers is timed by itself, not beside diffusers; leave out compiled and process")
        return costs(model, case, rounds=rounds)
    model.forget_graphs()  # of the case before
    pipe = peers.pipeline(model)
    agreement = {"network": network_difference(model, pipe), "decoder": decoder_difference(model, pipe)}
    rivals = {"diffusers": pipe}
    if compiled:
        rivals["diffusers_compiled"] = compiled_pipeline(model)
    with tempfile.TemporaryDirectory() as folder, compiled_or_failing(model, wanted=compiled):
        calls = {
            "denoise": (denoised, their_latents),
            "prompt_to_frames": (to_frames, their_frames),
            "prompt_to_file": (partial(to_file, folder=folder), partial(_their_file, folder=folder)),
        }
        phases = {
            phase: {"ours": partial(ours, model, case)}
            | {name: partial(theirs, rival, model, case) for name, rival in rivals.items()}
            for phase, (ours, theirs) in calls.items()
        }
        decoders = _decoders(model, pipe, list(drafts(model, case.request(model))))
        phases = {"denoise": phases.pop("denoise"), "decode": decoders, **phases}
        times = {phase: interleaved(sides, rounds=rounds, warmup=warmup(model)) for phase, sides in phases.items()}
        taken = {
            phase: {name: fresh_memory(model, call) for name, call in phases[phase].items()}
            for phase in ("denoise", "prompt_to_frames")
        }
        whole = _processes(model, pipe, case, Path(folder)) if process else None
    loaded = {name: weights(_networks(rival)) for name, rival in {"ours": model, **rivals}.items()}
    return _report(model, case, times | ({"process": whole} if whole else {}), taken, loaded, agreement)


def compiled_pipeline(model: VideoModel) -> AnimateDiffPipeline:
    """diffusers' pipeline, its network compiled for the shapes of one case. What was compiled for earlier ones is
    forgotten: with it Dynamo would take shapes for variable from the second case on."""
    torch._dynamo.reset()
    pipe = peers.pipeline(model)
    pipe.unet = torch.compile(pipe.unet, dynamic=False)
    return pipe


@contextmanager
def compiled_or_failing(model: VideoModel, *, wanted: bool) -> Iterator[None]:
    """Meanwhile Dynamo raises FailOnRecompileLimitHit where it would go on uncompiled, and would only say so in a log.
    Nothing changes where neither the model nor, if ``wanted``, a rival is compiled: Dynamo is slow to import."""
    if not wanted and model.compile != "full":
        yield
        return
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def costs(model: VideoModel, case: Case, *, rounds: int = 9) -> dict[str, Any]:
    """One object with what each adapter of a case costs while a clip is denoised, beside text alone, A B A B.

    ``denoise_times_text_<adapter>`` first: how many times as long as with text alone. ``seconds`` and
    ``peak_bytes_denoise`` have "text" and each adapter beside it; ``weights_bytes`` the model's under "text", and
    each adapter's own. Raises ValueError where the model has no such adapter.
    """
    if unknown := [name for name in case.steer if name not in model.adapters]:
        known = ", ".join(sorted(model.adapters)) or "none"
        raise ValueError(f"{model.facts.name} has no adapter {unknown[0]!r} to steer with; its adapters are: {known}")
    model.forget_graphs()  # of the case before
    conditions = {"text": None} | {name: condition(name, case) for name in case.steer}
    calls = {name: partial(denoised, model, case, seen) for name, seen in conditions.items()}
    with compiled_or_failing(model, wanted=False):
        times = interleaved(calls, rounds=rounds, warmup=warmup(model))
        taken = {name: fresh_memory(model, call).tensors for name, call in calls.items()}
    own = {name: weights([model.adapters[name]]) for name in case.steer}
    return {
        **{f"denoise_times_text_{name}": times[name].median / times["text"].median for name in case.steer},
        **_described(model, case),
        "seconds": {"denoise": {name: timing._asdict() for name, timing in times.items()}},
        "peak_bytes_denoise": taken,
        "weights_bytes": {"text": weights(_networks(replace(model, adapters={}))), **own},
        "machine": machine.facts(),
    }


def condition(name: str, case: Case) -> Condition:
    """Pixels for an adapter to look at, the same each time."""
    drawn = np.random.default_rng(0).integers(0, 256, (case.frames, case.size, case.size, 3), np.uint8)
    return Condition(image=drawn[0]) if name == IMAGE else Condition(controls=(Control(name, drawn),))


def warmup(model: VideoModel) -> int:
    """Calls before those that are timed: of one evaluation each, the second is what records a CUDA graph."""
    return 2 if model.device.type == "cuda" else 1


def fresh_memory(model: VideoModel, call: Callable[[], object]) -> Memory:
    """What a call takes together with the CUDA graphs that it records: to replay one, whose tensors lie in memory of
    its own, allocates next to nothing. Those of the model's earlier calls would be held beside it, and are dropped."""
    model.forget_graphs()

    def calls() -> None:
        for _ in range(warmup(model)):
            call()

    return memory_of(calls, model.device)


def fitting(call: Callable[[], _T]) -> _T | None:
    """What a call returns; None where memory does not suffice for it, on either side."""
    try:
        return call()
    except (RuntimeError, MemoryError, ValueError) as error:
        given_up = isinstance(error, ValueError) and "too little memory" in str(error)  # by ours, which tried all ways
        if not given_up and not memory._of_memory(error):
            raise
    torch.cuda.empty_cache()  # out here, since the error held on to all that the call had made
    return None


def weights(networks: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers, those that several share once."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _networks(side: VideoModel | AnimateDiffPipeline) -> list[nn.Module]:
    if isinstance(side, VideoModel):
        return [*side.networks.values(), *([] if side.decoder is None else [side.decoder])]
    return [side.unet, side.vae, side.text_encoder]


def denoised(model: VideoModel, case: Case, seen: Condition | None = None) -> list[Tensor]:
    """Latents of a case, from the prompt, and from what else is ``seen``."""
    return [draft.latents for draft in drafts(model, case.request(model), condition=seen)]


def to_frames(model: VideoModel, case: Case) -> list[np.ndarray]:
    """uint8 (F, H, W, 3) of each video of a case, from the prompt."""
    return _drawn(model, drafts(model, case.request(model)))


def _drawn(model: VideoModel, made: Iterable[Draft]) -> list[np.ndarray]:
    return [decoding.whole(model, draft).frames for draft in made]


def to_file(model: VideoModel, case: Case, folder: str) -> None:
    """Each video of a case as a file, from the prompt."""
    for i, draft in enumerate(drafts(model, case.request(model))):
        decoding.write(model, draft, Path(folder) / f"ours-{i}.mp4", source=ModelSource(), overwrite=True)


def in_chunks(model: VideoModel, case: Case) -> None:
    """The tensors of ``to_file`` in one thread, where the CPU's memory can be counted: frames chunk by chunk, the next
    one made before one is let go."""
    for draft in drafts(model, case.request(model)):
        for _chunk in decoding.frames(model, draft):  # held while the next is made
            pass


def their_latents(pipe: AnimateDiffPipeline, model: VideoModel, case: Case) -> Tensor:
    """``denoised`` by diffusers."""
    return pipe(**_their_arguments(model, case), output_type="latent").frames


def their_frames(pipe: AnimateDiffPipeline, model: VideoModel, case: Case) -> np.ndarray:
    """``to_frames`` by diffusers: (B, F, H, W, 3)."""
    return video.to_uint8(pipe(**_their_arguments(model, case), output_type="np").frames)


def _their_file(pipe: AnimateDiffPipeline, model: VideoModel, case: Case, folder: str) -> None:
    for i, frames in enumerate(their_frames(pipe, model, case)):
        video.write(frames, Path(folder) / f"theirs-{i}.mp4", fps=model.facts.fps, overwrite=True)


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
    model: VideoModel, pipe: AnimateDiffPipeline, made: Sequence[Draft]
) -> dict[str, Callable[[], Sequence[np.ndarray]]]:
    """Latents -> uint8 (F, H, W, 3) of each video, by each: ours on a stream of its own, as files are written."""
    latents = torch.cat([draft.latents for draft in made])

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            pixels = pipe.decode_latents(latents.to(pipe.vae.dtype), decode_chunk_size=16)
            return video.to_uint8(pipe.video_processor.postprocess_video(pixels, output_type="np"))

    return {"ours": partial(_drawn, model, made), "diffusers": theirs}


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
    taken: dict[str, dict[str, Memory]],
    loaded: dict[str, int],
    agreement: dict[str, float],
) -> dict[str, Any]:
    """Figures of each side by its name ("ours", "diffusers", "diffusers_compiled"), ratios first.

    ``weights_bytes``: what is loaded. ``peak_bytes_<phase>``: tensors beyond that at most, ours with the graphs of its
    evaluations made anew. ``process_bytes``: what a process of this side alone takes from prompt to frames, weights and
    all that torch's allocator holds for it; not what the driver and libraries take by themselves.
    """
    ratios = {
        f"{phase}_speedup_vs_{rival}": timings[rival].median / timings["ours"].median
        for phase, timings in times.items()
        for rival in timings
        if rival != "ours"
    }
    work, best = flops(model, case), machine.peak(model.device, model.unet.dtype)
    limit = max(best)
    shares = {
        phase: {name: work[phase] / timing.median / limit for name, timing in times[phase].items()} for phase in work
    }
    held = {name: most.held for name, most in taken["prompt_to_frames"].items()}
    return {
        **ratios,
        **_described(model, case),
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


def _described(model: VideoModel, case: Case) -> dict[str, Any]:
    return {
        "model": model.facts.name,
        "case": asdict(case),
        "device": str(model.device),
        "dtype": str(model.unet.dtype).removeprefix("torch."),
    }


def table(report: dict[str, Any]) -> str:
    """A report as lines: phase, who, median, p95, times faster, share of what the machine does at best; or what steers,
    how many times as long as text alone, and memory."""
    return "\n".join([_title(report), *(_costs(report) if report["case"]["steer"] else _comparison(report))])


def _title(report: dict[str, Any]) -> str:
    case, facts = report["case"], report["machine"]
    return (
        f"{report['model']}: {case['frames']} frames of {case['size']}x{case['size']}, {case['steps']} steps, "
        f"guidance {case['guidance']:g}, batch {case['batch']}; {report['dtype']} on "
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads"
    )


def _comparison(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'phase':<18}{'':<20}{'median':>10}{'p95':>10}{'first':>10}{'faster':>9}{'of machine':>12}"
    for phase, timings in report["seconds"].items():
        for name, timing in timings.items():
            times = f"{timing['median'] / timings['ours']['median']:.2f}"
            share = report["share_of_machine"].get(phase, {}).get(name)
            yield (
                f"{phase:<18}{name:<20}{timing['median']:>9.3f}s{timing['p95']:>9.3f}s{timing['first']:>9.3f}s"
                f"{'' if name == 'ours' else times:>9}{'' if share is None else f'{share:.0%}':>12}"
            )
    sides = (
        f"{name} {_mib(report['weights_bytes'][name])} + {_mib(peak)} ({_mib(report['process_bytes'][name])} held)"
        for name, peak in report["peak_bytes_prompt_to_frames"].items()
    )
    yield f"MiB at most, prompt to frames, weights + tensors: {', '.join(sides)}"
    differences = report["differences"]
    yield (
        f"largest differences on the same input: network {differences['network']:.1e} deviations, "
        f"decoder {differences['decoder']:.0f} of 255 levels"
    )


def _costs(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'denoising':<18}{'median':>10}{'p95':>10}{'first':>10}{'times text':>12}{'peak, MiB':>12}{'weights':>9}"
    timings = report["seconds"]["denoise"]
    for name, timing in timings.items():
        yield (
            f"{name if name == 'text' else f'text + {name}':<18}{timing['median']:>9.3f}s{timing['p95']:>9.3f}s"
            f"{timing['first']:>9.3f}s{timing['median'] / timings['text']['median']:>12.2f}"
            f"{_mib(report['peak_bytes_denoise'][name]):>12}{_mib(report['weights_bytes'][name]):>9}"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"
