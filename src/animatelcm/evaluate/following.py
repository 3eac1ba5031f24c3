"""How well a clip follows what steers it: edges, the place of a thing, and how steadily it does so from frame to frame.

Errors are given per frame; ``error_variance`` says how much of them is flicker.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from animatelcm.data.sprites import Pose, render
from animatelcm.evaluate.motion import PRESENT, background, centre_of_weight, foreground, presence
from animatelcm.images import checked_pixels

CONTRAST = 32  # grey levels: the lowest step between plain colours that is an edge
SMALLEST = 0.005  # of the frame's area: a thing that covers less has not been found
# ITU-R BT.601 Y, Cb, Cr in thousandths of a grey level. Whole numbers keep equals equal: edges flip with the picture.
_OPPONENT = np.array([[299, 587, 114], [-169, -331, 500], [500, -419, -81]])
_STEP = 4 * 1000  # what a Sobel filter makes of a step by one grey level


def edges(frame: np.ndarray) -> np.ndarray:
    """Where luminance or chroma of a uint8 frame (H, W, 3) changes most, by ``CONTRAST`` at least: bool (H, W).

    Sobel gradients; a pixel stays where no neighbour along the steeper axis is steeper, so a sharp step between two
    pixels marks them both, and a blurred one the middle of the blur.
    """
    padded = np.pad(frame.astype(np.int64) @ _OPPONENT.T, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down, across = padded[2:] - padded[:-2], padded[:, 2:] - padded[:, :-2]
    steep_y = np.square(down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]).sum(axis=2)
    steep_x = np.square(across[:-2] + 2 * across[1:-1] + across[2:]).sum(axis=2)
    steep = steep_x + steep_y
    crest_x = steep == _windows(steep, 1, axis=1).max(axis=-1)
    crest_y = steep == _windows(steep, 1, axis=0).max(axis=-1)
    crest = ((steep_x >= steep_y) & crest_x) | ((steep_y >= steep_x) & crest_y)
    return crest & (steep >= (CONTRAST * _STEP) ** 2)


def edge_f1(frames: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> np.ndarray:
    """How far the edges of uint8 frames (F, H, W, 3) are those of the wanted ones: float64 (F,), 1 where all are.

    The harmonic mean of the shares of made edges within ``tolerance`` pixels (diagonal steps are one) of wanted ones,
    and of wanted within ``tolerance`` of made ones. 1 where neither frame has edges, 0 where one has none.
    """
    if checked_pixels(frames, 4).shape != checked_pixels(wanted, 4).shape:
        raise ValueError(f"edges are held against frames of the same shape, got {frames.shape} and {wanted.shape}")
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance}, but pixels are 0 or more apart; 1 forgives rounding")
    return np.array([_f1(edges(a), edges(b), tolerance) for a, b in zip(frames, wanted, strict=True)])


def _f1(made: np.ndarray, wanted: np.ndarray, tolerance: int) -> float:
    if not (made.any() and wanted.any()):
        return float(made.any() == wanted.any())
    precision, recall = _widened(wanted, tolerance)[made].mean(), _widened(made, tolerance)[wanted].mean()
    return float(2 * precision * recall / (precision + recall)) if precision and recall else 0.0


def _widened(marks: np.ndarray, reach: int) -> np.ndarray:
    return _windows(_windows(marks, reach, axis=0).any(axis=-1), reach, axis=1).any(axis=-1)


def _windows(plane: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """(H, W) -> (H, W, 2 reach + 1): what lies up to ``reach`` around each pixel; zeros beyond the border."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (reach, reach)
    return sliding_window_view(np.pad(plane, padding), 2 * reach + 1, axis=axis)


def keypoint_distance(frames: np.ndarray, poses: Sequence[Pose], picture: Tensor | None = None) -> np.ndarray:
    """How far the thing on the plain background of uint8 frames (F, H, W, 3) is from its poses: pixels, float64 (F,).

    Its place is the centre of weight of all that shows. With a ``picture`` (4, 64, 64), premultiplied, that of the
    picture drawn at the poses is wanted, which may be off its middle or cut by the frame; without, the poses' centres.
    Where nothing is found the distance is half the longer side.
    """
    height, width = checked_pixels(frames, 4).shape[1:3]
    if len(poses) != len(frames):
        raise ValueError(f"each frame has a pose, got {len(frames)} frames and {len(poses)} poses")
    if picture is None:
        wanted = torch.tensor([(pose.x, pose.y) for pose in poses])
    else:
        drawn = render(picture, poses, background(frames).tolist())
        wanted, _ = centre_of_weight(presence(foreground(drawn)))
    seen, weight = centre_of_weight(presence(foreground(frames)))
    away = ((seen - wanted) * torch.tensor([width / 2, height / 2])).norm(dim=1)
    found = weight >= SMALLEST * PRESENT * height * width
    return torch.where(found, away, max(height, width) / 2).double().numpy()


def displacements(poses: Sequence[Pose], height: int, width: int) -> np.ndarray:
    """How far poses move from each frame to the next, x and y in pixels: float64 (F - 1, 2)."""
    return np.diff([(pose.x * width / 2, pose.y * height / 2) for pose in poses], axis=0)


def error_variance(errors: np.ndarray) -> float:
    """Half the mean square of successive differences of errors (F,): 0 for a steady error of any size, s^2 for white
    noise of variance s^2 (von Neumann's estimate).
    """
    if len(errors) < 2:
        raise ValueError(f"how errors vary needs two frames at least, got {len(errors)}")
    return float(np.square(np.diff(errors)).mean() / 2)


def warped_difference(frames: np.ndarray, motion: np.ndarray | None = None) -> float:
    """Mean absolute difference of each uint8 frame (F, H, W, 3) and the one before, moved by ``motion``: 0 to 1.

    ``motion`` (F - 1, 2): x and y in pixels, right and down; None: nothing moves. Between pixels bilinear; what comes
    from beyond the border is left out. The plain background is taken to move along, turning and growing are not known.
    """
    height, width = checked_pixels(frames, 4).shape[1:3]
    steps = len(frames) - 1
    motion = np.zeros((steps, 2)) if motion is None else np.asarray(motion, dtype=float)
    if steps < 1 or motion.shape != (steps, 2):
        raise ValueError(f"{len(frames)} frames, two at least, need a motion of shape {(steps, 2)}, got {motion.shape}")
    if not (np.abs(motion) <= (width - 1, height - 1)).all():
        raise ValueError(f"a motion by {np.abs(motion).max():g} pixels leaves nothing of frames {height}x{width}")
    pairs = zip(frames[:-1].astype(float), frames[1:].astype(float), motion, strict=True)
    return float(np.mean([_left_over(before, after, x, y) for before, after, (x, y) in pairs]) / 255)


def _left_over(before: np.ndarray, after: np.ndarray, x: float, y: float) -> float:
    rows, columns = _sources(len(after), y), _sources(after.shape[1], x)
    came = _between(_between(before, rows[rows >= 0], axis=0), columns[columns >= 0], axis=1)
    return float(np.abs(after[rows >= 0][:, columns >= 0] - came).mean())


def _sources(cells: int, moved: float) -> np.ndarray:
    """Where each of so many cells comes from, in cells; -1 where from beyond the border."""
    source = np.arange(cells) - moved
    return np.where((source >= 0) & (source <= cells - 1), source, -1)


def _between(frame: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    low = np.floor(places).astype(int)
    high, share = np.ceil(places).astype(int), np.expand_dims(places - low, tuple({0, 1, 2} - {axis}))
    return frame.take(low, axis) * (1 - share) + frame.take(high, axis) * share
