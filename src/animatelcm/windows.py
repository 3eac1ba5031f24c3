"""Videos longer than a network knows: overlapping windows of frames, whose predictions are averaged.

The mean of what windows predict is MultiDiffusion's (Bar-Tal et al. 2023), along time: ComfyUI's static context windows
with the pyramid's weights. Noise that windows share keeps their subject, FreeNoise's (Qiu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Predict = Callable[[Tensor, Sequence[range]], Tensor]
"""(latents of n windows, one after the other (n * B, C, L, h, w), their frames) -> predictions of the same shape."""


def windows(frames: int, length: int, overlap: int) -> list[range]:
    """Windows of ``length`` frames that cover all, each sharing ``overlap`` with the next one.

    The last one is moved back to end with the video, and shares more; a video no longer than one window is one. Raises
    ValueError for an overlap that leaves no way forward.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"overlap={overlap}, but windows are {length} frames long; choose 0..{length - 1}")
    if frames <= length:
        return [range(frames)]
    starts = [*range(0, frames - length, length - overlap), frames - length]
    return [range(start, start + length) for start in starts]


def weights(spans: Sequence[range]) -> Tensor:
    """What share each of its frames takes of each window: (windows, length) float64, CPU; 1 in all at every frame.

    A window's share rises and falls in a straight line where its neighbours reach into it.
    """
    place = torch.arange(1, len(spans[0]) + 1, dtype=torch.float64, device="cpu")
    shared = [before.stop - after.start for before, after in pairwise(spans)]
    rows = [
        torch.minimum(place / (left + 1), place.flip(0) / (right + 1)).clamp(max=1)
        for left, right in zip([0, *shared], [*shared, 0], strict=True)
    ]
    total = torch.zeros(spans[-1].stop, dtype=torch.float64, device="cpu")
    for span, row in zip(spans, rows, strict=True):
        total[span.start : span.stop] += row
    return torch.stack([row / total[span.start : span.stop] for span, row in zip(spans, rows, strict=True)])


def in_windows(predict: Predict, x: Tensor, spans: Sequence[range], batch: int = 1) -> Tensor:
    """Latents x (B, C, F, h, w) -> the weighted mean of what ``predict`` says of their windows, ``batch`` at a time.

    One window is predicted as it is. Frames on which windows agree keep exactly what was said.
    """
    if len(spans) == 1:
        return predict(x, spans)
    shares = weights(spans)
    heard = shares.new_zeros(x.shape[2])  # of each frame's weight, so far
    mean = torch.zeros_like(x)
    for first in range(0, len(spans), batch):
        group = spans[first : first + batch]
        found = predict(torch.cat([x[:, :, span.start : span.stop] for span in group]), group)
        for span, share, part in zip(group, shares[first : first + batch], found.chunk(len(group)), strict=True):
            here = slice(span.start, span.stop)
            heard[here] += share
            ratio = (share / heard[here]).to(part.dtype).to(part.device)
            mean[:, :, here].lerp_(part, ratio[:, None, None])
    return mean


def freenoise(frames: int, length: int, source: torch.Generator) -> Tensor:
    """Which frame's noise each frame takes: int64 (frames,), the first ``length`` their own.

    The next ones take it again block by block, a quarter of a window each, shuffled inside: a window that begins with
    a block holds every noise once, as the first one does.
    """
    order, block = torch.arange(min(frames, length), device="cpu"), max(1, length // 4)
    while len(order) < frames:
        again = order[len(order) - length :][:block]
        order = torch.cat([order, again[torch.randperm(len(again), generator=source)]])
    return order[:frames]
