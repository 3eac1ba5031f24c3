"""Clips that lie in a folder, each with its prompt and its setting: what evaluations kept, batches, any videos."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from animatelcm import video
from animatelcm.model_source import ModelSource
from animatelcm.request import SampleRequest

CLIPS, MANIFEST = Path("clips") / "clips.jsonl", Path("manifest.jsonl")
GIVEN = ("image", "video", "control")
"""Settings that belong to a prompt's line, as it does itself."""
NAMED = ("sampler", "num_inference_steps", "guidance_scale", "spacing")
"""Settings that have a short form: lcm@4, ddim@25:4/trailing."""
LOOK = tuple(
    field.name
    for field in (*fields(SampleRequest), *fields(ModelSource))
    if field.name not in ("prompt", "seed", "num_videos_per_prompt", "context_length", "context_overlap", *GIVEN)
)
SIDE = 8192  # pixels: what sizes in files are believed up to


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video or a picture, and what is known of it."""

    path: Path
    prompt: str
    seed: str = ""
    given: str = ""
    """What else tells its line from others: files that it was made from."""
    setting: str = ""
    """Its column; empty where that is not known."""
    kind: str = ""
    seconds: float | None = None
    command: str = ""
    """Makes it again."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, where the file says so."""
    fault: str = ""
    """Why there is nothing to be seen."""

    @property
    def line(self) -> tuple[str, str, str]:
        """Clips of one line are shown side by side."""
        return self.prompt, self.seed, self.given


class Gallery(NamedTuple):
    """Clips, and sentences on what could not be read."""

    clips: list[Clip]
    faults: list[str]


def read(folder: Path) -> Gallery:
    """The clips of one folder, without those of folders inside."""
    kept, batch = _kept(folder), _batch(folder)
    known = {clip.path for clip in batch.clips}
    paths = [path for path in in_order(folder.iterdir()) if path.suffix.lower() in video.VIDEO_SUFFIXES]
    loose = _columns(folder, [(path, {}) for path in paths if path not in known and not path.name.startswith(".")])
    return Gallery(kept.clips + batch.clips + loose, kept.faults + batch.faults)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """By name, 9 before 10."""

    def key(path: Path) -> list[str | int]:
        return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]

    return sorted(paths, key=key)


def _records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects, one a line; lines that are none, such as a kill tears, are counted."""
    records, torn = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            torn += 1
    return records, [f"lines of {path.name} that cannot be read and are left out: {torn}"] if torn else []


def _kept(folder: Path) -> Gallery:
    records, faults = _records(folder / CLIPS)
    clips = []
    for record in records:
        path = folder / CLIPS.parent / str(record.get("file", ""))
        told, fault = _told(path, folder)
        clips.append(
            Clip(
                path=path,
                prompt=str(record.get("prompt", "")),
                seed=str(record.get("seed", "")),
                setting=str(record.get("setting", "")),
                kind=str(record.get("kind", "")),
                seconds=_seconds(record.get("seconds")),
                command=str(record.get("command", "")),
                size=_size(told),
                fault=fault,
            )
        )
    return Gallery(clips, faults)


def _batch(folder: Path) -> Gallery:
    """The newest record of each row, in the order of rows."""
    records, faults = _records(folder / MANIFEST)
    newest = {record["row"]: record for record in records if isinstance(record.get("row"), int)}
    rows = [newest[number] for number in sorted(newest)]
    made = iter(_columns(folder, [(folder / str(row["file"]), row) for row in rows if "file" in row]))
    return Gallery([next(made) if "file" in row else _failed(folder, row) for row in rows], faults)


def _failed(folder: Path, row: dict[str, Any]) -> Clip:
    said = f"row {row['row']}: {row.get('error', 'there is no file')}"
    return Clip(path=folder, prompt=str(row.get("prompt", "")), given=f"row {row['row']}", fault=said)


def _columns(folder: Path, files: Sequence[tuple[Path, dict[str, Any]]]) -> list[Clip]:
    """Videos with what a manifest and they themselves say of them; what differs between them names their columns."""
    told = [_told(path, folder) for path, _ in files]
    every = [_words(row.get("settings")) | metadata for (_, row), (metadata, _) in zip(files, told, strict=True)]
    values = {name: {words[name] for words in every if name in words} for name in LOOK}
    varying = [name for name in LOOK if len(values[name]) > 1]
    clips = []
    for (path, row), words, (_, fault) in zip(files, every, told, strict=True):
        given = ", ".join(f"{name} {words[name]}" for name in GIVEN if words.get(name))
        clips.append(
            Clip(
                path=path,
                prompt=words.get("prompt", str(row.get("prompt", path.stem))),
                seed=words.get("seed", ""),
                given=given,
                setting=_setting(words, varying),
                seconds=_seconds(row.get("seconds")),
                command=words.get("command", ""),
                size=_size(words),
                fault=fault,
            )
        )
    return clips


def _setting(words: Mapping[str, str], varying: Sequence[str]) -> str:
    """Sampler, steps and guidance, and whatever else is not the same for all."""
    sampler, steps, guidance, spacing = (words.get(name, "") for name in NAMED)
    short = f"{sampler}@{steps}" if sampler and steps else "video"
    short += "" if guidance in ("", "1", "1.0") else f":{guidance.removesuffix('.0')}"
    short += "" if spacing in ("", "leading") else f"/{spacing}"
    rest = [f"{name.replace('_', ' ')} {words.get(name) or '-'}" for name in varying if name not in NAMED]
    return ", ".join([short, *rest])


def _told(path: Path, folder: Path) -> tuple[dict[str, str], str]:
    """What a file says of itself, or why it cannot. A list may name no file elsewhere: a page would carry it away."""
    if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
        return {}, f"{path.name} is not in the folder"
    if not path.is_file():
        return {}, f"{path.name} is not there"
    try:
        return video.read_metadata(path), ""
    except ValueError:
        return {}, f"{path.name} cannot be read"


def _words(settings: object) -> dict[str, str]:
    """Settings of a manifest in the form that files have them."""
    found = settings.items() if isinstance(settings, dict) else ()
    return {name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in found}


def _seconds(value: object) -> float | None:
    """One number, or those of several phases."""
    parts = list(value.values()) if isinstance(value, dict) else [value]
    numbers = [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
    return float(sum(numbers)) if numbers and len(numbers) == len(parts) else None


def _size(words: Mapping[str, str]) -> tuple[int, int] | None:
    sides = [words.get(name, "") for name in ("width", "height")]
    if not all(side.isascii() and side.isdecimal() and 0 < int(side[:9]) <= SIDE for side in sides):
        return None
    return int(sides[0]), int(sides[1])
