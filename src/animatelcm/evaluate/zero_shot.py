"""The papers' zero-shot row on UCF-101, from a model to its figures: videos of every class by its caption, as many real
clips, FVD between them, and CLIPSIM where a CLIP is given (see ``ucf101``).

In the folder of a run: ``batch/`` and ``videos/``, ``kept/`` with features, ``draws.json`` with the real clips. All of
it is made once; the same call again goes on.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from animatelcm import video
from animatelcm.evaluate import clipsim, fvd, rows, ucf101
from animatelcm.evaluate.clipsim import Clip
from animatelcm.evaluate.folders import Reel, chosen
from animatelcm.evaluate.i3d import Detector
from animatelcm.evaluate.judge import Progress, silent
from animatelcm.evaluate.report import facts_hash
from animatelcm.evaluate.score import Scored
from animatelcm.evaluate.viewing import Looks, kept, kept_score, measured, mixtures, stamp
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource

KEPT, DRAWS = "kept", "draws.json"


def plan(per_class: int, seed: int, settings: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that are to be made. Raises ValueError where a setting is none, or leaves too few frames for FVD."""
    if per_class < 1:
        raise ValueError(f"per_class={per_class}: ask for 1 at least; the papers make {ucf101.PER_CLASS}")
    asked = ucf101.prompts(per_class * len(ucf101.CAPTIONS), seed, {})
    asked = rows.filled(asked, settings, ucf101.SETTINGS)
    if asked[0]["num_frames"] < fvd.FRAMES:
        raise ValueError(f"{asked[0]['num_frames']} frames are too few for FVD; ask for {fvd.FRAMES} at least")
    return asked


def figures(
    model: VideoModel,
    source: ModelSource,
    asked: Sequence[dict[str, Any]],
    drawn: ucf101.Draws,
    data: Path,
    out: Path,
    detector: Detector,
    clip: Clip | None = None,
    *,
    progress: Progress = silent,
) -> Scored:
    """Make what ``plan`` asked for, and hold it against the clips that were drawn from ``data``: as many of either, by
    the same seed, where there are more. CLIPSIM is of all that was made."""
    videos = rows.make(asked, model, source, out, progress=progress)
    ucf101.write_draws(drawn, out / DRAWS)
    name, keep = shlex.join(source.words()[1:]), out / KEPT
    prompts = {row["file"]: row["prompt"] for row in asked}
    picked = chosen(sorted(prompts), len(drawn.clips), drawn.seed)
    expected, real = _real(detector, drawn, data, keep, progress)
    compared = Reel(videos, tuple(videos / file for file in sorted(picked)))
    measure = partial(fvd.features, detector, names=compared.files)
    options = {"keep": keep, "progress": progress}
    found, made = measured(compared, fvd.facts(detector), measure, frames=fvd.FRAMES, **options)
    about = {**drawn.facts(), "captions": facts_hash(ucf101.CAPTIONS), "asked": len(asked)}
    distance = partial(fvd.fvd, expected, found, detector, about=about, progress=progress)
    scores = {name: [kept_score(keep, {**fvd.facts(detector), **about}, [expected, found], distance)]}
    remarks = [drawn.remark()] if drawn.remark() else []
    if drawn.skipped:
        file, reason = next(iter(drawn.skipped.items()))
        remarks.append(f"{len(drawn.skipped)} real videos were passed over, e.g. {file}: {reason}")
    remarks += rows.differences(asked, ucf101.SETTINGS) + fvd.remarks(scores) + mixtures({"real": real, "made": made})
    if clip is not None:
        everything = Reel(videos, tuple(videos / file for file in prompts), tuple(prompts.values()))
        for similar in clipsim.of_reels(clip, [everything], **options).scores.values():
            scores[name] += similar
    return Scored(scores, remarks, {"draw": {**drawn.facts(), "skipped": drawn.skipped}, "made": dict(asked[0])})


def _real(detector: Detector, drawn: ucf101.Draws, data: Path, keep: Path, progress: Progress) -> tuple[Tensor, Looks]:
    """Features of the real clips, and how these look."""
    root = ucf101.root_of(data)
    files = [root / draw.file for draw in drawn.clips]
    facts = {**fvd.facts(detector), "draw": asdict(drawn), "files": stamp(files, root)}

    def make() -> tuple[Tensor, dict[str, Any]]:
        looks, rate = Looks(), video.probe(files[0]).fps

        def watched() -> Iterator[np.ndarray]:
            for number, frames in enumerate(ucf101.clips(data, drawn), start=1):
                looks.add(frames, float(rate or 0) / drawn.stride)
                yield frames
                progress("real clips", number, len(files))

        return fvd.features(detector, watched(), names=files), asdict(looks)

    values, looks = kept(keep, facts, make)
    return values, Looks(**looks)
