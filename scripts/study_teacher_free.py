"""Print the tables of docs/math.md, "Without a teacher": what a loss teaches, link by link, were it trained for ever.

    python scripts/study_teacher_free.py

* how much of detail of standard deviation S a chain of steps keeps, for some k, on Gaussian data (closed form);
* how far f at the noisiest timestep is from the exact one on data with two modes, for some N, and the slope over N;
* the same for some c of pseudo-Huber.

That a training arrives there is for tests/test_teacher_free.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import DDIMSolver, ddim_step, to_eps

How = Literal["teacher", "squared", "absolute"] | float
"""A perfect teacher, or the clip's own noise under squared errors, absolute ones, or pseudo-Huber with that c."""
ROWS: dict[str, How] = {
    "a perfect teacher, any distance": "teacher",
    "the clip's own noise, squared errors": "squared",
    "the clip's own noise, absolute errors": "absolute",
}
SCHEDULE = NoiseSchedule()
COUNTS = (10, 25, 50, 100, 200)
STEPS_BACK = (100, 40, 20)
SPREADS = (1.0, 0.5, 0.2, 0.1)
CS = (0.001, 0.1, 0.3, 1.0)

SHARES, PLACES, WIDTH = np.array([0.3, 0.7]), np.array([-1.0, 1.0]), 0.5
"""The two modes."""
GRID = np.linspace(-7, 7, 2001)
"""Where f is known, x_t (G,); straight between."""
PARTS = 32
"""Points that stand for a normal distribution."""


def _cdf(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(x))).numpy()


QUANTILES = torch.special.ndtri((torch.arange(PARTS, dtype=torch.float64) + 0.5) / PARTS).numpy()
QUANTILES /= QUANTILES.std()


def level(t: int) -> tuple[float, float]:
    alpha, sigma = SCHEDULE.level(torch.tensor(t))
    return float(alpha), float(sigma)


def chain(n: int, k: int | None = None) -> list[int]:
    """The timesteps through which what is learned at the noisiest one comes from the data, ascending from 0; k is a
    multiple of the grid's stride."""
    back = dict(zip(*(times.tolist() for times in DDIMSolver(SCHEDULE, n, k).times(torch.arange(n))), strict=True))
    links = [max(back)]
    while links[-1]:
        links.append(back[links[-1]])
    return links[::-1]


def kept(n: int, k: int, spread: float) -> float:
    """The share of its standard deviation that Gaussian data comes out with: a product of cosines."""
    angles = [math.atan2(sigma, spread * alpha) for alpha, sigma in map(level, chain(n, k))]
    return math.prod(math.cos(after - before) for before, after in pairwise(angles))


def posterior(t: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Of x_0 given x_t = GRID: the modes' shares (2, G), means (2, G) and their standard deviation."""
    alpha, sigma = level(t)
    scale = math.hypot(alpha * WIDTH, sigma)
    away = GRID - alpha * PLACES[:, None]
    weights = SHARES[:, None] * np.exp(-0.5 * (away / scale) ** 2)
    return weights / weights.sum(0), PLACES[:, None] + alpha * WIDTH**2 / scale**2 * away, WIDTH * sigma / scale


def earlier(x_0: np.ndarray, t: int, s: int) -> np.ndarray:
    """x_s (..., G): one DDIM step from x_t = GRID, made from x_0 (..., G)."""
    x_t, clean = (torch.from_numpy(np.ascontiguousarray(x)) for x in np.broadcast_arrays(GRID, x_0))
    begin, end = (SCHEDULE.level(torch.tensor(i)) for i in (t, s))
    return ddim_step(x_t, to_eps(x_t, clean, begin), begin, end).numpy()


def learned(n: int, how: How) -> np.ndarray:
    """f at the noisiest timestep, on GRID: link after link, what minimises the loss given the f before."""
    f = GRID.copy()
    for s, t in pairwise(chain(n)):
        shares, means, spread = posterior(t)
        if how == "teacher":
            f = np.interp(earlier((shares * means).sum(0), t, s), GRID, f)
        elif how == "absolute":  # f rises: the median of f(x_s) is f at the median
            f = np.interp(earlier(median(shares, means, spread), t, s), GRID, f)
        else:
            values = np.interp(earlier(means[:, None] + spread * QUANTILES[:, None], t, s), GRID, f)
            f = least(values, np.repeat(shares[:, None], PARTS, 1) / PARTS, how)
    return f


def median(shares: np.ndarray, means: np.ndarray, spread: float) -> np.ndarray:
    low, high = means.min(0) - 8 * spread, means.max(0) + 8 * spread
    for _ in range(50):
        middle = (low + high) / 2
        below = (shares * _cdf((middle - means) / spread)).sum(0) < 0.5
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def least(values: np.ndarray, weights: np.ndarray, how: How) -> np.ndarray:
    """The point (G,) of the least mean loss from values (2, PARTS, G)."""
    if how == "squared":
        return (weights * values).sum((0, 1))
    low, high = values.min((0, 1)), values.max((0, 1))
    for _ in range(25):
        middle = (low + high) / 2
        away = values - middle
        rises = (weights * away / np.sqrt(away**2 + how**2)).sum((0, 1)) > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return middle


def error(n: int, how: How) -> tuple[float, float]:
    """(root mean square distance from the exact f, mean of f) over x_t; the exact f keeps every quantile."""

    def below(x: np.ndarray, at: int) -> np.ndarray:
        alpha, sigma = level(at)
        return (SHARES[:, None] * _cdf((x - alpha * PLACES[:, None]) / math.hypot(alpha * WIDTH, sigma))).sum(0)

    t, f, fine = chain(n)[-1], learned(n, how), np.linspace(-5, 5, 100_001)
    exact = np.interp(below(GRID, t), below(fine, 0), fine)
    density = np.gradient(below(GRID, t))
    return float(np.sqrt((density * (f - exact) ** 2).sum())), float((density * f).sum())


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _head(cells: Sequence[object]) -> str:
    return "\n" + _line(cells) + "|" + "---|" * len(cells) + "\n"


def main() -> None:
    write = sys.stdout.write
    write(_head(["kept of detail, N = 50", *(f"S = {spread:g}" for spread in SPREADS)]))
    for k in STEPS_BACK:
        write(_line([f"k = {k}", *(f"{kept(50, k, spread):.0%}" for spread in SPREADS)]))
    write(
        _head(["root mean square error of f at the noisiest timestep", *(f"N = {n}" for n in COUNTS), "slope", "mean"])
    )
    for name, how in ROWS.items():
        errors, means = zip(*(error(n, how) for n in COUNTS), strict=True)
        slope = np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
        write(_line([name, *(f"{e:.3f}" for e in errors), f"{slope:.2f}", f"{means[-1]:.2f}"]))
    write(_head(["the clip's own noise, pseudo-Huber, N = 25", *(f"c = {c:g}" for c in CS)]))
    write(_line(["root mean square error", *(f"{error(25, c)[0]:.3f}" for c in CS)]))


if __name__ == "__main__":
    main()
