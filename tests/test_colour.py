"""Colour is moved by what is missing, on the circle of hues: colorsys is the oracle of the numbers."""

from __future__ import annotations

import colorsys
from itertools import product

import numpy as np
import pytest

from animatelcm.colour import aligned, from_hsv, to_hsv


def picture(*, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float], seed: int = 0):
    """uint8 (40, 50, 3) of random colours from ranges of turns and shares."""
    low, high = np.array([hue, saturation, value]).T
    return from_hsv(np.random.default_rng(seed).uniform(low, high, (40, 50, 3)))


def means(frame: np.ndarray) -> tuple[float, float, float]:
    """Mean hue in degrees -180..180, weighted by chroma; mean saturation and value in levels of 255."""
    hues = [(colorsys.rgb_to_hsv(*pixel), max(pixel) - min(pixel)) for pixel in (frame.reshape(-1, 3) / 255).tolist()]
    vector = sum(chroma * np.exp(2j * np.pi * hsv[0]) for hsv, chroma in hues)
    saturation, value = np.mean([hsv[1:] for hsv, _ in hues], axis=0)
    return float(np.degrees(np.angle(vector))), 255 * saturation, 255 * value


def difference(after: tuple[float, float, float], before: tuple[float, float, float]) -> np.ndarray:
    hue, *levels = np.subtract(after, before)
    return np.array([(hue + 180) % 360 - 180, *levels])


CORNERS = np.array(list(product((0, 1, 127, 128, 254, 255), repeat=3)), np.uint8)
RANDOM = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)


@pytest.mark.parametrize("colours", [CORNERS, RANDOM], ids=["corners", "random"])
def test_hsv_is_that_of_colorsys(colours):
    oracle = [colorsys.rgb_to_hsv(*pixel) for pixel in (colours / 255).tolist()]
    assert np.allclose(to_hsv(colours), oracle, rtol=0, atol=1e-12)
    hsv = np.random.default_rng(1).uniform(0, 1, (3000, 3))
    hsv[:216] = to_hsv(CORNERS)
    levels = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv.tolist()]) * 255
    assert np.abs(from_hsv(hsv) - levels).max() < 0.5 + 1e-9


def test_all_levels_come_back():
    levels = np.unique(np.r_[0:256:5, 1:256:9, 254]).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    assert np.array_equal(from_hsv(to_hsv(grid)), grid)
    every = np.arange(256, dtype=np.uint8)
    for step in ((1, 1, 1), (1, 0, 0), (0, 1, 1), (1, 255, 7)):
        ramp = np.stack([every * np.uint8(by) for by in step], axis=-1)
        assert np.array_equal(from_hsv(to_hsv(ramp)), ramp)


def test_any_turn_is_a_hue_and_shares_are_clipped():
    hsv = np.random.default_rng(2).uniform((-3, -1, -1), (3, 2, 2), (500, 3))
    inside = np.stack([hsv[:, 0] % 1, *np.clip(hsv[:, 1:], 0, 1).T], axis=-1)
    assert np.abs(from_hsv(hsv).astype(int) - from_hsv(inside)).max() <= 1  # of 3 % 1 and 3 * 6 % 6, one may round


MIDDLE = {"saturation": (0.35, 0.5), "value": (0.5, 0.7)}
FRAMES = np.stack([picture(hue=(0.1, 0.3), **MIDDLE, seed=i) for i in range(3)])
REFERENCE = picture(hue=(0.5, 0.6), saturation=(0.5, 0.7), value=(0.6, 0.9), seed=9)


def test_strength_0_changes_nothing_and_1_meets_the_means():
    assert np.array_equal(aligned(FRAMES, REFERENCE, strength=0.0), FRAMES)
    goal = means(REFERENCE)
    for before, after in zip(FRAMES, aligned(FRAMES, REFERENCE), strict=True):
        assert abs(means(before)[1] - goal[1]) > 25
        assert np.abs(np.subtract(means(after)[1:], goal[1:])).max() < 1


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("hue", [0.0, 0.03, 0.5])
def test_means_move_by_their_share(strength, hue):
    before, after, goal = means(FRAMES[0]), means(aligned(FRAMES[:1], REFERENCE, strength, hue)[0]), means(REFERENCE)
    moved = difference(after, before) / difference(goal, before)
    assert np.allclose(moved, [hue * strength, strength, strength], rtol=0, atol=0.02)


def test_what_is_aligned_stays():
    for still in (FRAMES[0], np.concatenate([FRAMES[0], np.full_like(FRAMES[0], 77)])):
        scrambled = np.random.default_rng(3).permutation(still.reshape(-1, 3)).reshape(still.shape)
        assert np.abs(aligned(still[None], scrambled).astype(int) - still).max() == 0
    once = aligned(FRAMES, REFERENCE, hue=0.0)
    assert np.abs(aligned(once, REFERENCE, hue=0.0).astype(int) - once).max() <= 2  # below 1 level of a mean


def test_hues_meet_the_short_way_round():
    """Reds at 10 and at 350 degrees meet at 0 or 350, never in the cyans on the far side."""
    below, above = (np.tile(from_hsv(np.array([turn, 0.8, 0.8])), (1, 8, 8, 1)) for turn in (350 / 360, 10 / 360))
    for frame, reference, degrees in ((below, above, -10), (above, below, 10)):
        for hue, met in ((0.5, 0), (1.0, -degrees), (0.25, degrees / 2)):
            assert means(aligned(frame, reference[0], hue=hue)[0])[0] == pytest.approx(met, abs=0.4)
    both = np.concatenate([below, above], axis=1)
    assert abs(means(both[0])[0]) < 0.1
    assert np.array_equal(aligned(both, both[0], hue=1.0), both)


def test_greys_do_not_vote():
    """A white wall beside it changes nothing of the hue that a picture has."""
    frame, reference = FRAMES[:1], REFERENCE.copy()
    wall = np.full((40, 500, 3), 255, np.uint8)
    alone = aligned(frame, reference, hue=0.5)[0]
    beside = aligned(frame, np.concatenate([reference, wall], axis=1), hue=0.5)[0]
    assert means(alone)[0] == pytest.approx(means(beside)[0], abs=1.0)


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_grey_reference_takes_colour_and_turns_nothing(level):
    after = aligned(FRAMES[:1], np.full((8, 8, 3), level, np.uint8), strength=0.5, hue=1.0)[0]
    assert means(after)[0] == pytest.approx(means(FRAMES[0])[0], abs=1.0)
    assert means(after)[1] < 0.6 * means(FRAMES[0])[1] + 1


def test_greys_that_gain_colour_gain_that_of_the_reference():
    """Not red, which is hue 0; and none where the reference has all hues alike."""
    grey, rainbow = np.full((1, 8, 8, 3), 120, np.uint8), from_hsv(np.linspace((0, 0.8, 0.8), (1, 0.8, 0.8), 13)[:-1])
    after = aligned(grey, REFERENCE)[0]
    assert means(after)[0] == pytest.approx(means(REFERENCE)[0], abs=1.0)
    assert means(after)[1] == pytest.approx(means(REFERENCE)[1], abs=1.0)
    unsure = aligned(grey, rainbow[None])[0]
    assert (unsure == round(0.8 * 255)).all()


def test_what_has_all_hues_alike_turns_nowhere():
    frame = from_hsv(np.random.default_rng(5).permutation(np.linspace((0, 0.6, 0.7), (1, 0.6, 0.7), 61)[:-1]))[
        None, None
    ]
    frame = np.concatenate([frame, np.array([[[[120, 119, 119]]]], np.uint8)], axis=2)  # all but alike
    assert np.array_equal(aligned(frame, REFERENCE, hue=1.0), aligned(frame, REFERENCE, hue=0.0))


def test_every_frame_is_aligned_by_itself():
    together = aligned(np.concatenate([FRAMES, FRAMES[::-1] // 2]), REFERENCE)
    alone = [aligned(frame[None], REFERENCE)[0] for frame in (*FRAMES, *(FRAMES[::-1] // 2))]
    assert np.array_equal(together, alone)


def test_what_leaves_the_range_is_clipped_not_wrapped():
    bright = aligned(np.full((1, 4, 4, 3), (250, 128, 128), np.uint8), np.full((2, 2, 3), 255, np.uint8))
    assert np.array_equal(bright, np.full((1, 4, 4, 3), 255))
    contrast = np.array([[[[255, 255, 255], [0, 0, 0]]]], np.uint8)
    assert aligned(contrast, np.full((1, 1, 3), 200, np.uint8))[0, 0, :, 0].tolist() == [255, 72]  # 127.5 + 72.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strength": -0.1}, "strength=-0.1"),
        ({"strength": 1.1}, "between 0 .off. and 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"hue": 2.0}, r"hue=2\.0"),
        ({"frames": FRAMES[0]}, r"\(F, H, W, 3\) is needed"),
        ({"frames": FRAMES / 255}, "to_uint8"),
        ({"frames": FRAMES[:0]}, r"got uint8 \(0, 40, 50, 3\)"),
        ({"reference": FRAMES}, r"\(H, W, 3\) is needed"),
        ({"reference": REFERENCE[..., 0]}, r"\(H, W, 3\) is needed"),
    ],
)
def test_what_cannot_be_aligned_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        aligned(**{"frames": FRAMES, "reference": REFERENCE, **change})
