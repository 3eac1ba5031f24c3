"""Folders of videos to be judged: which files they are, whether they can be read, what they were asked to show."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from animatelcm import video
from animatelcm.evaluate.rows import MANIFEST, read_manifest
from animatelcm.rng import generator


class Reel(NamedTuple):
    """Videos of one place."""

    place: Path
    files: tuple[Path, ...]
    """Files, or folders of numbered png."""
    prompts: tuple[str, ...] = ()
    """What each was asked to show, where that is known."""
    remarks: tuple[str, ...] = ()


def reel(place: Path, limit: int | None = None, seed: int = 0) -> Reel:
    """The videos in a folder, however deep, by name, or those that a .txt lists, a path a line (relative to its own
    folder); ``limit`` of them drawn by ``seed``. Folders of numbered png are videos; hidden files and folders are none.

    Raises ValueError where a place is neither, holds fewer than two, or lists what is not there.
    """
    files = _listed(place) if place.suffix.lower() == ".txt" and place.is_file() else _found(place)
    if limit is not None:
        if limit < 2:
            raise ValueError(f"limit={limit} videos are too few for a figure with an interval; choose 2 or more")
        by_name = {os.path.relpath(file, _base(place)): file for file in files}
        files = [by_name[name] for name in sorted(chosen(list(by_name), limit, seed))]
    if len(files) < 2:
        raise ValueError(f"{place} holds a single video, {files[0].name}; a figure with an interval needs two at least")
    return Reel(place, tuple(files))


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        said = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"{folder} {said}; give a folder of videos, or a .txt that lists them")
    if found := sorted(_walk(folder)):
        return found
    raise ValueError(
        f"{folder} holds no videos; files ending in {', '.join(video.VIDEO_SUFFIXES)} and folders of 00000.png, ... are"
        " looked for"
    )


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        shown = [name for name in names if not name.startswith(".")]
        films = [name for name in shown if Path(name).suffix.lower() in video.VIDEO_SUFFIXES]
        yield from (Path(root, name) for name in films)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if not films and any(re.fullmatch(r"\d+\.png", name) for name in shown):
            yield Path(root)


def _listed(table: Path) -> list[Path]:
    lines = [line.strip() for line in _text(table).split("\n")]
    files = list(dict.fromkeys(table.parent / line for line in lines if line))
    if not files:
        raise ValueError(f"{table} lists no videos; write a path a line")
    _all_there(files, f"list {table}")
    return files


def _text(table: Path) -> str:
    try:
        return table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {table} ({error}); give a text file in UTF-8") from error


def _all_there(files: Sequence[Path], source: str) -> None:
    if absent := [file for file in files if not file.exists()]:
        raise ValueError(
            f"{len(absent)} of {len(files)} videos of the {source} are not there, e.g. {absent[0]}; correct it"
        )


def _base(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def chosen(files: Sequence[str], n: int, seed: int = 0) -> list[str]:
    """``n`` of the files by chance, or all in a random order where there are not so many.

    Draws are addressed by seed and name: one of fewer begins one of more, and a name that comes or goes shifts none.
    """

    def place(file: str) -> float:
        return float(torch.rand((), generator=generator(seed, 0, 0, f"chosen/{file}")))

    return sorted(files, key=lambda file: (place(file), file))[:n]


# What videos were asked to show


def prompted(folder: Path, table: Path | None = None) -> Reel:
    """The videos of a folder with their prompts: by a .jsonl of {"file", "prompt"}; else as the manifest of
    ``animatelcm batch`` says; else as the recipes inside the files do.

    Raises ValueError where a video has no prompt, or a prompt no video.
    """
    if table is not None:
        found = _by_table(reel(folder), table)
    elif (folder / MANIFEST).is_file():
        found = _by_manifest(folder)
    else:
        found = _by_recipes(reel(folder))
    if len(found.files) < 2:
        raise ValueError(f"{folder} has {len(found.files)} videos with prompts; a figure with an interval needs two")
    return found


def _by_table(all_there: Reel, table: Path) -> Reel:
    said: dict[Path, str] = {}
    for number, line in enumerate(_text(table).split("\n"), start=1):
        try:
            if line.strip():
                cells = json.loads(line)
                said[all_there.place / cells["file"]] = str(cells["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{table}, line {number}: {{"file": ..., "prompt": ...}} is needed ({error})') from error
    _all_there(list(said), f"file {table}")
    if without := [file for file in all_there.files if file not in said]:
        raise ValueError(
            f"{len(without)} of {len(all_there.files)} videos have no prompt in {table}, e.g. {without[0]}; "
            "add a line for each, or take them out of the folder"
        )
    return Reel(all_there.place, tuple(said), tuple(said.values()))


def _by_manifest(folder: Path) -> Reel:
    rows = read_manifest(folder / MANIFEST)
    made = {folder / row["file"]: str(row["prompt"]) for _, row in sorted(rows.items()) if "file" in row}
    if not made:
        raise ValueError(f"{folder / MANIFEST} tells of no video that was made; run the batch again")
    _all_there(list(made), f"manifest {folder / MANIFEST}")
    failed = len(rows) - len(made)
    said = [f"{folder}: {failed} of {len(rows)} rows of the batch failed and are not measured"] if failed else []
    return Reel(folder, tuple(made), tuple(made.values()), tuple(said))


def _by_recipes(all_there: Reel) -> Reel:
    said = {file: header.metadata.get("prompt") for file, header in zip(all_there.files, check(all_there), strict=True)}
    if without := [file for file, prompt in said.items() if prompt is None]:
        raise ValueError(
            f"{len(without)} of {len(all_there.files)} videos do not say what they were asked to show, e.g. "
            f'{without[0]}; give a folder of animatelcm batch, or --prompts with a .jsonl of {{"file", "prompt"}}'
        )
    return all_there._replace(prompts=tuple(prompt or "" for prompt in said.values()))


# Whether they can be read


def check(one: Reel, frames: int = 1) -> list[video.Header]:
    """What the files say of themselves. Raises ValueError naming the first that cannot be read or has fewer frames, and
    how many are so: before any work."""
    headers, failed = [], []
    for file in one.files:
        try:
            headers.append(video.probe(file))
            if headers[-1].num_frames < frames:
                raise ValueError(f"{file} has {headers[-1].num_frames} frames, and {frames} are needed; leave it out")
        except ValueError as error:
            failed.append(str(error))
    complain(failed, one)
    return headers


def complain(failed: Sequence[str], one: Reel) -> None:
    """Raises ValueError where some videos failed, each for a reason."""
    if failed:
        raise ValueError(f"{failed[0]} ({len(failed)} of {len(one.files)} videos in {one.place} cannot be used)")
