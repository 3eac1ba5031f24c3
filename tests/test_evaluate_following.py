"""Edges, places and flicker: exact on shapes moved by known steps, close on the pack's pictures when spoilt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from animatelcm.data.emoji import BASE_STYLES, COLOURS
from animatelcm.data.sprites import MOTIONS, SMALL_CONCEPTS, Pose, SpritePack, render
from animatelcm.evaluate.concepts import soften
from animatelcm.evaluate.following import (
    CONTRAST,
    displacements,
    edge_f1,
    edges,
    error_variance,
    keypoint_distance,
    warped_difference,
)
from animatelcm.evaluate.motion import motion_amount

PACK = SpritePack()  # keeps the sheets that it has read
PAPER, INK = (240, 230, 120), (40, 60, 160)


def square(x: int, y: int, side: int = 16) -> np.ndarray:
    frame = np.full((1, 48, 56, 3), PAPER, np.uint8)
    frame[:, y : y + side, x : x + side] = INK
    return frame


def disc(pose: Pose, side: int = 64) -> np.ndarray:
    """By its equation: shares no code with the pack's renderer."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    inside = (axis - pose.x) ** 2 + (axis[:, None] - pose.y) ** 2 < (0.6 * pose.size) ** 2
    return np.where(inside[..., None], INK, PAPER).astype(np.uint8)


def parrot(name: str = "orbiting", drift: float = 0.3) -> tuple[np.ndarray, list[Pose]]:
    motion, sizes = MOTIONS[name]
    poses = motion(sum(sizes) / 2, drift)
    return render(PACK.sprite("parrot", "noto"), poses, COLOURS["blue"]), poses


def textured(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_step_marks_the_pixels_on_both_its_sides():
    frame = np.full((12, 20, 3), 100, np.uint8)
    frame[:, 9:] = 100 + CONTRAST
    assert np.argwhere(edges(frame).all(axis=0)).ravel().tolist() == [8, 9]
    assert edges(frame).sum() == 2 * 12
    frame[:, 9:] = 100 + CONTRAST - 1
    assert not edges(frame).any()


def test_colours_of_one_luminance_have_an_edge_between_them():
    frame = np.full((12, 20, 3), (200, 0, 0), np.uint8)
    frame[:, 9:] = (0, 102, 0)  # BT.601: 59.8 and 59.9
    assert np.argwhere(edges(frame).all(axis=0)).ravel().tolist() == [8, 9]


def test_a_blur_leaves_an_edge_where_it_was():
    away_from_corners = slice(16, 24)
    sharp, blurred = edges(square(20, 12)[0]), edges(soften(square(20, 12), 1.0)[0])
    assert np.array_equal(blurred[away_from_corners], sharp[away_from_corners])


def test_edges_flip_and_turn_with_the_picture():
    for frame in [*parrot()[0][:4], textured((20, 31, 3))]:
        for changed in (np.flipud, np.fliplr, np.rot90, lambda a: a.swapaxes(0, 1)):
            assert np.array_equal(edges(changed(frame)), changed(edges(frame)))


def test_what_has_the_same_edges_follows_perfectly():
    frames, _ = parrot()
    assert (edge_f1(frames, frames) == 1).all()
    assert (edge_f1(frames, 255 - frames, tolerance=0) == 1).all()


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3])
def test_a_shift_within_tolerance_is_none(tolerance):
    for dx, dy in itertools.product((-tolerance, 0, tolerance), repeat=2):
        assert edge_f1(square(20 + dx, 16 + dy), square(20, 16), tolerance) == 1
    assert edge_f1(square(21 + tolerance, 16), square(20, 16), tolerance) < 1


def test_the_farther_the_worse():
    f1 = [edge_f1(square(20 + d, 16 + d), square(20, 16)).item() for d in range(9)]
    assert f1[0] == f1[1] == 1
    assert f1 == sorted(f1, reverse=True)
    assert f1[2] < 0.6
    assert f1[4] < 0.15


def test_a_thing_too_many_costs_precision():
    both = np.minimum(square(4, 4), square(32, 20))  # ink is darker than paper in red and green
    both[(both != PAPER).any(axis=-1)] = INK
    for pair in ((both, square(4, 4)), (square(4, 4), both)):
        np.testing.assert_allclose(edge_f1(*pair), 2 * 0.5 * 1 / (0.5 + 1))


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_f1_is_that_of_all_pairs_of_edge_pixels(tolerance):
    clips = [soften(textured((3, 24, 30, 3), seed), 1.5) for seed in (0, 1)]
    for a, b, f1 in zip(*clips, edge_f1(*clips, tolerance), strict=True):
        apart = np.abs(np.argwhere(edges(a))[:, None] - np.argwhere(edges(b))).max(axis=-1)
        precision, recall = ((apart.min(axis=axis) <= tolerance).mean() for axis in (1, 0))
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
        assert 0 < f1 < 1


def test_frames_without_edges():
    plain = np.full_like(square(0, 0), 90)
    pairs = [(plain, plain), (plain, square(9, 9)), (square(9, 9), plain)]
    assert edge_f1(*(np.concatenate(side) for side in zip(*pairs, strict=True))).tolist() == [1, 0, 0]


def test_edges_of_spoilt_pictures_are_still_there():
    frames, _ = parrot()
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    other = render(PACK.sprite("banana", "noto"), parrot("sliding up")[1], COLOURS["blue"])
    assert edge_f1(noisy, frames).mean() > 0.95
    assert edge_f1(soften(frames, 0.7), frames).mean() > 0.9
    assert edge_f1(other, frames).mean() < 0.5


def test_frames_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        edge_f1(square(0, 0), square(0, 0)[:, 1:])
    with pytest.raises(ValueError, match="uint8"):
        edge_f1(square(0, 0) / 255, square(0, 0))
    with pytest.raises(ValueError, match="tolerance=-1"):
        edge_f1(square(0, 0), square(0, 0), -1)


@pytest.mark.parametrize("name", MOTIONS)
@pytest.mark.parametrize("side", [64, 96])
def test_what_follows_its_poses_is_where_they_want_it(name, side):
    motion, sizes = MOTIONS[name]
    for size, drift in itertools.product(sizes, (-1.0, 0.3)):
        poses = motion(size, drift)
        assert keypoint_distance(np.stack([disc(pose, side) for pose in poses]), poses).max() < 1


@pytest.mark.parametrize("name", MOTIONS)
def test_pictures_of_the_pack_are_found_when_lopsided_cut_and_spoilt(name):
    first = 2 * list(MOTIONS).index(name)
    motion, sizes = MOTIONS[name]
    source = np.random.default_rng(first)
    subjects = zip(SMALL_CONCEPTS, itertools.cycle(BASE_STYLES), itertools.cycle(COLOURS.values()), strict=False)
    for (slug, style, colour), size in zip(itertools.islice(subjects, first, first + 2), sizes, strict=True):
        picture, poses = PACK.sprite(slug, style), motion(size, -0.4)
        frames = render(picture, poses, colour)
        assert keypoint_distance(frames, poses, picture).max() < 0.05  # the colour behind is known in whole levels
        noisy = np.clip(frames + source.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
        assert keypoint_distance(soften(noisy, 0.7), poses, picture).max() < 1


def test_the_distance_is_in_pixels():
    poses = [Pose(0.5, 0.1, -0.2)] * 3
    for side in (64, 128):
        frames = np.roll(np.stack([disc(pose, side) for pose in poses]), (3, -4), axis=(1, 2))
        np.testing.assert_allclose(keypoint_distance(frames, poses), 5, atol=0.3)
    low = np.roll(disc(Pose(0.5, 0.0, 0.0)), 4, axis=1)[None, 8:-8]
    np.testing.assert_allclose(keypoint_distance(low, [Pose(0.5, 0.0, 0.0)]), 4, atol=0.01)


def test_a_lopsided_picture_is_judged_by_its_own_centre():
    corner = torch.zeros(4, 64, 64)
    corner[3, :32, 32:] = 1  # its middle is half of the picture's size to the right and above
    poses = [Pose(0.5, 0.0, 0.0, degrees) for degrees in (0.0, 90.0, 200.0)]
    frames = render(corner, poses, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(keypoint_distance(frames, poses), 0.5 * 0.5 * math.sqrt(2) * 32, atol=0.1)
    np.testing.assert_allclose(keypoint_distance(frames, poses, corner), 0, atol=1e-5)


def test_nothing_is_half_a_side_away():
    frames = np.stack([disc(Pose(0.6, 0.0, 0.0))] * 3)[:, 8:-8]
    frames[1] = PAPER
    assert keypoint_distance(frames, [Pose(0.6, 0.0, 0.0)] * 3) == pytest.approx([0, 32, 0], abs=1e-3)
    noise = np.random.default_rng(0).normal(127, 6, (2, 64, 64, 3)).astype(np.uint8)
    assert keypoint_distance(noise, [Pose(0.5, 0.0, 0.0)] * 2).tolist() == [32, 32]


def test_each_frame_has_a_pose():
    with pytest.raises(ValueError, match="3 frames and 2 poses"):
        keypoint_distance(np.zeros((3, 64, 64, 3), np.uint8), [Pose(0.5, 0.0, 0.0)] * 2)


def test_displacements_are_pixels_of_the_whole_way():
    poses = MOTIONS["sliding left"][0](0.6, 0.5)
    np.testing.assert_allclose(displacements(poses, 48, 64).sum(axis=0), [-2 * (1 - 0.7 * 0.6) * 32, 0], atol=1e-9)
    np.testing.assert_allclose(displacements([Pose(1, 0, 0), Pose(1, 0.5, -0.25)], 48, 64), [[16, -6]])


def test_only_what_changes_from_frame_to_frame_is_flicker():
    assert error_variance(np.full(16, 0.7)) == 0
    assert error_variance(np.arange(16) * 0.3) == pytest.approx(0.3**2 / 2)
    assert error_variance(0.4 * (-1.0) ** np.arange(16)) == pytest.approx((2 * 0.4) ** 2 / 2)
    noise = np.random.default_rng(0).normal(5, 0.3, 200_000)
    assert error_variance(noise) == pytest.approx(0.3**2, rel=0.02)
    with pytest.raises(ValueError, match="two frames"):
        error_variance(np.ones(1))


def test_what_moves_as_said_does_not_flicker():
    motion = [(3, 0), (-2, 5), (0, -1), (23, 0)]
    steps = np.cumsum([(0, 0), *motion], axis=0)
    frames = np.stack([np.roll(textured((20, 24, 3)), (y, x), axis=(0, 1)) for x, y in steps])
    assert warped_difference(frames, np.array(motion)) == 0
    assert warped_difference(frames, -np.array(motion)) > 0.2
    assert warped_difference(frames) == pytest.approx(motion_amount(frames) / 255)


def test_between_pixels_the_way_is_straight():
    y, x = np.mgrid[:16, :20]
    frames = np.stack([(4 * x + 8 * y + 20 - level)[..., None].repeat(3, -1) for level in (0, 6, 12)]).astype(np.uint8)
    assert warped_difference(frames, np.array([[0.5, 0.5], [-0.5, 1.0]])) == pytest.approx(0, abs=1e-12)


def test_a_difference_is_a_share_of_the_whole_range():
    frames = np.stack([np.full((8, 9, 3), level, np.uint8) for level in (0, 255, 204)])
    for motion in (None, np.array([[1.5, -2.0], [0.0, 3.3]])):
        assert warped_difference(frames, motion) == pytest.approx((1 + 0.2) / 2)


@pytest.mark.parametrize("name", ["sliding left", "sliding down", "bouncing", "shaking", "orbiting"])
def test_rendered_motions_move_as_their_poses_say(name):
    frames, poses = parrot(name)
    moved = warped_difference(frames, displacements(poses, 64, 64))
    assert moved < warped_difference(frames) / 8
    flickering = frames.copy()
    flickering[::2] = np.clip(frames[::2].astype(int) + 5, 0, 255)
    assert warped_difference(flickering, displacements(poses, 64, 64)) > moved + 3 / 255


@pytest.mark.parametrize(
    ("motion", "message"),
    [(np.zeros((2, 2)), r"\(3, 2\)"), (np.full((3, 2), 20.0), "leaves nothing"), (np.full((3, 2), np.nan), "nan")],
)
def test_motions_that_do_not_fit_are_refused(motion, message):
    with pytest.raises(ValueError, match=message):
        warped_difference(np.zeros((4, 16, 20, 3), np.uint8), motion)


def test_one_frame_does_not_move():
    with pytest.raises(ValueError, match="two at least"):
        warped_difference(np.zeros((1, 16, 20, 3), np.uint8))
