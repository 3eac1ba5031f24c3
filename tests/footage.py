"""Clips that show what is done to them: smooth waves, noise, a disc on it, words that are hard to keep."""

from __future__ import annotations

import numpy as np

from animatelcm import video

CONTAINERS = (".mp4", ".gif", ".webp", "")
WORDS = {
    "prompt": 'a "parrot"\nwith \u00e9l\u00e9gance \u2603 \U0001f99c',
    "seed": "7",
    "empty": "",
    "": "\x00\ud800",
}


def smooth(count: int = 16, height: int = 48, width: int = 64) -> np.ndarray:
    """Slowly moving waves of all colours."""
    f, y, x = np.ogrid[:count, :height, :width]
    waves = np.sin(x / 20 + f / 8 + y * 0), np.cos(y / 15 - f / 9 + x * 0), np.sin((x + y) / 30 + f * 0)
    return video.to_uint8(np.stack([0.5 + 0.48 * wave for wave in waves], axis=-1))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def disc(count: int = 3, height: int = 40, width: int = 56) -> np.ndarray:
    """A disc of another colour in each frame, on noise of few levels."""
    y, x = np.mgrid[:height, :width]
    inside = (y - 18) ** 2 + (x - 25) ** 2 < 100
    colours = noise(count, 3, seed=4)[:, None, None]
    return np.where(inside[None, ..., None], colours, noise(count, height, width, 3) // 16).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
