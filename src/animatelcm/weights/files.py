"""The only door for weight files: safetensors in, safetensors out, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def read_safetensors(path: Path) -> State:
    """All tensors of a file by name, on the CPU. Raises ValueError naming the file if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"weights are missing: {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries about itself; empty where it carries none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under a temporary name, then rename: readers see the old file or the new one."""
    unfinished = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(contiguous, unfinished, metadata={"format": "pt", **(metadata or {})})
    unfinished.replace(path)


def read_header(path: Path) -> dict[str, tuple[int, str]]:
    """Tensor name -> (number of elements, dtype), without reading the tensors."""
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            return {key: (math.prod(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
