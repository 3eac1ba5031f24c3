"""Edges are what OpenCV and the closed form of a step say, and borders around a frame are none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from animatelcm.control_maps import fitted_maps, made
from animatelcm.images import fitted
from footage import disc, noise


def step(low: int, high: int, at: int = 12) -> np.ndarray:
    frames = np.full((1, 20, 30, 3), low, np.uint8)
    frames[:, :, at:] = high
    return frames


# Made


def test_canny_is_that_of_opencv_in_white_on_black():
    import cv2

    frames = disc()
    maps = made("canny", frames)
    assert maps.shape == frames.shape
    assert maps.dtype == np.uint8
    for frame, seen in zip(frames, maps, strict=True):
        assert np.array_equal(seen, cv2.Canny(frame, 100, 200)[..., None].repeat(3, axis=2))
    assert set(np.unique(maps)) == {0, 255}


def test_an_edge_is_white_beside_a_whole_step_and_nowhere_else():
    """1 2 1 makes of a step 0 0 1 3 4 4 quarters, whose central differences are to each other as 1 3 3 1."""
    for frames in (step(0, 255), step(255, 0), step(0, 255) * np.array([0, 1, 0], np.uint8)):
        maps = made("edge", frames)
        assert (maps == maps[:, :1, :, :1]).all()
        assert maps[0, 0, 10:14, 0].tolist() == [85, 255, 255, 85]
        assert not np.delete(maps, range(10, 14), axis=2).any()
        assert np.array_equal(made("edge", frames.swapaxes(1, 2)), maps.swapaxes(1, 2))


def test_an_edge_is_the_steepest_channel_of_a_smoothed_frame():
    """Scharr's 3 10 3 along and -1 0 1 across, by sums of shifted frames in float64."""
    frame = disc()[1]
    smooth = np.pad(frame.astype(float), ((2, 2), (2, 2), (0, 0)), "edge")
    for axis in (0, 1):
        smooth = shifted(smooth, (1, 2, 1), axis) / 4
    across = shifted(shifted(smooth, (3, 10, 3), 0), (-1, 0, 1), 1)
    down = shifted(shifted(smooth, (3, 10, 3), 1), (-1, 0, 1), 0)
    steepest = np.sqrt(across**2 + down**2).max(axis=2) / 12
    seen = made("edge", frame[None])[0, ..., 0]
    inside = np.s_[1:-1, 1:-1]  # at the rim it matters whether the smoothed frame or the frame is continued
    assert np.abs(seen - np.minimum(steepest, 255))[inside].max() <= 0.5 + 1e-4


def shifted(frame: np.ndarray, weights: tuple[int, int, int], axis: int) -> np.ndarray:
    """The weighted sum of three neighbours, shorter by two."""
    length = frame.shape[axis] - 2
    return sum(weight * frame.take(range(i, i + length), axis) for i, weight in enumerate(weights))


@pytest.mark.parametrize("contrast", [1, 2, 16, 127, 128, 254])
def test_an_edge_is_as_bright_as_its_step_is_high(contrast):
    """Not as bright as the frame's own maximum makes it, which flickers."""
    assert made("edge", step(0, contrast)).max() == contrast
    assert made("edge", step(255 - contrast, 255)).max() == contrast
    both = np.concatenate([step(0, contrast), step(0, 255)], axis=2)
    assert made("edge", both)[0, 0, 11, 0] == contrast


def test_edges_are_linear_in_contrast():
    frames = disc() // 2
    doubled = np.minimum(2.0 * made("edge", frames), 255)
    assert np.abs(made("edge", 2 * frames) - doubled).max() <= 1


def test_edges_turn_and_flip_with_the_frame_exactly():
    frames = noise(2, 21, 30, 3)
    maps = made("edge", frames)
    assert np.array_equal(made("edge", frames[:, ::-1]), maps[:, ::-1])
    assert np.array_equal(made("edge", frames[:, :, ::-1]), maps[:, :, ::-1])
    assert np.array_equal(made("edge", np.rot90(frames, axes=(1, 2))), np.rot90(maps, axes=(1, 2)))
    assert np.array_equal(made("edge", frames[..., ::-1]), maps)
    assert np.array_equal(made("edge", 255 - frames), maps)


@pytest.mark.parametrize("kind", ["canny", "edge"])
def test_frames_are_mapped_apart_and_plain_ones_are_black(kind):
    frames = disc()
    assert np.array_equal(made(kind, frames), np.concatenate([made(kind, frame[None]) for frame in frames]))
    assert not made(kind, np.full((2, 9, 7, 3), 200, np.uint8)).any()
    assert made(kind, noise(1, 1, 1, 3)).shape == (1, 1, 1, 3)


def test_a_tile_is_the_frame():
    assert np.array_equal(made("tile", disc()), disc())


@pytest.mark.parametrize(
    ("kind", "frames", "said"),
    [
        ("depth", disc(), "a depth control needs ready maps: give a clip of them, as depth=map:FILE"),
        ("pose", disc(), "a pose control needs ready maps: give a clip of them, as pose=map:FILE"),
        ("scribble", disc(), "scribble maps cannot be made here, only canny, edge and tile; give ready ones"),
        ("edge", disc()[0], "(F, H, W, 3) is needed"),
        ("tile", disc() / 255, "to_uint8"),
    ],
)
def test_what_cannot_be_made_is_said(kind, frames, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        made(kind, frames)


# Fitted


@pytest.mark.parametrize("kind", ["canny", "edge"])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 80), (31, 64), (64, 31)])
def test_borders_are_no_edges(kind, height, width):
    plain = np.full((2, 20, 40, 3), (200, 30, 90), np.uint8)
    assert not fitted_maps(kind, plain, height, width, "pad", ready=False).any()
    frames = disc(2, 20, 40)
    frames[:, 8:12, 15:25] = 255
    scale = min(height / 20, width / 40)
    y, x = round((height - 20 * scale) / 2), round((width - 40 * scale) / 2)
    inner = np.stack([fitted(frame, height - 2 * y, width - 2 * x, "stretch") for frame in frames])
    expected = np.zeros((2, height, width, 3), np.uint8)
    expected[:, y : height - y, x : width - x] = made(kind, inner)
    assert expected.any()
    assert np.array_equal(fitted_maps(kind, frames, height, width, "pad", ready=False), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fit": "squash"}, "fit='squash' to 8x8: choose crop, pad, stretch"),
        ({"fit": "pad", "height": 0}, "fit='pad' to 8x0: choose"),
        ({"frames": disc()[0]}, "(F, H, W, 3) is needed"),
        ({"ready": False}, "a depth control needs ready maps"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        fitted_maps(**{"kind": "depth", "frames": disc(), "height": 8, "width": 8, "ready": True, **change})


@pytest.mark.parametrize("kind", ["depth", "pose", "canny", "seg"])
def test_ready_maps_are_set_in_black(kind):
    maps = fitted_maps(kind, disc(2, 20, 40) | 1, 40, 40, "pad", ready=True)
    assert not maps[:, :10].any()
    assert not maps[:, 30:].any()
    assert np.array_equal(maps[:, 10:30], disc(2, 20, 40) | 1)


@pytest.mark.parametrize("ready", [True, False])
def test_a_tile_has_the_borders_of_a_picture(ready):
    tiles = fitted_maps("tile", disc(2, 20, 40), 40, 40, "pad", ready=ready)
    assert np.array_equal(tiles, np.stack([fitted(frame, 40, 40, "pad") for frame in disc(2, 20, 40)]))
    assert tiles.all(axis=0)[0].any()
