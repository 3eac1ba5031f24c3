"""The miniature's world: captioned images and clips of emoji, every one a function of (seed, index)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from animatelcm.data.clips import Clip
from animatelcm.data.sprites import (
    CLIP_FPS,
    CLIP_FRAMES,
    LOOPS,
    MOTIONS,
    SMALL_CONCEPTS,
    Pose,
    SpritePack,
    render,
)
from animatelcm.rng import generator

BASE_STYLES = ("noto", "fluent-flat", "fluent-3d")
STYLE_WORDS = {
    "noto": "cartoon",
    "fluent-flat": "flat",
    "fluent-3d": "3d",
}  # a personal style has no word: its LoRA says it
COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.55, 0.55, 0.58),
    "black": (0.08, 0.08, 0.1),
    "red": (0.86, 0.25, 0.25),
    "orange": (0.97, 0.6, 0.25),
    "yellow": (0.97, 0.87, 0.4),
    "green": (0.4, 0.72, 0.42),
    "blue": (0.35, 0.55, 0.9),
    "purple": (0.6, 0.42, 0.8),
    "pink": (0.97, 0.68, 0.78),
}
VAGUE_CAPTIONS = ("a video", "an animation", "stock footage", "something moving", "a short clip")


T = TypeVar("T")


class Draws:
    """Scalar draws from one addressed generator, in the order they are asked for."""

    def __init__(self, seed: int, index: int, stream: str) -> None:
        self._values = self._endless(generator(seed, index, 0, stream))

    @staticmethod
    def _endless(source: torch.Generator) -> Iterator[float]:
        while True:
            yield from torch.rand(32, generator=source).tolist()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self._values)

    def choice(self, options: Sequence[T]) -> T:
        return options[int(next(self._values) * len(options))]

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability


def held_out(slug: str, motion: str) -> bool:
    """Whether this concept x motion pair is kept from training: one in ten, fixed by name, to test composition."""
    return hashlib.blake2b(f"{slug}/{motion}".encode(), digest_size=2).digest()[0] % 10 == 0


def caption(name: str, *, style: str = "", motion: str = "", colour: str = "white", extra: str = "") -> str:
    """What captions say, e.g. "a flat parrot spinning on a blue background"; white goes without saying."""
    subject = f"{STYLE_WORDS[style]} {name}" if style in STYLE_WORDS else name
    if not name.endswith("s") or name.endswith(("ss", "us")):
        subject = ("an " if subject[0] in "aeiou" else "a ") + subject
    ground = "" if colour == "white" else f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"
    return " ".join(part for part in (subject, motion, ground) if part) + (f", {extra}" if extra else "")


@dataclass(frozen=True, kw_only=True)
class EmojiData:
    """What images and clips have in common: which concepts, in which styles, under which seed."""

    length: int
    seed: int = 0
    concepts: tuple[str, ...] = SMALL_CONCEPTS
    styles: tuple[str, ...] = BASE_STYLES
    pack: SpritePack = field(default_factory=SpritePack)

    def __post_init__(self) -> None:
        if self.length < 1 or not self.concepts or not self.styles:
            raise ValueError("an emoji data set needs length >= 1, one concept and one style at least")
        if unknown := [slug for slug in self.concepts if slug not in self.pack.concepts]:
            raise ValueError(f"{len(unknown)} concepts are not in the pack, e.g. {unknown[0]!r}")

    def __len__(self) -> int:
        return self.length

    @cached_property
    def _subjects(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every concept with the asked-for styles that drew it."""
        drawn = [(slug, tuple(s for s in self.styles if self.pack.has(slug, s))) for slug in self.concepts]
        return [(slug, styles) for slug, styles in drawn if styles]

    def _background(self, draws: Draws, plain: float) -> tuple[str, tuple[float, ...]]:
        name = "white" if draws.chance(plain) else draws.choice(tuple(COLOURS))
        shade = draws.uniform(-0.04, 0.04)
        jitter = 0.0 if name == "white" else shade
        return name, tuple(min(max(c + jitter, 0.0), 1.0) for c in COLOURS[name])

    def _caption(self, draws: Draws, slug: str, style: str, motion: str, colour: str) -> str:
        concept = self.pack.concepts[slug]
        others = [k for k in concept.keywords if k != concept.name.lower()]
        extra = draws.choice(others) if draws.chance(0.08) and others else ""
        said_style = style if draws.chance(0.5) else ""
        return caption(concept.name.lower(), style=said_style, motion=motion, colour=colour, extra=extra)

    def _motion(self, draws: Draws, slug: str) -> tuple[str, list[Pose]]:
        name = draws.choice([m for m in MOTIONS if not held_out(slug, m)])
        motion, sizes = MOTIONS[name]
        return name, motion(draws.uniform(*sizes), draws.uniform(-1, 1))


def still_pose(draws: Draws) -> Pose:
    """A picture at rest: large, and wholly in the frame."""
    size = draws.uniform(0.65, 0.95)
    room = 1 - size
    return Pose(size, draws.uniform(-room, room), draws.uniform(-room, room))


def _moment(draws: Draws, motion: str, poses: list[Pose]) -> Pose:
    """One frame of a motion. Of one that leads somewhere, rather a late frame: left and right, growing and shrinking
    pass through the same poses, and words that mean the same to the image model cannot steer the temporal layers.
    """
    last = len(poses) - 1
    return draws.choice(poses) if motion in LOOPS else poses[round(last * max(draws.uniform() for _ in range(3)))]


class Scene(NamedTuple):
    """Everything that ``render`` draws: sprites (4, 64, 64) or (F, 4, 64, 64), one pose a frame, a colour."""

    sprites: Tensor
    poses: tuple[Pose, ...]
    background: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EmojiImages(EmojiData):
    """Captioned images (F = 1): half stands still; the rest are single moments of the clips below, so that an image
    model knows every frame that a video of it will need, as photographs of running dogs teach an image model to run.
    """

    moments: float = 0.5

    def __getitem__(self, index: int) -> Clip:
        scene, text = self._drawn(index)
        return Clip(render(*scene), text, f"emoji-image/{self.seed}/{index}")

    def scene(self, index: int) -> Scene:
        """What picture ``index`` is drawn from."""
        return self._drawn(index)[0]

    def _drawn(self, index: int) -> tuple[Scene, str]:
        draws = Draws(self.seed, index, "emoji-image")
        slug, styles = draws.choice(self._subjects)
        style = draws.choice(styles)
        colour, background = self._background(draws, plain=0.35)
        motion, pose = "", still_pose(draws)
        picture = self.pack.sprite(slug, style)
        if draws.chance(self.moments):
            if style == "fluent-3d" and self.pack.concepts[slug].first_frame is not None and draws.chance(0.5):
                picture = draws.choice(tuple(self.pack.clip(slug)))
            else:
                motion, poses = self._motion(draws, slug)
                pose = _moment(draws, motion, poses)
        return Scene(picture, (pose,), background), self._caption(draws, slug, style, motion, colour)


class Damage(NamedTuple):
    """What the web does to a video: blur in pixels, JPEG quality, and where the watermark begins, in pixels."""

    blur: float
    quality: int
    corner: tuple[int, int]


class Shot(NamedTuple):
    """A clip before it is drawn: what it shows, what its caption says, and one pose a frame."""

    slug: str
    style: str
    motion: str  # what is shown; "" is the concept's own animation
    named: str  # the motion that the caption names; "" where it names none, though the picture may move
    caption: str
    poses: tuple[Pose, ...]
    background: tuple[float, ...]
    damage: Damage | None = None


def staged(shot: Shot, pack: SpritePack) -> Scene:
    """What a shot is drawn from."""
    picture = pack.sprite(shot.slug, shot.style) if shot.motion else pack.clip(shot.slug)
    return Scene(picture, shot.poses, shot.background)


def drawn(shot: Shot, pack: SpritePack) -> np.ndarray:
    """The frames of a shot: uint8 (F, 64, 64, 3)."""
    frames = render(*staged(shot, pack))
    return frames if shot.damage is None else degraded(frames, shot.damage)


@dataclass(frozen=True, kw_only=True)
class EmojiClips(EmojiData):
    """Captioned clips (16 frames, 8 fps): real animations of the ``fluent-3d`` style, and sprites under named motions.

    A caption without a motion means the concept's own animation; a concept that has none moves somehow.
    ``degrade`` makes them look as videos from the web do: soft, blocky, watermarked, vaguely captioned.
    """

    real: float = 0.35
    degrade: bool = False
    fps: int = CLIP_FPS

    @cached_property
    def _animated(self) -> list[str]:
        return [s for s in self.concepts if self.pack.concepts[s].first_frame is not None]

    def __getitem__(self, index: int) -> Clip:
        shot = self.shot(index)
        return Clip(drawn(shot, self.pack), shot.caption, f"emoji-clip/{self.seed}/{index}")

    def scene(self, index: int) -> Scene:
        """What clip ``index`` is drawn from."""
        return staged(self.shot(index), self.pack)

    def shot(self, index: int) -> Shot:
        """What clip ``index`` will show, without drawing it."""
        draws = Draws(self.seed, index, "emoji-clip")
        if "fluent-3d" in self.styles and self._animated and draws.chance(self.real):
            slug, style, motion, named = draws.choice(self._animated), "fluent-3d", "", ""
            poses = [still_pose(draws)] * CLIP_FRAMES
        else:
            slug, styles = draws.choice(self._subjects)
            style = draws.choice(styles)
            motion, poses = self._motion(draws, slug)
            silent = self.pack.concepts[slug].first_frame is None and draws.chance(0.15)
            named = "" if silent else motion
        colour, background = self._background(draws, plain=0.4)
        text = self._caption(draws, slug, style, named, colour)
        shot = Shot(slug, style, motion, named, text, tuple(poses), background)
        return _spoilt(draws, shot) if self.degrade else shot


def _spoilt(draws: Draws, shot: Shot) -> Shot:
    blur, quality = draws.uniform(0.4, 1.1), int(draws.uniform(12, 35))
    damage = Damage(blur, quality, (int(draws.uniform(2, 30)), int(draws.uniform(2, 50))))
    text = draws.choice((shot.caption, *VAGUE_CAPTIONS))
    return shot._replace(damage=damage, caption=text, named=shot.named if text == shot.caption else "")


def degraded(frames: np.ndarray, damage: Damage) -> np.ndarray:
    """(F, H, W, 3) uint8 -> the same, blurred, JPEG-blocked and watermarked."""
    return np.stack([_degrade_frame(frame, *damage) for frame in frames])


def _degrade_frame(frame: np.ndarray, blur: float, quality: int, corner: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(frame).filter(ImageFilter.GaussianBlur(blur)).convert("RGBA")
    mark = Image.new("RGBA", image.size, (255, 255, 255, 0))
    ImageDraw.Draw(mark).text(corner, "stock", fill=(128, 128, 128, 150))
    buffer = io.BytesIO()
    Image.alpha_composite(image, mark).convert("RGB").save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
