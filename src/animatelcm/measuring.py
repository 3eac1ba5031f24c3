"""The verbs that measure the miniature: quality, speed, and which of the papers' claims hold."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from animatelcm.evaluate.report import Kind, Split, Steer
from animatelcm.model_source import Compile, ModelSource, Precision
from animatelcm.terminal import bars, load, say, told


@dataclass(frozen=True, kw_only=True)
class EvalEmoji:
    """Clips of a miniature: distance, subjects, motions, seconds."""

    out: Path
    """Folder for rows/, report.json, clips/, contact sheets, and what is kept of real clips. A second run measures only
    what is not there yet."""
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
    split: Split = "test"
    """Whose prompts: test, of the figures that are reported; validation, others, to choose a model or a setting by."""
    ceilings: bool = False
    """Also judge the real clips of the prompts, and those through the model's autoencoder."""
    keep: int = 8
    """Clips of each setting and kind that are kept as videos, to be looked at: clips/SETTING/KIND-NUMBER.mp4."""
    sheet: bool = False
    """Also draw 16 fixed prompts: sheet-SETTING.png."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest here."""
    force: bool = False
    """Replace rows of another model or protocol."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import emoji, paired
        from animatelcm.evaluate.judge import Protocol
        from animatelcm.evaluate.report import file_stem, summary, table, write_json
        from animatelcm.images import at_home, write_image

        out = at_home(self.out)
        settings = [emoji.Setting.parse(text) for text in self.settings]
        counts = {"clips": self.clips, "real": self.real}
        protocol = Protocol(**counts, style_truth=self.style_truth, steer=self.steer, split=self.split)
        model = load(self.source, self.device)
        settings = settings or [emoji.Setting.of(model.facts)]
        with bars(quiet=self.json) as progress:
            rows = emoji.evaluate(
                model,
                shlex.join(self.source.words()[1:]),
                settings=settings,
                protocol=protocol,
                out=out,
                kinds=self.kinds,
                ceilings=self.ceilings,
                keep=self.keep,
                source=self.source,
                force=self.force,
                progress=progress,
            )
            for setting in settings if self.sheet else []:
                sheet = emoji.contact_sheet(model, setting, progress)
                write_image(sheet, out / f"sheet-{file_stem(str(setting))}.png", overwrite=True)
        pairs = paired.to_first(out, rows)
        report = summary(rows, protocol.facts, emoji.versions()) | {"paired": [pair.to_json() for pair in pairs]}
        write_json(report, out / "report.json")
        tables = [table(rows), *([paired.pair_table(pairs)] if pairs else [])]
        say(json.dumps(report) if self.json else "\n\n".join(tables))


@dataclass(frozen=True, kw_only=True)
class EvalCompare:
    """Tell rows of eval emoji apart, paired by prompt."""

    rows: Positional[tuple[Path, ...]]
    """OUT/rows/SETTING.json, two or more, of any models but of the same prompts; the first is taken from each other."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        from animatelcm.evaluate import paired
        from animatelcm.images import at_home

        if len(self.rows) < 2:
            raise ValueError(f"{len(self.rows)} rows are no pair; give two or more, OUT/rows/SETTING.json each")
        first, *others = map(at_home, self.rows)
        pairs = [paired.compare(first, other) for other in others]
        said = {"paired": [pair.to_json() for pair in pairs]}
        say(json.dumps(said) if self.json else paired.pair_table(pairs))


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
    steer: UseAppendAction[tuple[str, ...]] = ()
    """An adapter (i2v, edge; of sd15-random pose too): in place of diffusers, what it costs beside text alone is
    measured. More than one may be given."""
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
        from animatelcm.bench import comparison, tables, workload
        from animatelcm.memory import best_dtype
        from animatelcm.sampling import best_device

        device = best_device() if self.device == "auto" else self.device
        size = self.size or (64 if self.model == "emoji" else 512)
        asked = {name: getattr(self, name) for name in ("steps", "guidance", "frames", "batch", "steer")}
        case = workload.Case(size=size, **asked)
        dtype = best_dtype(self.precision, device)
        model = workload.subject(self.model, device, dtype, adapters=bool(self.steer))
        model.compile_as(self.compile)
        report = comparison.compare(model, case, rounds=self.rounds, compiled=self.compiled, process=self.process)
        say(json.dumps(report) if self.json else tables.table(report))


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Hold every claim of the papers against the miniature: two hours of two cores, or ten minutes that show how."""

    out: Path = Path("runs/out/reproduction")
    """Folder for reproduction.md, claims.json, plots, and everything behind them. The same line goes on where it
    stopped."""
    quick: bool = False
    """Sizes that show that everything runs; figures mean nothing then, and are marked so."""
    clips: int | None = None
    """Generated for each row. Default: 64, of the ablations 256, or 8 where it is quick."""
    device: str = "auto"
    """cpu, cuda, or auto: the fastest here."""

    def run(self) -> None:
        from functools import partial

        from animatelcm.images import at_home
        from animatelcm.reproduce.page import reproduce
        from animatelcm.reproduce.study import QUICK, Sizes, Study

        sizes, progress = QUICK if self.quick else Sizes(), partial(bars, quiet=False)
        sizes = sizes if self.clips is None else replace(sizes, clips=self.clips, ablation_clips=self.clips)
        with told(quiet=False):
            page = reproduce(Study(out=at_home(self.out), sizes=sizes, device=self.device, bars=progress))
        say(f"{page}; animatelcm report {self.out} makes it a page to look at")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one page from a folder of eval or batch, or of such folders: figures, plots, and videos side by side."""

    folder: Positional[Path]
    """What eval or batch wrote, or folders of that, up to three deep."""
    out: Path | None = None
    """The page. Default: FOLDER/index.html."""
    title: str = ""
    """Default: the folder's name."""
    embed: bool = False
    """Put videos and pictures inside: one file, of at most 50 MB of them, to be mailed."""
    open: bool = False
    """Show it in a browser."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def run(self) -> None:
        from animatelcm.images import at_home
        from animatelcm.page import document

        out = document.write(at_home(self.folder), self.out and at_home(self.out), title=self.title, embed=self.embed)
        said = {"page": str(out), "bytes": out.stat().st_size}
        say(json.dumps(said) if self.json else f"page in {out}")
        if self.open:
            import webbrowser

            webbrowser.open(out.resolve().as_uri())
