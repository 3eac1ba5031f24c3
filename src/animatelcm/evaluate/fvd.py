"""FVD (Unterthiner et al. 2018): the Frechet distance of real and generated videos in I3D's logits.

A video is its first 16 frames, each squeezed to 224x224: bilinear, align_corners=False, without antialiasing, both
sides apart, in [-1, 1] without rounding: what the PyTorch ports of FVD do where they keep no shape. Frames are taken as
they come; whoever wants another part, rate or crop gives other frames. Papers compare 2,048 with 2,048 videos; fewer
give a larger distance, whatever the model. 400 videos or fewer have covariances without full rank: their distance is
computed exactly all the same (see ``frechet``), and a score says the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.evaluate.bootstrap import interval
from animatelcm.evaluate.folders import Reel, reel
from animatelcm.evaluate.frechet import frechet_distance, gaussian
from animatelcm.evaluate.i3d import CLASSES, Detector
from animatelcm.evaluate.judge import Progress, silent
from animatelcm.evaluate.score import Score, Scored, check_counts
from animatelcm.evaluate.viewing import Looks, kept_score, measured, mixtures
from animatelcm.images import checked_pixels

VERSION = 1  # of the protocol: to be raised by whoever changes what the figure is
FRAMES, SIDE, PAPERS = 16, 224, 2048
RESIZE = "bilinear 224x224, align_corners=False, antialias=False, aspect not kept"


def features(
    detector: Detector, videos: Iterable[np.ndarray], *, batch: int = 4, names: Sequence[object] | None = None
) -> Tensor:
    """Videos uint8 (F, H, W, 3), of any sizes, one ``batch`` at a time -> logits float32 (N, 400) on the CPU.

    Raises ValueError naming a video, by ``names`` or counted from 0, that has fewer than 16 frames or whose logits are
    not finite.
    """
    called = (f"video {number}" for number in count()) if names is None else iter(names)
    rows, stream = [torch.empty(0, CLASSES)], _pixels_of(videos, called)
    while group := list(islice(stream, batch)):
        rows.append(_logits(detector, group))
    return torch.cat(rows)


def fvd(
    real: Tensor,
    generated: Tensor,
    detector: Detector,
    *,
    about: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> Score:
    """The distance of features (N, 400) and (M, 400), in squared logits, with its 95 % interval over both sets.

    ``about`` is what else the figure depends on (which real videos, by which draw, seeds, frame rate), as JSON's types;
    it goes into the protocol's hash. 1,000 resamples of 2,048 videos take a minute of a processor.
    """
    a, b = gaussian(real), gaussian(generated)
    value, drawn = frechet_distance(a, b), count(1)

    def again(real: Tensor, generated: Tensor) -> float:
        progress("interval", next(drawn), resamples)
        return frechet_distance(gaussian(real), gaussian(generated))

    return Score(
        metric="FVD",
        value=value,
        interval=interval(again, real.double(), generated.double(), value=value, resamples=resamples, seed=seed),
        n={"real": a.n, "generated": b.n},
        rank={"real": a.rank, "generated": b.rank},
        facts={**(about or {}), **facts(detector), "n": [a.n, b.n]},
    )


def facts(detector: Detector) -> dict[str, Any]:
    """What features depend on beside the videos."""
    known = {"metric": "FVD", "version": VERSION, "frames": f"the first {FRAMES}", "resize": RESIZE}
    return {**detector.facts, **known}


def of_folders(
    detector: Detector,
    real: Path,
    generated: Sequence[Path],
    *,
    limit: int = PAPERS,
    seed: int = 0,
    mixed: bool = False,
    keep: Path | None = None,
    progress: Progress = silent,
) -> Scored:
    """The distance from the videos of ``real`` to those of each folder, ``limit`` of each drawn by ``seed``.

    Places are what ``folders.reel`` reads. Features and intervals are kept in ``keep``. Raises ValueError where folders
    have different numbers of videos, unless ``mixed`` is said.
    """
    truth, *others = (reel(place, limit, seed) for place in (real, *dict.fromkeys(generated)))
    check_counts({str(one.place): len(one.files) for one in others}, mixed)
    options = {"frames": FRAMES, "keep": keep, "progress": progress}

    def seen(one: Reel) -> tuple[Tensor, Looks]:
        return measured(one, facts(detector), partial(features, detector, names=one.files), **options)

    (expected, looks), scores = seen(truth), {}
    about, met = {"real": looks.contents}, {f"real, {truth.place}": looks}
    for one in others:
        found, met[str(one.place)] = seen(one)
        make = partial(fvd, expected, found, detector, about=about, progress=progress)
        scores[str(one.place)] = [kept_score(keep, {**facts(detector), **about}, [expected, found], make)]
    return Scored(scores, mixtures(met) + remarks(scores), {})


def remarks(scores: Mapping[str, Sequence[Score]]) -> list[str]:
    """What is to be said of distances between fewer videos than papers take, or than there are features."""
    said = []
    for name, score in ((name, score) for name, several in scores.items() for score in several if score.rank):
        if (n := min(score.n.values())) < PAPERS:
            said.append(f"{name}: n = {n:,} where papers use {PAPERS:,}: not comparable with their figures")
        if min(score.rank.values()) < CLASSES:
            ranks = ", ".join(f"{kind} {rank}" for kind, rank in score.rank.items())
            said.append(f"{name}: covariances of rank {ranks}, not {CLASSES}: the fewer videos, the larger the figure")
    return said


def pixels(video: np.ndarray) -> Tensor:
    """The first 16 frames of uint8 (F, H, W, 3) as I3D sees them: float32 (3, 16, 224, 224) in [-1, 1]."""
    if len(checked_pixels(video, 4)) < FRAMES:
        raise ValueError(f"{len(video)} frames are too few for FVD; give {FRAMES} at least")
    frames = torch.from_numpy(np.ascontiguousarray(video[:FRAMES])).permute(0, 3, 1, 2).float()
    frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
    return frames.transpose(0, 1) / 127.5 - 1


def _pixels_of(videos: Iterable[np.ndarray], names: Iterator[object]) -> Iterator[tuple[object, Tensor]]:
    for video in videos:
        name = next(names)
        try:
            yield name, pixels(video)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _logits(detector: Detector, group: Sequence[tuple[object, Tensor]]) -> Tensor:
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = detector.logits(torch.stack([seen for _, seen in group]).to(detector.device)).float().cpu()
    if logits.shape != (len(group), CLASSES):
        raise ValueError(f"I3D's logits have the shape {tuple(logits.shape)}, not (N, {CLASSES}); give Kinetics-400's")
    bad = (~logits.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"{group[int(bad[0])][0]}: its logits are NaN or infinite; look at its frames and the weights")
    return logits
