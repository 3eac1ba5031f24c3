"""How far a figure may be off because it is of these clips and not of others: the bootstrap (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from animatelcm.rng import generator


class Interval(NamedTuple):
    """Where a figure lies, in its units, in ``level`` of such measurements, each of as many other clips."""

    low: float
    high: float
    bias: float
    """Resampled figures lie above the figure by this much on average. It estimates by how much the figure lies above
    that of endless clips, and is too small where features have more dimensions than there are clips."""
    level: float
    resamples: int
    seed: int


class Difference(NamedTuple):
    """By how much a figure of one set of clips lies above that of another, of the same prompts and seeds."""

    value: float
    deviation: float
    """Its standard deviation, were the prompts others: of draws of prompts, each for both sets at once."""
    low: float
    high: float
    """Of its interval, as in ``Interval``."""
    level: float
    resamples: int
    seed: int


def interval(
    statistic: Callable[..., float],
    *samples: Tensor,
    value: float | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The interval of ``statistic(*samples)``, ``value`` where that is known: each sample (N, ...) is drawn anew from
    itself, N rows with replacement, ``resamples`` times.

    Quantiles are taken about the mean of what is drawn. A Frechet distance grows where rows repeat, as covariances
    lose rank, so that all of it may lie above the figure: plain quantiles would not even hold the figure itself.
    Of Gaussians in 40 dimensions, 95 % intervals held the mean of as many other clips in 92 % of 80 trials (400 and 400
    clips; plain ones 36 %), 96 % of 100 (60 and 200; 3 %), and all of 80, being too wide (30 and 60; none).
    Draw i of sample j depends on (seed, i, j) alone. Raises ValueError for a sample of fewer than two rows.
    """
    _check(samples, level, resamples)
    value = statistic(*samples) if value is None else value
    drawn = _drawn(statistic, samples, resamples, seed)
    low, high = _around(value, drawn, level)
    return Interval(low, high, float(drawn.mean()) - value, level, resamples, seed)


def paired(
    first: Callable[[Tensor], float],
    second: Callable[[Tensor], float],
    n: int,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """How far a figure of the ``second`` n clips lies above that of the ``first``, clip i of both being of one prompt
    and seed; each is a function of the clips' numbers, int64 (n,), of which a draw has some several times.

    What prompts do to both sets alike cancels in the difference of each draw, but not in that of two intervals. Of
    means, the deviation is that of the n differences over the root of n.
    """

    def difference(rows: Tensor) -> float:
        return second(rows) - first(rows)

    clips = torch.arange(n)
    _check([clips], level, resamples)
    value, drawn = difference(clips), _drawn(difference, [clips], resamples, seed)
    return Difference(value, float(drawn.std()), *_around(value, drawn, level), level, resamples, seed)


def average(sample: Tensor) -> float:
    """A figure of clips (N,), a number each; or of (N, 2), the ratio of the means of two numbers each."""
    means = sample.double().mean(0)
    return float(means[0] / means[1]) if sample.ndim == 2 else float(means)


def ends(
    statistic: Callable[[Tensor], float],
    sample: Tensor,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = 1000,
) -> tuple[float, float] | None:
    """Of an interval over the rows of a sample, of a figure within bounds; None where there are too few."""
    if len(sample) < 2:
        return None
    found = interval(statistic, sample, resamples=resamples)
    return max(found.low, bounds[0]), min(found.high, bounds[1])


def _check(samples: Sequence[Tensor], level: float, resamples: int) -> None:
    if not 0 < level < 1 or resamples < 2:
        raise ValueError(
            f"level={level}, resamples={resamples}: choose a level between 0 and 1, and 2 resamples or more"
        )
    if short := [len(sample) for sample in samples if len(sample) < 2]:
        raise ValueError(f"an interval needs two rows at least in each sample, got {short[0]}; measure more clips")


def _drawn(statistic: Callable[..., float], samples: Sequence[Tensor], resamples: int, seed: int) -> Tensor:
    """The statistic of each draw: float64 (resamples,)."""
    return torch.tensor(
        [statistic(*(_again(sample, seed, i, j) for j, sample in enumerate(samples))) for i in range(resamples)],
        dtype=torch.float64,
    )


def _around(value: float, drawn: Tensor, level: float) -> tuple[float, float]:
    """The ends of an interval: quantiles about the mean, moved to the value."""
    ends = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    low, high = (value + ends - drawn.mean()).tolist()
    return low, high


def _again(sample: Tensor, seed: int, draw: int, number: int) -> Tensor:
    """As many rows of a sample, drawn with replacement."""
    source = generator(seed, draw, number, "bootstrap")
    return sample[torch.randint(len(sample), (len(sample),), generator=source)]
