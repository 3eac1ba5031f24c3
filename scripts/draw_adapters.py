"""Draw what adapters do, before and after their adaptation (AnimateLCM, figure 6).

    python scripts/draw_adapters.py --out docs --model runs/out/controlnet_emoji/model --kind pose \
        --adapted runs/out/controlnet_lora_emoji/model --clips 12 17 6 19

* ``i2v.png``: a picture from data that no recipe trains on, and eight frames of the clip made of it, a row each.
* ``control.png``: for each clip its maps, the clip that the adapter as it was makes of them, and the adapted one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from animatelcm import video
from animatelcm.condition import Condition
from animatelcm.data.emoji import drawn
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.report import Steer
from animatelcm.evaluate.steered import condition
from animatelcm.model import VideoModel
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample

COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw, and from what."""

    out: Path
    model: str = "emoji"
    adapted: str = ""
    """The same model with the adapter after its adaptation; "" leaves control.png out."""
    steps: int = 2
    """Of the clips in i2v.png: two keep a picture best."""
    kind: Steer = "edge"
    clips: tuple[int, ...] = (1, 3, 6, 8, 12, 17)
    """Of the evaluation's prompts, in their order."""


def made(model: VideoModel, prompt: str, given: Condition, seed: int, steps: int | None = None) -> np.ndarray:
    request = SampleRequest(prompt=prompt, seed=seed, num_inference_steps=steps)
    return sample(model, request, condition=given)[0].frames


def i2v_figure(model: VideoModel, options: Options) -> np.ndarray:
    protocol = Protocol(clips=max(options.clips) + 1, real=2)
    data, rows, captions = protocol.data(PROMPT_SEED, protocol.clips), [], []
    for i in options.clips:
        given = condition(data.shot(i), protocol.pack, "i2v")
        clip = made(model, data.shot(i).caption, given, seed=i, steps=options.steps)
        shown = np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)
        rows.append(np.concatenate([given.image[None], clip[shown]]))
        captions.append(data.shot(i).caption)
    return video.contact_sheet(rows, captions, columns=COLUMNS + 1)


def control_figure(before: VideoModel, after: VideoModel, options: Options) -> np.ndarray:
    protocol = Protocol(clips=max(options.clips) + 1, real=2)
    data, rows, captions = protocol.data(PROMPT_SEED, protocol.clips), [], []
    for i in options.clips:
        shot = data.shot(i)
        given = condition(shot, protocol.pack, options.kind)
        clips = [made(model, shot.caption, given, seed=i) for model in (before, after)]
        rows += [drawn(shot, protocol.pack), given.controls[0].maps, *clips]
        captions += [shot.caption, f"{options.kind} maps", "adapter as it was", "adapted"]
    return video.contact_sheet(rows, captions, columns=COLUMNS)


def main(options: Options) -> None:
    from animatelcm.bundle import load

    model = load(options.model)
    if "i2v" in model.adapters:
        video.write_image(i2v_figure(model, options), options.out / "i2v.png", overwrite=True)
    if options.adapted:
        sheet = control_figure(model, load(options.adapted), options)
        video.write_image(sheet, options.out / "control.png", overwrite=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
