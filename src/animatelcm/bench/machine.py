"""What a benchmark ran on: the machine in words, and how much arithmetic it does at best."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from animatelcm.bench.timing import interleaved

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "triton", "animatelcm")
LONGEST = 0.5  # seconds that each of the two measurements of ``peak`` may take, after two runs more


def facts() -> dict[str, str | int]:
    """The machine and the software, by name; empty where there is none or it cannot be told."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that holds this package: a folder that somebody else's checkout ignores is none."""
    folder = str(Path(__file__).resolve().parents[1])
    if not _said("git", "-C", folder, "ls-files", "__init__.py"):
        return ""
    return _said("git", "-C", folder, "describe", "--always", "--dirty")


def _said(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Peak(NamedTuple):
    """Multiplications and additions a second, at best."""

    matmul_flops: float
    conv_flops: float


def peak(device: torch.device | str, dtype: torch.dtype) -> Peak:
    """The best of several runs of one large matrix product and one large 3x3 convolution (channels last).

    With torch's own settings (TF32, threads) as they are. About a second on a CPU; a second and 2 GiB on a GPU.
    """
    import torch

    large = torch.device(device).type == "cuda"
    with torch.inference_mode():
        matmul = _matmul(8192 if large else 1024, device, dtype)
        return Peak(matmul, _conv(16, 1280, 64, device, dtype) if large else _conv(4, 256, 32, device, dtype))


def _matmul(side: int, device: torch.device | str, dtype: torch.dtype) -> float:
    import torch

    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / _least(lambda: a @ b)


def _conv(images: int, width: int, side: int, device: torch.device | str, dtype: torch.dtype) -> float:
    import torch
    import torch.nn.functional as F

    x, weight = torch.randn(images, width, side, side, device=device), torch.randn(width, width, 3, 3, device=device)
    x, weight = (tensor.to(dtype).contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return 2 * 9 * images * width**2 * side**2 / _least(lambda: F.conv2d(x, weight, padding=1))


def _least(call: Callable[[], object]) -> float:
    """Seconds of the fastest of the runs that ``LONGEST`` has room for."""
    first = interleaved({"call": call}, rounds=1)["call"].least
    rounds = max(2, min(100, int(LONGEST / first)))
    return interleaved({"call": call}, rounds=rounds)["call"].least
