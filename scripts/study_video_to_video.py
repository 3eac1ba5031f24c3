"""What a clip to begin from leaves of itself, and what the prompt makes of it, over strengths.

    python scripts/study_video_to_video.py --out docs --clips 64

Each of the evaluation's real clips under a named motion is begun from with the prompt of another subject in its place:
style, motion and background stay. A table goes to the terminal, a line a strength, without control and with the clip's
own edges:

* asked, kept: shares of judged frames that show the subject that was asked for, and that of the clip;
* motion: clips whose motion is still the clip's; amount: of motion, over the clip's;
* edges: F1 of edges with the clip's, at one pixel; PSNR with the clip in dB.

``v2v.png``: some of the clips, then what each strength makes of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from animatelcm import video
from animatelcm.bundle import load
from animatelcm.condition import Condition, Control
from animatelcm.control_maps import made as maps_of
from animatelcm.data.emoji import STYLE_WORDS, Shot, caption, drawn
from animatelcm.evaluate.features import JUDGED
from animatelcm.evaluate.following import edge_f1
from animatelcm.evaluate.judge import PROMPT_SEED, Judge, Protocol
from animatelcm.evaluate.likeness import psnr
from animatelcm.evaluate.motion import classify, motion_amount
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample

HEAD = "| strength | edges given | asked | kept | motion | amount | edges | PSNR |\n|--:|---|--:|--:|--:|--:|--:|--:|\n"
SHIFT = 5
"""How many shots further on the subject comes from."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to try, and where the picture goes."""

    out: Path
    clips: int = 64
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    steps: int = 4
    shown: tuple[int, ...] = (0, 2, 4)
    """Of the clips, in their order."""


class Source(NamedTuple):
    shot: Shot
    frames: np.ndarray
    slug: str
    prompt: str


def sources(protocol: Protocol) -> list[Source]:
    """Real clips under a named motion, each with another subject to be made of it."""
    data = protocol.data(PROMPT_SEED, 4 * protocol.clips)
    shots = [shot for shot in map(data.shot, range(len(data))) if shot.named]
    found = []
    for shot, other in list(zip(shots, [*shots[SHIFT:], *shots[:SHIFT]], strict=True))[: protocol.clips]:
        style = shot.style if STYLE_WORDS.get(shot.style, " ") in shot.caption.split() else ""
        ground = re.search(r" on an? (\w+) background", shot.caption)
        said = {"style": style, "motion": shot.named, "colour": ground[1] if ground else "white"}
        prompt = caption(protocol.pack.concepts[other.slug].name.lower(), **said)
        found.append(Source(shot, drawn(shot, protocol.pack), other.slug, prompt))
    return found


def row(judge: Judge, given: Sequence[Source], clips: Sequence[np.ndarray]) -> dict[str, float]:
    seen = [[judge.classifier.concepts[i] for i in judge.classifier.predict(clip[JUDGED])] for clip in clips]
    pairs = list(zip(given, clips, strict=True))
    return {
        "asked": float(np.mean([[slug == one.slug for slug in row] for one, row in zip(given, seen, strict=True)])),
        "kept": float(np.mean([[slug == one.shot.slug for slug in row] for one, row in zip(given, seen, strict=True)])),
        "motion": float(np.mean([classify(clip) == one.shot.named for one, clip in pairs])),
        "amount": sum(motion_amount(clip) for clip in clips) / sum(motion_amount(one.frames) for one in given),
        "edges": float(np.mean([edge_f1(clip, one.frames).mean() for one, clip in pairs])),
        "psnr": float(np.mean([psnr(clip, one.frames) for one, clip in pairs])),
    }


def main(options: Options) -> None:
    model, judge = load("emoji"), Judge(Protocol(clips=options.clips, real=2), options.out)
    given, sheets = sources(judge.protocol), [[] for _ in options.shown]
    sys.stdout.write(HEAD)
    for strength in options.strengths:
        for steered in (False, True):
            asked = {"strength": strength, "num_inference_steps": options.steps}
            clips = []
            for seed, one in enumerate(given):
                controls = (Control("edge", maps_of("edge", one.frames)),) if steered else ()
                request = SampleRequest(prompt=one.prompt, seed=seed, **asked)
                clips.append(sample(model, request, condition=Condition(video=one.frames, controls=controls))[0].frames)
            found = row(judge, given, clips)
            shares = " | ".join(f"{100 * found[name]:.0f} %" for name in ("asked", "kept", "motion"))
            rest = f"{found['amount']:.2f} | {found['edges']:.2f} | {found['psnr']:.1f} dB"
            sys.stdout.write(f"| {strength:g} | {'yes' if steered else 'no'} | {shares} | {rest} |\n")
            sys.stdout.flush()
            if not steered:
                for sheet, i in zip(sheets, options.shown, strict=True):
                    sheet.append((f"{strength:g}: {given[i].prompt}", clips[i]))
    rows = []
    for sheet, i in zip(sheets, options.shown, strict=True):
        rows += [(given[i].shot.caption, given[i].frames), *sheet]
    picture = video.contact_sheet([frames for _, frames in rows], [said for said, _ in rows])
    video.write_image(picture, options.out / "v2v.png", overwrite=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
