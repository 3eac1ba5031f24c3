"""How much clips move, and how steadily: motion, flicker, freezes, drifting colours. How to read it: docs/stability.md.

Motion is dense optical flow (DIS: Kroeger et al. 2016, OpenCV's), of frames brought to one size, with what would make
it follow a flicker left out: its patches are compared without their means, its refinement by gradients alone. It is
believed where it explains at least half of what changes nearby; elsewhere nothing is said to move, or noise on plain
ground would. Flicker is what is left of a frame once its neighbour has been moved back (the warping error of Lai et
al. 2018), where forward and backward flow agree. Nothing here depends on the frame rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from animatelcm.evaluate.bootstrap import interval
from animatelcm.evaluate.features import SIDE as FEATURE_SIDE
from animatelcm.evaluate.features import EfficientNetLite0, frame_features, load_network, network_hash
from animatelcm.evaluate.likeness import to_lab
from animatelcm.evaluate.score import Score
from animatelcm.images import checked_pixels

VERSION = 1  # of the protocol: to be raised by whoever changes what a figure is
SIDE = 256  # pixels: the shorter side of what flow is found in
NARROWEST = 16  # the longer side over the shorter
WINDOW = 21  # pixels: what "nearby" is
EXPLAINED = 0.5  # of the variance of the change nearby: what flow has to explain
SEEN = 0.5  # grey levels^2: a change of less variance moves nothing; rounding alone makes 1/6
AGREEMENT = 0.01, 0.5  # |F + B|^2 <= 0.01 (|F|^2 + |B|^2) + 0.5 pixels^2 (Sundaram et al. 2010)
FREEZE = 1  # grey level: frames that differ by no more, anywhere, are the same


class Figures(NamedTuple):
    """Of one clip. A still clip has no flicker and no drift: these are read beside ``motion`` and ``frozen``."""

    motion: float
    """Mean length of the flow from a frame to its neighbour, as a share of the shorter side."""
    change: float
    """Mean absolute difference of neighbouring frames, as a share of full scale."""
    frozen: float
    """Share of the pairs of neighbouring frames that are the same."""
    flicker: float
    """Mean absolute difference of neighbouring frames once moved back, as a share of full scale."""
    followed: float
    """Share of pixels that flicker is of: those in the neighbour too, by flows that agree."""
    consistency: float | None
    """Mean cosine of neighbouring frames' EfficientNet-lite0 features; None without the network."""
    drift_end: float
    """Delta E (1976) from the first frame's mean colour to that of the last quarter of frames."""
    drift_largest: float
    """Delta E from the first frame's mean colour to that of the frame farthest from it."""
    drift_line: float
    """Delta E from beginning to end of the straight line fitted to all mean colours: 0 for what returns."""
    temporal_flickering: float
    """VBench's (255 - MAE) / 255, which is 1 - ``change``: of clips that ought to stand still, as motion lowers it."""


def figures(clip: np.ndarray, network: EfficientNetLite0 | None = None) -> Figures:
    """Of a clip, uint8 (F, H, W, 3), of two frames at least and any size.

    Raises ValueError for fewer frames, frames narrower than 1:16, or where OpenCV is missing.
    """
    frames, cv2 = checked_pixels(clip, 4), _opencv()
    if len(frames) < 2:
        raise ValueError(f"stability is of neighbouring frames, got {len(frames)}; give two at least")
    pairs = [_of_pair(cv2, *both) for both in pairwise(_prepared(cv2, frames))]
    motion, flicker, followed = np.mean(pairs, axis=0).tolist()
    steps = (np.abs(a.astype(np.int16) - b) for a, b in pairwise(frames))
    change, frozen = np.mean([(step.mean() / 255, step.max() <= FREEZE) for step in steps], axis=0).tolist()
    end, largest, line = _drift(np.stack([to_lab(frame).mean(axis=(0, 1)) for frame in frames]))
    return Figures(
        motion=motion,
        change=change,
        frozen=frozen,
        flicker=flicker,
        followed=followed,
        consistency=None if network is None else _consistency(frame_features(network, frames)),
        drift_end=end,
        drift_largest=largest,
        drift_line=line,
        temporal_flickering=1 - change,
    )


def scores(
    videos: Iterable[np.ndarray], *, about: Mapping[str, Any] | None = None, resamples: int = 1000, seed: int = 0
) -> list[Score]:
    """The mean of each figure over videos, uint8 (F, H, W, 3), taken one by one, with its 95 % interval.

    Consistency is among them where the extra [eval] is installed. ``about`` is what else figures depend on (frame
    rate, prompts, seeds), as JSON's types; it goes into their protocols' hashes. Raises ValueError naming a video,
    counted from 0, that has no figures, or for fewer than two.
    """
    network = None
    with suppress(ValueError):  # raised where the extra is not installed
        network = load_network()
    found = [_named(number, video, network) for number, video in enumerate(videos)]
    if len(found) < 2:
        raise ValueError(f"an interval needs two videos at least, got {len(found)}; measure more")
    result = []
    for metric, facts in _facts(network).items():
        values = torch.tensor([getattr(one, metric) for one in found], dtype=torch.float64)
        result.append(
            Score(
                metric=metric,
                value=_mean(values),
                interval=interval(_mean, values, resamples=resamples, seed=seed),
                n={"videos": len(found)},
                facts={**(about or {}), **facts, "metric": metric, "version": VERSION, "n": [len(found)]},
            )
        )
    return result


def _facts(network: EfficientNetLite0 | None) -> dict[str, dict[str, Any]]:
    """Figure -> its unit, and what it depends on beside the frames."""
    flow = {
        "flow": "OpenCV's DIS, medium, refined by gradients alone",
        "opencv": _opencv().__version__.split(".")[0],
        "resize": f"shorter side {SIDE}: smaller by area, larger cubic",
        "believed": [WINDOW, EXPLAINED, SEEN],
        "agreement": list(AGREEMENT),
    }
    features = {"unit": "cosine", "network": network_hash(), "side": FEATURE_SIDE} if network else {}
    scale, delta = {"unit": "of full scale"}, {"unit": "Delta E 1976", "colour": "mean CIE Lab"}
    return {
        "motion": {"unit": "of the shorter side a frame", **flow},
        "change": scale,
        "frozen": {"unit": "of pairs", "levels": FREEZE},
        "flicker": {**scale, **flow},
        "followed": {"unit": "of pixels", **flow},
        **({"consistency": features} if network else {}),
        "drift_end": delta,
        "drift_largest": delta,
        "drift_line": delta,
        "temporal_flickering": scale,
    }


def _named(number: int, video: np.ndarray, network: EfficientNetLite0 | None) -> Figures:
    try:
        return figures(video, network)
    except ValueError as error:
        raise ValueError(f"video {number}: {error}") from error


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ValueError("stability needs OpenCV: pip install animatelcm[control]") from error
    return cv2


# Flow


class _Frame(NamedTuple):
    colour: np.ndarray  # float32 (H, W, 3)
    grey: np.ndarray  # uint8 (H, W)


def _prepared(cv2: ModuleType, frames: np.ndarray) -> Iterator[_Frame]:
    """Frames with a shorter side of ``SIDE``, one by one."""
    height, width = frames.shape[1:3]
    shorter, longer = sorted((height, width))
    if longer > NARROWEST * shorter:
        raise ValueError(f"frames of {width}x{height} are too narrow to be followed; crop them to 1:{NARROWEST}")
    size = round(width * SIDE / shorter), round(height * SIDE / shorter)
    how = cv2.INTER_AREA if shorter > SIDE else cv2.INTER_CUBIC
    for frame in frames:
        colour = cv2.resize(frame.astype(np.float32), size, interpolation=how)
        grey = np.rint(cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)).clip(0, 255).astype(np.uint8)
        yield _Frame(colour, grey)


def _of_pair(cv2: ModuleType, a: _Frame, b: _Frame) -> np.ndarray:
    """Motion, flicker and share followed, of both directions: the same for the clip backwards."""
    there, back = _flow(cv2, a.grey, b.grey), _flow(cv2, b.grey, a.grey)
    return np.mean([_of_way(cv2, a, b, there, back), _of_way(cv2, b, a, back, there)], axis=0)


def _of_way(cv2: ModuleType, a: _Frame, b: _Frame, flow: np.ndarray, back: np.ndarray) -> tuple[float, float, float]:
    height, width = a.grey.shape
    x, y = _places(flow)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned = _moved(cv2, back, flow)
    most = AGREEMENT[0] * (_squared(flow) + _squared(returned)) + AGREEMENT[1]
    followed = inside & (_squared(flow + returned) <= most)
    left = (_moved(cv2, b.colour, flow) - a.colour)[followed] if followed.any() else b.colour - a.colour
    length = np.sqrt(_squared(flow)).mean() / min(height, width)
    return float(length), float(np.abs(left).mean(dtype=np.float64) / 255), float(followed.mean())


def _flow(cv2: ModuleType, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where each pixel of a goes in b, grey uint8 (H, W): float32 (H, W, 2), x and y; 0 where that explains little."""
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    finder.setVariationalRefinementDelta(0.0)  # no weight for levels that stay the same: a flicker changes them
    flow = finder.calc(a, b, None)
    before, after = a.astype(np.float32), b.astype(np.float32)
    change, left = (_variance(cv2, moved - before) for moved in (after, _moved(cv2, after, flow)))
    believed = (change > SEEN) & (left <= (1 - EXPLAINED) * change)
    return np.where(believed[..., None], flow, np.float32(0))


def _variance(cv2: ModuleType, plane: np.ndarray) -> np.ndarray:
    """About the mean nearby, so that a flicker has none: float32 (H, W)."""
    window = (WINDOW, WINDOW)
    return cv2.blur(plane * plane, window) - cv2.blur(plane, window) ** 2


def _moved(cv2: ModuleType, picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """What lies where the flow leads, between pixels bilinear: as ``picture``, float32 (H, W) or (H, W, C)."""
    return cv2.remap(picture, *_places(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _places(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = flow.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return flow[..., 0] + x, flow[..., 1] + y


def _squared(vectors: np.ndarray) -> np.ndarray:
    return np.square(vectors).sum(axis=-1)


# Features and colours


def _consistency(features: Tensor) -> float:
    """Mean cosine of neighbours among features (F, D) of length 1."""
    return float((features[:-1].double() * features[1:].double()).sum(dim=1).mean())


def _drift(colours: np.ndarray) -> tuple[float, float, float]:
    """Of mean colours (F, 3) in CIE Lab: at the end, at most, and along the line of least squares."""
    away = colours - colours[0]
    last = away[-max(len(away) // 4, 1) :]
    time = np.linspace(-0.5, 0.5, len(away))
    line = time @ away / (time @ time)
    largest = np.linalg.norm(away, axis=1).max()
    return float(np.linalg.norm(last.mean(axis=0))), float(largest), float(np.linalg.norm(line))
