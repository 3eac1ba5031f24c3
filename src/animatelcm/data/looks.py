"""Control maps of training clips: made from their frames, or for the miniature from what it draws."""

from __future__ import annotations

import math

import numpy as np
import torch

from animatelcm import control_maps
from animatelcm.data.batches import ClipDataset
from animatelcm.data.emoji import EmojiClips, EmojiImages, Scene
from animatelcm.data.sprites import CELL, Pose, render

RENDERED = ("pose", "depth")
"""Kinds that only the miniature's own renderer knows."""
DOT = 3.5
"""Radius of a keypoint in pixels."""
NEAREST, FARTHEST = 1.0, 0.3
"""Depth of a picture as large as the frame, and of one without size; the background is 0, infinitely far."""


def control(dataset: ClipDataset, index: int, kind: str) -> np.ndarray:
    """The maps of clip ``index``: uint8 (F, H, W, 3).

    Raises ValueError where the kind cannot be told from frames, and the data set does not know it.
    """
    if kind not in RENDERED:
        return control_maps.made(kind, dataset[index].frames)
    if not isinstance(dataset, EmojiClips | EmojiImages):
        raise ValueError(f"{kind} maps cannot be made from frames; train on canny, edge or tile")
    return layout(dataset.scene(index), kind)


def layout(scene: Scene, kind: str) -> np.ndarray:
    """Where things are in a scene: uint8 (F, 64, 64, 3).

    pose: a red dot in the middle of the picture and a green one at its upper end. depth: its silhouette, the brighter
    the larger, as if size were nearness.
    """
    if kind == "pose":
        return np.stack([_keypoints(pose) for pose in scene.poses])
    alpha = scene.sprites[..., 3:, :, :]
    white = alpha.expand(*alpha.shape[:-3], 4, -1, -1).contiguous()
    silhouettes = render(white, scene.poses, (0.0, 0.0, 0.0))
    near = np.array([FARTHEST + (NEAREST - FARTHEST) * min(pose.size, 1.0) for pose in scene.poses])
    return (silhouettes * near[:, None, None, None]).round().astype(np.uint8)


def _keypoints(pose: Pose) -> np.ndarray:
    angle, reach = math.radians(pose.degrees), 0.8 * pose.size
    tip = (pose.x + reach * math.sin(angle), pose.y - reach * math.cos(angle))
    cells = (torch.arange(CELL) + 0.5) * (2 / CELL) - 1
    picture = np.zeros((CELL, CELL, 3), np.uint8)
    for channel, (x, y) in enumerate(((pose.x, pose.y), tip)):
        away = torch.hypot(cells[None] - x, cells[:, None] - y) * (CELL / 2)
        picture[..., channel] = (away <= DOT).numpy() * 255
    return picture
