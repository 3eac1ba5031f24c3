"""The manifest of a folder: what was made of each row and of what, by which the next run knows what is done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from animatelcm import __version__
from animatelcm.batch.engine import About, Made
from animatelcm.batch.rows import Row
from animatelcm.images import at_home
from animatelcm.video import check_fps

MANIFEST = "manifest.jsonl"


def plan(row: Row, about: About, suffix: str, contents: dict[str, str]) -> tuple[Row, dict[str, Any]]:
    """A row as the model will make it, and the beginning of its record; ``contents`` remembers hashes of files."""
    if row.request is None:
        return row, {}
    try:
        request = row.request.resolved(about.facts, about.cell)
        check_fps(request.fps or about.facts.fps, suffix)
    except ValueError as error:
        return row._replace(request=None, error=str(error)), {}
    paths = {request.image, request.video, *(control.file for control in request.controls())} - {""}
    for path in paths - contents.keys():
        contents[path] = _hash_of(at_home(path))
    settings, files = asdict(request), {path: contents[path] for path in paths}
    said = json.dumps([settings, files, about.fingerprint], sort_keys=True)
    return row._replace(request=request), {
        "row": row.number,
        "file": f"{row.number:06}{suffix}",
        "prompt": row.prompt,
        "seed": request.seed,
        "settings": json.loads(json.dumps(settings)),
        "model": about.facts.name,
        "fingerprint": about.fingerprint,
        "hash": hashlib.blake2b(said.encode(), digest_size=8).hexdigest(),
    }


def facts(made: Made) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(made.data).hexdigest(),
        "seconds": {phase: round(value, 3) for phase, value in made.seconds.items()},
        "evaluations": made.evaluations,
        "host": made.host,
        "animatelcm": __version__,
    }


def is_done(record: dict[str, Any] | None, plan: dict[str, Any], out: Path) -> bool:
    """Whether a record is of the same settings, and its file what was recorded."""
    if not plan or record is None or any(record.get(key) != plan[key] for key in ("hash", "file")):
        return False
    return "sha256" in record and _hash_of(out / record["file"]) == record["sha256"]


def _hash_of(path: Path) -> str:
    """Of a file, or of the files in a folder with their names; empty where nothing is there."""
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{file} {_hash_of(file)}\n" for file in names).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(out: Path, suffix: str, force: bool) -> None:
    """Make the folder. Raises ValueError where it has videos that no manifest tells of: they are somebody else's."""
    out.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in out.iterdir()]
    foreign = [name for name in names if re.fullmatch(r"\d{6,}" + re.escape(suffix), name)]
    if foreign and MANIFEST not in names and not force:
        raise ValueError(f"{out} holds {foreign[0]} and no {MANIFEST}; choose another folder, or --force to replace it")


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[int, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The newest record of each row, and what adds one: it is on the disk when that returns. A torn last line, as a
    kill in the middle of one leaves it, is cut off, and files that it left unfinished are removed. Raises ValueError
    where another process has it open."""
    with path.open("a+b", buffering=0) as file:
        _lock(file, path)
        for unfinished in path.parent.glob(".[0-9]*.new"):
            if re.fullmatch(r"\.\d{6,}\.\w+\.[0-9a-f]{8}\.new", unfinished.name):
                unfinished.unlink()
        file.seek(0)
        data = file.readall()
        whole = data[: data.rfind(b"\n") + 1]
        file.truncate(len(whole))
        records: dict[int, dict[str, Any]] = {}
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[int(record["row"])] = record

        def append(record: dict[str, Any]) -> None:
            line, end = json.dumps(record).encode() + b"\n", file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):  # so ends a disk's last page
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
            records[record["row"]] = record

        yield records, append


def _lock(file: FileIO, path: Path) -> None:
    """Until it is closed; two runs would overwrite each other's. (Where there is no fcntl, nobody checks.)"""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run works on {path.parent}; wait for it, or choose another folder") from error
