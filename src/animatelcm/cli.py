"""The command line: verbs whose flags are the fields of the dataclasses that the library speaks; no logic here."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from animatelcm import __version__, recipes
from animatelcm.config import TrainConfig
from animatelcm.request import SampleRequest

if TYPE_CHECKING:
    from animatelcm.request import Video


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make videos from a sentence."""

    request: Annotated[SampleRequest, arg(name="")]
    model: str = "emoji"
    """"emoji" (embedded), a model folder, or a Hugging Face id."""
    size: str | None = None
    """Width and height in pixels, as 64x64; instead of --width and --height."""
    out: Path | None = None
    """A file (.mp4, .gif, .webp), or a folder for a png sequence; several get -0, -1, ... Default: PROMPT.mp4."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    force: bool = False
    """Replace files that exist."""
    json: bool = False
    """Print one JSON object instead of sentences."""

    def run(self) -> None:
        from animatelcm import video

        targets = _targets(self.out or Path(_slug(self.request.prompt) + ".mp4"), self.request.num_videos_per_prompt)
        for target in targets:
            video.check_path(target, overwrite=self.force)
        began = time.perf_counter()
        from animatelcm.model import load
        from animatelcm.sampling import best_device

        request = _sized(self.request, self.size)
        model = load(self.model, device=best_device() if self.device == "auto" else self.device)
        request = request.resolved(model.facts, model.downscale)
        loaded = time.perf_counter() - began
        videos = _with_bar(model, request, quiet=self.json)
        for made, target in zip(videos, targets, strict=True):
            video.write(
                made.frames, target, fps=made.fps, metadata=made.recipe(self.model, __version__), overwrite=self.force
            )
        seconds = {"load": loaded, **_sum_seconds(videos), "total": time.perf_counter() - began}
        self._report(request, videos, targets, seconds)

    def _report(
        self, request: SampleRequest, videos: list[Video], targets: list[Path], seconds: dict[str, float]
    ) -> None:
        evaluations = sum(made.evaluations for made in videos)
        if self.json:
            files = {"model": self.model, "files": [str(target) for target in targets]}
            rounded = {phase: round(value, 3) for phase, value in seconds.items()}
            _say(json.dumps({**asdict(request), **files, "seconds": rounded, "network_evaluations": evaluations}))
        else:
            phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
            _say(f"{', '.join(map(str, targets))}: {seconds['total']:.1f} s ({phases}), {evaluations} evaluations")


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
class RunOptions:
    """How to run a recipe, as opposed to what it is."""

    dry_run: bool = False
    """Print the plan and stop."""
    resume: bool = False
    """Continue from the newest checkpoint of the run's folder."""
    stop_after: int | None = None
    """Leave after this many steps with a checkpoint, to be resumed."""


def _train(config: TrainConfig, options: RunOptions) -> None:
    """Run a training recipe: animatelcm train RECIPE [--field value]; without a recipe it lists them."""
    if options.dry_run:
        _say(config.to_json())
        return
    from animatelcm.training import train

    _say(f"model in {train(config, resume=options.resume, stop_after=options.stop_after)}")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; a user's error is one sentence on stderr and exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        _run(words)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"animatelcm: {error}\n")
        raise SystemExit(2) from error


VERBS = {"generate": Generate, "inspect": Inspect}


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
    tyro.cli(run, args=words[1:], prog=f"animatelcm train {words[0]}", description=recipe.__doc__)


def _with_bar(model: object, request: SampleRequest, *, quiet: bool) -> list[Video]:
    from rich.console import Console
    from rich.progress import Progress

    from animatelcm.sampling import sample

    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(request.prompt, total=request.num_inference_steps * request.num_videos_per_prompt)
        return sample(model, request, progress=lambda _: bar.advance(task))


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


def _sum_seconds(videos: list[Video]) -> dict[str, float]:
    return {phase: sum(made.seconds[phase] for made in videos) for phase in videos[0].seconds}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
