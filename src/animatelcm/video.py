"""Videos on disk (mp4, gif, webp, png sequence): with ``images``, the only door for pixels.

Frames are uint8 (F, H, W, 3) RGB. GIF and WebP know delays in whole units of 10 and 1 ms and merge equal
neighbours, so it is the note inside our files (see ``images``) that gives frames and frame rate back exactly.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial as wrapped
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from animatelcm.images import (
    IMAGE_SUFFIXES,
    Note,
    at_home,
    check_free,
    checked_pixels,
    contact_sheet,
    explained,
    opened,
    read_image,
    replacing,
    rgb,
    save,
    to_fraction,
    write_image,
)
from animatelcm.streams import (
    Decoded,
    Header,
    Span,
    Window,
    by_rate,
    follow_stream,
    on_show,
    probe_stream,
    read_stream,
    write_mp4,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "PICTURE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Footage",
    "Header",
    "check_fps",
    "check_path",
    "contact_sheet",
    "follow",
    "probe",
    "read",
    "read_image",
    "read_metadata",
    "to_uint8",
    "write",
    "write_image",
]

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm", ".webp")  # .gif, .webp: or a still
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png")
"""What a video of one frame may be written as, too."""
DEFAULT_QUALITY = 85
LONGEST_NAME = 200
"""Bytes: file systems take 255, and names grow while a file is unfinished."""

_MAX_FPS = {"": 1000, ".mp4": 1000, ".gif": 50, ".webp": 100}  # players show faster gifs and webps at 10
_BROWSER_DELAY = 100  # milliseconds that they show a picture without any


class Footage(NamedTuple):
    """Frames uint8 (F, H, W, 3), the file's frames per second, and the metadata it was written with."""

    frames: np.ndarray
    fps: Fraction
    metadata: dict[str, str]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> the nearest of 256 levels; what lies outside is clipped, NaN is an error."""
    if not np.issubdtype(frames.dtype, np.floating) or np.isnan(frames).any():
        raise ValueError(f"floats without NaN are needed, got {frames.dtype}; NaN means that the model overflowed")
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def write(
    frames: np.ndarray | Iterator[np.ndarray],
    path: str | Path,
    *,
    fps: float | Fraction,
    num_frames: int | None = None,
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write frames as .mp4 (H.264), .gif, .webp or, at a path without suffix, png sequence; returns the path.

    Chunks (n, H, W, 3) of ``num_frames`` in all may come in place of an array: mp4 and png sequences write each as it
    comes and hold no other, gif and webp gather them. One frame may also become a picture: .png or .jpg.
    ``quality`` is 0..100, higher is better, for the lossy formats: mp4 has crf = 51 - 0.43 * quality, webp
    its own scale, 100 being lossless. A gif of <= 256 colours a frame and png are exact.
    """
    chunks, count = _in_chunks(frames, num_frames)
    path = check_path(path, overwrite=overwrite, num_frames=count, fps=fps)
    kind = path.suffix.lower()
    if quality is not None and (kind not in (".mp4", ".webp") or not 0 <= quality <= 100):
        raise ValueError(f"quality={quality}: .mp4 and .webp take 0..100, .gif, pictures and png sequences take none")
    note = Note.checked(metadata, to_fraction(fps), count)
    with replacing(path) as partial:
        _WRITERS[kind](chunks, partial, note, DEFAULT_QUALITY if quality is None else quality)
    return path


def _in_chunks(frames: np.ndarray | Iterator[np.ndarray], count: int | None) -> tuple[Iterator[np.ndarray], int]:
    """Checked chunks, and how many frames they are in all; an array is one chunk."""
    if isinstance(frames, Iterator):
        if not count:
            raise ValueError("frames that come in chunks need num_frames, how many they are in all; give it")
        return _checked(frames, count), count
    array = checked_pixels(frames, 4)
    if count not in (None, len(array)):
        raise ValueError(f"num_frames={count}, but the array holds {len(array)} frames; leave num_frames out")
    return iter([np.ascontiguousarray(array)]), len(array)


def _checked(chunks: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The chunks, of one size and of ``count`` frames in all. Raises ValueError where they are not."""
    seen, size = 0, None
    for chunk in chunks:
        size = size or checked_pixels(chunk, 4).shape[1:]
        if checked_pixels(chunk, 4).shape[1:] != size:
            raise ValueError(f"frames {chunk.shape[1:]} come after frames {size}; a video has one size")
        seen += len(chunk)
        if seen > count:
            break
        yield np.ascontiguousarray(chunk)
    if seen != count:
        raise ValueError(f"num_frames={count}, but {seen}{'' if seen < count else ' or more'} frames came; correct it")


def read(path: str | Path, *, num_frames: int | None = None, stride: float | Fraction = 1, start: int = 0) -> Footage:
    """Frames floor(start + i * stride), i < num_frames (None: to the end); ``fps`` stays that of the file.

    Streams are decoded from a key frame before ``start``; of a png sequence only these frames are opened.
    """
    if start < 0 or stride < 1 or (num_frames is not None and num_frames < 1):
        raise ValueError(f"start={start}, stride={stride}, num_frames={num_frames}: at least 0, 1 and 1 are needed")
    path, window = at_home(path), Window(start, Fraction(stride), num_frames)
    with explained(path):
        images, fps, metadata = _READERS.get(_kind(path), read_stream)(path, window)
        frames = np.stack(images) if images else np.empty((0, 0, 0, 3), np.uint8)
    if len(frames) < (num_frames or 1):
        raise ValueError(f"{path} is too short for start={start}, stride={stride}, num_frames={num_frames}")
    return Footage(frames, fps, metadata)


def follow(path: str | Path, fps: Fraction, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """For i < count, number and pixels of the frame that a player shows i / fps seconds after the first began.

    Times are those of presentation in a stream, the delays of a gif or webp from elsewhere, and otherwise the frame
    rate that our own files note. It ends with the video. A frame is decoded when it is asked for, none after the last;
    of a gif or webp all are beforehand too, for their delays, but none is kept.
    """
    if fps <= 0 or count < 1:
        raise ValueError(f"fps={fps}, count={count}: more than 0, and 1 at least, are needed")
    path, found = at_home(path), False
    with explained(path):
        for found in _FOLLOWERS.get(_kind(path), follow_stream)(path, fps, count):
            yield found
        if not found:
            raise ValueError("it shows no frame")


def probe(path: str | Path) -> Header:
    """Length, frame rate and metadata; only a gif or webp from elsewhere is decoded, for its frame rate."""
    path = at_home(path)
    with explained(path):
        return _PROBES.get(_kind(path), probe_stream)(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that ``write`` or ``write_image`` was given; empty for files from elsewhere."""
    return probe(path).metadata


def check_path(
    path: str | Path, *, overwrite: bool = False, num_frames: int | None = None, fps: float | Fraction | None = None
) -> Path:
    """Say now, rather than after the work, why a video could not be written at ``path``; a picture can where it has
    one frame. ``~`` is whose home it is."""
    path = at_home(path)
    kind, one = path.suffix.lower(), num_frames == 1
    if kind in PICTURE_SUFFIXES and not one:
        count = "a video" if num_frames is None else f"{num_frames} frames"
        raise ValueError(f"cannot write {count} as {path.name!r}: ask for one frame, or choose .mp4, .gif or .webp")
    if kind not in _WRITERS:
        raise ValueError(f"cannot write {path.name!r}: choose .mp4, .gif, .webp, or no suffix for a png sequence")
    if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
        raise ValueError(f"the name {path.name[:20]!r}... has {length} bytes; choose one of {LONGEST_NAME} at most")
    if fps is not None:
        check_fps(fps, kind)
    names = [file.name for file in path.iterdir()] if path.is_dir() else None
    if strange := [name for name in names or () if not re.fullmatch(r"\d{5,}\.png|metadata\.json", name)]:
        raise ValueError(f"the folder {path} holds more than a png sequence, e.g. {strange[0]!r}; choose another")
    if names != []:
        check_free(path, overwrite)
    return path


def check_fps(fps: float | Fraction, kind: str) -> None:
    """Raises ValueError where files of this suffix ("": png sequences) cannot show as many frames a second."""
    most = _MAX_FPS.get(kind, _MAX_FPS[""])
    if not 0 < to_fraction(fps) <= most:
        raise ValueError(f"fps={fps}, but {kind or 'a png sequence'} takes 0 < fps <= {most}")


def _kind(path: Path) -> str:
    return "" if path.is_dir() else path.suffix.lower()


# Animations: gif and webp


def _write_gif(chunks: Iterator[np.ndarray], path: Path, note: Note, quality: int) -> None:
    save(np.concatenate(list(chunks)), path, "GIF", note, duration=note.delays(10))


def _write_webp(chunks: Iterator[np.ndarray], path: Path, note: Note, quality: int) -> None:
    save(
        np.concatenate(list(chunks)),
        path,
        "WEBP",
        note,
        duration=note.delays(1),
        quality=quality,
        lossless=quality == 100,
    )


def _probe_animation(path: Path) -> Header:
    with opened(path) as image:
        note, stored = Note.of(image), getattr(image, "n_frames", 1)
    if note.fps is not None or stored == 1:
        return Header(note.num_frames, note.fps, note.metadata)
    fps, spans = _timed(path)
    return Header(len(spans), fps, note.metadata)


def _read_animation(path: Path, window: Window) -> Decoded:
    _check_end(path)
    with opened(path) as image:
        note = Note.of(image)
        images, delays = zip(*((rgb(image), delay) for delay in _delays(image)), strict=True)
    fps, spans = _spans(note, delays)
    return list(window.choose((number, images[stored]) for number, stored, _ in spans)), fps, note.metadata


def _follow_animation(path: Path, fps: Fraction, count: int) -> Iterator[tuple[int, np.ndarray]]:
    _, spans = _timed(path)
    with opened(path) as image:

        def pixels(stored: int) -> np.ndarray:
            image.seek(stored)
            return rgb(image)

        yield from on_show(spans, fps, count, pixels)


def _check_end(path: Path) -> None:
    if path.suffix.lower() != ".gif":
        return
    last = b""
    with path.open("rb") as file:
        while block := file.read(1 << 16):
            last = block.rstrip(b"\0")[-1:] or last
    if last != b";":
        raise ValueError("its end is missing")


def _delays(image: Image.Image) -> Iterator[int]:
    """Milliseconds that each stored picture is shown, while the image is at it."""
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()  # before which a webp does not know
        yield image.info.get("duration") or _BROWSER_DELAY


def _timed(path: Path) -> tuple[Fraction, list[Span[int]]]:
    """Frame rate and spans; every picture is decoded, and none is kept."""
    _check_end(path)
    with opened(path) as image:
        return _spans(Note.of(image), list(_delays(image)))


def _spans(note: Note, delays: Sequence[int]) -> tuple[Fraction, list[Span[int]]]:
    """Frame rate, and for each frame the stored picture that it is, by its index."""
    ends = list(accumulate(delays))
    # The note holds unless somebody has cut or retimed the file since; a still webp has lost its delay.
    if note.fps and (len(delays) == 1 or abs(1000 * note.num_frames / note.fps - ends[-1]) < 10):
        middles = [1000 * (i + Fraction(1, 2)) / note.fps for i in range(note.num_frames)]
        stored = [min(bisect_right(ends, time), len(ends) - 1) for time in middles]
        return note.fps, list(by_rate(stored, note.fps))
    return Fraction(1000 * len(ends), ends[-1]), [(i, i, Fraction(end, 1000)) for i, end in enumerate(ends)]


# Sequences: a folder of 00000.png, 00001.png, ... and metadata.json


def _write_sequence(chunks: Iterator[np.ndarray], path: Path, note: Note, quality: int) -> None:
    path.mkdir()
    for index, frame in enumerate(chain.from_iterable(chunks)):
        save(frame[None], path / f"{index:05}.png", "PNG", Note(note.metadata))
    (path / "metadata.json").write_text(note.to_json() + "\n", encoding="utf-8")


def _sequence(path: Path) -> tuple[list[Path], Note]:
    files = sorted(path.glob("*.png"), key=lambda file: (len(file.name), file.name))
    note = Note.parse((path / "metadata.json").read_text(encoding="utf-8"))
    if note.fps is None or note.num_frames != len(files):
        raise ValueError(f"metadata.json says {note.num_frames} frames at fps {note.fps}, but {len(files)} are here")
    return files, note


def _probe_sequence(path: Path) -> Header:
    files, note = _sequence(path)
    return Header(len(files), note.fps, note.metadata)


def _read_sequence(path: Path, window: Window) -> Decoded:
    files, note = _sequence(path)
    assert note.fps is not None
    return [read_image(file) for file in window.choose(enumerate(files))], note.fps, note.metadata


def _follow_sequence(path: Path, fps: Fraction, count: int) -> Iterator[tuple[int, np.ndarray]]:
    files, note = _sequence(path)
    assert note.fps is not None
    return on_show(by_rate(files, note.fps), fps, count, read_image)


def _write_picture(file_format: str, chunks: Iterator[np.ndarray], path: Path, note: Note, quality: int) -> None:
    save(np.concatenate(list(chunks)), path, file_format, Note(note.metadata), quality=95)


def _probe_image(path: Path) -> Header:
    with opened(path) as image:
        return Header(1, None, Note.of(image).metadata)


_WRITERS = {"": _write_sequence, ".gif": _write_gif, ".mp4": write_mp4, ".webp": _write_webp}
_WRITERS |= {kind: wrapped(_write_picture, "PNG" if kind == ".png" else "JPEG") for kind in PICTURE_SUFFIXES}
_READERS = {"": _read_sequence, ".gif": _read_animation, ".webp": _read_animation}
_FOLLOWERS = {"": _follow_sequence, ".gif": _follow_animation, ".webp": _follow_animation}
_PROBES = dict.fromkeys(IMAGE_SUFFIXES, _probe_image) | {
    "": _probe_sequence,
    ".gif": _probe_animation,
    ".webp": _probe_animation,
}
