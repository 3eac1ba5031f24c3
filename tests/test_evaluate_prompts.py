"""What is asked for: every kind asks what its name says, and the real clip shows it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from animatelcm.data.emoji import EmojiClips, drawn, held_out
from animatelcm.data.sprites import MOTIONS, SMALL_CONCEPTS
from animatelcm.evaluate.motion import classify
from animatelcm.evaluate.prompts import PER_CONCEPT, PER_MOTION, SHEET, prompts

KINDS = ("clips", "images", "plain", "motions", "held_out")
DATA = EmojiClips(length=200, seed=5)


def test_the_clips_are_those_of_the_data_set():
    assert prompts("clips", DATA) == [DATA.shot(i) for i in range(200)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_fixed_and_fewer_are_the_first_ones(kind):
    whole, again = prompts(kind, DATA), prompts(kind, EmojiClips(length=200, seed=5))
    assert whole == again
    assert prompts(kind, EmojiClips(length=7, seed=5)) == whole[:7]
    assert [shot.poses for shot in prompts(kind, EmojiClips(length=200, seed=6))] != [shot.poses for shot in whole]


@pytest.mark.parametrize("kind", ["images", "plain"])
def test_every_subject_is_asked_for_as_often(kind):
    shots = prompts(kind, DATA)
    assert Counter(shot.slug for shot in shots) == dict.fromkeys(SMALL_CONCEPTS, PER_CONCEPT[kind])
    assert not any(shot.named or motion in shot.caption for shot in shots for motion in MOTIONS)
    assert {len(shot.poses) for shot in shots} == {1 if kind == "images" else 16}


@pytest.mark.parametrize("kind", ["motions", "held_out"])
def test_every_motion_is_asked_for_of_different_subjects(kind):
    shots = prompts(kind, DATA)
    assert Counter(shot.named for shot in shots) == dict.fromkeys(MOTIONS, PER_MOTION[kind])
    assert len({(shot.slug, shot.named) for shot in shots}) == len(shots)
    for shot in shots:
        assert held_out(shot.slug, shot.named) == (kind == "held_out")
        assert shot.caption.endswith(f" {shot.named}")


@pytest.mark.parametrize("kind", ["motions", "held_out"])
def test_the_real_clip_shows_what_the_prompt_names(kind):
    for shot in prompts(kind, DATA)[:11]:
        assert classify(drawn(shot, DATA.pack)) == shot.named


def test_real_images_and_plain_clips_are_drawn_by_the_styles_asked_for():
    twemoji = EmojiClips(length=20, styles=("twemoji",), real=0.0)
    for kind in KINDS:
        shots = prompts(kind, twemoji)
        assert {shot.style for shot in shots} == {"twemoji"}
        assert len(drawn(shots[0], twemoji.pack)) == (1 if kind == "images" else 16)
    for shot in prompts("plain", twemoji):
        assert shot.motion in MOTIONS  # a style that has no animations moves somehow


def test_plain_clips_are_the_subjects_own_animation_where_there_is_one():
    for shot in prompts("plain", DATA):
        assert (shot.motion == "") == (DATA.pack.concepts[shot.slug].first_frame is not None)
        if not shot.motion:
            assert all(a == b for a, b in pairwise(shot.poses))


def test_the_sheet_asks_for_16_different_subjects_that_were_learned():
    names = [DATA.pack.concepts[slug].name.lower() for slug in SMALL_CONCEPTS]
    subjects = [[name for name in names if re.search(rf"\b{name}\b", prompt)] for prompt in SHEET]
    assert len({max(found, key=len) for found in subjects}) == 16
