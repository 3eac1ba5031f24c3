"""Draw the pictures of docs/ from a bundle.

    python scripts/draw_figures.py --model emoji --out docs

* ``steps.png``: one prompt a row, the middle frame after 1, 2, 4 and 8 evaluations, and the teacher's after 25 guided
  steps (AnimateLCM, figure 3).
* ``sum.png``: style from left to right (alpha), image acceleration from top to bottom (beta), one seed.
* ``race.webp``: teacher (top) and distilled model (bottom), each with as many steps as fit in the same time
  (AnimateLCM-2, figure 2).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from animatelcm import video
from animatelcm.assembly import load_sum
from animatelcm.model import VideoModel
from animatelcm.request import ModelSource, SampleRequest
from animatelcm.sampling import sample

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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw, and from what."""

    out: Path
    model: str = "emoji"
    style: str = "twemoji"
    seed: int = 0


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
    """Both in the time of the fast one's four steps: (F, 2 H, n W, 3), and what ran."""
    frames(fast, PROMPTS[0], seed)  # once for warmth
    began = time.perf_counter()
    top = [frames(fast, prompt, seed) for prompt in PROMPTS]
    budget = time.perf_counter() - began
    began = time.perf_counter()
    frames(slow, PROMPTS[0], seed, num_inference_steps=4)
    steps = max(1, int(4 * budget / len(PROMPTS) / (time.perf_counter() - began)))
    below = [frames(slow, prompt, seed, num_inference_steps=steps) for prompt in PROMPTS]
    facts = f"teacher (top): {steps} guided DDIM steps; distilled (bottom): 4; {budget / len(PROMPTS):.2f} s a clip"
    return np.concatenate([np.concatenate(below, axis=2), np.concatenate(top, axis=2)], axis=1), facts


def main(options: Options) -> None:
    source = ModelSource(model=options.model)
    fast, slow = load_sum(source), load_sum(replace(source, teacher=True))
    video.write_image(steps_figure(fast, slow, options.seed), options.out / "steps.png", overwrite=True)
    clip, facts = race(fast, slow, options.seed)
    video.write(clip, options.out / "race.webp", fps=fast.facts.fps, metadata={"what": facts}, overwrite=True)
    video.write_image(sum_figure(options), options.out / "sum.png", overwrite=True)
    sys.stdout.write(facts + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
