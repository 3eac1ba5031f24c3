"""What every door speaks: a request for videos, and a video with the recipe that makes it again."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    import numpy as np

    from animatelcm.model import Facts

Sampler = Literal["lcm", "ddim", "dpm++"]
Spacing = Literal["leading", "trailing"]
BetaSchedule = Literal["linear", "scaled_linear"]
Target = Literal["diffusers", "animatediff", "kohya", "peft", "bundle"]
"""Formats of weights that can be written."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which weights: a bundle, and what is added to it."""

    model: str = "emoji"
    """"emoji" (embedded), a model folder, a checkpoint of Stable Diffusion 1.x, or a Hugging Face id."""
    motion: str = ""
    """Temporal layers to add or to replace: a file of AnimateDiff's or AnimateLCM's, a MotionAdapter's folder, or one
    of them on the hub (owner/name, owner/name/FILE)."""
    style: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["--lora"])] = ()
    """A LoRA, FILE or FILE:SCALE, or the name of one of the model's own styles; may be given several times."""
    image_scale: float = 1.0
    """Beta: how much of the model's image acceleration; 0.8 is a usual choice with styles."""
    teacher: bool = False
    """The many-step model that this one was distilled from."""
    beta_schedule: BetaSchedule | None = None
    """Noise to sample under, where it is not what the files were made for."""
    solver_steps: int | None = None
    """N, the grid that an lcm sampler steps on (diffusers' original_inference_steps)."""

    def styles(self) -> list[tuple[str, float]]:
        """(file or name, scale) of each style. Raises ValueError where a scale is no number."""
        return [_scaled(text) for text in self.style]

    def words(self) -> list[str]:
        """As the command line has it; defaults are left out."""
        words = ["--model", self.model, *(["--motion", self.motion] if self.motion else [])]
        for text in self.style:
            words += ["--style", text]
        words += ["--image-scale", _number(self.image_scale)] if self.image_scale != 1 else []
        words += ["--teacher"] if self.teacher else []
        words += ["--beta-schedule", self.beta_schedule] if self.beta_schedule else []
        return words + (["--solver-steps", str(self.solver_steps)] if self.solver_steps else [])


def _scaled(text: str) -> tuple[str, float]:
    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or "\\" in scale:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError as error:
        raise ValueError(f"style {text!r}: {scale!r} is no scale; write FILE or FILE:0.8") from error


def _number(value: float | None) -> str:
    """In full, so that it reads back as the same number; 4.0 is 4."""
    return repr(value).removesuffix(".0")


LIMITS = {"num_inference_steps": 1000, "num_frames": 64, "height": 4096, "width": 4096, "num_videos_per_prompt": 10_000}


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt, sampled ``num_videos_per_prompt`` times. None means what the model was made for; aliases are the
    command line's short names.

    Raises ValueError where a value is out of range.
    """

    prompt: Positional[str]
    """What to show, e.g. "a parrot"."""
    negative_prompt: Annotated[str, arg(aliases=["--negative"])] = ""
    """What to steer away from; needs guidance_scale > 1."""
    num_inference_steps: Annotated[int | None, arg(aliases=["--steps"])] = None
    """Steps of the sampler; with guidance each costs two network evaluations."""
    guidance_scale: Annotated[float | None, arg(aliases=["--guidance"])] = None
    """Classifier-free guidance; 1 is off."""
    num_frames: Annotated[int | None, arg(aliases=["--frames"])] = None
    """1 draws an image."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    seed: int = 0
    """Of the first video; the next ones count on from it."""
    num_videos_per_prompt: Annotated[int, arg(aliases=["-n"])] = 1
    """How many videos."""
    sampler: Sampler | None = None
    """lcm: multistep consistency; ddim, dpm++ (DPM-Solver++ 2M): for models that were not distilled."""
    spacing: Spacing = "leading"
    """Timesteps of ddim and dpm++: leading is Stable Diffusion's setting; trailing begins at pure noise, which is
    better below about ten steps."""

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}={value} is out of range; choose 1..{most}")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale={self.guidance_scale} is out of range; choose 1 (off) to 100")
        if self.sampler is not None and self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler={self.sampler!r} is not one of {', '.join(get_args(Sampler))}")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing={self.spacing!r} is not one of {', '.join(get_args(Spacing))}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; choose 0..2**63 - 1")

    def resolved(self, facts: Facts, cell: int = 8) -> SampleRequest:
        """The same request, every None filled in from the model's facts; sides must be multiples of ``cell`` pixels."""
        names = [f.name for f in fields(self) if getattr(self, f.name) is None]
        full = replace(self, **{name: getattr(facts, name) for name in names})
        for name in ("height", "width"):
            value = getattr(full, name)
            if value % cell:
                nearest = max(cell, round(value / cell) * cell)
                raise ValueError(f"{name}={value} is not a multiple of {cell}; the nearest is {nearest}")
        return full

    def singles(self) -> list[SampleRequest]:
        """One request a video, each with its own seed."""
        return [replace(self, seed=self.seed + i, num_videos_per_prompt=1) for i in range(self.num_videos_per_prompt)]


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

    def recipe(self, source: ModelSource, version: str) -> dict[str, str]:
        """What is written into the file: every field of the request and of the model's source, version, the command."""
        made = {**dataclasses.asdict(self.request), **dataclasses.asdict(source), "style": " ".join(source.style)}
        facts = {"animatelcm": version, "command": command(self.request, source)}
        return {key: str(value) for key, value in made.items()} | facts


def command(request: SampleRequest, source: ModelSource) -> str:
    """The command line that makes a resolved request again."""
    words = ["animatelcm", "generate", request.prompt, *source.words()]
    words += ["--steps", str(request.num_inference_steps), "--guidance", _number(request.guidance_scale)]
    if request.negative_prompt:
        words += ["--negative", request.negative_prompt]
    words += ["--frames", str(request.num_frames), "--size", f"{request.width}x{request.height}"]
    words += ["--seed", str(request.seed), "--sampler", str(request.sampler)]
    words += ["--spacing", request.spacing] if request.spacing != "leading" else []
    return shlex.join(words)
