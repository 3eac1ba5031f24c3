"""Control maps of training clips: of their frames, for the miniature of what it draws, or ready in a folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from animatelcm import control_maps, video
from animatelcm.data.batches import ClipDataset
from animatelcm.data.clips import SUFFIXES, FolderDataset, visible
from animatelcm.data.emoji import EmojiClips, EmojiImages, Scene
from animatelcm.data.sprites import CELL, Pose, render

MADE = ("canny", "edge", "tile")
RENDERED = ("pose", "depth")
"""Kinds that only the miniature's own renderer knows."""
DOT = 3.5
"""Radius of a keypoint in pixels."""
Maps = Callable[[int, str | None], np.ndarray]
"""A clip's index, and its source if that is known -> its maps, uint8 (F, H, W, 3)."""
NEAREST, FARTHEST = 1.0, 0.3
"""Depth of a picture as large as the frame, and of one without size; the background is 0, infinitely far."""


def control(dataset: ClipDataset, kind: str, index: int, source: str | None = None) -> np.ndarray:
    """The maps of clip ``index`` of a kind, as ``check`` has found possible: uint8 (F, H, W, 3)."""
    if kind not in RENDERED:
        return control_maps.made(kind, dataset[index].frames)
    assert isinstance(dataset, EmojiClips | EmojiImages)
    return layout(dataset.scene(index), kind)


def check(dataset: ClipDataset, kind: str) -> None:
    """Raises ValueError where maps of a kind cannot be made: they do not show in frames, and the data set does not know
    them; or they need OpenCV, which is not there."""
    if kind in MADE:
        control_maps.made(kind, np.zeros((1, 8, 8, 3), np.uint8))
    elif kind not in RENDERED or not isinstance(dataset, EmojiClips | EmojiImages):
        raise ValueError(
            f"{kind} maps cannot be made from frames; train on {', '.join(MADE)}, or give ready ones: data.maps"
        )


def ready(dataset: FolderDataset, folder: Path) -> Maps:
    """Maps of a data set's clips from the files of the same names under ``folder``, or of the same names but for the
    suffix: what comes back gives those of an index and its source, the clip's own frames, uint8 (F, H, W, 3).

    Raises ValueError that names the first clip without such a file, with several, or with one of too few frames, and
    how many there are.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}, where maps should be; correct data.maps")
    named: dict[str, list[str]] = {}
    files = visible(folder)
    for name in sorted(files):
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            named.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    found, wrong = {}, []
    for source in dataset.sources:
        fits = [source] if source in files else named.get(str(PurePosixPath(source).with_suffix("")), [])
        fault = f"{len(fits)} files" if len(fits) != 1 else _fault(dataset, source, folder / fits[0])
        if fault is None:
            found[source] = folder / fits[0]
        else:
            wrong.append(f"{source} ({fault})")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(dataset.sources)} clips in {dataset.path} have no fitting maps in {folder}, first "
            f"{wrong[0]}; give each clip one file of its name, with as many frames"
        )
    sources = dataset.sources

    def read(index: int, source: str | None) -> np.ndarray:
        source = sources[index % len(sources)] if source is None else source
        return dataset.alike(found[source], source, index)

    return read


def _fault(dataset: FolderDataset, source: str, path: Path) -> str | None:
    """What keeps a file from being the maps of a source."""
    needed = dataset.frames_needed(source)
    try:
        header = video.probe(path)
    except ValueError as error:
        return str(error)
    if (header.fps is None) != (needed == 0):
        return "an image for a video" if needed else "a video for an image"
    return f"{header.num_frames} frames, {needed} are needed" if header.num_frames < needed else None


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
