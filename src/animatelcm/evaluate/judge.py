"""Clips get their figures from one protocol, so that those of several models and settings compare.

Judged are every third frame and every third step from frame to frame.

* Concept accuracy, motion accuracy, motion amount: see ``concepts`` and ``motion``.
* FVD-like: the Frechet distance between generated and real clips, each clip a point of 2,560 dimensions
  (``features.clip_features``). The covariance of n clips has rank n - 1, so the distance is biased upwards, the more
  the fewer clips. The floor beside it has the same bias: as many other real clips against the same real ones.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from animatelcm.data.emoji import BASE_STYLES, EmojiClips, Shot, drawn
from animatelcm.data.sprites import CLIP_FRAMES, SMALL_CONCEPTS, SpritePack
from animatelcm.evaluate.bootstrap import average, ends
from animatelcm.evaluate.concepts import ConceptClassifier
from animatelcm.evaluate.features import JUDGED, SIDE, clip_features, network_hash
from animatelcm.evaluate.frechet import Gaussian, distances, frechet_distance, gaussian
from animatelcm.evaluate.motion import classify, motion_amount
from animatelcm.evaluate.prompts import PER_CONCEPT, PER_MOTION
from animatelcm.evaluate.report import Kind, Split, Steer, facts_hash
from animatelcm.weights.files import read_safetensors, write_safetensors

VERSION = 1  # of the protocol: to be raised by whoever changes what a figure is
PROMPT_SEED, REAL_SEED, FLOOR_SEED, CHOICE_SEED = 1001, 1002, 1003, 1004

DRAWS = 200
"""Of a distance's bootstrap."""

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it, of how much) -> None."""


def silent(title: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that figures depend on beside the model and its setting."""

    clips: int = 256
    """Prompts of the kind "clips", and at most as many of each other kind."""
    real: int = 2048
    """Clips that those are held against."""
    style_truth: str = ""
    """The style that clips ought to have: a sheet of the pack, or the path of one. "": the three of training."""
    concepts: tuple[str, ...] = SMALL_CONCEPTS
    steer: Steer = ""
    """What of their real clips steers the generated ones."""
    split: Split = "test"
    """Whose prompts: those that figures are reported of, or others, to choose a model or a setting by."""

    def __post_init__(self) -> None:
        if min(self.clips, self.real) < 2:
            raise ValueError(f"clips={self.clips} and real={self.real}: a distribution needs two clips at least")
        if self.style_truth:
            self.pack.sprite(self.concepts[0], *self.styles)

    @property
    def styles(self) -> tuple[str, ...]:
        return (Path(self.style_truth).stem,) if self.style_truth else BASE_STYLES

    @cached_property
    def pack(self) -> SpritePack:
        return SpritePack(extra_styles={self.styles[0]: self._sheet} if self._sheet else {})

    @property
    def _sheet(self) -> Path | None:
        return Path(self.style_truth) if self.style_truth.endswith(".webp") else None

    def data(self, seed: int, length: int) -> EmojiClips:
        """Real clips; of a personal style there are no animations, so all are sprites under motions."""
        real = 0.0 if self.style_truth else EmojiClips.real
        return EmojiClips(
            seed=seed, length=length, concepts=self.concepts, styles=self.styles, pack=self.pack, real=real
        )

    @property
    def prompt_seed(self) -> int:
        return PROMPT_SEED if self.split == "test" else CHOICE_SEED

    @cached_property
    def judging(self) -> dict[str, Any]:
        """What the features of a real clip depend on, beside its seed."""
        return {
            "metric": "emoji",
            "version": VERSION,
            "network": network_hash(),
            "side": SIDE,
            "judged": list(range(CLIP_FRAMES)[JUDGED]),
            "styles": list(self.styles),
            "sheet": hashlib.blake2b(self._sheet.read_bytes(), digest_size=8).hexdigest() if self._sheet else "",
            "concepts": list(self.concepts),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What the hash of the protocol is of."""
        seeds = {"prompts": self.prompt_seed, "real": REAL_SEED, "floor": FLOOR_SEED}
        counts = {"clips": self.clips, "real": self.real, **PER_CONCEPT, **PER_MOTION}
        steered = {"steer": self.steer} if self.steer else {}
        return {**self.judging, "seeds": seeds, "counts": counts, **steered}


class Reference(NamedTuple):
    """The real clips that generated ones are held against, and how far other real clips are from them."""

    real: Gaussian
    floor: float


@dataclass(frozen=True)
class Judge:
    """Gives clips their figures; what it needs of real ones is made at first use and kept in ``folder``."""

    protocol: Protocol
    folder: Path
    progress: Progress = silent

    @cached_property
    def classifier(self) -> ConceptClassifier:
        styles = tuple(dict.fromkeys((*BASE_STYLES, *self.protocol.styles)))
        return ConceptClassifier(self.protocol.pack, self.protocol.concepts, styles)

    @cached_property
    def reference(self) -> Reference:
        real = self._real_features(REAL_SEED, self.protocol.real)
        others = self._real_features(FLOOR_SEED, self.protocol.clips)
        return Reference(gaussian(real), frechet_distance(gaussian(others), gaussian(real)))

    @property
    def real_file(self) -> Path:
        """Where the features of the real clips are kept that generated ones are held against: "features" (N, 2560)."""
        return self._kept(REAL_SEED, self.protocol.real)

    def _kept(self, seed: int, length: int) -> Path:
        name = facts_hash({**self.protocol.judging, "seed": seed, "length": length})
        return self.folder / f"real-{name}.safetensors"

    def _real_features(self, seed: int, length: int) -> Tensor:
        path = self._kept(seed, length)
        if not path.is_file():
            data = self.protocol.data(seed, length)
            features = self._features((data[i].frames for i in range(length)), "real clips", length)
            write_safetensors({"features": features}, path)
        return read_safetensors(path)["features"]

    def _features(self, clips: Iterable[np.ndarray], title: str, total: int) -> Tensor:
        rows = []
        for done, clip in enumerate(clips, start=1):
            rows.append(clip_features(self.classifier.network, clip))
            self.progress(title, done, total)
        return torch.stack(rows)

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(gaussian(features), self.reference.real)

    def figures(self, kind: Kind, shots: Sequence[Shot], clips: Sequence[np.ndarray]) -> dict[str, Any]:
        """The fields of a ``Row`` that judge clips by the shots they were asked for; and "samples", what each clip
        brings to a figure: by its name a number (N,), two of a ratio (N, 2), or features (N, 2560) of the distance."""
        judged = np.concatenate([clip[JUDGED] for clip in clips])
        asked = [shot.slug for shot, clip in zip(shots, clips, strict=True) for _ in clip[JUDGED]]
        seen = [self.classifier.concepts[i] for i in self.classifier.predict(judged)]
        concepts = _missed(asked, seen)
        named = [(shot.named, clip) for shot, clip in zip(shots, clips, strict=True) if shot.named]
        shown = [classify(clip) for _, clip in named]
        motions = _missed([name for name, _ in named], shown)
        right = torch.tensor([a == b for a, b in zip(asked, seen, strict=True)]).double()
        samples = {
            "concept_accuracy": right.view(len(clips), -1).mean(dim=1),
            "motion_accuracy": torch.tensor([a == b for (a, _), b in zip(named, shown, strict=True)]).double(),
        }
        intervals = {name: ends(average, each, (0, 1)) for name, each in samples.items()}
        moved = None if kind == "images" else self._motion_amounts(shots, clips)
        if moved is not None:
            samples["motion_amount"] = moved
            intervals["motion_amount"] = ends(average, moved)
        if kind == "clips":
            samples["fvd_like"] = features = self._features(clips, "features", len(clips))
            distance, numbers = distances(features, self.reference.real), torch.arange(len(clips))
            intervals["fvd_like"] = ends(distance, numbers, (0, math.inf), resamples=DRAWS)
        return {
            "n": len(clips),
            "concept_accuracy": 1 - concepts.total() / len(asked),
            "missed_concepts": dict(concepts.most_common(12)),
            "named": len(named),
            "motion_accuracy": 1 - motions.total() / len(named) if named else None,
            "missed_motions": dict(motions.most_common(12)),
            "motion_amount": None if moved is None else average(moved),
            "fvd_like": self._distance(features) if kind == "clips" else None,
            "fvd_floor": self.reference.floor if kind == "clips" else None,
            "intervals": {name: found for name, found in intervals.items() if found},
            "samples": samples,
        }

    def _motion_amounts(self, shots: Sequence[Shot], clips: Sequence[np.ndarray]) -> Tensor:
        """(N, 2): of each clip, and of the real one."""
        real = (drawn(shot, self.protocol.pack) for shot in shots)
        pairs = [tuple(map(motion_amount, pair)) for pair in zip(clips, real, strict=True)]
        return torch.tensor(pairs, dtype=torch.float64)


def _missed(asked: Sequence[str], seen: Sequence[str]) -> Counter[str]:
    return Counter(f"{a} -> {b}" for a, b in zip(asked, seen, strict=True) if a != b)
