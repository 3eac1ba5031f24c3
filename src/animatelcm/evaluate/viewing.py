"""Videos read one by one: what they look like, and what is measured of them, kept so that it is measured once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from animatelcm import video
from animatelcm.evaluate.folders import Reel, check, complain, reel
from animatelcm.evaluate.judge import Progress, silent
from animatelcm.evaluate.report import facts_hash, write_json
from animatelcm.evaluate.score import Score, Scored, check_counts
from animatelcm.weights.files import read_metadata, read_safetensors, sha256, write_safetensors

SHOWN = 3
"""Sizes or frame rates that a remark names of each set."""


@dataclass
class Looks:
    """What was met while videos were read."""

    sizes: dict[str, int] = field(default_factory=dict)
    """"WIDTHxHEIGHT" -> videos."""
    rates: dict[str, int] = field(default_factory=dict)
    """Frames a second -> videos."""
    contents: str = ""
    """A hash of the bytes of all, whatever their names and order: the same videos."""

    def add(self, frames: np.ndarray, fps: float) -> None:
        """One more video, uint8 (F, H, W, 3)."""
        for counts, value in ((self.sizes, f"{frames.shape[2]}x{frames.shape[1]}"), (self.rates, f"{fps:.5g}")):
            counts[value] = counts.get(value, 0) + 1


def read(
    one: Reel, looks: Looks | None = None, *, frames: int | None = None, progress: Progress = silent
) -> Iterator[np.ndarray]:
    """Videos uint8 (F, H, W, 3) one by one, their first ``frames``; ``looks`` learns what they look like.

    Raises ValueError at the end naming the first that fails to decode, and how many do; none comes after that one.
    """
    failed, hashes, looks = [], [], Looks() if looks is None else looks
    for number, file in enumerate(one.files, start=1):
        try:
            footage = video.read(file, num_frames=frames)
        except ValueError as error:
            failed.append(str(error))
        if not failed:
            looks.add(footage.frames, float(footage.fps))
            hashes.append(_digest(file))
            yield footage.frames
        progress(f"{one.place}", number, len(one.files))
    complain(failed, one)
    looks.contents = facts_hash({"videos": sorted(hashes)})


def _digest(file: Path) -> str:
    if file.is_dir():
        return hashlib.sha256("".join(sha256(part) for part in sorted(file.glob("*.png"))).encode()).hexdigest()
    return sha256(file)


def of_folders(
    judge: Callable[..., list[Score]],
    folders: Sequence[Path],
    *,
    frames: int = 1,
    mixed: bool = False,
    progress: Progress = silent,
) -> Scored:
    """The scores of each folder's videos by ``judge(videos, about=...)``, which takes them one by one.

    Raises ValueError where one has fewer than ``frames``, and where folders have different numbers of videos, unless
    ``mixed`` is said.
    """
    reels, scores, met = [reel(folder) for folder in dict.fromkeys(folders)], {}, {}
    check_counts({str(one.place): len(one.files) for one in reels}, mixed)
    for one in reels:
        check(one, frames)
        met[str(one.place)] = looks = Looks()
        scores[str(one.place)] = judge(read(one, looks, progress=progress), about={})
    return Scored(scores, mixtures(met), {})


# What is kept


def measured(
    one: Reel,
    facts: Mapping[str, Any],
    measure: Callable[[Iterator[np.ndarray]], Tensor],
    *,
    frames: int | None = None,
    keep: Path | None = None,
    progress: Progress = silent,
) -> tuple[Tensor, Looks]:
    """What ``measure`` makes of the videos, a row each, and how they look; from the folder ``keep`` where it was made
    there before of the same files (names, sizes, times) by the same ``facts``."""

    def make() -> tuple[Tensor, dict[str, Any]]:
        check(one, frames or 1)
        looks = Looks()
        return measure(read(one, looks, frames=frames, progress=progress)), asdict(looks)

    values, about = kept(keep, {**facts, "files": stamp(one.files, one.place)}, make)
    return values, Looks(**about)


def stamp(files: Sequence[Path], base: Path) -> list[list[Any]]:
    """Name, size and time of each file, those in folders too: they change where a file does, and none is read."""
    parts = [part for file in files for part in (sorted(file.iterdir()) if file.is_dir() else [file])]
    facts = [(part, part.stat()) for part in parts]
    return [[os.path.relpath(part, base), found.st_size, found.st_mtime_ns] for part, found in facts]


def kept(
    folder: Path | None, facts: Mapping[str, Any], make: Callable[[], tuple[Tensor, dict[str, Any]]]
) -> tuple[Tensor, dict[str, Any]]:
    """A tensor and words about it, as JSON's types: as ``folder`` has them by the hash of ``facts``, else as made and
    kept there. A damaged file is none."""
    path = None if folder is None else folder / f"{facts_hash(facts)}.safetensors"
    if path is not None and path.is_file():
        with suppress(ValueError, KeyError):
            return read_safetensors(path)["values"], json.loads(read_metadata(path)["about"])
    values, about = make()
    if path is not None:
        write_safetensors({"values": values}, path, {"about": json.dumps(about)})
    return values, about


def kept_score(
    folder: Path | None, facts: Mapping[str, Any], tensors: Sequence[Tensor], make: Callable[[], Score]
) -> Score:
    """The score that ``make`` makes of these numbers by these ``facts``: an interval takes a minute."""
    digests = [hashlib.sha256(tensor.contiguous().numpy().data).hexdigest() for tensor in tensors]
    path = None if folder is None else folder / f"{facts_hash({**facts, 'numbers': digests})}.json"
    if path is not None and path.is_file():
        with suppress(ValueError, KeyError, TypeError):
            return Score.from_json(json.loads(path.read_text(encoding="utf-8")))
    score = make()
    if path is not None:
        write_json(score.to_json(), path)
    return score


# Remarks


def mixtures(looks: Mapping[str, Looks]) -> list[str]:
    """Sentences about sizes and frame rates, where sets by name have more than one of them among all."""
    said = []
    for kind, ending in (
        ("sizes", "each is brought to the network's size"),
        ("rates", "frames are taken as they come, so motion is seen at different speeds"),
    ):
        counts = {name: getattr(one, kind) for name, one in looks.items() if getattr(one, kind)}
        if len(set().union(*counts.values())) > 1:
            named = "; ".join(f"{name}: {_counted(found)}" for name, found in counts.items())
            said.append(f"{'frame rates' if kind == 'rates' else kind} are mixed ({named}): {ending}")
    return said


def _counted(found: Mapping[str, int]) -> str:
    commonest = sorted(found.items(), key=lambda item: -item[1])
    shown = [f"{value} in {count}" for value, count in commonest[:SHOWN]]
    return ", ".join(shown + ([f"{len(found) - SHOWN} others"] if len(found) > SHOWN else []))
