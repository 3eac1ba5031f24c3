"""A study: training runs, rows of figures and measurements in one folder, each made once, and how long all took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from animatelcm import training, video
from animatelcm.assembly import load_sum
from animatelcm.config import TrainConfig
from animatelcm.data.emoji import drawn
from animatelcm.evaluate import emoji
from animatelcm.evaluate.judge import PROMPT_SEED, Progress, Protocol, silent
from animatelcm.evaluate.paired import Pair, compare
from animatelcm.evaluate.prompts import prompts
from animatelcm.evaluate.report import Row, Steer, facts_hash, row_path, summary, write_json
from animatelcm.evaluate.rows import link
from animatelcm.model_source import ModelSource
from animatelcm.sampling import best_device

SHOWN = 4
"""Clips of a contact sheet."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured and trained. The defaults take two hours of two cores."""

    clips: int = 64
    """Generated for each row, but for those of the ablations."""
    ablation_clips: int = 256
    """Generated for each row of an ablation: short trainings differ by less than many steps from few."""
    real: int = 512
    """Real clips that these are held against."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Of the samplers that are compared."""
    guidances: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Tried for each baseline; its best is taken."""
    teacher_steps: int = 25
    image_steps: int = 240
    """Stage 1 of the ablations, 32 pictures each."""
    video_steps: int = 120
    """Stage 2 of the ablations, 4 clips each."""
    adapter_steps: int = 120
    """A LoRA of an adapter without a teacher, 4 clips each."""
    rounds: int = 9
    """Of timings."""
    quick: bool = False
    """Too small for figures that mean anything: what is written says so."""

    def __post_init__(self) -> None:
        if 4 not in self.steps:
            raise ValueError(f"steps={self.steps} must have 4 among them: the papers' claims are about four")


QUICK = Sizes(
    clips=8,
    ablation_clips=8,
    real=64,
    steps=(1, 4),
    guidances=(2.0,),
    image_steps=12,
    video_steps=8,
    adapter_steps=8,
    rounds=1,
    quick=True,
)
"""Ten minutes of two cores: that everything runs, and what the tables will look like."""


def _unseen() -> AbstractContextManager[Progress]:
    return nullcontext(silent)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything of one reproduction, in ``out``. What lies there of the same sizes is taken as it is."""

    out: Path
    sizes: Sizes
    device: str = "auto"
    bars: Callable[[], AbstractContextManager[Progress]] = _unseen
    """Opens what shows the progress of one measurement; training runs show their own."""

    def trained(self, config: TrainConfig) -> ModelSource:
        """The model that a run leaves, from ``out / "runs"``; a run that was stopped goes on.

        Raises KeyboardInterrupt where it was interrupted.
        """
        config = replace(config, out=self.out / "runs", log_every=10, save_every=60, sample_every=1_000_000_000)
        model = config.folder / "model"
        if not model.is_dir():
            with self._clock(f"train {config.name}"):
                if training.train(config, resume=True) is None:
                    raise KeyboardInterrupt
        return ModelSource(model=str(model))

    def rows(
        self,
        name: str,
        source: ModelSource,
        settings: Sequence[str],
        *,
        clips: int | None = None,
        style_truth: str = "",
        steer: Steer = "",
    ) -> list[Row]:
        """A row of figures for each setting, from ``out / name``: an eval folder of its own. ``clips``: others than
        ``Sizes.clips``."""
        count = clips or self.sizes.clips
        protocol = Protocol(clips=count, real=self.sizes.real, style_truth=style_truth, steer=steer)
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for kept in sorted(self.out.glob("*/real-*.safetensors")):  # features of real clips, named by what they are of
            if not (folder / kept.name).exists():
                link(kept, folder / kept.name)
        with self._clock(f"eval {name}"), self.bars() as progress:
            model = load_sum(source, device=self.place)
            parsed = [emoji.Setting.parse(text) for text in settings]
            label = " ".join(source.words()[1:]) or source.model
            rows = emoji.evaluate(model, label, settings=parsed, protocol=protocol, out=folder, progress=progress)
        write_json(summary(rows, protocol.facts, emoji.versions()), folder / "report.json")
        return rows

    def less(self, row: tuple[str, Row], other: tuple[str, Row]) -> Pair:
        """The figures of a row less those of another, paired by prompt: each with the name of its ``rows``.

        Raises ValueError where what a row's clips bring is not there, as earlier versions left it.
        """
        return compare(*(row_path(self.out / name, row.kind, row.setting) for name, row in (other, row)))

    def sheet(
        self, name: str, shown: Mapping[str, tuple[ModelSource, str]], *, style_truth: str = "", steer: Steer = ""
    ) -> str:
        """Draw ``out / NAME.png`` and return its name: of each of the first clips that are judged the real one and
        what each (model, setting) of ``shown`` makes of it, a row each by title, eight frames of sixteen."""
        path = self.out / f"{name}.png"
        if path.is_file():
            return path.name
        protocol = Protocol(clips=self.sizes.clips, real=self.sizes.real, style_truth=style_truth, steer=steer)
        shots = prompts("clips", protocol.data(PROMPT_SEED, protocol.clips))[:SHOWN]
        rows = [[drawn(shot, protocol.pack)] for shot in shots]
        with self._clock(f"draw {name}"):
            for source, setting in shown.values():
                model, parsed = load_sum(source, device=self.place), emoji.Setting.parse(setting)
                for seed, (row, shot) in enumerate(zip(rows, shots, strict=True)):
                    row.append(emoji.sampled(model, parsed, protocol, shot, seed).frames)
        labels = [f"{shot.caption}: {title}" for shot in shots for title in ("real", *shown)]
        sheet = video.contact_sheet([clip for row in rows for clip in row], labels)
        video.write_image(sheet, path, overwrite=True)
        return path.name

    def measured(self, name: str, make: Callable[[Progress], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` finds, of JSON's types; kept in ``out / "measured"``."""
        path = self.out / "measured" / f"{name}.json"
        if not path.is_file():
            with self._clock(f"measure {name}"), self.bars() as progress:
                write_json(make(progress), path)
        return json.loads(path.read_text(encoding="utf-8"))

    def begin(self) -> None:
        """Make the folder. Raises ValueError where one of other sizes lies there."""
        path, sizes = self.out / "sizes.json", facts_hash(json.loads(json.dumps(vars(self.sizes))))
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["hash"] != sizes:
            raise ValueError(f"{self.out} holds a reproduction of other sizes; choose another --out")
        write_json({**vars(self.sizes), "hash": sizes}, path)

    def seconds(self) -> dict[str, float]:
        """How long everything took that was done so far, by what it was."""
        spent: dict[str, float] = {}
        path = self.out / "compute.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            entry = json.loads(line)
            spent[entry["what"]] = spent.get(entry["what"], 0.0) + entry["seconds"]
        return spent

    @property
    def place(self) -> str:
        """The device that models are loaded to."""
        return best_device() if self.device == "auto" else self.device

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        """Adds to what was spent, also where it is cut short."""
        began = time.perf_counter()
        try:
            yield
        finally:
            entry = {"what": what, "seconds": round(time.perf_counter() - began, 1)}
            with (self.out / "compute.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
