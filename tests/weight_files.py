"""Weight files for tests: any bits, exact comparison, refusals that come at once."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from animatelcm.weights.files import DTYPES, read_header, read_state

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
READERS = (read_state, read_header)
SLOW = 5.0
"""Seconds that no file of a few megabytes may take, on a busy machine."""
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits that a dtype can have."""
    source = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=source).to(torch.uint8)
    return bits.view(dtype).reshape(shape)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, with shapes and dtypes."""
    alike = a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    flat = {name: {k: v.flatten().view(torch.uint8) for k, v in state.items()} for name, state in (("a", a), ("b", b))}
    return alike and all(torch.equal(flat["a"][key], flat["b"][key]) for key in a)


def everything() -> dict[str, torch.Tensor]:
    """A matrix, a number and an empty tensor of each dtype."""
    shapes = {"matrix": (3, 5), "number": (), "empty": (0, 4)}
    return {f"{name}.{kind}": filled(shapes[kind], dtype) for name, dtype in DTYPES.items() for kind in shapes}


def refusal(read, path: Path) -> str:
    """What a reader says of a file that it refuses: without delay, and beginning with the path."""
    begun = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is returned
        read(path)
    assert time.monotonic() - begun < SLOW
    assert str(caught.value).startswith(f"{path} ")
    return str(caught.value).removeprefix(f"{path} ")


@contextlib.contextmanager
def memory(extra: int):
    """No more than this many bytes beyond what the process has now."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory is only limited on Linux")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file, or None where it is refused as it should be; any other end of it fails."""
    begun, problem = time.monotonic(), ""
    try:
        found = read_state(path)
    except ValueError as error:
        found, problem = None, str(error)
    assert time.monotonic() - begun < SLOW
    assert found is not None or problem.startswith(f"{path} ")
    return found
