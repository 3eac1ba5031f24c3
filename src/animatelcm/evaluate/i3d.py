"""I3D, the classifier of videos in whose logits FVD compares them: Inception-v1 inflated to three dimensions
(Carreira & Zisserman 2017), with the names of its PyTorch port, and the two kinds of files that circulate.

* TorchScript, ``i3d_torchscript.pt``: a program of torch's operators with its weights, those that FVD was first
  measured with. Pixels are resized and scaled here, not by it (``rescale=False, resize=False, return_features=True``).
* Tensors by name, for Kinetics-400: ``i3d_pretrained_400.pt`` (epsilon 1e-5), and ``rgb_imagenet.pt`` (epsilon 1e-3),
  which are other weights. Both have the same names and shapes, so which epsilon belongs to a file must be said.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.building import empty_weights, filled
from animatelcm.weights.files import read_state, sha256

CLASSES = 400
PROGRAM = {"rescale": False, "resize": False, "return_features": True}
"""How the TorchScript is called: it gets pixels as they are to be, and gives logits, not probabilities."""
MIXED = {
    # channels: of the 1x1x1 branch, of two branches before and after their 3x3x3, of the branch that pools
    "Mixed_3b": (64, (96, 128), (16, 32), 32),
    "Mixed_3c": (128, (128, 192), (32, 96), 64),
    "Mixed_4b": (192, (96, 208), (16, 48), 64),
    "Mixed_4c": (160, (112, 224), (24, 64), 64),
    "Mixed_4d": (128, (128, 256), (24, 64), 64),
    "Mixed_4e": (112, (144, 288), (32, 64), 64),
    "Mixed_4f": (256, (160, 320), (32, 128), 128),
    "Mixed_5b": (256, (160, 320), (32, 128), 128),
    "Mixed_5c": (384, (192, 384), (48, 128), 128),
}
POOLED_BEFORE = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2,) * 3, (2,) * 3),
}
"""Kernel and stride of the pooling before a layer."""


def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """(N, C, F, H, W) with zeros around it, so that a window gives ceil(side / stride) cells: TensorFlow's SAME."""
    whole = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.pad(x, [side for n in reversed(whole) for side in (n // 2, n - n // 2)])


def pooled(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The largest of each window; zeros beyond the border are never above what a ReLU gives."""
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, epsilon: float) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, F, H, W), each side divided by the stride, rounded up."""
        return F.relu(self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(
        self, inputs: int, channels: tuple[int, tuple[int, int], tuple[int, int], int], unit: Callable
    ) -> None:
        super().__init__()
        one, (first, second), (third, fourth), last = channels
        self.b0 = unit(inputs, one, 1)
        self.b1a, self.b1b = unit(inputs, first, 1), unit(first, second, 3)
        self.b2a, self.b2b = unit(inputs, third, 1), unit(third, fourth, 3)
        self.b3b = unit(inputs, last, 1)

    def forward(self, x: Tensor) -> Tensor:
        around = pooled(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(around)], dim=1)


class I3D(nn.Module):
    """Pixels (N, 3, F, 224, 224) in [-1, 1], 9 frames at least -> logits (N, classes), their mean over time."""

    def __init__(self, classes: int = CLASSES, epsilon: float = 1e-3) -> None:
        super().__init__()
        unit = partial(Unit, epsilon=epsilon)
        self.Conv3d_1a_7x7 = unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = unit(64, 64, 1)
        self.Conv3d_2c_3x3 = unit(64, 192, 3)
        inputs = 192
        for name, channels in MIXED.items():
            self.add_module(name, Mixed(inputs, channels, unit))
            inputs = channels[0] + channels[1][1] + channels[2][1] + channels[3]
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(inputs, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            if name in POOLED_BEFORE:
                x = pooled(x, *POOLED_BEFORE[name])
            x = self.get_submodule(name)(x)
        x = self.logits.conv3d(F.avg_pool3d(x, (2, 7, 7), stride=1))
        return x.mean(dim=(2, 3, 4))


class Detector(NamedTuple):
    """A trained I3D: pixels (N, 3, 16, 224, 224) in [-1, 1] -> logits (N, 400)."""

    logits: Callable[[Tensor], Tensor]
    device: torch.device
    facts: dict[str, Any]
    """Which one: the kind of file, the SHA-256 of its bytes, epsilon where the file does not hold it."""


PAGES = (b"<!doctype", b"<html", b"<?xml")


def load_i3d(
    source: str | Path, *, sha256: str | None = None, epsilon: float = 1e-3, device: str | torch.device = "cpu"
) -> Detector:
    """A trained network from a path, or an http(s) address; that is kept in torch's cache. An address and a program
    need the file's ``sha256``: what comes from elsewhere, or runs here, is to be what was meant. ``epsilon`` is for
    tensors by name alone (see above).

    Raises ValueError where the file is missing, has another hash, or holds no I3D for Kinetics-400.
    """
    wanted = sha256.lower() if sha256 else None
    path = _fetched(str(source), wanted) if re.match(r"https?://", str(source)) else Path(source)
    found = _checked(path, wanted)
    device = torch.device(device)
    if _is_program(path):
        if not wanted:
            raise ValueError(
                f"{path} is a program, which could do anything: find out where it is from, and give its SHA-256 "
                f"(sha256sum {path} prints it), or give tensors by name"
            )
        return Detector(_program(path, device), device, {"network": "I3D, TorchScript", "weights": found})
    network = _network(path, epsilon).to(device)
    return Detector(network, device, {"network": "I3D", "weights": found, "epsilon": epsilon})


def _checked(path: Path, wanted: str | None) -> str:
    found = sha256(path)
    with path.open("rb") as file:
        if file.read(64).lstrip().lower().startswith(PAGES):
            raise ValueError(f"{path} is a web page, as failed downloads leave them; fetch the file itself")
    if wanted and found != wanted:
        raise ValueError(
            f"{path} has the SHA-256 {found}, and {wanted} is asked for; fetch it again, or ask for that one"
        )
    return found


def _fetched(address: str, wanted: str | None) -> Path:
    """The file of an address in torch's cache, by its hash."""
    if not wanted or not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise ValueError(f"{address} needs the SHA-256 of the file, 64 hexadecimal digits; give it, or a path")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"i3d-{wanted}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=wanted, progress=False)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(
                f"{address} gives no file of that SHA-256 ({error}); check both, or give a path"
            ) from error
    return path


def _is_program(path: Path) -> bool:
    """Whether a file is TorchScript: a zip with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _program(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the file is what it is
            script = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript that this torch can load; fetch it again") from error
    if not set(PROGRAM) <= {argument.name for argument in script.forward.schema.arguments}:
        raise ValueError(f"{path} is no I3D as FVD takes it: it has no {', '.join(PROGRAM)}; give i3d_torchscript.pt")
    return partial(script, **PROGRAM)


def _network(path: Path, epsilon: float) -> I3D:
    with empty_weights():
        network = I3D(epsilon=epsilon)
    state = read_state(path)
    counts = {
        f"{name}.num_batches_tracked" for name, part in network.named_modules() if isinstance(part, nn.BatchNorm3d)
    }
    state |= {name: torch.tensor(0) for name in counts - state.keys()}  # files before torch 0.4.1 have none
    return filled(network, state, torch.float32, str(path))
