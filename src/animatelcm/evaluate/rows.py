"""What a protocol wants made: rows for ``animatelcm batch``, and the names that its videos are to have afterwards.

A row is a dict: ``file``, the name that is wanted, then prompt, seed and settings, fields of ``SampleRequest``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


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
    records = _records(made / "manifest.jsonl")
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


def _records(path: Path) -> dict[int, dict[str, Any]]:
    """The newest record of each row; a line that a killed run tore is none."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder that animatelcm batch wrote")
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records[int(record["row"])] = record
    return records
