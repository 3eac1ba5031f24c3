"""What a protocol wants made: rows for ``animatelcm batch``, and the names that its videos are to have afterwards.

A row is a dict: ``file``, the name that is wanted, then prompt, seed and settings, fields of ``SampleRequest``.
``make`` has them made in this process, and finds done what ``animatelcm batch rows.jsonl --out batch`` made before, by
any of its engines.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from animatelcm import batch
from animatelcm.evaluate.judge import Progress, silent
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.request import SampleRequest

MANIFEST = batch.MANIFEST


def filled(
    rows: Sequence[Mapping[str, Any]], settings: Sequence[str], otherwise: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows with ``settings``, NAME=VALUE as ``animatelcm batch`` takes them, and ``otherwise`` where these say nothing.

    Raises ValueError for a setting that is none, and where there are no rows.
    """
    if not rows:
        raise ValueError("no video is asked for; choose other prompts or dimensions")
    with tempfile.TemporaryDirectory(prefix="animatelcm-") as room:
        path = Path(room) / "rows.jsonl"
        write_rows(rows[:1], path)
        (row,) = batch.read_rows(path, settings=settings)
    if row.request is None:
        raise ValueError(row.error)
    said = {field.name: getattr(row.request, field.name) for field in fields(SampleRequest)}
    defaults = {field.name: field.default for field in fields(SampleRequest)}
    own = {name: value for name, value in said.items() if name not in rows[0] and value != defaults[name]}
    return [{**row, **otherwise, **own} for row in rows]


def differences(rows: Sequence[Mapping[str, Any]], otherwise: Mapping[str, Any]) -> list[str]:
    """A sentence where rows of one setting are not made as a protocol has it; else none."""
    other = {name: value for name, value in otherwise.items() if rows[0].get(name) != value}
    if not other:
        return []
    ours, theirs = (", ".join(f"{name}={given.get(name)!r}" for name in other) for given in (rows[0], otherwise))
    return [f"videos were made with {ours} where the papers have {theirs}: not comparable with their figures"]


def make(
    rows: Sequence[Mapping[str, Any]], model: VideoModel, source: ModelSource, out: Path, *, progress: Progress = silent
) -> Path:
    """Have a batch make them into ``out / "batch"``, of ``out / "rows.jsonl"``; what is there already stays.

    ``out / "videos"`` comes back, where they have their names. Raises ValueError where the model makes no such videos,
    before anything is written, or where some could not be made.
    """
    first = {key: value for key, value in rows[0].items() if key != "file"}
    SampleRequest(**first).resolved(model.facts, model.downscale)
    write_rows(rows, out / "rows.jsonl")
    asked, engine = batch.read_rows(out / "rows.jsonl"), batch.here(model, source)
    batch.run(asked, out / "batch", batch.about(model), engine, facts={"engine": "local"}, progress=progress)
    if absent := give_names(rows, out / "batch", out / "videos"):
        raise ValueError(
            f"{len(absent)} of {len(rows)} videos could not be made, e.g. {absent[0]!r}; see why in "
            f"{out / 'batch' / MANIFEST}, and the same line again makes what is missing"
        )
    return out / "videos"


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """As .jsonl, whole or not at all; without ``file``, for a batch names its videos by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    asked = [{key: value for key, value in row.items() if key != "file"} for row in rows]
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    unfinished.replace(path)


def give_names(rows: Sequence[Mapping[str, Any]], made: Path, out: Path) -> list[str]:
    """Link the videos of a batch of these rows into ``out`` by the names wanted; those that were not made come back.

    Raises ValueError where ``made`` has no manifest, or that of other prompts, seeds or another format.
    """
    records = read_manifest(made / MANIFEST)
    out.mkdir(parents=True, exist_ok=True)
    absent = []
    for number, row in enumerate(rows):
        record = records.get(number, {})
        if "file" not in record or not (made / record["file"]).is_file():
            absent.append(row["file"])
            continue
        if any(record.get(key) != row[key] for key in ("prompt", "seed")):
            raise ValueError(f"row {number} of {made} was made of other prompts or seeds; give the batch of these rows")
        if Path(record["file"]).suffix != Path(row["file"]).suffix:
            raise ValueError(f"{made / record['file']} is to be called {row['file']!r}; make the batch as .mp4")
        (out / row["file"]).unlink(missing_ok=True)
        link(made / record["file"], out / row["file"])
    return absent


def link(source: Path, target: Path) -> None:
    """A link to a file, or a copy where links are not allowed."""
    try:
        target.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, target)


def read_manifest(path: Path) -> dict[int, dict[str, Any]]:
    """The newest record of each row of a batch; a line that a killed run tore is none.

    Raises ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder that animatelcm batch wrote")
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records[int(record["row"])] = record
    return records
