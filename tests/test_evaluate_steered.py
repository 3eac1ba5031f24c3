"""Steered clips are held against the real clips they were taken from: a perfect follower gets perfect figures."""

from __future__ import annotations

import numpy as np
import pytest

from animatelcm.data.emoji import EmojiClips, drawn, staged
from animatelcm.data.looks import layout
from animatelcm.data.sprites import SpritePack
from animatelcm.evaluate import steered
from animatelcm.evaluate.bootstrap import average
from animatelcm.evaluate.features import load_network
from animatelcm.evaluate.steered import condition

PACK = SpritePack()
DATA = EmojiClips(length=6, seed=5, pack=PACK)
SHOTS = [DATA.shot(i) for i in range(6)]
REAL = [drawn(shot, PACK) for shot in SHOTS]


@pytest.fixture(scope="module")
def network():
    return load_network()


def following(*arguments) -> dict[str, float]:
    return {name: average(sample) for name, sample in steered.following(*arguments).items()}


def keeping(*arguments) -> dict[str, float]:
    return {name: average(sample) for name, sample in steered.keeping(*arguments).items()}


def test_a_condition_is_what_the_real_clip_shows():
    shot, real = SHOTS[0], REAL[0]
    assert np.array_equal(condition(shot, PACK, "i2v").image, real[0])
    (control,) = condition(shot, PACK, "tile").controls
    assert control.name == "tile"
    assert np.array_equal(control.maps, real)
    (control,) = condition(shot, PACK, "pose").controls
    assert np.array_equal(control.maps, layout(DATA.scene(0), "pose"))
    empty = condition(shot, PACK, "")
    assert empty.image is None
    assert not empty.controls


@pytest.mark.parametrize("steer", ["edge", "pose"])
def test_real_clips_follow_themselves_and_others_do_not(steer):
    own = following(steer, SHOTS, REAL, REAL, PACK)
    assert own["control_error"] < (1e-9 if steer == "edge" else 1.0)
    assert own["warped_difference"] == pytest.approx(1)
    other = following(steer, SHOTS, REAL[1:] + REAL[:1], REAL, PACK)
    assert other["control_error"] > own["control_error"] + (0.2 if steer == "edge" else 2)


def test_flicker_is_what_changes_from_frame_to_frame():
    shaken = [np.roll(clip, 2, axis=2) if i % 2 else clip for i, clip in enumerate(REAL)]
    every_other = [
        np.where((np.arange(16) % 2)[:, None, None, None] > 0, np.roll(clip, 6, axis=2), clip) for clip in REAL
    ]
    steady = following("pose", SHOTS, shaken, REAL, PACK)
    jumping = following("pose", SHOTS, every_other, REAL, PACK)
    assert jumping["control_flicker"] > 4 * steady["control_flicker"]
    assert jumping["warped_difference"] > steady["warped_difference"]


def test_a_clip_keeps_to_its_own_picture_best(network):
    still = [np.repeat(clip[:1], 16, axis=0) for clip in REAL]
    firsts = [clip[0] for clip in REAL]
    perfect = keeping(network, still, REAL, firsts)
    assert perfect["identity"] == pytest.approx(1, abs=1e-5)
    assert perfect["first_frame_psnr"] == 60
    assert perfect["colour_error"] == pytest.approx(0, abs=1e-9)
    other = keeping(network, still[1:] + still[:1], REAL, firsts)
    assert other["identity"] < 0.8
    assert other["first_frame_psnr"] < 20
    assert other["colour_error"] > 5


def test_samples_have_a_row_a_clip_and_none_is_an_error(network):
    found = steered.following("edge", SHOTS, REAL, REAL, PACK) | steered.keeping(
        network, REAL, REAL, [clip[0] for clip in REAL]
    )
    assert {len(sample) for sample in found.values()} == {len(SHOTS)}
    own = [shot for shot in SHOTS if staged(shot, PACK).sprites.ndim == 4]
    assert own
    clips = [drawn(shot, PACK) for shot in own]
    with pytest.raises(ValueError, match="ask for more clips"):
        steered.following("pose", own, clips, clips, PACK)
