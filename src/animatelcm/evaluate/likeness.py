"""How well an animated picture keeps to the picture: pixel by pixel, as a classifier sees it, and in its colours."""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from animatelcm.images import checked_pixels

# Linear sRGB -> CIE XYZ under D65 (Lindbloom's matrix). White is its row sums, so greys have no colour.
_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_CORNER = 6 / 29  # the cube root of where the cube root gives way to its tangent


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 arrays of one shape, in dB, the peak being 255; inf where they are equal."""
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"the ratio is of two uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}; "
            "images.fitted resizes"
        )
    error = float(np.square(a.astype(np.int64) - b).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def identity(features_of_frames: Tensor, features_of_input: Tensor) -> np.ndarray:
    """Cosine of the angle between each frame's features (F, D) and the input's (D,): float64 (F,), 1 for the same."""
    if features_of_input.shape != features_of_frames.shape[1:]:
        raise ValueError(
            f"features of frames (F, D) go with (D,) of one picture, got {tuple(features_of_frames.shape)} "
            f"and {tuple(features_of_input.shape)}"
        )
    frames, picture = features_of_frames.double(), features_of_input.double()
    return F.cosine_similarity(frames, picture[None], dim=1).clamp(-1, 1).numpy()


def colour_error(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far the mean colour of each uint8 frame (F, H, W, 3) is from that of the reference (H', W', 3): float64 (F,).

    Colours are averaged in CIE Lab; the distance is Delta E of 1976, in which 2.3 is just noticeable.
    """
    wanted = to_lab(checked_pixels(reference, 3)).mean(axis=(0, 1))
    seen = np.stack([to_lab(frame).mean(axis=(0, 1)) for frame in checked_pixels(frames, 4)])
    return np.linalg.norm(seen - wanted, axis=1)


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """uint8 sRGB (..., 3) -> CIE Lab (1976) under D65, float64 (..., 3): L in 0..100."""
    ratio = _LINEAR[pixels] @ (_XYZ / _XYZ.sum(axis=1, keepdims=True)).T
    root = np.where(ratio > _CORNER**3, np.cbrt(ratio), ratio / (3 * _CORNER**2) + 4 / 29)
    return root @ _LAB.T - (16.0, 0.0, 0.0)


def _linear() -> np.ndarray:
    """Light of each of the 256 levels (IEC 61966-2-1)."""
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


_LINEAR = _linear()
