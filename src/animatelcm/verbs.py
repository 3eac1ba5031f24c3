"""The verbs that make, change and describe files: their flags are the fields of dataclasses; no logic here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from animatelcm.model_source import Compile, ModelSource, Offload, Precision, Target
from animatelcm.request import SampleRequest, parse_size, unused
from animatelcm.terminal import bars, load, say, step_bar, told

if TYPE_CHECKING:
    from animatelcm.batch import About, Engine

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make videos from a sentence."""

    request: Annotated[SampleRequest, arg(name="")]
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    size: str | None = None
    """Width and height in pixels, as 64x64; instead of --width and --height."""
    out: Path | None = None
    """A file (.mp4, .gif, .webp; of one frame .png, .jpg), or a folder for a png sequence; several get -0, -1, ...
    Default: PROMPT.mp4, with one frame PROMPT.png, or the first free of PROMPT-2, PROMPT-3, ..."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    offload: Offload = "auto"
    """model: networks wait on the CPU while others work on the device; none: they stay there; auto: they wait where its
    memory is short."""
    precision: Precision = "auto"
    """Numbers that networks compute with; auto: fp16 on CUDA, else fp32."""
    compile: Compile = "auto"
    """none: networks are called as they are; auto: as CUDA graphs on a GPU; full: fused by torch.compile too, which
    takes minutes at first; openvino: compiled for the CPU, seconds at first, for many videos of one size."""
    force: bool = False
    """Replace files that exist."""
    json: bool = False
    """Print one JSON object instead of sentences."""

    def run(self) -> None:
        from animatelcm import video
        from animatelcm.condition import check_files, read
        from animatelcm.decoding import rescued, write
        from animatelcm.sampling import drafts

        targets = _free(self.request, force=self.force) if self.out is None else _targets(self.out, self.request)
        asked = {"num_frames": self.request.num_frames or 1, "fps": self.request.fps}
        for target in targets:  # which length and speed the model chooses is not known yet
            video.check_path(target, overwrite=self.force, **asked)
        check_files(self.request)
        began = time.perf_counter()
        request = _sized(self.request, self.size)
        with told(quiet=self.json):
            adapters = request.adapter_names()
            options = {"offload": self.offload, "precision": self.precision, "adapters": adapters}
            model = load(self.source, self.device, keep=False, **options)
            model.compile_as(self.compile)
            request = request.resolved(model.facts, model.downscale)
            fps = request.fps or model.facts.fps
            video.check_path(targets[0], overwrite=self.force, num_frames=request.num_frames, fps=fps)
            for warning in (warnings := unused(request)):
                LOG.warning("%s", warning)
            condition = read(request, model)
        loaded, made = time.perf_counter() - began, []
        options = {"condition": condition, "offload": self.offload}
        with (
            step_bar(request, quiet=self.json) as shown,
            closing(drafts(model, request, progress=shown, **options)) as coming,
        ):
            for draft, target in zip(coming, targets, strict=True):
                with rescued(draft, target, self.source):
                    phases = write(model, draft, target, source=self.source, overwrite=self.force)
                made.append((draft.evaluations, phases))
                precision = draft.precision
        seconds = {"load": loaded, **_sum_seconds([phases for _, phases in made])}
        seconds["total"] = time.perf_counter() - began
        facts = {"files": [str(target) for target in targets], "warnings": warnings, "precision": precision}
        self._report(request, facts, sum(evaluations for evaluations, _ in made), seconds)

    def _report(
        self, request: SampleRequest, facts: dict[str, Any], evaluations: int, seconds: dict[str, float]
    ) -> None:
        if self.json:
            rounded = {phase: round(value, 3) for phase, value in seconds.items()}
            counted = {"seconds": rounded, "network_evaluations": evaluations}
            say(json.dumps({**asdict(request), **asdict(self.source), **facts, **counted}))
        else:
            phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
            say(f"{', '.join(facts['files'])}: {seconds['total']:.1f} s ({phases}), {evaluations} evaluations")


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Go on where memory or the disk did not suffice for a video: from its latents to its file."""

    latents: Positional[Path]
    """NAME.latents.safetensors, as generate left it."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    out: Path | None = None
    """A file (.mp4, .gif, .webp), or a folder for a png sequence. Default: NAME.mp4."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    force: bool = False
    """Replace a file that exists."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        from animatelcm import decoding, video
        from animatelcm.images import at_home

        latents = at_home(self.latents)
        target = self.out or latents.with_name(latents.name.removesuffix(decoding.SUFFIX) + ".mp4")
        target = video.check_path(target, overwrite=self.force, num_frames=1)  # how many there are is not known yet
        with told(quiet=self.json):
            model = load(self.source, self.device, offload="model", keep=False, adapters=())
            draft = decoding.load(latents, model)
            seconds = decoding.write(model, draft, target, source=self.source, overwrite=self.force)["decode"]
        said = {"files": [str(target)], "seconds": {"decode": round(seconds, 3)}}
        say(json.dumps(said) if self.json else f"{target}: decoded in {seconds:.1f} s")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Make many videos, one of each row of a file. The same line again makes what is missing or has changed."""

    prompts: Positional[Path]
    """.txt: a prompt a line; .csv or .jsonl: columns are the settings of generate (prompt, steps, seed, ...)."""
    out: Path
    """Folder for 000000.mp4, ... and manifest.jsonl, which tells how each was made."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    seed: int = 0
    """Of row 0; the next rows count on from it, where they say nothing."""
    settings: tuple[str, ...] = ()
    """NAME=VALUE each, such as steps=8, for rows that say nothing of it."""
    ext: Literal["mp4", "gif", "webp"] = "mp4"
    """Format of the files."""
    engine: Literal["local", "ray"] = "local"
    """local: this process; ray: processes on this machine or on a cluster. Both make the same files."""
    address: str = ""
    """Of a Ray cluster, such as 10.0.0.1:6379. Default: $RAY_ADDRESS, or one that is started here."""
    actors: int | None = None
    """Processes of the engine ray, a copy of the model in each. Default: one a GPU, or one a core."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest there."""
    precision: Precision = "auto"
    """Numbers that networks compute with; auto: fp16 on CUDA, else fp32."""
    offload: Offload = "auto"
    """model: networks wait on the CPU while others work on the device; none: they stay there; auto: they wait where its
    memory is short."""
    compile: Compile = "auto"
    """none: networks are called as they are; auto: as CUDA graphs on a GPU; full: fused by torch.compile too, which
    takes minutes at first; openvino: compiled for the CPU, seconds at first, for many videos of one size."""
    force: bool = False
    """Replace videos that no manifest tells of."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        from animatelcm import batch
        from animatelcm.images import at_home

        rows = batch.read_rows(at_home(self.prompts), seed=self.seed, settings=self.settings)
        needed = set().union(*(row.request.adapter_names() for row in rows if row.request))
        options = {"device": self.device, "precision": self.precision, "adapters": None if needed else ()}
        options["offload"] = self.offload
        with told(quiet=self.json), self._engine(options) as (about, engine), bars(quiet=self.json) as progress:
            counts = batch.run(
                rows,
                at_home(self.out),
                about,
                engine,
                suffix="." + self.ext,
                facts={"engine": self.engine},
                force=self.force,
                progress=progress,
            )
        made, failed, before, seconds = counts
        rate = f" in {seconds:.1f} s ({made / seconds:.2f} a second)" if made else ""
        said = f"{self.out}: {made} made{rate}, {before} done before, {failed} failed"
        say(json.dumps({"out": str(self.out), **counts._asdict()}) if self.json else said)
        if failed:
            raise SystemExit(1)

    @contextmanager
    def _engine(self, options: dict[str, Any]) -> Iterator[tuple[About, Engine]]:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"actors={self.actors}, but at least 1 is needed; leave it out for one a GPU or core")
        if self.engine == "ray":
            from animatelcm.cluster import actors

            options["compiled"] = self.compile
            with actors(self.source, count=self.actors, address=self.address, **options) as pool:
                yield pool
        else:
            from animatelcm import batch

            model = load(self.source, keep=False, **options)
            model.compile_as(self.compile)
            yield batch.about(model), batch.here(model, self.source, self.offload)


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Add styles and image acceleration up into one model, w0 + alpha style + beta acceleration + motion, as a folder.

    Its unet/ is the sum, so that every tool that reads diffusers folders has it.
    """

    out: Path
    """The model folder to write."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    force: bool = False
    """Replace a model folder that exists."""

    def run(self) -> None:
        from animatelcm.images import at_home

        out = at_home(self.out)
        if out.exists() and not (self.force and (out / "model_index.json").is_file()):
            raise ValueError(f"{out} exists; choose another name, or add --force to replace a model folder")
        if self.source.embedding:
            raise ValueError("a model folder has no room for textual inversions; give --embedding to generate instead")
        from animatelcm.fusion import baked
        from animatelcm.saving import check_folder, save, scheduler_of

        check_folder(out)
        model = baked(load(self.source, "cpu", keep=False))
        save(model, out, scheduler=scheduler_of(model))
        say(f"model in {out}")


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a model, a weight file, or a video made here is."""

    file: Positional[Path]
    """A model folder, "emoji", a .safetensors file, or a video."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def run(self) -> None:
        from animatelcm.inspection import describe

        facts = describe(self.file)
        say(json.dumps(facts) if self.json else "\n".join(f"{key:>20}  {value}" for key, value in facts.items()))


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model, a motion module or a LoRA in another tool's format."""

    source: Positional[str]
    """A model folder, "emoji", a checkpoint, a motion module, a LoRA, or one of them on the hub."""
    out: Positional[Path]
    """The file (.safetensors) or the folder to write."""
    to: Target
    """diffusers: a model's or a MotionAdapter's folder; checkpoint: a model's base in one file, animatediff: a motion
    module, both for ComfyUI and A1111; kohya, peft: a LoRA; bundle: a model's folder."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Numbers of 16 or 32 bits."""
    part: str = ""
    """Of a model: a style's name (kohya, peft); "teacher", or "i2v" with the image encoder (animatediff)."""
    vae: str = ""
    """Into a model's folder or checkpoint: an autoencoder in place of its own, a file, a folder or a hub id."""
    force: bool = False
    """Replace what exists."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        from animatelcm.images import at_home

        out = at_home(self.out)
        if out.exists() and not self.force:
            raise ValueError(f"{out} exists; choose another name, or add --force to replace it")
        import torch

        from animatelcm.conversion import convert

        dtype = {"fp16": torch.float16, "fp32": torch.float32}[self.dtype]
        made = convert(self.source, out, to=self.to, dtype=dtype, part=self.part, vae=self.vae)
        facts = {key: str(value) for key, value in asdict(made).items() if value}
        say(
            json.dumps(facts)
            if self.json
            else f"{made.path}: {made.kind}" + (f", sha256 {made.sha256}" * bool(made.sha256))
        )


def _targets(out: Path, request: SampleRequest) -> list[Path]:
    from animatelcm.images import at_home

    out, count = at_home(out), request.num_videos_per_prompt
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def _free(request: SampleRequest, *, force: bool) -> list[Path]:
    """Files named after the prompt; where one is there already, with the first number behind it of which none is."""
    name, suffix = _slug(request.prompt), ".png" if request.num_frames == 1 else ".mp4"
    for number in count(1):
        targets = _targets(Path(name + f"-{number}" * (number > 1) + suffix), request)
        if force or not any(target.exists() for target in targets):
            return targets
    raise AssertionError


def _slug(prompt: str) -> str:
    """Words of a prompt as a file's name, of a length that file systems take, which count bytes."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    kept = words[1:] if words[:1] in (["a"], ["an"], ["the"]) and len(words) > 1 else words
    return "-".join(kept)[:60].encode()[:150].decode(errors="ignore").strip("-") or "video"


def _sized(request: SampleRequest, size: str | None) -> SampleRequest:
    if size is None:
        return request
    width, height = parse_size(size, "--size")
    return replace(request, width=width, height=height)


def _sum_seconds(videos: list[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(seconds[phase] for seconds in videos) for phase in videos[0]}
