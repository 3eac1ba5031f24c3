from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from animatelcm.data.emoji import COLOURS, VAGUE_CAPTIONS, EmojiClips, EmojiImages, caption, drawn, held_out
from animatelcm.data.sprites import MOTIONS, SMALL_CONCEPTS
from animatelcm.evaluate.motion import classify


@pytest.mark.parametrize("kind", [EmojiImages, EmojiClips])
def test_a_clip_is_a_function_of_seed_and_index(kind):
    one, two, other = kind(length=50), kind(length=50), kind(length=50, seed=1)
    for i in (7, 3, 7):  # in any order
        assert one[i].caption == two[i].caption
        assert (one[i].frames == two[i].frames).all()
    assert any((one[i].frames != other[i].frames).any() for i in range(5))


def test_shapes():
    assert EmojiImages(length=9)[0].frames.shape == (1, 64, 64, 3)
    assert EmojiClips(length=9)[0].frames.shape == (16, 64, 64, 3)


def test_captions_read_as_sentences():
    assert caption("parrot") == "a parrot"
    assert caption("octopus", style="fluent-flat", motion="spinning", colour="orange") == (
        "a flat octopus spinning on an orange background"
    )
    assert caption("alarm clock", colour="blue") == "an alarm clock on a blue background"
    assert caption("cherries") == "cherries"
    assert caption("parrot", style="twemoji") == "a parrot"  # a personal style has no word


def test_the_background_is_the_colour_that_the_caption_says():
    images = EmojiImages(length=200)
    seen = 0
    for clip in (images[i] for i in range(200)):
        if found := re.search(r"on an? (\w+) background", clip.caption):
            corners = clip.frames[0][[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
            wanted = np.array(COLOURS[found[1]]) * 255
            seen += (np.abs(corners - wanted).max(1) < 15).any()
        else:
            seen += (clip.frames[0][[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(1).any()
    assert seen == 200


def test_held_out_pairs_never_appear_and_every_motion_does():
    clips = EmojiClips(length=1500, real=0.0)
    slugs = {clips.pack.concepts[slug].name.lower(): slug for slug in SMALL_CONCEPTS}
    motions = Counter()
    for i in range(400):
        text = clips.shot(i).caption
        for motion in MOTIONS:
            if f" {motion}" in text:
                motions[motion] += 1
                names = [name for name in slugs if re.search(rf"\b{name} {motion}", text)]
                assert names, text
                assert not any(held_out(slugs[name], motion) for name in names)
    assert set(motions) == set(MOTIONS)
    share = np.mean([held_out(slug, motion) for slug in SMALL_CONCEPTS for motion in MOTIONS])
    assert 0.05 < share < 0.15


def test_opposite_motions_look_different_in_one_frame():
    # else their words would mean the same to the image model, and the temporal layers could not tell them apart
    across = {"sliding left": [], "sliding right": []}
    subject = next(slug for slug in SMALL_CONCEPTS if not any(held_out(slug, motion) for motion in across))
    images = EmojiImages(length=3000, moments=1.0, styles=("noto",), concepts=(subject,))
    for i in range(400):
        clip = images[i]
        for motion, found in across.items():
            if motion in clip.caption:
                ink = np.abs(clip.frames[0].astype(float) - clip.frames[0][0, 0]).sum((0, 2))
                found.append((ink @ np.arange(64)) / ink.sum())
    assert min(map(len, across.values())) > 15
    assert np.mean(across["sliding left"]) < 28
    assert np.mean(across["sliding right"]) > 36


def test_real_clips_move():
    clips = EmojiClips(length=100, real=1.0)
    change = [np.abs(np.diff(clips[i].frames.astype(float), axis=0)).mean() for i in range(10)]
    assert min(change) > 0.1


def test_degraded_clips_are_softer_and_vaguer():
    good, bad = EmojiClips(length=300, real=0.0), EmojiClips(length=300, real=0.0, degrade=True)
    vague = 0
    for i in range(40):
        sharp, soft = good[i], bad[i]
        assert soft.frames.shape == sharp.frames.shape
        vague += soft.caption in VAGUE_CAPTIONS
        edges = [np.abs(np.diff(clip.frames.astype(float), axis=2)).max() for clip in (sharp, soft)]
        assert edges[1] < edges[0] + 60
        assert (soft.frames != sharp.frames).any()
    assert vague > 20


def test_a_personal_style_is_drawn_in_that_style_alone():
    images = EmojiImages(length=20, styles=("twemoji",))
    assert not any(word in images[i].caption for i in range(20) for word in ("cartoon", "flat", "3d"))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"concepts": ()}, {"styles": ()}, {"concepts": ("no-such-thing",)}])
def test_senseless_data_sets_are_refused(wrong):
    with pytest.raises(ValueError, match=r"length|concept"):
        EmojiImages(**{"length": 5, **wrong})


@pytest.mark.parametrize("options", [{}, {"degrade": True}, {"styles": ("twemoji",), "real": 0.0}])
def test_a_shot_says_what_its_clip_shows(options):
    clips = EmojiClips(length=300, seed=3, **options)
    for i in range(12):
        shot, clip = clips.shot(i), clips[i]
        assert clip.caption == shot.caption
        assert (drawn(shot, clips.pack) == clip.frames).all()
        assert (clip.source, shot.style in clips.styles) == (f"emoji-clip/3/{i}", True)
        if shot.motion and "degrade" not in options:
            assert classify(clip.frames) == shot.motion


@pytest.mark.parametrize("degrade", [False, True])
def test_a_shot_knows_which_motion_its_caption_names(degrade):
    clips = EmojiClips(length=600, degrade=degrade)
    shots = [clips.shot(i) for i in range(600)]
    for shot in shots:
        said = [motion for motion in MOTIONS if re.search(rf"\b{motion}\b", shot.caption)]
        assert said == ([shot.named] if shot.named else [])
        assert shot.named in ("", shot.motion)
        assert (shot.damage is not None) == degrade
    own = np.mean([shot.motion == "" for shot in shots])
    assert 0.25 < own < 0.45  # EmojiClips.real
    still_lives = [s for s in shots if s.motion and clips.pack.concepts[s.slug].first_frame is None]
    silent = np.mean([shot.named == "" for shot in still_lives])
    assert silent > 0.7 if degrade else 0.05 < silent < 0.3  # moves, and the caption does not say how
    assert degrade or all(s.named for s in shots if s.motion and s not in still_lives)
