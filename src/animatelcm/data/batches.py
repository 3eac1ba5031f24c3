"""From data sets to batches: what objectives eat, and the latents that are computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from animatelcm.data.clips import Clip
from animatelcm.rng import generator


class ClipDataset(Protocol):
    """Anything map-style that yields clips of one shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """B captioned clips, as pixels (B, 3, F, H, W) in [-1, 1] or as latents (B, C, F, h, w)."""

    captions: tuple[str, ...]
    pixels: Tensor | None = None
    latents: Tensor | None = None
    maps: Tensor | None = None
    """Control maps (B, 3, F, H, W) in [0, 1], where an adapter reads them."""
    first: Tensor | None = None
    """The first frame's pixels (B, 3, H, W) in [-1, 1], where an adapter sees them."""


Batches = Callable[[Sequence[int]], ClipBatch]
"""Indices -> the batch of those clips."""


def to_pixels(frames: Sequence[np.ndarray]) -> Tensor:
    """B clips of uint8 (F, H, W, 3) -> (B, 3, F, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(frames))
    return stacked.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def pixel_batches(dataset: ClipDataset) -> Batches:
    """Batches of pixels, drawn afresh from the data set each time."""

    def batch(indices: Sequence[int]) -> ClipBatch:
        clips = [dataset[i] for i in indices]
        return ClipBatch(captions=tuple(c.caption for c in clips), pixels=to_pixels([c.frames for c in clips]))

    return batch


def with_looks(batches: Batches, dataset: ClipDataset, kind: str | None) -> Batches:
    """The same batches with the pixels of each clip's first frame, or with control maps of a kind, made from the clips
    as they are needed (``data.looks``): they are cheap beside a training step, and large to keep."""
    from animatelcm.data.looks import control

    def batch(indices: Sequence[int]) -> ClipBatch:
        found = batches(indices)
        if kind is None:
            return replace(found, first=to_pixels([dataset[i].frames[:1] for i in indices]).squeeze(2))
        maps = torch.from_numpy(np.stack([control(dataset, i, kind) for i in indices]))
        return replace(found, maps=maps.permute(0, 4, 1, 2, 3).float().div(255))

    return batch


def draw_indices(length: int, count: int, *, seed: int, step: int, rank: int) -> list[int]:
    """The clips of one step: ``count`` indices below ``length``, with replacement, by address alone."""
    draws = torch.randint(length, (count,), generator=generator(seed, step, rank, "data"))
    return draws.tolist()


def latent_batches(
    dataset: ClipDataset,
    encode: Callable[[Tensor], Tensor],
    path: Path,
    *,
    facts: str,
    chunk: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Batches:
    """Batches of latents from a safetensors file that is made at first need.

    ``encode`` maps pixels (B, 3, F, H, W) to latents (B, C, F, h, w); they are kept in fp16. ``facts`` says what
    the latents depend on (data set, autoencoder); its hash is part of the file name, so a change makes a new file.
    """
    path = path.with_name(f"{path.stem}-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}.safetensors")
    if not path.is_file():
        _write_latents(dataset, encode, path, chunk, progress)
    with safe_open(str(path), framework="pt") as file:
        captions = json.loads(file.metadata()["captions"])
        latents = file.get_tensor("latents")

    def batch(indices: Sequence[int]) -> ClipBatch:
        return ClipBatch(captions=tuple(captions[i] for i in indices), latents=latents[list(indices)].float())

    return batch


def _write_latents(
    dataset: ClipDataset,
    encode: Callable[[Tensor], Tensor],
    path: Path,
    chunk: int,
    progress: Callable[[int, int], None],
) -> None:
    captions: list[str] = []
    latents: list[Tensor] = []
    for start in range(0, len(dataset), chunk):
        clips = [dataset[i] for i in range(start, min(start + chunk, len(dataset)))]
        captions += [clip.caption for clip in clips]
        latents.append(encode(to_pixels([clip.frames for clip in clips])).half().cpu())
        progress(len(captions), len(dataset))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file({"latents": torch.cat(latents).contiguous()}, unfinished, metadata={"captions": json.dumps(captions)})
    unfinished.replace(path)
