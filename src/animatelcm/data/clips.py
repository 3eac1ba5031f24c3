"""Any folder of images or videos with captions is a data set.

Captions come from ``metadata.jsonl`` or ``metadata.csv`` beside the files (column ``file_name``, and ``text``
or ``caption``: the imagefolder/videofolder convention of Hugging Face), or else from a text file of the same
name (``cat.png``, ``cat.txt``). A file without either has an empty caption, which is counted and reported.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from animatelcm import video
from animatelcm.rng import generator

CAPTION_COLUMNS = ("text", "caption")
SUFFIXES = tuple(sorted({*video.IMAGE_SUFFIXES, *video.VIDEO_SUFFIXES}))
_NAMED = 10  # how many skipped files a summary names


@dataclass(frozen=True, eq=False)
class Clip:
    """Captioned frames, uint8 (F, H, W, 3), an image being F = 1; ``source`` says where they came from."""

    frames: np.ndarray
    caption: str
    source: str


class _Item(NamedTuple):
    source: str
    caption: str
    num_frames: int  # of the whole video; 0 for an image
    stride: Fraction


class FolderDataset:
    """Clips of one shape from the images or the videos under ``path`` (not hidden ones), ordered by name.

    A clip is ``num_frames`` of a video, each ``frame_stride``-th or such that they show at ``fps``, and of each
    frame the largest centred window shaped like ``size`` (side, or height and width). It begins where the
    video does or, given a ``seed``, at a random frame addressed by (seed, index), ``repeats`` times a file.
    What is unreadable, too short or too slow is left out and named in ``skipped``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_frames: int = 16,
        frame_stride: int | None = None,
        fps: float | None = None,
        size: int | tuple[int, int] = 512,
        caption_column: str | None = None,
        seed: int | None = None,
        repeats: int = 1,
    ) -> None:
        if frame_stride is not None and fps is not None:
            raise ValueError("give frame_stride or fps, not both: fps becomes a stride for each video")
        stride = 1 if frame_stride is None else frame_stride
        if min(num_frames, stride, repeats) < 1 or (fps is not None and fps <= 0):
            raise ValueError("num_frames, frame_stride and repeats must be at least 1, and fps above 0")
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 1:
            raise ValueError(f"size={size}: a side, or height and width, in pixels is needed")
        if repeats > 1 and seed is None:
            raise ValueError(f"repeats={repeats} without a seed would be the same clips again; give a seed")
        self.path, self.num_frames, self.seed, self.repeats = Path(path), num_frames, seed, repeats
        self._items: list[_Item] = []
        self._reasons: dict[str, str] = {}
        self._scan(caption_column, Fraction(stride), fps)

    @property
    def sources(self) -> list[str]:
        """Files that are used, relative to the folder."""
        return [item.source for item in self._items]

    @property
    def stills(self) -> bool:
        """Whether the files are images, clips of one frame."""
        return self._items[0].num_frames == 0

    @property
    def skipped(self) -> list[str]:
        """Files left out so far, relative to the folder; what fails to decode later is added then."""
        return sorted(self._reasons)

    def __len__(self) -> int:
        return len(self._items) * self.repeats

    def __getitem__(self, index: int) -> Clip:
        """The clip at ``index``; where it fails to decode, that of the next file that does not."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        for offset in range(len(self._items)):
            item = self._items[(index + offset) % len(self._items)]
            try:
                return Clip(self._frames(self.path / item.source, item, index), item.caption, item.source)
            except ValueError as error:
                self._skip(item.source, error)
        raise ValueError(f"no file could be decoded. {self.summary()}")

    def summary(self) -> str:
        """What was found, how much of it without a caption, and what was skipped for which reason."""
        images = sum(item.num_frames == 0 for item in self._items)
        bare = sum(not item.caption for item in self._items)
        said = f"{self.path}: {len(self._items) - images} videos, {images} images, {bare} without a caption."
        if not self._reasons:
            return said
        named = [f"{source} ({self._reasons[source]})" for source in self.skipped[:_NAMED]]
        more = f" and {len(self._reasons) - _NAMED} more" if len(self._reasons) > _NAMED else ""
        return f"{said} {len(self._reasons)} skipped: {'; '.join(named)}{more}."

    def notice(self, taken: Sequence[str]) -> None:
        """Count as skipped what ``taken``, the source of each index's clip, has another file in place of: others, or
        an earlier run, could not decode it."""
        for index, source in enumerate(taken):
            wanted = self._items[index % len(self._items)].source
            if source != wanted:
                self._reasons.setdefault(wanted, "could not be decoded when its latents were made")

    def _skip(self, source: str, error: ValueError) -> None:
        self._reasons[source] = str(error.__cause__ or error)

    def _span(self, stride: Fraction) -> int:
        return int((self.num_frames - 1) * stride) + 1

    def alike(self, path: Path, source: str, index: int) -> np.ndarray:
        """Frames (F, H, W, 3) of a file that goes with ``source``, those that clip ``index`` has of it."""
        return self._frames(path, self._of[source], index)

    def frames_needed(self, source: str) -> int:
        """Of a file that goes with ``source``; 0: an image."""
        item = self._of[source]
        return item.num_frames if self.seed is not None else min(item.num_frames, self._span(item.stride))

    @cached_property
    def _of(self) -> dict[str, _Item]:
        return {item.source: item for item in self._items}

    def _frames(self, path: Path, item: _Item, index: int) -> np.ndarray:
        start = 0
        if item.num_frames == 0:
            return fit(video.read_image(path), self.size)[None]
        if self.seed is not None:
            starts = item.num_frames - self._span(item.stride) + 1
            start = int(torch.randint(starts, (), generator=generator(self.seed, index, 0, "clip-start")))
        footage = video.read(path, num_frames=self.num_frames, stride=item.stride, start=start)
        return np.stack([fit(frame, self.size) for frame in footage.frames])

    def _scan(self, caption_column: str | None, stride: Fraction, fps: float | None) -> None:
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}")
        files = visible(self.path)
        listed = _listed_captions(self.path, files, caption_column)
        for source in sorted(files | listed.keys()):
            if source in listed or PurePosixPath(source).suffix.lower() in SUFFIXES:
                try:
                    caption = listed.get(source) or _sidecar(self.path / source)
                    self._items.append(self._item(source, caption, stride, fps))
                except ValueError as error:
                    self._skip(source, error)
        if not self._items:
            raise ValueError(f"nothing to use among {', '.join(SUFFIXES)} in {self.summary()}")
        if self.num_frames > 1 and len({item.num_frames == 0 for item in self._items}) == 2:
            raise ValueError(f"images cannot share batches with clips of {self.num_frames} frames: {self.summary()}")

    def _item(self, source: str, caption: str, stride: Fraction, fps: float | None) -> _Item:
        header = video.probe(self.path / source)
        if header.fps is None:
            return _Item(source, caption, 0, stride)
        if fps is not None and self.num_frames > 1:
            stride = header.fps / Fraction(fps).limit_denominator(1001)
        if stride < 1:
            raise ValueError(f"{float(header.fps):.4g} frames a second, fewer than {fps:.4g}")
        if header.num_frames < self._span(stride):
            raise ValueError(f"{header.num_frames} frames, {self._span(stride)} are needed")
        return _Item(source, caption, header.num_frames, stride)


def fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred window of (h, w, 3) that is shaped like ``size``, resized to it: (H, W, 3)."""
    (h, w), (height, width) = frame.shape[:2], size
    scale = min(h / height, w / width)
    window_h, window_w = min(height * scale, h), min(width * scale, w)
    top, left = int((h - window_h) / 2), int((w - window_w) / 2)  # whole pixels: a mere crop stays exact
    box = (left, top, left + window_w, top + window_h)
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


def visible(root: Path) -> set[str]:
    """Files under a folder, relative to it, but for hidden ones."""
    names = {file.relative_to(root) for file in root.rglob("*") if file.is_file()}
    hidden = (".", "__MACOSX")
    return {name.as_posix() for name in names if not any(part.startswith(hidden) for part in name.parts)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def _sidecar(path: Path) -> str:
    text = path.with_suffix(".txt")
    return _text(text).strip() if text.is_file() else ""


def _listed_captions(root: Path, files: set[str], column: str | None) -> dict[str, str]:
    """Path relative to ``root`` -> caption, from every metadata file at any depth."""
    captions: dict[str, str] = {}
    for table in sorted(files):
        if PurePosixPath(table).name not in ("metadata.csv", "metadata.jsonl"):
            continue
        for name, caption in _table_captions(root / table, column):
            source = (PurePosixPath(table).parent / name).as_posix()
            if source in captions:
                raise ValueError(f"{root / table} lists {name!r} a second time; keep one caption for each file")
            captions[source] = caption
    return captions


def _table_captions(table: Path, column: str | None) -> Iterator[tuple[str, str]]:
    rows = list(_csv_rows(table) if table.suffix == ".csv" else _json_rows(table))
    columns = sorted({name for row in rows for name in row if name})
    wanted = " or ".join(CAPTION_COLUMNS) if column is None else repr(column)
    column = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if rows and (column not in columns or "file_name" not in columns):
        raise ValueError(f"{table} needs the columns file_name and {wanted}; it has {', '.join(columns)}")
    for number, row in enumerate(rows, 1):
        name, caption = row.get("file_name"), row.get(column)
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise ValueError(f"row {number} of {table} must hold a file name and one caption, both text")
        path = PureWindowsPath(name)  # which takes both kinds of slash
        if path.drive or path.root or ".." in path.parts:
            raise ValueError(
                f"row {number} of {table} names {name!r}, which is outside the folder; use names inside it"
            )
        yield path.as_posix(), (caption or "").strip()


def _csv_rows(table: Path) -> Iterator[dict]:
    return csv.DictReader(io.StringIO(_text(table), newline=""))


def _json_rows(table: Path) -> Iterator[dict]:
    for number, line in enumerate(_text(table).split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {table} is not JSON ({error.msg}); one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {table} must be an object with a file_name, got {line[:40]!r}")
            yield row
