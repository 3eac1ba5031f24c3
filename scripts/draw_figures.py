"""Draw the pictures of docs/ from a bundle.

    python scripts/draw_figures.py --model emoji --out docs

* ``steps.png``: one prompt a row, the middle frame after 1, 2, 4 and 8 evaluations, and the teacher's after 25 guided
  steps (AnimateLCM, figure 3).
* ``sum.png``: style from left to right (alpha), image acceleration from top to bottom (beta), one seed.
* ``race.webp``: teacher (top) and distilled model (bottom), each with as many steps as fit in the same time
  (AnimateLCM-2, figure 2).
* ``teacher-free-bias.png``: how far one sample of the score leads from the exact earlier point (docs/math.md), and the
  mean of many, by the formula and measured; it needs no model: ``--only teacher-free-bias``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from animatelcm import video
from animatelcm.assembly import load_sum
from animatelcm.consistency import renoise
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.sampling import sample
from animatelcm.schedule import NoiseSchedule
from animatelcm.solver import DDIMSolver, ddim_step, to_eps

PROMPTS = (
    "a parrot",
    "a cartoon fox bouncing on a blue background",
    "a flat red apple spinning on a yellow background",
    "a 3d rocket sliding up",
    "a penguin shaking on a pink background",
    "an octopus growing on a green background",
)
STEPS = (1, 2, 4, 8)
SCALES = (0.0, 0.4, 0.8, 1.2)
GRIDS = (10, 25, 50, 100, 200)
SPREADS = (1.0, 0.2)
DOTS = 5
"""Timesteps of each grid at which the deviation is measured too, from the first to the last."""
SAMPLES = 100_000
COUNTS = tuple(4**i for i in range(8))
"""Samples of the score at one x_t, whose mean is held against the exact one."""
PLACES = 400
"""So many x_t for that."""
INKS = ("#fdae6b", "#f16913", "#a63603", "#6a51a3", "#08306b")
Figure = Literal["steps", "race", "sum", "teacher-free-bias"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw, and from what."""

    out: Path
    model: str = "emoji"
    style: str = "twemoji"
    seed: int = 0
    only: tuple[Figure, ...] = ("steps", "race", "sum", "teacher-free-bias")


def frames(model: VideoModel, prompt: str, seed: int, **settings: object) -> np.ndarray:
    return sample(model, SampleRequest(prompt=prompt, seed=seed, **settings))[0].frames


def steps_figure(fast: VideoModel, slow: VideoModel, seed: int) -> np.ndarray:
    rows = []
    for prompt in PROMPTS:
        clips = [frames(fast, prompt, seed, num_inference_steps=n) for n in STEPS] + [frames(slow, prompt, seed)]
        rows.append(np.stack([clip[len(clip) // 2] for clip in clips]))
    return video.contact_sheet(rows, PROMPTS, columns=len(STEPS) + 1)


def sum_figure(options: Options, prompt: str = "a fox") -> np.ndarray:
    rows = []
    for beta in SCALES:
        sources = [ModelSource(model=options.model, style=(f"{options.style}:{a}",), image_scale=beta) for a in SCALES]
        clips = [frames(load_sum(source), prompt, options.seed) for source in sources]
        rows.append(np.stack([clip[len(clip) // 2] for clip in clips]))
    return video.contact_sheet(rows, columns=len(SCALES))


def race(fast: VideoModel, slow: VideoModel, seed: int) -> tuple[np.ndarray, str]:
    """Both in about the time of the fast one's four steps: (F, 2 H, n W, 3), and what ran."""
    frames(fast, PROMPTS[0], seed)  # once for warmth
    began = time.perf_counter()
    top = [frames(fast, prompt, seed) for prompt in PROMPTS]
    budget = time.perf_counter() - began
    seconds: dict[int, float] = {}
    for count in (1, 4, 1, 4):  # the first two for warmth; what is the same for any number of steps cancels out
        began = time.perf_counter()
        frames(slow, PROMPTS[0], seed, num_inference_steps=count, spacing="trailing")
        seconds[count] = time.perf_counter() - began
    each = (seconds[4] - seconds[1]) / 3
    steps = max(1, 1 + round((budget / len(PROMPTS) - seconds[1]) / each))
    below = [frames(slow, prompt, seed, num_inference_steps=steps, spacing="trailing") for prompt in PROMPTS]
    each_took = f"{seconds[1] + (steps - 1) * each:.2f} and {budget / len(PROMPTS):.2f} s a clip"
    facts = f"teacher (top): {steps} guided DDIM steps, trailing; distilled (bottom): 4; {each_took}"
    return np.concatenate([np.concatenate(below, axis=2), np.concatenate(top, axis=2)], axis=1), facts


def deviation(schedule: NoiseSchedule, t: torch.Tensor, s: torch.Tensor, spread: float) -> torch.Tensor:
    """Root mean square of x_s with the clip's own noise less x_s with the exact score, for data N(m, spread^2)."""
    (a_t, s_t), (a_s, s_s) = schedule.level(t), schedule.level(s)
    return spread * (a_s * s_t - a_t * s_s) / torch.hypot(spread * a_t, s_t)


def measured(schedule: NoiseSchedule, t: torch.Tensor, s: torch.Tensor, spread: float) -> torch.Tensor:
    """The same of SAMPLES clips x_0 of one number, noised to each t (P,) and, with the same noise, to s (P,)."""
    source = generator(0, 0, 0, "deviation")
    x_0, eps = (torch.randn(len(t), SAMPLES, generator=source) for _ in range(2))
    x_0 = spread * x_0
    x_t = schedule.add_noise(x_0, eps, t)
    at_t, at_s = schedule.level(t), schedule.level(s)
    alpha, sigma = at_t.over(x_t)
    best = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x_t  # E[x_0 | x_t]
    exact = ddim_step(x_t, to_eps(x_t, best, at_t), at_t, at_s)
    return (renoise(x_0, eps, s, schedule) - exact).square().mean(1).sqrt()


Curve = tuple[np.ndarray, np.ndarray]
"""Timesteps (P,) and values (P,)."""


def teacher_free_figure(schedule: NoiseSchedule) -> tuple[np.ndarray, float]:
    """One panel for each of SPREADS, one line for each of GRIDS: deviation over the timestep; dots are measured.

    Also the largest relative difference between a dot and its line.
    """
    panels, away = [], 0.0
    for spread in SPREADS:
        lines, dots = [], []
        for n in GRIDS:
            t, s = DDIMSolver(schedule, n).times(torch.arange(n))
            values, some = deviation(schedule, t, s, spread), torch.linspace(0, n - 1, DOTS).long()
            found = measured(schedule, t[some], s[some], spread)
            away = max(away, float((found / values[some] - 1).abs().max()))
            lines.append((t.numpy(), values.numpy()))
            dots.append((t[some].numpy(), found.numpy()))
        panels.append(_plot(lines, dots, f"one sample's deviation, data of standard deviation {spread:g}", OVER_T))
    lines, dots = zip(*(averaged(schedule, n) for n in GRIDS), strict=True)
    panels.append(_plot(lines, dots, f"mean of samples at one x_t, t near 500, the same of {SPREADS[0]:g}", OVER_COUNT))
    return np.concatenate(panels, axis=1), away


def averaged(schedule: NoiseSchedule, n: int) -> tuple[Curve, Curve]:
    """How far the mean of COUNTS samples of x_s is from the exact one, root mean square over PLACES, and over how many:
    base-10 logarithms, by the formula (one sample's over the square root of their number) and measured."""
    t, s = (times[n // 2 : n // 2 + 1] for times in DDIMSolver(schedule, n).times(torch.arange(n)))
    source, spread = generator(0, 0, 0, "averages"), SPREADS[0]
    at_t, at_s = schedule.level(t), schedule.level(s)
    alpha, sigma = (float(part) for part in at_t)
    variance = alpha**2 * spread**2 + sigma**2
    x_t = variance**0.5 * torch.randn(1, PLACES, generator=source)
    best = alpha * spread**2 / variance * x_t  # E[x_0 | x_t]
    x_0 = best + spread * sigma / variance**0.5 * torch.randn(COUNTS[-1], PLACES, generator=source)
    x_s = renoise(x_0, (x_t - alpha * x_0) / sigma, s.expand(COUNTS[-1]), schedule)
    exact = ddim_step(x_t, to_eps(x_t, best, at_t), at_t, at_s)
    found = [float((x_s[:count].mean(0) - exact).square().mean().sqrt()) for count in COUNTS]
    counts = np.log10(COUNTS)
    line = np.log10(float(deviation(schedule, t, s, spread))) - counts / 2
    return (counts, line), (counts, np.log10(found))


class Axes(NamedTuple):
    """What a panel spans; ticks are (value, label)."""

    right: float
    low: float
    high: float
    x_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


OVER_T = Axes(
    1000,
    0,
    0.35,
    "timestep t",
    tuple((t, str(t)) for t in range(0, 1001, 250)),
    tuple((i / 10, f"0.{i}") for i in range(4)),
)
OVER_COUNT = Axes(
    float(np.log10(COUNTS[-1])),
    -4.2,
    0.6,
    "samples",
    tuple((float(np.log10(count)), f"{count:,}") for count in COUNTS[::2]),
    tuple((float(-i), f"{10.0**-i:g}") for i in range(5)),
)


def _plot(lines: Sequence[Curve], dots: Sequence[Curve], title: str, axes: Axes) -> np.ndarray:
    """Curves labelled by their N: uint8 (340, 480, 3), drawn twice as large."""
    width, height, left, low, right, high = 960, 680, 110, 590, 930, 80
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=26)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / axes.right, (y - axes.low) / (axes.high - axes.low)
        return left + (right - left) * across, low - (low - high) * up

    draw.text((left, 24), title, "black", font)
    for value, label in axes.y_ticks:
        draw.line([place(0, value), place(axes.right, value)], "#dddddd", 2)
        draw.text((left - 14, place(0, value)[1]), label, "black", font, anchor="rm")
    for value, label in axes.x_ticks:
        draw.text((place(value, axes.low)[0], low + 14), label, "black", font, anchor="mt")
    draw.text(((left + right) / 2, height - 14), axes.x_label, "black", font, anchor="mb")
    for i, (n, ink, line, measurements) in enumerate(zip(GRIDS, INKS, lines, dots, strict=True)):
        draw.line([place(*point) for point in zip(*map(np.ndarray.tolist, line), strict=True)], ink, 5, joint="curve")
        y = high + 20 + 38 * i
        draw.line([(right - 190, y), (right - 130, y)], ink, 6)
        draw.text((right - 115, y), f"N = {n}", "black", font, anchor="lm")
        for point in zip(*map(np.ndarray.tolist, measurements), strict=True):
            draw.circle(place(*point), 9, ink, "white", 2)
    y = high + 20 + 38 * len(GRIDS)
    draw.circle((right - 160, y), 9, "black", "white", 2)
    draw.text((right - 115, y), "measured", "black", font, anchor="lm")
    return np.array(sheet.resize((width // 2, height // 2), Image.Resampling.LANCZOS))


def main(options: Options) -> None:
    if "teacher-free-bias" in options.only:
        picture, away = teacher_free_figure(NoiseSchedule())
        video.write_image(picture, options.out / "teacher-free-bias.png", overwrite=True)
        sys.stdout.write(f"teacher-free-bias.png: measured within {away:.1%} of the formula\n")
    if set(options.only) <= {"teacher-free-bias"}:
        return
    source = ModelSource(model=options.model)
    fast, slow = load_sum(source), load_sum(replace(source, teacher=True))
    if "steps" in options.only:
        video.write_image(steps_figure(fast, slow, options.seed), options.out / "steps.png", overwrite=True)
    if "race" in options.only:
        clip, facts = race(fast, slow, options.seed)
        video.write(clip, options.out / "race.webp", fps=fast.facts.fps, metadata={"what": facts}, overwrite=True)
        sys.stdout.write(facts + "\n")
    if "sum" in options.only:
        video.write_image(sum_figure(options), options.out / "sum.png", overwrite=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
