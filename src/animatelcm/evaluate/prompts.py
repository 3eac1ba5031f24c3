"""What the miniature is asked for: prompts of several kinds, each taken from a real clip that it describes."""

from __future__ import annotations

from animatelcm.data.emoji import COLOURS, Draws, EmojiClips, Shot, caption, held_out, still_pose
from animatelcm.data.sprites import CLIP_FRAMES, MOTIONS
from animatelcm.evaluate.motion import STILL
from animatelcm.evaluate.report import Kind

PER_CONCEPT = {"images": 2, "plain": 1}
PER_MOTION = {"motions": 4, "held_out": 2}
SHEET = (
    "a parrot",
    "a fox",
    "a butterfly",
    "an octopus",
    "a unicorn",
    "a rocket",
    "a dolphin on a blue background",
    "a 3d penguin on a pink background",
    "a red apple bouncing on a green background",
    "a flat pizza spinning",
    "a cartoon airplane sliding right on a blue background",
    "a red heart growing on a pink background",
    "a balloon sliding up",
    "a bomb shaking on an orange background",
    "a flat banana swinging on a purple background",
    "a honeybee orbiting on a yellow background",
)
"""The rows of a contact sheet."""


def prompts(kind: Kind, data: EmojiClips) -> list[Shot]:
    """The shots of one kind, ``len(data)`` of "clips" and as many at most of others; a shot's caption is the prompt.

    Captions of other kinds than "clips" name no style and no colour: their real clips stand on white.
    """
    if kind == "clips":
        return [data.shot(i) for i in range(len(data))]
    if kind in PER_CONCEPT:
        pairs = [(slug, "") for slug in data.concepts for _ in range(PER_CONCEPT[kind])]
    else:
        pairs = _pairs(data, PER_MOTION[kind], unseen=kind == "held_out")
    draws = (Draws(data.seed, i, f"evaluate-{kind}") for i in range(len(data)))
    return [_shot(data, *pair, still=kind == "images", draws=draw) for pair, draw in zip(pairs, draws, strict=False)]


def _pairs(data: EmojiClips, count: int, *, unseen: bool) -> list[tuple[str, str]]:
    """``count`` concepts for every motion, one round of motions after the other."""
    draws = Draws(data.seed, int(unseen), "evaluate-pairs")
    fitting = [[slug for slug in data.concepts if held_out(slug, motion) == unseen] for motion in MOTIONS]
    orders = [sorted(slugs, key=lambda _: draws.uniform()) for slugs in fitting]
    rounds = range(count)
    return [(order[i], name) for i in rounds for name, order in zip(MOTIONS, orders, strict=True) if i < len(order)]


def _shot(data: EmojiClips, slug: str, named: str, *, still: bool, draws: Draws) -> Shot:
    """A real clip (or, ``still``, an image) of a concept, under the named motion if there is one."""
    concept, white = data.pack.concepts[slug], COLOURS["white"]
    style = draws.choice([name for name in data.styles if data.pack.has(slug, name)])
    text = caption(concept.name.lower(), motion=named)
    if still:
        return Shot(slug, style, STILL, "", text, (still_pose(draws),), white)
    if not named and "fluent-3d" in data.styles and concept.first_frame is not None:
        return Shot(slug, "fluent-3d", "", "", text, (still_pose(draws),) * CLIP_FRAMES, white)
    motion = named or draws.choice([name for name in MOTIONS if not held_out(slug, name)])
    poses, sizes = MOTIONS[motion]
    placed = poses(draws.uniform(*sizes), draws.uniform(-1, 1))
    return Shot(slug, style, motion, named, text, tuple(placed), white)
