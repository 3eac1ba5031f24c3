"""What was made, of what: a video, its recipe, and the command line that makes it again."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from animatelcm.model_source import ModelSource, in_full
from animatelcm.request import SampleRequest

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames uint8 (F, H, W, 3) at ``fps``, and the resolved request and model that made them."""

    frames: np.ndarray
    fps: float
    request: SampleRequest
    model: str
    evaluations: int
    """Network evaluations it took, a guided one counted twice."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    precision: str = ""
    """Numbers that the network computed with: fp16, bf16 or fp32; empty where nobody said."""

    def recipe(self, source: ModelSource, version: str) -> dict[str, str]:
        """What is written into the file (``recipe``)."""
        return recipe(self.request, source, version, self.precision)


def recipe(request: SampleRequest, source: ModelSource, version: str, precision: str = "") -> dict[str, str]:
    """What files say of how they were made: every field of request and source, the numbers that the network computed
    with where they are known, the version, the command."""
    made = {**dataclasses.asdict(request), **dataclasses.asdict(source)}
    made |= {"precision": precision} if precision else {}
    made |= {key: " ".join(made[key]) for key in ("style", "adapter", "embedding", "control")}
    facts = {"animatelcm": version, "command": command(request, source, precision)}
    return {key: str(value) for key, value in made.items()} | facts


def command(request: SampleRequest, source: ModelSource, precision: str = "") -> str:
    """The command line that makes a resolved request again, on any machine where it says the ``precision``, too."""
    dashed = request.prompt.startswith("-")  # which comes last, behind what says that no flags follow
    words = ["animatelcm", "generate", *([] if dashed else [request.prompt]), *source.words()]
    words += ["--steps", str(request.num_inference_steps), "--guidance", in_full(request.guidance_scale)]
    if request.negative_prompt:
        words += _said("--negative", request.negative_prompt)
    words += ["--prompt-syntax", request.prompt_syntax] if request.prompt_syntax != "a1111" else []
    words += ["--clip-skip", str(request.clip_skip)] if request.clip_skip != 1 else []
    words += ["--frames", str(request.num_frames), "--size", f"{request.width}x{request.height}"]
    if request.context_length is not None and request.shape[0] > request.context_length:
        words += ["--context-length", str(request.context_length), "--context-overlap", str(request.context_overlap)]
        words += ["--noise", request.noise] if request.noise != "freenoise" else []
    words += ["--seed", str(request.seed), "--sampler", str(request.sampler)]
    words += ["--spacing", request.spacing] if request.spacing != "leading" else []
    words += [] if request.fps is None else ["--fps", in_full(request.fps)]
    for text in request.control:
        words += ["--control", text]
    if request.image:
        words += [*_said("--image", request.image), "--fit", request.fit]
        words += [] if request.motion_scale is None else ["--motion-scale", in_full(request.motion_scale)]
        words += ["--colour-match", in_full(request.colour_match)]
    words += [*_said("--video", request.video), "--strength", in_full(request.strength)] if request.video else []
    words += ["--precision", precision] if precision else []
    return shlex.join([*words, *(["--", request.prompt] if dashed else [])])


def _said(flag: str, value: str) -> list[str]:
    """A flag and its value, in one word where that begins as flags do."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]
