"""How the clip's own noise, one sample of the score, compares with a trained teacher's prediction (eq. 11-12).

Noise eps was added to a clip. Given x_t, its mean is the best prediction there is. So for a perfect teacher eps_phi the
error eps - eps_phi has no part that x_t tells, and the regression of eps on eps_phi, <eps, eps_phi> / |eps_phi|^2, has
the slope 1. Guidance is not that mean: its slope says how much less than the guided prediction the sample holds.
"""

from __future__ import annotations

from typing import Any

import torch

from animatelcm.assembly import load_sum
from animatelcm.data.batches import to_pixels
from animatelcm.evaluate.judge import PROMPT_SEED, Progress, Protocol
from animatelcm.model_source import ModelSource
from animatelcm.rng import generator
from animatelcm.solver import DDIMSolver, ddim_step, guided

POINTS = 9
"""Timesteps of the grid, from the first to the last."""
SCALE = 4.0
"""Of the guided teacher."""


@torch.inference_mode()
def measure(clips: int, progress: Progress) -> dict[str, Any]:
    """Of held-out clips, at each timestep: slopes over the teacher's prediction with and without guidance, the
    root mean square of eps - eps_phi, and how far apart one DDIM step of both ends, in latents of variance 1."""
    model = load_sum(ModelSource(teacher=True))
    data = Protocol(clips=clips).data(PROMPT_SEED, clips)
    drawn = [data[i] for i in range(clips)]
    solver = DDIMSolver(model.schedule, model.schedule.solver_steps)
    chosen = torch.linspace(0, solver.n - 1, POINTS).round().long()
    times, earlier = solver.times(chosen)
    sums = torch.zeros(POINTS, 6, dtype=torch.float64)
    for number, clip in enumerate(drawn):
        progress("teacher and sample", number, clips)
        x_0 = model.encode(to_pixels([clip.frames]))
        text = model.embed(["", clip.caption])
        for i, (t, s) in enumerate(zip(times, earlier, strict=True)):
            noise = torch.randn(x_0.shape, generator=generator(0, number, i, "estimate"))
            x = model.schedule.add_noise(x_0, noise, t[None])
            both = model.predict(torch.cat([x, x]), t.expand(2), text=text, motion=True).float()
            plain, strong = both[1:], guided(both[1:], both[:1], SCALE)
            begin, end = model.schedule.level(t[None]), model.schedule.level(s[None])
            apart = ddim_step(x, noise, begin, end) - ddim_step(x, plain, begin, end)
            parts = (noise * plain, plain**2, noise * strong, strong**2, (noise - plain) ** 2, apart**2)
            sums[i] += torch.stack([part.double().mean() for part in parts])
    means = sums / clips
    return {
        "clips": clips,
        "guidance": SCALE,
        "t": times.tolist(),
        "s": earlier.tolist(),
        "slope_unguided": (means[:, 0] / means[:, 1]).tolist(),
        "slope_guided": (means[:, 2] / means[:, 3]).tolist(),
        "noise_error": means[:, 4].sqrt().tolist(),
        "step_apart": means[:, 5].sqrt().tolist(),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown, a line a timestep."""
    names = {
        "t": "t",
        "s": "back to",
        "slope_unguided": "slope, unguided",
        "slope_guided": f"slope, guidance {found['guidance']:g}",
        "noise_error": "rms of eps - eps_phi",
        "step_apart": "rms between the earlier points",
    }
    head = f"| {' | '.join(names.values())} |\n|{'--:|' * len(names)}\n"
    rows = zip(*(found[name] for name in names), strict=True)
    return head + "".join(f"| {' | '.join(f'{value:.3g}' for value in row)} |\n" for row in rows)
