"""The verbs that make, change and describe files: their flags are the fields of dataclasses; no logic here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from animatelcm.request import Compile, ModelSource, Offload, Precision, SampleRequest, Target
from animatelcm.terminal import bars, load, say, step_bar, told

if TYPE_CHECKING:
    from animatelcm.batch import About, Engine


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make videos from a sentence."""

    request: Annotated[SampleRequest, arg(name="")]
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    size: str | None = None
    """Width and height in pixels, as 64x64; instead of --width and --height."""
    out: Path | None = None
    """A file (.mp4, .gif, .webp), or a folder for a png sequence; several get -0, -1, ... Default: PROMPT.mp4."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    offload: Offload = "auto"
    """model: networks wait on the CPU while others work on the device; none: they stay there; auto: they wait where its
    memory is short."""
    precision: Precision = "auto"
    """Numbers that networks compute with; auto: fp16 on CUDA, else fp32."""
    compile: Compile = "auto"
    """none: networks are called as they are; auto: as CUDA graphs on a GPU; full: fused by torch.compile too, which
    takes minutes at first."""
    force: bool = False
    """Replace files that exist."""
    json: bool = False
    """Print one JSON object instead of sentences."""

    def run(self) -> None:
        from animatelcm import video
        from animatelcm.condition import read
        from animatelcm.decoding import rescued, write
        from animatelcm.sampling import drafts

        targets = _targets(self.out or Path(_slug(self.request.prompt) + ".mp4"), self.request.num_videos_per_prompt)
        for target in targets:
            video.check_path(target, overwrite=self.force)
        began = time.perf_counter()
        request = _sized(self.request, self.size)
        with told(quiet=self.json):
            adapters = request.adapter_names()
            options = {"offload": self.offload, "precision": self.precision, "adapters": adapters}
            model = load(self.source, self.device, keep=False, **options)
            model.compile = self.compile
            request = request.resolved(model.facts, model.downscale)
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
        seconds = {"load": loaded, **_sum_seconds([phases for _, phases in made])}
        seconds["total"] = time.perf_counter() - began
        self._report(request, sum(evaluations for evaluations, _ in made), targets, seconds)

    def _report(self, request: SampleRequest, evaluations: int, targets: list[Path], seconds: dict[str, float]) -> None:
        if self.json:
            files = {**asdict(self.source), "files": [str(target) for target in targets]}
            rounded = {phase: round(value, 3) for phase, value in seconds.items()}
            say(json.dumps({**asdict(request), **files, "seconds": rounded, "network_evaluations": evaluations}))
        else:
            phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
            say(f"{', '.join(map(str, targets))}: {seconds['total']:.1f} s ({phases}), {evaluations} evaluations")


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

        target = self.out or self.latents.with_name(self.latents.name.removesuffix(decoding.SUFFIX) + ".mp4")
        video.check_path(target, overwrite=self.force)
        with told(quiet=self.json):
            model = load(self.source, self.device, offload="model", keep=False, adapters=())
            draft = decoding.load(self.latents, model)
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
    force: bool = False
    """Replace videos that no manifest tells of."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        from animatelcm import batch

        rows = batch.read_rows(self.prompts, seed=self.seed, settings=self.settings)
        needed = set().union(*(row.request.adapter_names() for row in rows if row.request))
        options = {"device": self.device, "precision": self.precision, "adapters": None if needed else ()}
        with told(quiet=self.json), self._engine(options) as (about, engine), bars(quiet=self.json) as progress:
            counts = batch.run(
                rows,
                self.out,
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

            with actors(self.source, count=self.actors, address=self.address, **options) as pool:
                yield pool
        else:
            from animatelcm import batch

            model = load(self.source, keep=False, **options)
            yield batch.about(model), batch.here(model, self.source)


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
        if self.out.exists() and not (self.force and (self.out / "model_index.json").is_file()):
            raise ValueError(f"{self.out} exists; choose another name, or add --force to replace a model folder")
        from animatelcm.bundle import save
        from animatelcm.fusion import baked

        save(baked(load(self.source, "cpu", keep=False)), self.out)
        say(f"model in {self.out}")


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
    """diffusers: a model's or a MotionAdapter's folder; animatediff: a motion module for ComfyUI and A1111; kohya,
    peft: a LoRA; bundle: a model's folder."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Numbers of 16 or 32 bits."""
    part: str = ""
    """Of a model: a style's name (kohya, peft); "teacher", or "i2v" with the image encoder (animatediff)."""
    force: bool = False
    """Replace what exists."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        if self.out.exists() and not self.force:
            raise ValueError(f"{self.out} exists; choose another name, or add --force to replace it")
        import torch

        from animatelcm.conversion import convert

        dtype = {"fp16": torch.float16, "fp32": torch.float32}[self.dtype]
        made = convert(self.source, self.out, to=self.to, dtype=dtype, part=self.part)
        facts = {key: str(value) for key, value in asdict(made).items() if value}
        say(
            json.dumps(facts)
            if self.json
            else f"{made.path}: {made.kind}" + (f", sha256 {made.sha256}" * bool(made.sha256))
        )


def _targets(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def _slug(prompt: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    kept = words[1:] if words[:1] in (["a"], ["an"], ["the"]) and len(words) > 1 else words
    return "-".join(kept)[:60] or "video"


def _sized(request: SampleRequest, size: str | None) -> SampleRequest:
    if size is None:
        return request
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {size!r} is not WIDTHxHEIGHT in pixels, such as 64x64")
    return replace(request, width=int(width), height=int(height))


def _sum_seconds(videos: list[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(seconds[phase] for seconds in videos) for phase in videos[0]}
