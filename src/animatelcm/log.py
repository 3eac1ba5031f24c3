"""Where figures go: one JSON line a record, TensorBoard, and a progress bar with loss, steps a second, time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """The log of one run: ``metrics.jsonl`` and ``tensorboard/`` in its folder, a bar on the terminal."""

    def __init__(self, folder: Path, title: str, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        _cut(folder / "metrics.jsonl", start)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=300,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, figures="")
        self._last = (time.perf_counter(), start)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._board.close()
        self._file.close()

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures after ``step`` steps."""
        now, (then, before) = time.perf_counter(), self._last
        rate = (step - before) / (now - then) if step > before else 0.0
        self._last = (now, step)
        record = {"step": step, **figures, "steps_per_second": rate}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._progress.update(self._task, completed=step, figures=f"{text}  {rate:.2f} it/s")

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._progress.console.print(text)


def _cut(path: Path, start: int) -> None:
    """Forget records after ``start`` steps: a run that goes on from there makes them again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= start), encoding="utf-8")
