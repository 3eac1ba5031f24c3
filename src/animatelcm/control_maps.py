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
from animatelcm.images import at_home, checked_pixels, fitted, to_fraction

KINDS = ("canny", "edge", "depth", "pose", "tile")
FOUND_ELSEWHERE = ("depth", "pose")  # by networks that are not here
CANNY = (100, 200)  # thresholds of the field's preprocessors, of gradients by Sobel on 0..255

STEP = 0.75 * 16
"""The gradient by Scharr, whose weights add up to 16, of a step of 1 that was blurred by 1 2 1."""
_STILL_SUFFIXES = (*video.IMAGE_SUFFIXES, ".gif", ".webp")


class _Taken(NamedTuple):
    pictures: Iterable[np.ndarray]  # (H, W, 3), each once
    shown: list[int]  # which of them each frame shows
    said: str


def made(kind: str, frames: np.ndarray) -> np.ndarray:
    """Maps of uint8 frames (F, H, W, 3), each frame apart: canny, edge, or tile, which is the frames themselves."""
    mapped = _mapping(kind)
    return np.stack([mapped(frame) for frame in checked_pixels(frames, 4)])


def read(
    path: str | Path, kind: str, *, ready: bool, num_frames: int, fps: float | Fraction, height: int, width: int
) -> tuple[np.ndarray, str]:
    """Maps uint8 (num_frames, height, width, 3) from a video, a folder of images or one image, and what was taken.

    Frame i is what a video shows i / fps seconds after its beginning, or the i-th image of a folder, in the order of
    their names and the numbers in them; the last frame holds where there are too few. Frames are cropped to the size
    and, unless they are ``ready`` maps, made into maps. Of a stream, nothing after the last frame needed is decoded.
    """
    if min(num_frames, height, width) < 1 or not 0.001 <= fps <= 1000:
        raise ValueError(f"num_frames={num_frames}, {width}x{height}, fps={fps}: at least 1, 1x1 and 0.001 are needed")
    mapped = _itself if ready else _mapping(kind)
    taken = _take(at_home(path), num_frames, to_fraction(fps))
    maps = [mapped(fitted(picture, height, width, "crop")) for picture in taken.pictures]
    return np.stack(maps)[taken.shown], taken.said


# Maps of one frame (H, W, 3)


def _mapping(kind: str) -> Callable[[np.ndarray], np.ndarray]:
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
        return _Taken([video.read_image(path)], [0] * num_frames, f"{path.name}: one image, held for all {num_frames}")
    return _from_clip(path, header, num_frames, fps)


def _from_folder(path: Path, num_frames: int, fps: Fraction) -> _Taken:
    visible = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = sorted((file for file in visible if file.suffix.lower() in _STILL_SUFFIXES), key=_numbers_by_value)
    if not files:
        raise ValueError(f"the folder {path} holds no images; put in some of {', '.join(_STILL_SUFFIXES)}")
    pictures, shown = map(video.read_image, files[:num_frames]), list(range(num_frames))
    return _held(_Taken(pictures, shown, path.name), min(len(files), num_frames), len(files), Fraction(1), fps)


def _numbers_by_value(file: Path) -> tuple[list[str | int], str]:
    """frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", file.name)  # words and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def _from_clip(path: Path, header: video.Header, num_frames: int, fps: Fraction) -> _Taken:
    if header.fps <= 0:
        raise ValueError(f"{path} says that it has {header.fps} frames a second; remake it")
    ratio = header.fps / fps
    stride = max(ratio, Fraction(1))  # of what is read; where the clip is slower, its frames are repeated
    shown = [int(i * ratio / stride) for i in range(num_frames)]
    enough = header.num_frames > int(shown[-1] * stride)
    frames = video.read(path, num_frames=shown[-1] + 1 if enough else None, stride=stride).frames
    return _held(_Taken(frames, shown, path.name), len(frames), header.num_frames, ratio, fps)


def _held(taken: _Taken, there: int, total: int, ratio: Fraction, fps: Fraction) -> _Taken:
    """The last of the pictures that are ``there`` in place of those that are not; the name becomes a sentence."""
    last, missing = int((there - 1) * max(ratio, 1)), sum(index >= there for index in taken.shown)
    pace = f"each {1 / float(ratio):.4g} times" if ratio < 1 else "every frame" if ratio == 1 else _every(ratio)
    said = f"{taken.said}: frames 0 to {last} of {max(total, last + 1)} ({pace}, {float(fps):.4g} fps)"
    if missing:
        said += f"; it is too short: the last one holds for {missing} more"
    return _Taken(taken.pictures, [min(index, there - 1) for index in taken.shown], said)


def _every(ratio: Fraction) -> str:
    teen = ratio % 100 in (11, 12, 13)
    return f"every {float(ratio):.4g}" + ("th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(ratio % 10, "th"))
