"""What every door speaks: a request for videos."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import ceil, floor
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol, get_args

from tyro.conf import Positional, UseAppendAction, arg

from animatelcm.prompts import Syntax, sections

if TYPE_CHECKING:
    from animatelcm.model import Facts


Sampler = Literal["lcm", "ddim", "dpm++"]
Spacing = Literal["leading", "trailing"]
Noise = Literal["freenoise", "random"]
Fit = Literal["crop", "pad", "stretch"]
"""How a picture, a layout, or a video to begin from comes to the video's size."""


class Part(Protocol):
    """Something that acts in a part of the steps: from ``start`` to ``end``, shares of all of them."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


class ControlSource(NamedTuple):
    """One control as a request names it: which adapter reads it, how strongly, and in which part of the steps."""

    name: str
    file: str
    ready: bool = False
    """The file holds maps; else they are made from its frames."""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ControlSource:
        """Read NAME=[map:]FILE[:SCALE[@START-END]]. Raises ValueError naming what is wrong."""
        name, _, rest = text.partition("=")
        ready, rest = rest.startswith("map:"), rest.removeprefix("map:")
        found = re.fullmatch(r"(.+?)(?::(\d*\.?\d+)(?:@(\d*\.?\d+)-(\d*\.?\d+))?)?", rest)
        if not re.fullmatch(r"\w+", name) or not found:
            raise ValueError(
                f"control {text!r} is not KIND=FILE, KIND=FILE:SCALE or KIND=FILE:SCALE@START-END, such as "
                "edge=clip.mp4:0.8@0-0.5; for maps that are ready write KIND=map:FILE"
            )
        if name == "i2v":
            raise ValueError(f"control {text!r}: i2v sees a picture, and follows no layout; give it as --image FILE")
        scale, start, end = float(found[2] or 1), float(found[3] or 0), float(found[4] or 1)
        check_part(f"control {text!r}", scale, start, end)
        return cls(name, found[1], ready, scale, start, end)


def check_part(what: str, scale: float, start: float, end: float) -> None:
    """Raises ValueError where ``what`` cannot act so strongly, or in no such part of the steps."""
    if not (0 <= start < end <= 1 and 0 <= scale <= 10):
        raise ValueError(f"{what}: give a scale of 0..10 and a part of the steps within 0-1")


LIMITS = {
    "num_inference_steps": 1000,
    "num_frames": 10_000,
    "height": 4096,
    "width": 4096,
    "num_videos_per_prompt": 10_000,
    "context_length": 1024,
    "clip_skip": 128,
}


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
    prompt_syntax: Syntax = "a1111"
    """a1111: (x), [x] and (x:1.3) weigh words, BREAK begins a new chunk; plain: brackets are letters, as in
    diffusers."""
    clip_skip: int = 1
    """Layer of the text encoder whose output is used, counted from the end as A1111 does: 1 is the last one."""
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
    """Of the first video; the next ones count on from it. -1 draws one, which the recipe keeps."""
    num_videos_per_prompt: Annotated[int, arg(aliases=["-n"])] = 1
    """How many videos."""
    fps: float | None = None
    """Frames a second of the file, and those that are taken of a control or a video to begin from."""
    sampler: Sampler | None = None
    """lcm: multistep consistency; ddim, dpm++ (DPM-Solver++ 2M): for models that were not distilled."""
    spacing: Spacing = "leading"
    """Timesteps of ddim and dpm++: leading is Stable Diffusion's setting; trailing begins at pure noise, which is
    better below about ten steps."""

    context_length: int | None = None
    """Frames that the network sees at a time: a longer video is made in windows of so many, which overlap."""
    context_overlap: int | None = None
    """Frames that a window shares with the next one at least; a quarter of its length where nothing is said."""
    noise: Noise = "freenoise"
    """Of windows after the first: its own shuffled (freenoise), which keeps the subject, or random."""

    image: str = ""
    """A picture to animate: its file. The model needs an image encoder (i2v)."""
    fit: Fit = "crop"
    """How a picture, layouts and a video to begin from come to the video's size: crop the middle, pad with the colour
    of their borders (maps with black), or stretch."""
    motion_scale: float | None = None
    """With a picture: how much its frames may differ; 0 stands still. Default: as the image encoder was trained, 0.8
    where that says nothing."""
    colour_match: float = 1.0
    """With a picture: how far the frames' mean hue, saturation and value are moved to its own; 0 leaves them."""
    control: UseAppendAction[tuple[str, ...]] = ()
    """KIND=FILE: a video, a folder of images or an image whose layout to follow, read by the adapter of that name;
    KIND=FILE:SCALE, KIND=FILE:SCALE@START-END for a part of the steps; KIND=map:FILE where the file holds maps."""
    video: Annotated[str, arg(aliases=["--init-video"])] = ""
    """A video to begin from, in place of noise alone."""
    strength: float = 0.6
    """With a video to begin from: how much of it is lost to noise; 1 is all."""

    def __post_init__(self) -> None:
        ranges = {"motion_scale": (0, 4), "colour_match": (0, 1), "strength": (0, 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value} is out of range; choose {least}..{most}")
        for name, known in (("fit", Fit), ("noise", Noise)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(known))}")
        if self.prompt_syntax not in get_args(Syntax):
            raise ValueError(f"prompt_syntax={self.prompt_syntax!r} is not one of {', '.join(get_args(Syntax))}")
        for prompt in (self.prompt, self.negative_prompt):
            sections(prompt, self.prompt_syntax)
        self.controls()
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
        check_seed(self.seed, self.num_videos_per_prompt)
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"fps={self.fps} is out of range; choose 0.001..1000")

    def resolved(self, facts: Facts, cell: int = 8) -> SampleRequest:
        """The same request, every None filled in from the model's facts, and a seed of -1 drawn from 2**32; sides must
        be multiples of ``cell`` pixels."""
        if self.seed == -1:
            return replace(self, seed=secrets.randbelow(2**32)).resolved(facts, cell)
        names = [f.name for f in fields(self) if getattr(self, f.name) is None and hasattr(facts, f.name)]
        full = replace(self, **{name: getattr(facts, name) for name in names})._in_windows(facts)
        for name in ("height", "width"):
            value = getattr(full, name)
            if value % cell:
                nearest = max(cell, round(value / cell) * cell)
                raise ValueError(f"{name}={value} is not a multiple of {cell}; the nearest is {nearest}")
        return full

    def _in_windows(self, facts: Facts) -> SampleRequest:
        """With windows as long as the model's own clips; a model of pictures needs none. Raises ValueError where an
        overlap is as long as its window."""
        length = self.context_length or (facts.num_frames if facts.num_frames > 1 else self.shape[0])
        overlap = length // 4 if self.context_overlap is None else self.context_overlap
        if not 0 <= overlap < length:
            said = f"windows of context_length={length} frames"
            raise ValueError(f"context_overlap={overlap} does not fit {said}; choose 0..{length - 1}")
        return replace(self, context_length=length, context_overlap=overlap)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a resolved request."""
        assert self.num_frames is not None
        assert self.height is not None
        assert self.width is not None
        return self.num_frames, self.height, self.width

    def controls(self) -> list[ControlSource]:
        """What ``control`` names, read. Raises ValueError for what is none."""
        return [ControlSource.parse(text) for text in self.control]

    def adapter_names(self) -> set[str]:
        """The adapters that the request needs, by name."""
        return {control.name for control in self.controls()} | ({"i2v"} if self.image else set())

    def singles(self) -> list[SampleRequest]:
        """One request a video, each with its own seed."""
        return self.split(1)

    def split(self, most: int) -> list[SampleRequest]:
        """The same videos in the same order, asked for in requests for ``most`` of them; the last may ask for fewer."""
        total = self.num_videos_per_prompt
        return [
            replace(self, seed=self.seed + first, num_videos_per_prompt=min(most, total - first))
            for first in range(0, total, most)
        ]


def unused(
    request: SampleRequest,
    *,
    image: bool | None = None,
    video: bool | None = None,
    controls: Iterable[Part] | None = None,
) -> list[str]:
    """What a resolved request asks for and will not get, a sentence each: settings that change nothing without others,
    controls that act in no step.

    ``image``, ``video``: whether there are a picture and a video to begin from, and ``controls``: those there are,
    where these are pixels of no file.
    """
    image = bool(request.image) if image is None else image
    video = bool(request.video) if video is None else video
    steers = tuple(request.controls() if controls is None else controls)
    plain = SampleRequest(prompt="")
    said = {
        "negative_prompt": (request.guidance_scale == 1, "guidance_scale is 1 (off); ask for more, such as 2"),
        "motion_scale": (not image, "there is no picture to animate; give one as image"),
        "fit": (not (image or video or steers), "there is nothing to fit; give an image, a control or a video"),
        "colour_match": (not image, "there is no picture to animate; give one as image"),
        "strength": (not video, "there is no video to begin from; give one as video"),
        "spacing": (request.sampler == "lcm", "the sampler lcm has timesteps of its own; choose ddim or dpm++"),
    }
    settings = [
        f"{name} changes nothing: {why}"
        for name, (idle, why) in said.items()
        if idle and getattr(request, name) != getattr(plain, name)
    ]
    steps = steps_walked(request, begun=video)
    return settings + [_idle(part, steps) for part in steers if _is_idle(part, steps)]


def steps_walked(request: SampleRequest, *, begun: bool) -> int:
    """Of a sampler of many steps, those before the noise of a video that it begins from are left out."""
    assert request.num_inference_steps is not None
    steps = request.num_inference_steps
    return max(1, int(steps * request.strength)) if begun and request.sampler != "lcm" else steps


def _is_idle(part: Part, steps: int) -> bool:
    return not any(i / steps >= part.start and (i + 1) / steps <= part.end for i in range(steps))


def _idle(part: Part, steps: int) -> str:
    wider = floor(part.start * steps) / steps, ceil(part.end * steps) / steps
    start, end = floor(wider[0] * 1000) / 1000, ceil(wider[1] * 1000) / 1000
    return (
        f"control {part.name} changes nothing: none of the {steps} steps lies within {part.start:g}-{part.end:g} of "
        f"them; choose a part such as {start:g}-{end:g}"
    )


def check_seed(seed: int, count: int = 1) -> None:
    """Raises ValueError where a seed, or one of ``count`` that count on from it, is none; -1 is one to be drawn."""
    if not -1 <= seed <= 2**63 - count:
        said = f" for {count} videos, which count on from it" if count > 1 else ""
        raise ValueError(f"seed={seed} is out of range{said}; choose 0..2**63 - {count}, or -1 to have one drawn")


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """Width and height of "WIDTHxHEIGHT". Raises ValueError where it is none."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"{name} {text!r} is not WIDTHxHEIGHT in pixels, such as 64x64")
    return int(width), int(height)
