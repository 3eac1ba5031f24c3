"""Colours of decoded frames, moved towards those of the picture that they set in motion.

After ``adjust_colors`` of AnimateLCM's image-to-video, on exact numbers: hues are averaged as the angles that they
are, greys have no say in them, and nothing is truncated.
"""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

import numpy as np

from animatelcm.images import checked_pixels

HUELESS = 1 / 255  # mean chroma vectors shorter than one level point nowhere


class _Means(NamedTuple):
    chroma: complex  # mean of saturation * value, its angle being the hue
    saturation: float
    value: float


def aligned(frames: np.ndarray, reference: np.ndarray, strength: float = 1.0, hue: float = 0.03) -> np.ndarray:
    """Frames (F, H, W, 3) with the mean saturation and value of a picture (H', W', 3), each frame apart; both uint8.

    Means are moved by ``strength`` of their difference, that of hue by ``hue * strength``, the shorter way round and
    only where frame and picture have one. Greys that gain colour take the picture's mean hue. What leaves the range is
    clipped, so a mean may then fall short. Strength 0 changes nothing.
    """
    checked_pixels(frames, 4), checked_pixels(reference, 3)
    if not (0 <= strength <= 1 and 0 <= hue <= 1):
        raise ValueError(f"strength={strength} and hue={hue}: shares between 0 (off) and 1 (all of it) are needed")
    if strength == 0:
        return frames.copy()
    goal = _means(to_hsv(reference))
    return np.stack([_aligned(to_hsv(frame), goal, strength, hue) for frame in frames])


def _aligned(hsv: np.ndarray, goal: _Means, strength: float, hue: float) -> np.ndarray:
    own = _means(hsv)
    h, s, v = np.moveaxis(hsv, -1, 0)
    grey, turn, has_hue = s == 0, 0.0, abs(goal.chroma) >= HUELESS
    if has_hue and abs(own.chroma) >= HUELESS:
        turn = hue * strength * _turns(goal.chroma * own.chroma.conjugate())
    gain = strength * (goal.saturation - own.saturation)
    h = np.where(grey, _turns(goal.chroma), h + turn)
    s = np.where(grey & (not has_hue), 0, s + gain)
    v = v + strength * (goal.value - own.value)
    return from_hsv(np.stack([h, s, v], axis=-1))


def _means(hsv: np.ndarray) -> _Means:
    h, s, v = np.moveaxis(hsv, -1, 0)
    return _Means(complex((s * v * np.exp(2j * math.pi * h)).mean()), float(s.mean()), float(v.mean()))


def _turns(vector: complex) -> float:
    return cmath.phase(vector) / (2 * math.pi)


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> float64 (..., 3): hue in turns [0, 1), saturation and value in [0, 1]; all as ``colorsys``."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    largest = rgb.max(axis=-1).astype(np.float64)
    chroma = largest - rgb.min(axis=-1)
    divisor = np.where(chroma == 0, 1, chroma)
    sixths = np.where(largest == r, (g - b), np.where(largest == g, b - r, r - g)) / divisor
    sixths += np.where(largest == r, 0, np.where(largest == g, 2, 4))
    hue = np.where(chroma == 0, 0, sixths / 6 % 1)
    return np.stack([hue, chroma / np.maximum(largest, 1), largest / 255], axis=-1)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """The inverse, for any hue: saturation and value are clipped to [0, 1], the result is rounded to uint8 (..., 3)."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    value = np.clip(value, 0, 1)
    chroma = value * np.clip(saturation, 0, 1)
    sixths = (6 * hue[..., None] + (5, 3, 1)) % 6
    dip = np.clip(np.minimum(sixths, 4 - sixths), 0, 1)
    return np.rint(255 * (value[..., None] - chroma[..., None] * dip)).astype(np.uint8)
