"""The emoji pack as pictures with an alpha channel, and how a picture moves: sheets, clips, affine motions.

File layout of the pack (``assets/emoji/pack``): one RGBA sheet a style, 40 icons a row, icon ``i`` of
``concepts.jsonl`` at column ``i % 40``, row ``i // 40``; one H.264 file of 64x128 frames whose upper half is the
picture over white and whose lower half is its alpha, 16 frames a clip, each clip beginning with a key frame.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PACK = Path(__file__).parent.parent / "assets" / "emoji" / "pack"
CELL = 64  # pixels: side of an icon, and of every frame of the miniature
SHEET_COLUMNS = 40
CLIP_FRAMES = 16
CLIP_FPS = 8

# fmt: off
# The small set: visually distinct, and most of them with an animated clip. What two CPU cores can learn in an evening.
SMALL_CONCEPTS = (
    "parrot", "cat-face", "dog-face", "fox", "panda", "koala", "tiger-face", "lion", "frog", "penguin", "owl",
    "rooster", "duck", "flamingo", "butterfly", "honeybee", "lady-beetle", "snail", "octopus", "crab",
    "tropical-fish", "spouting-whale", "dolphin", "turtle", "unicorn", "elephant", "giraffe", "zebra", "hedgehog",
    "red-apple", "banana", "strawberry", "watermelon", "pineapple", "pizza", "hamburger", "doughnut",
    "soft-ice-cream", "birthday-cake", "cherries", "carrot",
    "rocket", "airplane", "helicopter", "sailboat", "automobile", "bus", "tractor", "locomotive", "flying-saucer",
    "rainbow", "sun", "snowman", "fire", "star", "umbrella",
    "alarm-clock", "bomb", "jack-o-lantern", "christmas-tree", "balloon", "soccer-ball", "guitar", "red-heart",
)
# fmt: on


class Concept(NamedTuple):
    """One subject of the pack; ``index`` is its cell in every sheet, ``first_frame`` its clip (None: no clip)."""

    index: int
    slug: str
    name: str
    keywords: tuple[str, ...]
    styles: tuple[str, ...]
    first_frame: int | None


def _jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class SpritePack:
    """Third-party artwork by concept and style; every picture is float32 (4, 64, 64), alpha premultiplied, in [0, 1].

    A style is a sheet ``<style>.webp`` in ``folder``, or any sheet of the same layout named in ``extra_styles``.
    """

    folder: Path = PACK
    extra_styles: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """Slug -> concept, in the order of the sheets."""
        clips = {row["slug"]: row["first_frame"] for row in _jsonl(self.folder / "clips.jsonl")}
        return {
            row["slug"]: Concept(
                i, row["slug"], row["name"], tuple(row["keywords"]), tuple(row["images"]), clips.get(row["slug"])
            )
            for i, row in enumerate(_jsonl(self.folder / "concepts.jsonl"))
        }

    @cached_property
    def _sheets(self) -> dict[str, np.ndarray]:
        return {}

    def _sheet(self, style: str) -> np.ndarray:
        if style not in self._sheets:
            path = self.extra_styles.get(style, self.folder / f"{style}.webp")
            if not path.is_file():
                have = sorted({p.stem for p in self.folder.glob("*.webp")} | set(self.extra_styles))
                raise ValueError(f"no sheet for style {style!r} at {path}; styles here: {', '.join(have)}")
            self._sheets[style] = np.asarray(Image.open(path).convert("RGBA"))
        return self._sheets[style]

    def has(self, slug: str, style: str) -> bool:
        """Whether this style drew this concept."""
        return style in self.extra_styles or style in self.concepts[slug].styles

    def sprite(self, slug: str, style: str) -> Tensor:
        """One icon: (4, 64, 64) premultiplied RGBA in [0, 1]."""
        row, column = divmod(self.concepts[slug].index, SHEET_COLUMNS)
        cell = self._sheet(style)[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        rgba = torch.from_numpy(cell.astype(np.float32) / 255).permute(2, 0, 1)
        return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])

    @cached_property
    def _clips(self) -> dict[str, Tensor]:
        return {}

    def clip(self, slug: str) -> Tensor:
        """One animated icon of the ``fluent-3d`` style: (16, 4, 64, 64) premultiplied RGBA in [0, 1]."""
        if slug not in self._clips:
            first = self.concepts[slug].first_frame
            if first is None:
                raise ValueError(f"concept {slug!r} has no animated clip")
            self._clips[slug] = _read_clip(self.folder / "fluent-3d-clips.mp4", first)
        return self._clips[slug].float() / 255


def _read_clip(path: Path, first: int) -> Tensor:
    """Frames ``first`` .. +15 of the clips file as uint8 (16, 4, 64, 64), premultiplied."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        assert stream.average_rate is not None
        container.seek(round(first / stream.average_rate / stream.time_base), stream=stream)
        frames = []
        for frame in container.decode(stream):
            if round(frame.time * stream.average_rate) >= first:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == CLIP_FRAMES:
                break
    both = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).int()
    over_white, alpha = both[:, :, :CELL], both[:, :1, CELL:]
    return torch.cat([(over_white - (255 - alpha)).clamp(min=0), alpha], dim=1).to(torch.uint8)


class Pose(NamedTuple):
    """A sprite in one frame: ``size`` as a fraction of the frame's side, centre in [-1, 1], clockwise degrees."""

    size: float
    x: float
    y: float
    degrees: float = 0.0


def render(sprites: Tensor, poses: Sequence[Pose], background: Sequence[float]) -> np.ndarray:
    """Draw sprites (F, 4, 64, 64), or one for all poses, on a colour (RGB in [0, 1]): uint8 (F, 64, 64, 3).

    Bilinear with 2x2 samples a pixel, so that small and turning sprites keep smooth edges.
    """
    matrix = torch.tensor([_inverse_affine(pose) for pose in poses])
    if sprites.ndim == 3:
        sprites = sprites.expand(len(poses), -1, -1, -1)
    grid = F.affine_grid(matrix, [len(poses), 4, 2 * CELL, 2 * CELL], align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(sprites, grid, align_corners=False), 2)
    colour = torch.tensor(background, dtype=torch.float32).view(3, 1, 1)
    frames = drawn[:, :3] + (1 - drawn[:, 3:]) * colour
    return frames.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _inverse_affine(pose: Pose) -> list[list[float]]:
    """Frame coordinates -> sprite coordinates, both in [-1, 1]."""
    angle = math.radians(pose.degrees)
    cos, sin = math.cos(angle) / pose.size, math.sin(angle) / pose.size
    return [[cos, sin, -cos * pose.x - sin * pose.y], [-sin, cos, sin * pose.x - cos * pose.y]]


Motion = Callable[[float, float], list[Pose]]
"""(size in (0, 1), drift in [-1, 1]) -> one pose a frame. ``drift`` places what the motion leaves free."""

_PHASE = [f / CLIP_FRAMES for f in range(CLIP_FRAMES)]  # a loop: frame 16 would be frame 0
_RAMP = [f / (CLIP_FRAMES - 1) for f in range(CLIP_FRAMES)]  # from 0 to 1, both reached


def _slide(dx: float, dy: float) -> Motion:
    def motion(size: float, drift: float) -> list[Pose]:
        reach = 1 - 0.7 * size
        along = [reach * (2 * u - 1) for u in _RAMP]
        across = drift * (1 - size)
        return [Pose(size, dx * a + abs(dy) * across, dy * a + abs(dx) * across) for a in along]

    return motion


def _bounce(size: float, drift: float) -> list[Pose]:
    room = 1 - size
    height = [abs(math.sin(2 * math.pi * u)) for u in _PHASE]
    return [Pose(size, drift * room, room - 1.6 * room * h) for h in height]


def _spin(size: float, drift: float) -> list[Pose]:
    return [Pose(size, drift * (1 - size) / 2, 0.0, 360 * u) for u in _PHASE]


def _grow(size: float, drift: float) -> list[Pose]:
    return [Pose(0.3 + (size - 0.15) * u, drift * 0.2, 0.0) for u in _RAMP]


def _shrink(size: float, drift: float) -> list[Pose]:
    return _grow(size, drift)[::-1]


def _shake(size: float, drift: float) -> list[Pose]:
    return [Pose(size, drift * 0.2 + 0.14 * (-1) ** f, 0.0) for f in range(CLIP_FRAMES)]


def _swing(size: float, drift: float) -> list[Pose]:
    pivot = -1.1 * size  # above the picture, as a pendulum hangs
    poses = []
    for u in _PHASE:
        degrees = 35 * math.sin(2 * math.pi * u)
        x, y = -pivot * -math.sin(math.radians(degrees)), pivot - pivot * math.cos(math.radians(degrees))
        poses.append(Pose(size, drift * 0.2 + x, y, degrees))
    return poses


def _orbit(size: float, drift: float) -> list[Pose]:
    radius = 0.9 * (1 - size)
    angle = [2 * math.pi * (u + drift / 2) for u in _PHASE]
    return [Pose(size, radius * math.sin(a), -radius * math.cos(a)) for a in angle]


MOTIONS: dict[str, tuple[Motion, tuple[float, float]]] = {
    "sliding left": (_slide(-1, 0), (0.55, 0.75)),
    "sliding right": (_slide(1, 0), (0.55, 0.75)),
    "sliding up": (_slide(0, -1), (0.55, 0.75)),
    "sliding down": (_slide(0, 1), (0.55, 0.75)),
    "bouncing": (_bounce, (0.5, 0.7)),
    "spinning": (_spin, (0.6, 0.85)),
    "growing": (_grow, (0.75, 0.95)),
    "shrinking": (_shrink, (0.75, 0.95)),
    "shaking": (_shake, (0.65, 0.85)),
    "swinging": (_swing, (0.5, 0.7)),
    "orbiting": (_orbit, (0.45, 0.55)),
}
"""What a caption may say of a sprite -> (poses, the range of sizes at which the whole motion stays in the frame)."""
LOOPS = ("bouncing", "spinning", "shaking", "swinging", "orbiting")
"""Motions without a beginning; the others lead from somewhere to somewhere else."""
