"""VBench's results (Huang et al. 2024) and the arithmetic of its leaderboard: quality, semantics, total."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

RESULTS = "_eval_results.json"
QUALITY_SHARE, SEMANTIC_SHARE = 4, 1


class Dimension(NamedTuple):
    """What a raw score, 0..1, counts for: (raw - low) / (high - low), by ``weight`` within its group."""

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", high=0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", high=0.364),
    "overall_consistency": Dimension("semantic", high=0.364),
}
"""Figures of VBench's ``scripts/constant.py``, in the order of its leaderboard."""
ALL = tuple(DIMENSIONS)


class Scores(NamedTuple):
    """In percent, as the leaderboard prints them; None where a dimension that belongs to it is missing."""

    quality: float | None
    semantic: float | None
    total: float | None
    dimensions: dict[str, float]
    """Raw scores of those there are, in the leaderboard's order."""


def scores(path: Path) -> Scores:
    """From a file of the tool's results, or all in a folder (``*_eval_results.json``).

    Raises ValueError where there are none, where two files disagree, or where a score is no share of 1.
    """
    raw = read_raw(path)
    if not raw:
        raise ValueError(f"{path} holds no results of VBench, *{RESULTS}; run it first")
    quality, semantic = (_group(raw, group) for group in ("quality", "semantic"))
    whole = None if quality is None or semantic is None else total(quality, semantic)
    return Scores(quality, semantic, whole, {name: 100 * raw[name] for name in DIMENSIONS if name in raw})


def total(quality: float, semantic: float) -> float:
    """4 parts of quality and 1 of semantics, in the unit of both."""
    return (QUALITY_SHARE * quality + SEMANTIC_SHARE * semantic) / (QUALITY_SHARE + SEMANTIC_SHARE)


def _group(raw: Mapping[str, float], group: str) -> float | None:
    """The weighted mean of a group's normalised scores, in percent."""
    members = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.group == group}
    if members.keys() - raw.keys():
        return None
    points = [d.weight * (raw[name] - d.low) / (d.high - d.low) for name, d in members.items()]
    return 100 * sum(points) / sum(d.weight for d in members.values())


def read_raw(path: Path) -> dict[str, float]:
    """Dimension -> raw score, of a file or of all in a folder."""
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; run VBench first")
    found: dict[str, tuple[float, Path]] = {}
    for file in sorted(path.rglob(f"*{RESULTS}")) if path.is_dir() else [path]:
        for name, score in _read(file):
            known, where = found.setdefault(name, (score, file))
            if known != score:
                raise ValueError(f"{where} and {file} differ in {name} ({known}, {score}); leave one of them")
    return {name: score for name, (score, _) in found.items()}


def _read(file: Path) -> Iterator[tuple[str, float]]:
    """A file's scores; names have underscores, or spaces as on the leaderboard."""
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no results of VBench ({error}); remove it, and run the tool again") from error
    for title, value in fields.items():
        name = title.replace(" ", "_")
        score = value[0] if isinstance(value, list) and value else value
        if name not in DIMENSIONS:
            raise ValueError(f"{file} has a score of {title!r}, none of VBench's sixteen dimensions; remove it")
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{file} has {score} for {name}: the tool found no videos; check their names")
        if abs(score) > 1.01:  # cosines may round to a little more than 1
            raise ValueError(f"{file} has {score} for {name}; scores are shares of 1, not percent")
        yield name, float(score)


def table(found: Scores) -> str:
    """Markdown, a line a figure: dimensions as the tool gives them, then what they add up to; "-" where some lack."""
    sums = {"quality": found.quality, "semantic": found.semantic, "total": found.total}
    shown = [(name, "-" if value is None else f"{value:.2f}") for name, value in {**found.dimensions, **sums}.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in [("VBench", "%"), ("---", "---:"), *shown])
