"""Runs of a batch into a folder, and what they left there: what the tests of batches share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from animatelcm import batch
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource

SMALL = ("frames=2", "steps=1", "guidance=1")
SOURCE = ModelSource()


def six_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a parrot\na fox\n\na cat\na dog\na robot\na ghost\n")
    return path


def runner(model: VideoModel, about: batch.About, into: Path) -> Callable[..., batch.Counts]:
    """What runs the rows of a file."""

    def go(path: Path, *settings: str, seed: int = 0, out: Path = into, **options) -> batch.Counts:
        rows = batch.read_rows(path, seed=seed, settings=(*SMALL, *settings))
        options = {"about": about, "engine": batch.here(model, SOURCE), "suffix": ".webp"} | options
        return batch.run(rows, out, **options)

    return go


def lines(out: Path) -> list[dict]:
    """The manifest's records, in their order."""
    return [json.loads(line) for line in (out / batch.MANIFEST).read_text().splitlines()]


def hashes(out: Path) -> dict[str, str]:
    """File -> sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("0*")}
