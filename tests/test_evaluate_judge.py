"""Figures of clips whose quality is known: real ones, frozen ones, those of a style."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from animatelcm.data.emoji import drawn
from animatelcm.data.sprites import PACK
from animatelcm.evaluate.bootstrap import average, interval
from animatelcm.evaluate.frechet import frechet_distance, gaussian
from animatelcm.evaluate.judge import FLOOR_SEED, PROMPT_SEED, Judge, Protocol
from animatelcm.evaluate.prompts import prompts
from animatelcm.evaluate.report import facts_hash

FEW = ("parrot", "banana", "rocket", "zebra")
PROTOCOL = Protocol(clips=12, real=24, concepts=FEW)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(PROTOCOL, tmp_path_factory.mktemp("judge"))


def real(protocol, kind="clips"):
    shots = prompts(kind, protocol.data(PROMPT_SEED, protocol.clips))
    return shots, [drawn(shot, protocol.pack) for shot in shots]


@pytest.fixture(scope="module")
def of_real(judge):
    """Figures of real clips."""
    return judge.figures("clips", *real(PROTOCOL))


def test_real_clips_get_full_marks(of_real):
    shots, figures = real(PROTOCOL)[0], of_real
    assert figures["concept_accuracy"] >= 0.95
    assert figures["motion_accuracy"] == 1
    assert figures["motion_amount"] == 1
    assert figures["named"] == sum(bool(shot.named) for shot in shots) > 2
    assert figures["n"] == 12
    assert 0.5 < figures["fvd_like"] / figures["fvd_floor"] < 2


def test_exchanged_clips_show_other_subjects_and_motions(judge):
    shots, clips = real(PROTOCOL, "motions")
    one = judge.figures("motions", shots, clips[1:] + clips[:1])
    same = np.mean([a.slug == b.slug for a, b in zip(shots, shots[1:] + shots[:1], strict=True)])
    assert one["motion_accuracy"] == pytest.approx(1 / 12)  # both rounds begin with the same motion
    assert one["concept_accuracy"] == pytest.approx(same, abs=0.06)
    assert sum(one["missed_motions"].values()) == 11
    low, high = one["intervals"]["motion_accuracy"]
    assert low == 0 < 1 / 12 < high < 1
    assert one["fvd_like"] is None


def test_intervals_hold_the_figure_and_are_as_wide_as_the_binomial_ones(judge, of_real):
    shots, clips = real(PROTOCOL, "images")
    swapped = [clips[i - 1] if i % 3 == 0 else clip for i, clip in enumerate(clips)]
    figures = judge.figures("images", shots, swapped)
    (low, high), share = figures["intervals"]["concept_accuracy"], figures["concept_accuracy"]
    assert 0.5 < share < 1
    assert (high - low) / 2 == pytest.approx(1.96 * (share * (1 - share) / len(shots)) ** 0.5, rel=0.15)
    assert low <= share <= high
    assert figures["intervals"].keys() == {"concept_accuracy"}
    low, high = of_real["intervals"]["fvd_like"]
    assert low < of_real["fvd_like"] < high
    plain = interval(
        lambda x: frechet_distance(gaussian(x), judge.reference.real), of_real["samples"]["fvd_like"], resamples=200
    )
    assert (low, high) == pytest.approx((plain.low, plain.high), rel=1e-9)
    assert of_real["intervals"]["motion_accuracy"] == (1, 1)
    assert of_real["intervals"]["motion_amount"] == pytest.approx((1, 1))


def test_figures_are_made_of_what_each_clip_brings(judge):
    shots, clips = real(PROTOCOL)
    swapped = [clips[i - 1] if i % 3 == 0 else clip for i, clip in enumerate(clips)]
    figures = judge.figures("clips", shots, swapped)
    samples = figures["samples"]
    for name in ("concept_accuracy", "motion_accuracy", "motion_amount"):
        assert average(samples[name]) == pytest.approx(figures[name], abs=1e-12)
    assert figures["fvd_like"] == frechet_distance(gaussian(samples["fvd_like"]), judge.reference.real)
    shapes = {name: tuple(sample.shape) for name, sample in samples.items()}
    assert shapes == {
        "concept_accuracy": (12,),
        "motion_accuracy": (figures["named"],),
        "motion_amount": (12, 2),
        "fvd_like": (12, 2560),
    }
    kept = [i for i in range(12) if i % 3]
    alone = judge.figures("plain", [shots[i] for i in kept], [clips[i] for i in kept])["samples"]
    assert torch.equal(alone["concept_accuracy"], samples["concept_accuracy"][kept])  # clip by clip


def distance(judge, clips):
    """Of clips from the real ones."""
    return frechet_distance(gaussian(judge._features(clips, "features", len(clips))), judge.reference.real)


def test_the_floor_is_the_distance_of_real_clips(judge):
    data = PROTOCOL.data(FLOOR_SEED, PROTOCOL.clips)
    assert distance(judge, [data[i].frames for i in range(12)]) == pytest.approx(judge.reference.floor, rel=1e-4)


def test_frozen_and_spoilt_clips_are_farther(judge):
    _, clips = real(PROTOCOL)
    near = distance(judge, clips)
    frozen = [np.repeat(clip[:1], 16, axis=0) for clip in clips]
    assert distance(judge, frozen) > 1.2 * near
    noise = np.random.default_rng(0).normal(0, 30, clips[0].shape)
    noisy = [np.clip(clip + noise, 0, 255).astype(np.uint8) for clip in clips]
    assert distance(judge, noisy) > 1.4 * near


def test_images_have_no_motion_figures(judge):
    shots, clips = real(PROTOCOL, "images")
    figures = judge.figures("images", shots, clips)
    assert [key for key, value in figures.items() if value is None] == [
        "motion_accuracy",
        "motion_amount",
        "fvd_like",
        "fvd_floor",
    ]
    assert figures["concept_accuracy"] == 1


def test_real_features_are_made_once(judge):
    kept = judge.reference

    def forbidden(*_):
        raise AssertionError("made again")

    again = Judge(PROTOCOL, judge.folder, forbidden).reference
    assert again.floor == kept.floor
    assert len(list(judge.folder.glob("real-*.safetensors"))) == 2


def test_a_personal_style_is_judged_by_that_style():
    protocol = Protocol(clips=6, real=6, concepts=FEW, style_truth="twemoji")
    shots, clips = real(protocol)
    assert {shot.style for shot in shots} == {"twemoji"}
    classifier = Judge(protocol, PACK).classifier
    assert "twemoji" in classifier.styles
    seen = classifier.predict(np.concatenate([clip[:1] for clip in clips]))
    assert [FEW[i] for i in seen] == [shot.slug for shot in shots]


def test_a_sheet_by_its_path_is_the_same_style_under_another_hash():
    by_name, by_path = (Protocol(style_truth=truth) for truth in ("twemoji", str(PACK / "twemoji.webp")))
    assert by_path.data(1, 9).shot(3) == by_name.data(1, 9).shot(3)
    assert facts_hash(by_name.facts) != facts_hash(by_path.facts)


def test_the_protocol_is_named_by_all_that_it_says():
    variants = [
        Protocol(),
        Protocol(clips=255),
        Protocol(real=99),
        Protocol(split="validation"),
        Protocol(style_truth="noto"),
        Protocol(concepts=FEW),
    ]
    assert len({facts_hash(protocol.facts) for protocol in variants}) == 6
    assert facts_hash(Protocol().facts) == facts_hash(variants[0].facts)


def test_what_is_chosen_by_is_not_what_is_reported():
    """Other prompts, held against the same real clips."""
    test, validation = (Protocol(clips=20, real=24, split=split) for split in ("test", "validation"))
    asked = [[shot.caption for shot in prompts("clips", p.data(p.prompt_seed, 20))] for p in (test, validation)]
    assert sum(a == b for a, b in zip(*asked, strict=True)) <= 2
    assert test.judging == validation.judging
    assert len({test.prompt_seed, validation.prompt_seed, FLOOR_SEED}) == 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"clips": 1}, "clips=1"), ({"real": 0}, "real=0"), ({"style_truth": "no-such"}, "no sheet for style 'no-such'")],
)
def test_senseless_protocols_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Protocol(**wrong)
