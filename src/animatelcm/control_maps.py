"""What ControlNets and T2I-Adapters look at: edges found in frames, or maps of depth and pose made elsewhere.

Maps are uint8 (F, H, W, 3), as frames are; the three channels of a map of edges are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from animatelcm import video
from animatelcm.images import Fit, at_home, check_fit, checked_pixels, fitted, to_fraction, within_borders

KINDS = ("canny", "edge", "depth", "pose", "tile")
FOUND_ELSEWHERE = ("depth", "pose")  # by networks that are not here
CANNY = (100, 200)  # thresholds of the field's preprocessors, of gradients by Sobel on 0..255

STEP = 0.75 * 16
"""The gradient by Scharr, whose weights add up to 16, of a step of 1 that was blurred by 1 2 1."""
_STILL_SUFFIXES = (*video.IMAGE_SUFFIXES, ".gif", ".webp")


_Mapping = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) -> (H, W, 3)


class _Taken(NamedTuple):
    pictures: Iterable[tuple[int, np.ndarray]]  # (H, W, 3) with its number, for each frame until there are no more
    said: Callable[[list[int]], str]  # of those numbers


def made(kind: str, frames: np.ndarray) -> np.ndarray:
    """Maps of uint8 frames (F, H, W, 3), each frame apart: canny, edge, or tile, which is the frames themselves."""
    mapped = _mapping(kind)
    return np.stack([mapped(frame) for frame in checked_pixels(frames, 4)])


def fitted_maps(
    kind: str, frames: np.ndarray, height: int, width: int, fit: Fit = "crop", *, ready: bool
) -> np.ndarray:
    """Maps (F, height, width, 3) of frames uint8 (F, H, W, 3), or of ``ready`` maps, each frame apart.

    Frames are brought to the size by ``images.fitted``, then made into maps. ``pad`` sets maps between black borders,
    where nothing is, and finds them without: a border is no edge. Tiles have the borders of a picture.
    """
    mapped = _fitting(kind, height, width, fit, ready=ready)
    return np.stack([mapped(frame) for frame in checked_pixels(frames, 4)])


def read(
    path: str | Path,
    kind: str,
    *,
    ready: bool,
    num_frames: int,
    fps: float | Fraction,
    height: int,
    width: int,
    fit: Fit = "crop",
) -> tuple[np.ndarray, str]:
    """Maps uint8 (num_frames, height, width, 3) from a video, a folder of images or one image, and what was taken.

    Frame i is what a video shows i / fps seconds after its beginning, or the i-th image of a folder, in the order of
    their names and the numbers in them; the last frame holds where there are too few. Frames are mapped as
    ``fitted_maps`` does it, each as it is decoded and once. Of a stream, nothing after the last needed is decoded.
    """
    if min(num_frames, height, width) < 1 or not 0.001 <= fps <= 1000:
        raise ValueError(f"num_frames={num_frames}, {width}x{height}, fps={fps}: at least 1, 1x1 and 0.001 are needed")
    mapped = _fitting(kind, height, width, fit, ready=ready)
    taken = _take(at_home(path), num_frames, to_fraction(fps))
    numbers: list[int] = []
    maps: list[np.ndarray] = []
    for number, picture in taken.pictures:
        maps.append(maps[-1] if number in numbers[-1:] else mapped(picture))
        numbers.append(number)
    return np.stack(maps + maps[-1:] * (num_frames - len(maps))), taken.said(numbers)


# Maps of one frame (H, W, 3)


def _fitting(kind: str, height: int, width: int, fit: Fit, *, ready: bool) -> _Mapping:
    check_fit(fit, height, width)
    mapped = _itself if ready else _mapping(kind)
    if fit == "pad" and kind != "tile":
        return lambda frame: _within_black(mapped, frame, height, width)
    return lambda frame: mapped(fitted(frame, height, width, fit))


def _within_black(mapped: _Mapping, frame: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = within_borders(frame, height, width)
    framed = np.zeros((height, width, 3), np.uint8)
    framed[rows, columns] = mapped(fitted(frame, rows.stop - rows.start, columns.stop - columns.start, "stretch"))
    return framed


def _mapping(kind: str) -> _Mapping:
    if kind in FOUND_ELSEWHERE:
        raise ValueError(f"a {kind} control needs ready maps: give a clip of them, as {kind}=map:FILE")
    if kind == "tile":
        return _itself
    if kind not in KINDS:
        raise ValueError(_unknown(kind))
    cv2 = _opencv(kind)
    return lambda frame: (_canny if kind == "canny" else _edge)(cv2, frame)


def _unknown(kind: str) -> str:
    return f"{kind} maps cannot be made here, only {', '.join(KINDS[:2])} and tile; give ready ones, as {kind}=map:FILE"


def _opencv(kind: str) -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"a {kind} control needs OpenCV: pip install animatelcm[control]") from error
    return cv2


def _itself(frame: np.ndarray) -> np.ndarray:
    return frame


def _canny(cv2: ModuleType, frame: np.ndarray) -> np.ndarray:
    return np.repeat(cv2.Canny(np.ascontiguousarray(frame), *CANNY)[..., None], 3, axis=-1)


def _edge(cv2: ModuleType, frame: np.ndarray) -> np.ndarray:
    """Soft edges: the steepest of the three channels, 255 beside a step from 0 to 255, whatever else is in the frame.

    All sums are of small integers over powers of two, hence exact in float32.
    """
    border = cv2.BORDER_REPLICATE
    smooth = cv2.GaussianBlur(frame.astype(np.float32), (3, 3), 0, borderType=border)
    across, down = (cv2.Scharr(smooth, cv2.CV_32F, *axis, borderType=border) for axis in ((1, 0), (0, 1)))
    steepest = np.hypot(across, down).max(axis=-1, keepdims=True) / STEP
    return np.repeat(np.rint(steepest.clip(max=255)).astype(np.uint8), 3, axis=-1)


# Where frames come from


def _take(path: Path, num_frames: int, fps: Fraction) -> _Taken:
    if path.is_dir() and not (path / "metadata.json").exists():
        return _from_folder(path, num_frames, fps)
    header = video.probe(path)
    if header.fps is None:
        return _Taken([(0, video.read_image(path))], lambda _: f"{path.name}: one image, held for all {num_frames}")
    return _from_clip(path, header, num_frames, fps)


def _from_folder(path: Path, num_frames: int, fps: Fraction) -> _Taken:
    visible = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = sorted((file for file in visible if file.suffix.lower() in _STILL_SUFFIXES), key=_numbers_by_value)
    if not files:
        raise ValueError(f"the folder {path} holds no images; put in some of {', '.join(_STILL_SUFFIXES)}")
    pictures = enumerate(map(video.read_image, files[:num_frames]))
    return _Taken(pictures, lambda numbers: _said(path, numbers, num_frames, len(files), fps, fps))


def _numbers_by_value(file: Path) -> tuple[list[str | int], str]:
    """frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", file.name)  # words and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def _from_clip(path: Path, header: video.Header, num_frames: int, fps: Fraction) -> _Taken:
    frames = video.follow(path, fps, num_frames)
    return _Taken(frames, lambda numbers: _said(path, numbers, num_frames, header.num_frames, header.fps, fps))


def _said(path: Path, numbers: list[int], num_frames: int, total: int, rate: Fraction, fps: Fraction) -> str:
    """Which frames were taken, and whether a constant rate takes the same."""
    ratio, last = rate / fps, numbers[-1]
    if numbers != [int(i * ratio) for i in range(len(numbers))]:
        pace = "by their times"
    else:
        pace = f"each {1 / float(ratio):.4g} times" if ratio < 1 else "every frame" if ratio == 1 else _every(ratio)
    said = f"{path.name}: frames 0 to {last} of {max(total, last + 1)} ({pace}, {float(fps):.4g} fps)"
    if missing := num_frames - len(numbers):
        said += f"; it is too short: the last one holds for {missing} more"
    return said


def _every(ratio: Fraction) -> str:
    teen = ratio % 100 in (11, 12, 13)
    return f"every {float(ratio):.4g}" + ("th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(ratio % 10, "th"))
