from __future__ import annotations

import numpy as np
import pytest
import torch

from animatelcm.data.sprites import CELL, CLIP_FRAMES, MOTIONS, SMALL_CONCEPTS, Pose, SpritePack, render

PACK = SpritePack()


def _dot(x: float = 0.0, y: float = 0.0) -> torch.Tensor:
    """An opaque white blob on nothing, centred at (x, y) in [-1, 1] of the sprite."""
    axis = (torch.arange(CELL) + 0.5) / CELL * 2 - 1
    mask = ((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2 < 0.15**2).float()
    return mask.expand(4, -1, -1).clone()


def _centroid(frame: np.ndarray) -> tuple[float, float]:
    weight = frame[..., 0].astype(float)
    axis = (np.arange(CELL) + 0.5) / CELL * 2 - 1
    return (weight.sum(0) @ axis) / weight.sum(), (weight.sum(1) @ axis) / weight.sum()


def test_the_pack_holds_what_its_index_says():
    assert len(PACK.concepts) == 1558
    assert sum(concept.first_frame is not None for concept in PACK.concepts.values()) == 675
    assert len(set(SMALL_CONCEPTS)) == 64
    for slug in SMALL_CONCEPTS:
        for style in ("noto", "fluent-flat", "fluent-3d", "twemoji"):
            assert PACK.sprite(slug, style)[3].mean() > 0.1, (slug, style)


def test_colours_are_premultiplied():
    sprite = PACK.sprite("parrot", "noto")
    assert (sprite[:3] <= sprite[3:] + 1e-6).all()
    clip = PACK.clip("parrot")
    assert clip.shape == (CLIP_FRAMES, 4, CELL, CELL)
    assert (clip[:, :3] <= clip[:, 3:] + 0.2).all()  # the file is lossy


def test_a_clip_shows_its_own_concept():
    # A wrong seek would show a neighbour: the middle of the animation must be nearest to its own still icon.
    slugs = [slug for slug in SMALL_CONCEPTS if PACK.concepts[slug].first_frame is not None][:12]
    stills = torch.stack([PACK.sprite(slug, "fluent-3d") for slug in slugs]).flatten(1)
    for i, slug in enumerate(slugs):
        distance = (PACK.clip(slug).flatten(1)[:, None] - stills).square().mean(-1).amin(0)
        assert distance.argmin() == i, slug


def test_render_places_scales_and_turns():
    black = (0.0, 0.0, 0.0)
    assert np.allclose(_centroid(render(_dot(), [Pose(1.0, 0.5, -0.25)], black)[0]), (0.5, -0.25), atol=0.02)
    half, full = (render(_dot(), [Pose(size, 0, 0)], black).astype(float).sum() for size in (0.5, 1.0))
    assert half / full == pytest.approx(0.25, rel=0.05)
    turned = render(_dot(x=0.6), [Pose(1.0, 0, 0, 90.0)], black)[0]  # clockwise: from the right to the bottom
    assert np.allclose(_centroid(turned), (0.0, 0.6), atol=0.02)


def test_an_opaque_sprite_at_full_size_is_itself():
    sprite = PACK.sprite("red-apple", "fluent-flat")
    frame = render(sprite, [Pose(1.0, 0, 0)], (1.0, 1.0, 1.0))[0]
    over_white = (sprite[:3] + 1 - sprite[3:]).permute(1, 2, 0).numpy() * 255
    assert np.abs(frame - over_white).mean() < 3  # 2x2 samples a pixel soften edges


@pytest.mark.parametrize("name", MOTIONS)
def test_motions_have_sixteen_poses_and_move(name):
    motion, sizes = MOTIONS[name]
    for size in sizes:
        poses = motion(size, 0.5)
        assert len(poses) == CLIP_FRAMES
        assert len(set(poses)) > 1
        for pose in poses:  # the centre stays on screen, and so does most of the sprite
            assert abs(pose.x) < 1
            assert abs(pose.y) < 1


def test_directions_are_what_they_are_called():
    moved = {name: (MOTIONS[name][0](0.6, 0.0)[0], MOTIONS[name][0](0.6, 0.0)[-1]) for name in MOTIONS}
    assert moved["sliding left"][1].x < moved["sliding left"][0].x
    assert moved["sliding right"][1].x > moved["sliding right"][0].x
    assert moved["sliding up"][1].y < moved["sliding up"][0].y
    assert moved["sliding down"][1].y > moved["sliding down"][0].y
    assert moved["growing"][1].size > moved["growing"][0].size
    assert moved["shrinking"][1].size < moved["shrinking"][0].size


def test_a_missing_style_is_named():
    with pytest.raises(ValueError, match="openmoji"):
        PACK.sprite("parrot", "openmoji")
