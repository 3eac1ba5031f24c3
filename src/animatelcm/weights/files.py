"""The only door for weight files: safetensors in and out, PyTorch's pickles in; whole or not at all.

Files come from strangers. A safetensors header (8 bytes of length, JSON, data: the format's own description) is checked
before anything is allocated. A pickle is walked without being run, and one that builds nothing but dicts of tensors is
then given to ``torch.load(weights_only=True)``. Every error is a ValueError that begins with the file's path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from animatelcm.weights.pickles import DTYPES, MAX_DIMS, MAX_TENSORS, OTHERWISE, check_pickle

State = dict[str, Tensor]
Names = Callable[[str], bool]

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
COPIES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
"""How a network's file ends in a diffusers folder; the first that is there is read."""
MAX_MARKS = 15 * MAX_TENSORS
"""Commas and colons in a header: a tensor has some ten of them."""
MAX_HEADER = 100_000_000
"""Bytes, of which a large model needs a hundredth."""
MAX_KEY = 1000
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor without its numbers; dtypes have safetensors' names ("F16", "F32", "BF16", "I64", ...)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a file's tensors, without reading them."""
    with _opened(path) as file:
        if _is_pickle(path):
            state = _load_pickle(path, file)
            return {key: TensorInfo(tuple(value.shape), DTYPE_NAMES[value.dtype]) for key, value in state.items()}
        return {key: entry.info for key, entry in _parse(file).entries.items()}


def read_state(path: Path, names: Names | None = None) -> State:
    """Tensors of a .safetensors, .ckpt, .pt, .pth or .bin file by name, on the CPU, as stored.

    Only those whose name ``names`` wants. Of a training checkpoint, its ``state_dict``; entries that are no tensors are
    left out. A pickle's tensors are views of the mapped file, which is to be replaced, not changed, while they live.
    """
    with _opened(path) as file:
        if _is_pickle(path):
            return {key: value for key, value in _load_pickle(path, file).items() if names is None or names(key)}
        return _read_tensors(file, names)


def read_safetensors(path: Path) -> State:
    """All tensors of a safetensors file by name, on the CPU, whatever its suffix."""
    with _opened(path) as file:
        return _read_tensors(file, None)


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries about itself; empty where it carries none, as pickles do."""
    with _opened(path) as file:
        return {} if path.suffix.lower() in PICKLES else _parse(file).metadata


def find_copy(folder: Path, stem: str) -> Path | None:
    """A network's file in a diffusers folder, in full precision if there is one; None where there is none."""
    return next((file for end in COPIES if (file := folder / f"{stem}{end}").is_file()), None)


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError naming the first floating-point tensor of a file that has NaN or infinity in it."""
    for key, value in state.items():
        if value.is_floating_point() and value.numel():
            # the extremes take no memory, and NaN is both of them; there are none for 8 bits
            low, high = torch.aminmax(value.float() if value.element_size() == 1 else value)
            if not (low.isfinite() and high.isfinite()):
                reason = "fetch it again, or take one from before its training failed"
                raise ValueError(f"{path}: {key} holds numbers that are not finite; {reason}")


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under a temporary name, then rename: readers see the old file or the new one.

    Nothing is left behind if it fails, and the file has the permissions of any new file.
    """
    unfinished = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        save_file(contiguous, unfinished, metadata={"format": "pt", **(metadata or {})})
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file open for plain reads; what goes wrong inside becomes a ValueError that begins with its path."""
    try:
        if not path.is_file():
            raise ValueError("is a folder; give a file in it" if path.is_dir() else "is missing; give a weight file")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error.__cause__


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle by its name, or safetensors; raises ValueError where it is neither."""
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ValueError(f"is no weight file by its name; give one that ends in .safetensors, {', '.join(PICKLES)}")
    return path.suffix.lower() in PICKLES


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _fill(file: BinaryIO, target: memoryview) -> None:
    """Read until ``target`` is full, straight into it."""
    while len(target):
        count = file.readinto(target)
        if not count:
            raise ValueError("ended while it was read; fetch it again")
        target = target[count:]


def _check_key(key: object) -> None:
    """Names become names of layers, and of files in other tools: none may be a path or hide anything."""
    if not isinstance(key, str):
        raise ValueError(f"has a tensor named by a {type(key).__name__}, not by a text; {OTHERWISE}")
    if len(key) > MAX_KEY or key.startswith("/") or ".." in key or "\\" in key or not key.isprintable():
        raise ValueError(
            f"has a tensor named {key[:60]!r}, which no layer is: names are printable, "
            f"have at most {MAX_KEY} characters and are no paths; fetch it again"
        )


# ---- safetensors


class _Entry(NamedTuple):
    """A tensor and its bytes, counted from the beginning of the data."""

    info: TensorInfo
    begin: int
    end: int


class _Layout(NamedTuple):
    """A checked header: tensors in the order of their bytes, where in the file these begin, and the file's text."""

    entries: dict[str, _Entry]
    start: int
    metadata: dict[str, str]


def _read_tensors(file: BinaryIO, names: Names | None) -> State:
    """One tensor after the other into memory of its own: nothing is mapped, nothing is held twice."""
    layout, state = _parse(file), State()
    for key, (info, begin, end) in layout.entries.items():
        if names is None or names(key):
            buffer = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(layout.start + begin)
            _fill(file, memoryview(buffer.numpy()))
            state[key] = buffer.view(DTYPES[info.dtype]).reshape(info.shape)
    return state


def _parse(file: BinaryIO) -> _Layout:
    """The header, in time and memory bounded by its size, which is bounded too."""
    size = _size(file)
    length = int.from_bytes(file.read(8), "little") if size > 8 else 0
    if not 0 < length <= min(size - 8, MAX_HEADER):
        raise ValueError(
            f"is cut short or no safetensors file: of its {size} bytes the header claims {length}; fetch it again"
        )
    raw = bytearray(length)
    _fill(file, memoryview(raw))
    header = _read_json(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has a header whose __metadata__ is not text by name; fetch it again")
    return _Layout(_entries(header, size - 8 - length), 8 + length, metadata)


def _read_json(raw: bytearray) -> dict[str, object]:
    """A header's JSON, where numbers are counts and no name comes twice."""
    if raw.count(b",") + raw.count(b":") > MAX_MARKS:
        raise ValueError(f"has a header with too many entries: more than {MAX_TENSORS} tensors; give a model's weights")
    try:
        text = raw.decode("utf-8")
        header = json.loads(
            text, object_pairs_hook=_no_name_twice, parse_int=_count, parse_float=_no_count, parse_constant=_no_count
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged or no safetensors file: {error} in its header; fetch it again") from error
    if not isinstance(header, dict) or not text.startswith("{"):
        raise ValueError("is damaged or no safetensors file: its header is no JSON object; fetch it again")
    return header


def _no_name_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) > MAX_TENSORS + 1:
        raise ValueError(f"there are more than {MAX_TENSORS} tensors")
    if len(found) < len(pairs):
        raise ValueError(f"the name {Counter(name for name, _ in pairs).most_common(1)[0][0][:60]!r} twice")
    for text in (*found, *(value for value in found.values() if isinstance(value, str))):
        text.encode()  # an escape may be half a character, which no file and no terminal takes
    return found


def _count(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 18:
        _no_count(digits)
    return int(digits)


def _no_count(number: str) -> NoReturn:
    raise ValueError(f"the number {number[:20]}, where a count is expected,")


def _entries(header: Mapping[str, object], available: int) -> dict[str, _Entry]:
    """Tensors in the order of their bytes, which follow each other and fill the file to its end."""
    if len(header) > MAX_TENSORS:
        raise ValueError(f"has a header with more than {MAX_TENSORS} tensors; give a model's weights")
    entries = {}
    for key, value in header.items():
        _check_key(key)
        entries[key] = _entry(key, value)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for key, entry in entries.items():
        if entry.begin != position:
            kind = "a hole" if entry.begin > position else "an overlap"
            raise ValueError(f"is damaged: there is {kind} in its data before {key!r}; fetch it again")
        position = entry.end
    if position > available:
        raise ValueError(f"is cut short: its last {position - available} bytes are missing; fetch it again")
    if position < available:
        raise ValueError(f"is damaged: {available - position} bytes of it belong to no tensor; fetch it again")
    return entries


def _entry(key: str, value: object) -> _Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(value) == 3:
            pass
        case _:
            raise ValueError(f"is damaged: {key!r} is not described by dtype, shape and data_offsets; fetch it again")
    if dtype not in DTYPES:
        raise ValueError(f"has {dtype[:20]!r} numbers in {key!r}; {', '.join(DTYPES)} are read")
    # 2**60 keeps strides of empty tensors, whose other sizes are free, within 64 bits
    counts = all(type(number) is int for number in (*shape, begin, end))
    if not counts or len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) > 2**60:
        raise ValueError(f"is damaged: {key!r} has no shape that a tensor can have; fetch it again")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"is damaged: {key!r} has {end - begin} bytes, not those of its shape; fetch it again")
    return _Entry(TensorInfo(tuple(shape), dtype), begin, end)


# ---- pickles


def _load_pickle(path: Path, file: BinaryIO) -> State:
    """The tensors of a file that ``torch.save`` wrote: zipped ones as views of the mapped file."""
    size = _size(file)
    zipped = check_pickle(file, size)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can lead the unpickler anywhere
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"is damaged ({reason[:200]}); fetch it again") from error
    return _tensors(loaded, size)


def _tensors(loaded: object, size: int) -> State:
    """The tensors of a loaded object by name: dense and on the CPU, since a checked pickle can build no others."""
    entries = loaded if isinstance(loaded, dict) else {}
    for place in ("state_dict", "string_to_param"):  # the latter in textual inversions of A1111's
        if isinstance(entries.get(place), dict):
            entries = entries[place]
    found = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not found:
        raise ValueError("has no tensors by name, at its top or in state_dict; give a file of weights")
    if len(found) > MAX_TENSORS or sum(value.nbytes for value in found.values()) > 2 * size:
        raise ValueError("has tensors that claim more than the file holds; fetch it again")
    for key in found:
        _check_key(key)
    return {key: _aligned(value.detach()) for key, value in found.items()}


def _aligned(value: Tensor) -> Tensor:
    """torch.save puts tensors at multiples of 64 bytes; arithmetic on others may crash."""
    return value.clone() if value.data_ptr() % value.element_size() else value
