"""Named motions are told from frames: symmetries of time and space, other drawings than the pack's, spoilt clips."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from animatelcm.data.emoji import BASE_STYLES, COLOURS
from animatelcm.data.sprites import MOTIONS, SMALL_CONCEPTS, Pose, SpritePack, render
from animatelcm.evaluate.motion import STILL, classify, measure, motion_amount

PAPER, INK, DOT = (np.array(c) for c in ([240.0, 230, 120], [40.0, 60, 160], [200.0, 40, 40]))
REVERSED = {
    "sliding left": "sliding right",
    "sliding right": "sliding left",
    "sliding up": "sliding down",
    "sliding down": "sliding up",
    "growing": "shrinking",
    "shrinking": "growing",
}
MIRRORED = {"sliding left": "sliding right", "sliding right": "sliding left"}
TRANSPOSED = {
    "sliding left": "sliding up",
    "sliding up": "sliding left",
    "sliding right": "sliding down",
    "sliding down": "sliding right",
}


def draw(pose: Pose, side: int = 64) -> np.ndarray:
    """An ellipse with an off-centre dot, by its implicit equation: shares no code with the pack's renderer."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    x, y = (axis[None, :] - pose.x) / pose.size, (axis[:, None] - pose.y) / pose.size
    angle = math.radians(pose.degrees)
    u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
    frame = np.where(((u / 0.85) ** 2 + (v / 0.55) ** 2 < 1)[..., None], INK, PAPER)
    return np.where(((u - 0.45) ** 2 + (v - 0.1) ** 2 < 0.06)[..., None], DOT, frame).astype(np.uint8)


def drawing(name: str, drift: float = 0.3, where: float = 0.5) -> np.ndarray:
    motion, (low, high) = MOTIONS[name]
    return np.stack([draw(pose) for pose in motion(low + where * (high - low), drift)])


def spoilt(frames: np.ndarray, seed: int) -> np.ndarray:
    """Softened, noisy, and moved by up to a pixel from frame to frame."""
    source = np.random.default_rng(seed)
    rolled = [np.roll(frame, source.integers(-1, 2, 2), axis=(0, 1)) for frame in frames]
    soft = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(1))) for f in rolled])
    return np.clip(soft + source.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", MOTIONS)
def test_symmetries_of_time_and_space(name):
    frames = drawing(name)
    assert classify(frames) == name
    assert classify(frames[::-1]) == REVERSED.get(name, name)
    assert classify(frames[:, :, ::-1]) == MIRRORED.get(name, name)
    assert classify(255 - frames) == name
    if name not in ("bouncing", "swinging", "shaking"):  # these know what is down
        assert classify(frames.transpose(0, 2, 1, 3)) == TRANSPOSED.get(name, name)


def test_what_does_not_move_is_still():
    frames = np.stack([draw(Pose(0.7, 0.2, -0.1))] * 16)
    assert classify(frames) == STILL
    assert classify(np.full((16, 64, 64, 3), 127, np.uint8)) == STILL


def test_the_trajectory_is_measured_in_the_units_of_poses():
    poses = [Pose(0.3 + 0.02 * f, 0.02 * f, -0.03 * f, 10.0 * f) for f in range(16)]
    round_about = [pose._replace(degrees=0.0) for pose in poses]
    seen = measure(np.stack([draw(pose) for pose in round_about]))
    size = np.array([pose.size for pose in poses])
    moved = seen.centre.numpy() - [(pose.x, pose.y) for pose in poses]
    np.testing.assert_allclose(moved - moved.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose(seen.log_size.numpy() - np.log(size), seen.log_size[0] - np.log(size[0]), atol=0.08)
    np.testing.assert_allclose(seen.turn.numpy(), 0, atol=1e-6)


@pytest.mark.parametrize("degrees", [-22.5, 11.25, 22.5])
def test_turns_are_clockwise_degrees(degrees):
    seen = measure(np.stack([draw(Pose(0.8, 0.0, 0.0, degrees * f)) for f in range(16)]))
    np.testing.assert_allclose(seen.turn.numpy(), degrees, atol=1e-6)


def test_real_clips_are_named_and_so_are_spoilt_ones():
    """Every motion three times, over concepts, styles and backgrounds, white pictures on white among them."""
    pack = SpritePack()
    subjects = zip(SMALL_CONCEPTS, itertools.cycle(BASE_STYLES), itertools.cycle(COLOURS.values()), strict=False)
    named = {False: 0, True: 0}
    for i, (name, (slug, style, colour)) in enumerate(zip(list(MOTIONS) * 3, subjects, strict=False)):
        motion, (low, high) = MOTIONS[name]
        poses = motion(low + (high - low) * (i % 5) / 4, (i % 7) / 3 - 1)
        frames = render(pack.sprite(slug, style), poses, colour)
        named[False] += classify(frames) == name
        named[True] += classify(spoilt(frames, seed=i)) == name
    assert named[False] >= 32
    assert named[True] >= 31


@pytest.mark.parametrize(
    ("slug", "style"), [("snowman", "noto"), ("unicorn", "fluent-flat"), ("sailboat", "fluent-3d")]
)
def test_white_pictures_on_white(slug, style):
    pack = SpritePack()
    for name, (motion, sizes) in MOTIONS.items():
        assert classify(render(pack.sprite(slug, style), motion(sum(sizes) / 2, -0.4), (1.0, 1.0, 1.0))) == name


def test_motion_amount_is_the_mean_step_in_grey_levels():
    brighter = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 6, 3), 5, np.uint8)
    assert motion_amount(brighter) == 5
    assert motion_amount(brighter[::-1]) == 5
    assert motion_amount(np.stack([brighter[7]] * 3)) == 0


def test_clips_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="16 frames"):
        classify(np.zeros((8, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="two frames"):
        motion_amount(np.zeros((1, 64, 64, 3), np.uint8))
