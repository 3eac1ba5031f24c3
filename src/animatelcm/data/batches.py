"""From data sets to batches: what objectives eat, and the latents that are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from animatelcm.data.clips import Clip
from animatelcm.rng import generator, sent


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
    text: Tensor | None = None
    """What the captions are embedded as, (B, L, D), where that was kept."""
    no_text: Tensor | None = None
    """The same of the empty caption, (1, L, D)."""
    sources: tuple[str, ...] = ()
    """Where the clips came from, if that is known."""

    def to(self, device: torch.device) -> ClipBatch:
        """The same on a device of its own memory, where nobody waits for it (``rng.sent``)."""
        if device.type != "cuda":
            return self
        named = {name: getattr(self, name) for name in ("pixels", "latents", "maps", "first", "text", "no_text")}
        moved = {name: sent(x, device) for name, x in named.items() if x is not None}
        return replace(self, **moved)


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
        said = {"captions": tuple(c.caption for c in clips), "sources": tuple(c.source for c in clips)}
        return ClipBatch(pixels=to_pixels([c.frames for c in clips]), **said)

    return batch


def with_first(batches: Batches, dataset: ClipDataset) -> Batches:
    """The same batches with the pixels of each clip's first frame."""

    def batch(indices: Sequence[int]) -> ClipBatch:
        found = batches(indices)
        if found.pixels is not None:
            return replace(found, first=found.pixels[:, :, 0])
        return replace(found, first=to_pixels([dataset[i].frames[:1] for i in indices]).squeeze(2))

    return batch


def with_maps(batches: Batches, maps: Callable[[int, str | None], np.ndarray]) -> Batches:
    """The same batches with control maps, which are read or made as they are needed (``data.looks``): they are cheap
    beside a training step, and large to keep. ``maps`` gives those of an index and its source, uint8 (F, H, W, 3)."""

    def batch(indices: Sequence[int]) -> ClipBatch:
        found = batches(indices)
        sources = found.sources or (None,) * len(indices)
        made = torch.from_numpy(np.stack([maps(i, source) for i, source in zip(indices, sources, strict=True)]))
        return replace(found, maps=made.permute(0, 4, 1, 2, 3).float().div(255))

    return batch


def draw_indices(length: int, count: int, *, seed: int, step: int, rank: int) -> list[int]:
    """The clips of one step: ``count`` indices below ``length``, with replacement, by address alone."""
    draws = torch.randint(length, (count,), generator=generator(seed, step, rank, "data"))
    return draws.tolist()


@contextmanager
def prefetched(
    batches: Callable[[int], ClipBatch], first: int, last: int, workers: int
) -> Iterator[Callable[[int], ClipBatch]]:
    """The same batches, asked for by numbers from ``first`` to below ``last``, one after another: while one is used,
    ``workers`` threads make the next ones, one more than they are. What fails there is raised where that batch is asked
    for."""
    if workers == 0:
        yield batches
        return
    pool = ThreadPoolExecutor(workers, "batches")
    ahead = {number: pool.submit(batches, number) for number in range(first, min(first + workers + 1, last))}

    def batch(number: int) -> ClipBatch:
        following = number + workers + 1
        if following < last and following not in ahead:
            ahead[following] = pool.submit(batches, following)
        return ahead.pop(number).result() if number in ahead else batches(number)

    try:
        yield batch
    finally:
        pool.shutdown(cancel_futures=True)
