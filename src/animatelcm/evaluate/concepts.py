"""Which concept a picture shows: the one whose artwork is nearest to it in an image classifier's features."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.data.emoji import BASE_STYLES, COLOURS
from animatelcm.data.sprites import SMALL_CONCEPTS, Pose, SpritePack, render
from animatelcm.evaluate.features import EfficientNetLite0, frame_features, load_network

VIEWS = (
    (Pose(0.9, 0.0, 0.0), COLOURS["white"]),
    (Pose(0.6, 0.1, 0.1), COLOURS["blue"]),
    (Pose(0.75, -0.1, -0.1, 25.0), COLOURS["gray"]),
    (Pose(0.75, -0.1, 0.1, 180.0), COLOURS["yellow"]),
)
"""How the references of every concept and style are drawn: large and small, upright and turned, on several colours."""


def centroids(features: Tensor, groups: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """Groups in the order they first appear, and the mean direction of each one's features: (N, D) -> (G, D)."""
    names = list(dict.fromkeys(groups))
    rows = {name: i for i, name in enumerate(names)}
    row = torch.tensor([rows[group] for group in groups])
    total = features.new_zeros(len(names), features.shape[1])
    return names, F.normalize(total.index_add(0, row, F.normalize(features, dim=1)), dim=1)


def nearest(features: Tensor, references: Tensor) -> Tensor:
    """For each feature (N, D) the index of the reference (M, D) at the smallest angle: int64 (N,)."""
    return (F.normalize(features, dim=1) @ F.normalize(references, dim=1).T).argmax(dim=1)


def soften(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Frames uint8 (N, H, W, 3) under a Gaussian blur of ``sigma`` pixels; 0 leaves them as they are."""
    if not sigma:
        return frames
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (bell / bell.sum()).expand(3, 1, 1, -1)
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    for _ in "xy":
        pixels = F.conv2d(F.pad(pixels, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3).transpose(2, 3)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class ConceptClassifier:
    """Tells concepts apart by the nearest of their centroids, one for each style that drew them.

    The artwork of styles differs more than that of some concepts, so one centroid a concept would lie between them.
    Frames and references are softened alike, by ``softness`` pixels: at 0 the features see how crisp an edge is as
    much as what it bounds, and frames that went through an autoencoder are taken for other things.
    """

    pack: SpritePack
    concepts: Sequence[str] = SMALL_CONCEPTS
    styles: Sequence[str] = BASE_STYLES
    softness: float = 1.0

    @cached_property
    def network(self) -> EfficientNetLite0:
        """Frames are compared in its features; it loads on first use."""
        return load_network()

    @cached_property
    def _references(self) -> tuple[list[Hashable], Tensor]:
        pairs = [(c, style) for c in self.concepts for style in self.styles if self.pack.has(c, style)]
        drawn = [render(self.pack.sprite(*pair), [pose], colour) for pair in pairs for pose, colour in VIEWS]
        groups = [pair for pair in pairs for _ in VIEWS]
        return centroids(self._features(np.concatenate(drawn)), groups)

    def _features(self, frames: np.ndarray) -> Tensor:
        return frame_features(self.network, soften(frames, self.softness))

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (N, H, W, 3) -> for each the index of a concept in ``concepts``: int64 (N,)."""
        groups, references = self._references
        concept = np.array([list(self.concepts).index(slug) for slug, _ in groups])
        return concept[nearest(self._features(frames), references).numpy()]
