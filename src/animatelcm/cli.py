"""The command line: verbs whose flags are the fields of the dataclasses that the library speaks; no logic here."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import AvoidSubcommands, Positional, arg

from animatelcm import __version__, recipes
from animatelcm.config import TrainConfig
from animatelcm.evaluate.report import Kind, Steer
from animatelcm.request import Compile, ModelSource, Offload, Precision, SampleRequest, Target

if TYPE_CHECKING:
    from animatelcm.model import VideoModel
    from animatelcm.sampling import Preview


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
        with _told(quiet=self.json):
            adapters = request.adapter_names()
            options = {"offload": self.offload, "precision": self.precision, "adapters": adapters}
            model = _load(self.source, self.device, keep=False, **options)
            model.compile = self.compile
            request = request.resolved(model.facts, model.downscale)
            condition = read(request, model)
        loaded, made = time.perf_counter() - began, []
        options = {"condition": condition, "offload": self.offload}
        with _bar(request, quiet=self.json) as bar, closing(drafts(model, request, progress=bar, **options)) as coming:
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
            _say(json.dumps({**asdict(request), **files, "seconds": rounded, "network_evaluations": evaluations}))
        else:
            phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
            _say(f"{', '.join(map(str, targets))}: {seconds['total']:.1f} s ({phases}), {evaluations} evaluations")


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
        with _told(quiet=self.json):
            model = _load(self.source, self.device, offload="model", keep=False, adapters=())
            draft = decoding.load(self.latents, model)
            seconds = decoding.write(model, draft, target, source=self.source, overwrite=self.force)["decode"]
        said = {"files": [str(target)], "seconds": {"decode": round(seconds, 3)}}
        _say(json.dumps(said) if self.json else f"{target}: decoded in {seconds:.1f} s")


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

        save(baked(_load(self.source, "cpu", keep=False)), self.out)
        _say(f"model in {self.out}")


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
        _say(json.dumps(facts) if self.json else "\n".join(f"{key:>20}  {value}" for key, value in facts.items()))


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
        _say(
            json.dumps(facts)
            if self.json
            else f"{made.path}: {made.kind}" + (f", sha256 {made.sha256}" * bool(made.sha256))
        )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure how good a miniature's clips are: distance to real ones, subjects, motions, seconds."""

    out: Path
    """Folder for rows/, report.json, contact sheets, and what is kept of real clips. A second run measures only what
    is not there yet."""
    source: Annotated[ModelSource, arg(name="")] = field(default_factory=ModelSource)
    style_truth: str = ""
    """The style that clips ought to have: prompts and real clips are of this sheet (twemoji, or a .webp's path)."""
    settings: tuple[str, ...] = ()
    """SAMPLER@STEPS[:GUIDANCE][/trailing] each, such as lcm@4 or ddim@25:4. Default: the model's own."""
    kinds: tuple[Kind, ...] = ("clips",)
    """clips: captions as in training, held against other real clips; images, plain: of each subject; motions, held_out:
    subjects under each motion, pairs that no training clip shows."""
    steer: Steer = ""
    """What of their real clips steers the generated ones: their first frame (i2v), or maps of a kind."""
    clips: int = 256
    """Prompts of the kind clips, and at most as many of each other kind."""
    real: int = 2048
    """Real clips that those are held against."""
    ceilings: bool = False
    """Also judge the real clips of the prompts, and those through the model's autoencoder."""
    sheet: bool = False
    """Also draw 16 fixed prompts: sheet-SETTING.png."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    force: bool = False
    """Replace rows of another model or protocol."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import emoji
        from animatelcm.evaluate.judge import Protocol
        from animatelcm.evaluate.report import file_stem, summary, table, write_json
        from animatelcm.video import write_image

        settings = [emoji.Setting.parse(text) for text in self.settings]
        protocol = Protocol(clips=self.clips, real=self.real, style_truth=self.style_truth, steer=self.steer)
        model = _load(self.source, self.device)
        settings = settings or [emoji.Setting.of(model.facts)]
        with _bars(quiet=self.json) as progress:
            rows = emoji.evaluate(
                model,
                shlex.join(self.source.words()[1:]),
                settings=settings,
                protocol=protocol,
                out=self.out,
                kinds=self.kinds,
                ceilings=self.ceilings,
                force=self.force,
                progress=progress,
            )
            for setting in settings if self.sheet else []:
                sheet = emoji.contact_sheet(model, setting, progress)
                write_image(sheet, self.out / f"sheet-{file_stem(str(setting))}.png", overwrite=True)
        report = summary(rows, protocol.facts, emoji.versions())
        write_json(report, self.out / "report.json")
        _say(json.dumps(report) if self.json else table(rows))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time the embedded model, or one of Stable Diffusion 1.5's size, beside diffusers on the same weights."""

    model: Literal["emoji", "sd15-random"] = "emoji"
    """sd15-random has random weights, and needs 16 GB on a CPU."""
    steps: int = 4
    """Of the sampler."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is off."""
    frames: int = 16
    """Of each clip."""
    size: int | None = None
    """Height and width in pixels. Default: 64, or 512 for sd15-random."""
    batch: int = 1
    """Clips of one prompt."""
    rounds: int = 9
    """Times that each is run, in turn with the others."""
    compiled: bool = False
    """Also time diffusers' network under torch.compile (minutes)."""
    process: bool = False
    """Also time whole processes, from nothing to a file."""
    device: str = "auto"
    """cpu, cuda, or auto: the fastest here."""
    precision: Precision = "auto"
    """Numbers that networks compute with, theirs too; auto: fp16 on CUDA, else fp32."""
    compile: Compile = "auto"
    """How our network is called, as in generate."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.bench import inference
        from animatelcm.memory import best_dtype
        from animatelcm.sampling import best_device

        device = best_device() if self.device == "auto" else self.device
        size = self.size or (64 if self.model == "emoji" else 512)
        case = inference.Case(steps=self.steps, guidance=self.guidance, frames=self.frames, size=size, batch=self.batch)
        model = inference.subject(self.model, device, best_dtype(self.precision, device))
        model.compile = self.compile
        report = inference.compare(model, case, rounds=self.rounds, compiled=self.compiled, process=self.process)
        _say(json.dumps(report) if self.json else inference.table(report))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a recipe, as opposed to what it is."""

    dry_run: bool = False
    """Print the resolved recipe and what a step of it will cost, and stop."""
    resume: bool = False
    """Continue from the newest checkpoint of the run's folder."""
    stop_after: int | None = None
    """Leave after this many steps with a checkpoint, to be resumed."""


def _train(config: TrainConfig, options: RunOptions) -> None:
    """Run a training recipe: animatelcm train RECIPE [--field value]; without a recipe it lists them."""
    if options.dry_run:
        _plan(config)
        return
    from animatelcm.training import train

    model = train(config, resume=options.resume, stop_after=options.stop_after)
    if model is not None:
        _say(f"model in {model}")
        return
    _say(f"stopped before step {config.steps}; the same line with --resume goes on")
    if options.stop_after is None:
        raise SystemExit(130)  # interrupted: a chain of recipes must not go on


def _plan(config: TrainConfig) -> None:
    """The resolved config as JSON on stdout, what it will cost on stderr."""
    _say(config.to_json())
    if config.trainable != "autoencoder":
        from animatelcm.planning import plan

        sys.stderr.write(plan(config).text() + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; a user's error is one sentence on stderr and exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        _run(words)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"animatelcm: {error}\n")
        raise SystemExit(2) from error


VERBS = {
    "generate": Generate,
    "decode": Decode,
    "fuse": Fuse,
    "convert": Convert,
    "inspect": Inspect,
    "eval": Eval,
    "bench": Bench,
}


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        _say(f"animatelcm {__version__}")
    elif words[:1] == ["train"]:
        _train_verb(words[1:])
    elif words[:1] and words[0] in VERBS:
        tyro.cli(VERBS[words[0]], args=words[1:], prog=f"animatelcm {words[0]}").run()
    else:
        tyro.extras.subcommand_cli_from_dict({**VERBS, "train": _train}, args=words, prog="animatelcm")


def _train_verb(words: list[str]) -> None:
    """``train RECIPE --field value``: the recipe's config is the flags' default."""
    names = [name for name, value in vars(recipes).items() if getattr(value, "__module__", "") == recipes.__name__]
    if not words or words[0] not in names:
        given = "nothing" if not words or words[0].startswith("-") else repr(words[0])
        raise ValueError(f"train needs a recipe, got {given}; recipes: {', '.join(names)}")

    recipe = getattr(recipes, words[0])

    def run(
        config: Annotated[TrainConfig, arg(name="", default=recipe())], options: Annotated[RunOptions, arg(name="")]
    ) -> None:
        _train(config, options)

    run.__annotations__["config"] = Annotated[TrainConfig, arg(name="", default=recipe())]
    tyro.cli(
        run,
        args=words[1:],
        prog=f"animatelcm train {words[0]}",
        description=recipe.__doc__,
        config=(AvoidSubcommands,),
    )


@contextmanager
def _told(*, quiet: bool) -> Iterator[None]:
    """What the library logs meanwhile, on stderr."""
    import logging

    log, handler = logging.getLogger("animatelcm"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _load(
    source: ModelSource,
    device: str,
    *,
    offload: Offload = "none",
    precision: Precision = "fp32",
    keep: bool = True,
    adapters: Collection[str] | None = None,
) -> VideoModel:
    from animatelcm.memory import best_dtype, load_for
    from animatelcm.sampling import best_device

    place = best_device() if device == "auto" else device
    dtype = best_dtype(precision, place)
    return load_for(source, device=place, dtype=dtype, offload=offload, keep=keep, adapters=adapters)


@contextmanager
def _bar(request: SampleRequest, *, quiet: bool) -> Iterator[Callable[[Preview], None]]:
    """A bar on stderr for the steps of a resolved request."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(request.prompt, total=request.num_inference_steps * request.num_videos_per_prompt)
        yield lambda _: bar.advance(task)


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr for whatever is being done: (title, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total)
            bar.update(tasks[title], completed=done, visible=done < total)

        yield show


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


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
