"""Still images on disk, the words that travel inside files, and writing that never leaves half a file.

Every file written here or by ``video`` carries a note where its format has room for words: JSON with the
caller's metadata and, for videos, frame rate and number of frames. That is text chunk ``Comment`` (png), EXIF
ImageDescription (jpg, webp), comment extension (gif), tag ``comment`` (mp4), ``metadata.json`` (folder).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps, PngImagePlugin

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# All that Pillow and PyAV were seen to raise on damaged bytes.
_DECODER_ERRORS = (
    av.FFmpegError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_OPENING = Lock()  # what becomes of a warning is the whole process's, and threads read pictures
_LABEL_HEIGHT = 14  # pixels: a line of Pillow's default font

Fit = Literal["crop", "pad", "stretch"]


class _LevelsError(ValueError):
    """Of a sound picture; the words say what to do."""


def at_home(path: str | Path) -> Path:
    """The path with somebody's home in place of ``~``; as it is where nobody has that name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises where nobody has that name


def read_image(path: str | Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB, the right way up (EXIF), transparency over white.

    Grey of 16 bits, or of floats in [0, 1], is rounded to 8 bits; grey of other numbers is an error. Colour of 16 bits
    is cut to its high bytes, which are all that Pillow gives: up to one level below or above the nearest.

    More pixels than Pillow's ``Image.MAX_IMAGE_PIXELS`` are an error, before any is decoded.
    """
    path = at_home(path)
    with explained(path), opened(path) as image:
        return rgb(ImageOps.exif_transpose(image))


def write_image(
    array: np.ndarray,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write uint8 (H, W, 3) as .png, .webp (both exact) or .jpg; the path comes back."""
    path = at_home(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot write {path.name!r} as an image: choose {', '.join(_FORMATS)}")
    check_free(path, overwrite)
    note, frames = Note.checked(metadata), checked_pixels(array, 3)[None]
    with replacing(path) as partial:
        save(frames, partial, _FORMATS[path.suffix.lower()], note, quality=95, lossless=True)
    return path


def fitted(image: np.ndarray, height: int, width: int, fit: Fit = "crop") -> np.ndarray:
    """A picture (H, W, 3) at another size, uint8 (height, width, 3): the middle stays in the middle, by Lanczos.

    ``crop``: what covers the frame, its middle cut out. ``pad``: the whole of it, within borders of the mean colour of
    its outermost pixels. ``stretch``: both sides apart. A picture that has the size comes back as it is.
    """
    check_fit(fit, height, width)
    h, w = checked_pixels(image, 3).shape[:2]
    if (h, w) == (height, width):
        return image.copy()
    if fit == "pad":
        return _padded(image, height, width)
    top = left = 0.0
    if fit == "crop":  # a window of the frame's shape; half pixels keep it in the middle
        scale = max(height / h, width / w)
        top, left = (max(0.0, own - side / scale) / 2 for own, side in ((h, height), (w, width)))
    return _resized(image, height, width, (left, top, w - left, h - top))


def check_fit(fit: str, height: int, width: int) -> None:
    """Raises ValueError where ``fitted`` would, whatever the picture."""
    if fit not in get_args(Fit) or min(height, width) < 1:
        raise ValueError(f"fit={fit!r} to {width}x{height}: choose {', '.join(get_args(Fit))}, and 1x1 at least")


def within_borders(image: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a frame (height, width, 3) that a picture (H, W, 3) fills where it is padded.

    Opposite borders are equal, for which the picture may grow by a pixel along one side, or two where it is thin.
    """
    h, w = image.shape[:2]
    scale = min(height / h, width / w)
    y, x = (min(round((side - scale * own) / 2), (side - 1) // 2) for side, own in ((height, h), (width, w)))
    return slice(y, height - y), slice(x, width - x)


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = image.shape[:2]
    rows, columns = within_borders(image, height, width)
    outermost = np.ones((h, w), bool)
    outermost[1:-1, 1:-1] = False
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = np.rint(image[outermost].mean(axis=0))
    frame[rows, columns] = _resized(image, rows.stop - rows.start, columns.stop - columns.start, (0, 0, w, h))
    return frame


def _resized(image: np.ndarray, height: int, width: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Pillow widens the filter where it shrinks, so nothing aliases."""
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box))


def contact_sheet(
    rows: Sequence[np.ndarray], labels: Sequence[str] | None = None, columns: int = 8, *, gap: int = 2
) -> np.ndarray:
    """One row a clip (F, H, W, 3), evenly spaced frames from first to last, on white: uint8 (H', W', 3)."""
    if len({row.shape[1:] for row in rows}) != 1 or (labels is not None and len(labels) != len(rows)):
        raise ValueError("a contact sheet needs clips of one size, and as many labels as clips")
    height, width = rows[0].shape[1:3]
    columns, band = min(columns, max(map(len, rows))), 0 if labels is None else _LABEL_HEIGHT
    pitch = height + band + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * pitch + gap), "white")
    for r, row in enumerate(rows):
        if labels is not None:
            ImageDraw.Draw(sheet).text((gap, r * pitch + gap), labels[r], fill="black")
        for c, index in enumerate(np.linspace(0, len(row) - 1, min(len(row), columns)).round().astype(int)):
            sheet.paste(Image.fromarray(row[index]), (c * (width + gap) + gap, r * pitch + gap + band))
    return np.array(sheet)


class Note(NamedTuple):
    """The words in a file; empty where they are somebody else's."""

    metadata: dict[str, str]
    fps: Fraction | None = None
    num_frames: int = 1

    @classmethod
    def checked(cls, metadata: Mapping[str, str] | None, fps: Fraction | None = None, num_frames: int = 1) -> Note:
        words = dict(metadata or {})
        if wrong := [key for key in words if not (isinstance(key, str) and isinstance(words[key], str))]:
            raise ValueError(f"metadata must map str to str, {wrong[0]!r} does not; json.dumps makes a str of anything")
        return cls(words, fps, num_frames)

    @classmethod
    def parse(cls, words: str | bytes) -> Note:
        try:
            fields = json.loads(words)
            metadata = {str(key): str(value) for key, value in fields.get("metadata", {}).items()}
            if "fps" not in fields:
                return cls(metadata)
            return cls(metadata, to_fraction(fields["fps"]), int(fields["num_frames"]))
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return cls({})

    @classmethod
    def of(cls, image: Image.Image) -> Note:
        words = image.info.get("comment") or image.info.get("Comment")
        return cls.parse(words or image.getexif().get(ExifTags.Base.ImageDescription, ""))

    def to_json(self) -> str:
        timing = {} if self.fps is None else {"fps": str(self.fps), "num_frames": self.num_frames}
        return json.dumps({**timing, "metadata": self.metadata})  # pure ASCII: no container can spoil it

    def delays(self, unit: int) -> list[int]:
        """Milliseconds a frame, multiples of ``unit``, whose running sum strays by half a unit at most."""
        assert self.fps is not None
        ends = [round(1000 * i / self.fps / unit) * unit for i in range(self.num_frames + 1)]
        return [end - begin for begin, end in pairwise(ends)]


def to_fraction(fps: float | str | Fraction) -> Fraction:
    """The simple fraction that is meant: 23.976023976... is 24000/1001."""
    return Fraction(fps).limit_denominator(1001)


def rgb(image: Image.Image) -> np.ndarray:
    """What a viewer with a white background shows: uint8 (H, W, 3). Raises ValueError for grey levels that are floats
    outside [0, 1] or integers outside 0..65535: nobody knows which are black and white."""
    if image.mode.startswith(("F", "I")):  # Pillow would clip at 255
        image = Image.fromarray(_levels(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _levels(image: Image.Image) -> np.ndarray:
    """Grey of floats or of more than 8 bits as uint8 (H, W)."""
    values = np.asarray(image)
    kind, white = ("floats", 1) if image.mode == "F" else ("integers", 65535)
    if not (values.min() >= 0 and values.max() <= white):
        low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        span = f"{low} to {high}{', some NaN' if np.isnan(values).any() else ''}"
        raise _LevelsError(f"its grey levels are {kind} from {span}, where 0 to {white} is needed; scale them to that")
    levels = np.rint(values * (255 / white)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        levels[values == clear] = 255
    return levels


def save(frames: np.ndarray, path: Path, file_format: str, note: Note, **options: object) -> None:
    """Pillow's formats, with the note where each keeps words; more than one frame for GIF and WEBP only."""
    if file_format == "GIF":
        options["comment"] = note.to_json().encode()
    elif file_format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", note.to_json())
        options["pnginfo"] = text
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = note.to_json()
        options["exif"] = exif
    first, *rest = (Image.fromarray(frame) for frame in frames)
    if file_format in ("GIF", "WEBP"):
        options |= {"save_all": True, "append_images": rest, "loop": 0}
    first.save(path, file_format, **options)


def checked_pixels(array: np.ndarray, ndim: int) -> np.ndarray:
    """The array itself, if it is uint8 and ends in (H, W, 3)."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"a uint8 array is needed, got {type(array).__name__}; numpy.asarray makes one of most things")
    if array.dtype != np.uint8 or array.ndim != ndim or array.shape[-1] != 3 or not array.size:
        shape = "(F, H, W, 3)" if ndim == 4 else "(H, W, 3)"
        raise ValueError(f"uint8 {shape} is needed, got {array.dtype} {array.shape}; video.to_uint8 rounds floats")
    return array


def check_free(path: Path, overwrite: bool) -> None:
    """Nothing is overwritten unasked."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name, or ask to overwrite it (--force)")


def opened(path: Path) -> Image.Image:
    """A picture of which no pixel is decoded yet. Raises Pillow's warning where there are too many, as an error."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever a decoder complains of becomes one sentence that names the file."""
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    try:
        yield
    except _TOO_LARGE as error:
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise ValueError(
            f"{path} has {pixels:,} pixels, more than the {Image.MAX_IMAGE_PIXELS:,} that are read; make it smaller"
        ) from error
    except _LevelsError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except _DECODER_ERRORS as error:
        raise ValueError(
            f"cannot read {path} ({error}): truncated, corrupt or of another format; remove or remake it"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that becomes ``path`` at the end, be it file or folder; failing leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial, former = path.with_name(f".{path.name}.{token}.new"), path.with_name(f".{path.name}.{token}.old")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # a folder that is not empty cannot be replaced
            path.rename(former)
        partial.replace(path)
    finally:
        shutil.rmtree(former, ignore_errors=True)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
