"""FVD (Unterthiner et al. 2018): the Frechet distance of real and generated videos in I3D's logits.

A video is its first 16 frames, each squeezed to 224x224: bilinear, align_corners=False, without antialiasing, both
sides apart, in [-1, 1] without rounding: what the PyTorch ports of FVD do where they keep no shape. Frames are taken as
they come; whoever wants another part, rate or crop gives other frames. Papers compare 2,048 with 2,048 videos; fewer
give a larger distance, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.evaluate.bootstrap import interval
from animatelcm.evaluate.frechet import frechet_distance, gaussian
from animatelcm.evaluate.i3d import CLASSES, Detector
from animatelcm.evaluate.score import Score
from animatelcm.images import checked_pixels

VERSION = 1  # of the protocol: to be raised by whoever changes what the figure is
FRAMES, SIDE = 16, 224
RESIZE = "bilinear 224x224, align_corners=False, antialias=False, aspect not kept"


def features(detector: Detector, videos: Iterable[np.ndarray], *, batch: int = 4) -> Tensor:
    """Videos uint8 (F, H, W, 3), of any sizes, one ``batch`` at a time -> logits float32 (N, 400) on the CPU.

    Raises ValueError naming a video, counted from 0, that has fewer than 16 frames or whose logits are not finite.
    """
    rows, stream = [torch.empty(0, CLASSES)], _pixels_of(videos)
    while group := list(islice(stream, batch)):
        start = sum(map(len, rows))
        rows.append(_logits(detector, torch.stack(group), start))
    return torch.cat(rows)


def fvd(
    real: Tensor,
    generated: Tensor,
    detector: Detector,
    *,
    about: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """The distance of features (N, 400) and (M, 400), in squared logits, with its 95 % interval over both sets.

    ``about`` is what else the figure depends on (which real videos, by which draw, seeds, frame rate), as JSON's types;
    it goes into the protocol's hash. 1,000 resamples of 2,048 videos take a minute of a processor.
    """
    a, b = gaussian(real), gaussian(generated)
    value = frechet_distance(a, b)
    return Score(
        metric="FVD",
        value=value,
        interval=interval(_distance, real.double(), generated.double(), value=value, resamples=resamples, seed=seed),
        n={"real": a.n, "generated": b.n},
        rank={"real": a.rank, "generated": b.rank},
        facts={
            **(about or {}),
            **detector.facts,
            "metric": "FVD",
            "version": VERSION,
            "frames": f"the first {FRAMES}",
            "resize": RESIZE,
            "n": [a.n, b.n],
        },
    )


def pixels(video: np.ndarray) -> Tensor:
    """The first 16 frames of uint8 (F, H, W, 3) as I3D sees them: float32 (3, 16, 224, 224) in [-1, 1]."""
    if len(checked_pixels(video, 4)) < FRAMES:
        raise ValueError(f"{len(video)} frames are too few for FVD; give {FRAMES} at least")
    frames = torch.from_numpy(np.ascontiguousarray(video[:FRAMES])).permute(0, 3, 1, 2).float()
    frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
    return frames.transpose(0, 1) / 127.5 - 1


def _distance(real: Tensor, generated: Tensor) -> float:
    return frechet_distance(gaussian(real), gaussian(generated))


def _pixels_of(videos: Iterable[np.ndarray]) -> Iterator[Tensor]:
    for number, video in enumerate(videos):
        try:
            yield pixels(video)
        except ValueError as error:
            raise ValueError(f"video {number}: {error}") from error


def _logits(detector: Detector, group: Tensor, start: int) -> Tensor:
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = detector.logits(group.to(detector.device)).float().cpu()
    if logits.shape != (len(group), CLASSES):
        raise ValueError(f"I3D's logits have the shape {tuple(logits.shape)}, not (N, {CLASSES}); give Kinetics-400's")
    bad = (~logits.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(
            f"video {start + int(bad[0])}: its logits are NaN or infinite; look at its frames and the weights"
        )
    return logits
