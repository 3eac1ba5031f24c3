"""When a claim of the papers holds: by how far rows are apart, and which baselines they are held against."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from animatelcm import planning
from animatelcm.evaluate.bootstrap import Difference, average, interval
from animatelcm.evaluate.frechet import distances, gaussian
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.paired import Pair, keep_samples
from animatelcm.evaluate.report import row_path, write_row
from animatelcm.model_source import ModelSource
from animatelcm.reproduce import learned, sampled
from animatelcm.reproduce.claims import (
    all_of,
    claims_table,
    nearer,
    paired_text,
    shows_more,
    some_of,
    verdict,
)
from animatelcm.reproduce.study import Sizes, Study
from animatelcm.weights.files import write_safetensors
from results import STUDIED


@pytest.fixture
def begun(tmp_path):
    made = Study(out=tmp_path / "r", sizes=Sizes())
    made.begin()
    return made


@pytest.mark.parametrize(("gain", "said"), [(10, True), (-10, False), (3.9, None), (-3.9, None), (4.1, True)])
def test_a_gain_counts_beyond_two_standard_deviations(gain, said):
    assert verdict(gain, 2.0) is said


def test_one_failure_fails_all_and_doubt_leaves_doubt():
    assert all_of([True, None, False]) is False
    assert all_of([True, None]) is None
    assert all_of([True, True]) is True


def test_one_that_holds_is_enough_where_none_fails():
    assert some_of([True, None, None]) is True
    assert some_of([True, None, False]) is False
    assert some_of([None, None]) is None


N, D = 120, 6


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _kept(made, name, features, right):
    """An evaluation of one row, as ``Study.rows`` leaves it: what its clips bring, and the real ones."""
    row, shots = replace(STUDIED, n=N), [Protocol(clips=N).data(PROMPT_SEED, N).shot(i) for i in range(N)]
    path = row_path(made.out / name, row.kind, row.setting)
    keep_samples({"fvd_like": features, "concept_accuracy": right}, path, row, shots, "real-x.safetensors")
    write_row(row, path)
    write_safetensors({"features": _normal(200, D, seed=1)}, made.out / name / "real-x.safetensors")
    return name, row


@pytest.mark.parametrize("akin", [True, False])
def test_rows_are_told_apart_by_what_their_clips_do_not_share(begun, akin):
    """Two rows of which one lies 1/2 farther off in each dimension, and misses ten subjects more. By what each spreads
    over its own clips they are not told apart; paired they are, but where clip i of both has nothing in common."""
    real, spread = _normal(200, D, seed=1), 5 * _normal(N, D, seed=2)
    features = [spread - spread.mean(0) + real.mean(0) + away for away in (3, 3.5)]
    right = [(torch.arange(N) < count).double() for count in (60, 50)]
    order = torch.arange(N) if akin else torch.randperm(N, generator=torch.Generator().manual_seed(3))
    ours = _kept(begun, "ours", features[0], right[0])
    other = _kept(begun, "other", features[1][order], right[1][order])
    there, back = begun.less(ours, other), begun.less(other, ours)
    distance, subjects = there.figures["fvd_like"], there.figures["concept_accuracy"]
    gain = D * (3.5**2 - 3**2)
    assert (distance.value, subjects.value) == (pytest.approx(-gain), pytest.approx(10 / N))
    assert [f(there) for f in (nearer, shows_more)] == [True if akin else None] * 2
    assert [f(back) for f in (nearer, shows_more)] == [False if akin else None] * 2
    if akin:  # by the mean over clips of the sum over dimensions of x - real mean + 1/4
        assert distance.deviation == pytest.approx(float(spread.sum(1).std()) / N**0.5, rel=0.12)
        assert subjects.deviation == pytest.approx((10 / N * (1 - 10 / N) / N) ** 0.5, rel=0.1)
    apart = [interval(distances(each, gaussian(real)), torch.arange(N), resamples=200) for each in features]
    shares = [interval(average, each) for each in right]
    own = [math.hypot(*((found.high - found.low) / 3.92 for found in both)) for both in (apart, shares)]
    assert [verdict(gain, own[0]), verdict(10 / N, own[1])] == [None, None]


def _apart(**figures):
    """A pair by name of the figure: (second less first, its deviation)."""
    said = {name: Difference(value, spread, 0.0, 0.0, 0.95, 200, 0) for name, (value, spread) in figures.items()}
    return Pair(STUDIED, STUDIED, said)


def test_a_pair_is_said_with_its_deviations_and_which_way_it_lies():
    pair = _apart(fvd_like=(-15.84, 2.66), control_error=(0.0031, 0.0012), concept_accuracy=(-0.0391, 0.0152))
    assert paired_text(pair, "fvd_like", "concept_accuracy") == (
        "paired by prompt 15.8 +- 2.7 nearer, 3.9 +- 1.5 points of subjects less"
    )
    assert paired_text(pair, "control_error") == "paired by prompt 0.003 +- 0.001 more error"
    other = _apart(fvd_like=(4.5, 2.3), control_error=(-0.1, 0.01), concept_accuracy=(0.052, 0.011))
    assert paired_text(other, "fvd_like", "control_error", "concept_accuracy") == (
        "paired by prompt 4.5 +- 2.3 farther, 0.100 +- 0.010 less error, 5.2 +- 1.1 points of subjects more"
    )


@pytest.mark.parametrize(
    ("lost", "margin", "said"), [(0.03, 0.0, False), (0.01, 0.0, None), (0.03, 0.05, None), (0.02, 0.05, True)]
)
def test_subjects_may_be_fewer_by_a_margin(lost, margin, said):
    """Of a deviation of 0.012."""
    assert shows_more(_apart(concept_accuracy=(-lost, 0.012)), margin) is said


class _Canned:
    """A study whose rows are said beforehand: (folder, setting) -> excess and share of subjects; and how far these
    spread in pairs."""

    def __init__(self, out, sizes, found):
        self.out, self.sizes, self.found, self.asked, self.shown = out, sizes, found, [], {}
        self.spread, self.clips = {"fvd_like": 8.0, "concept_accuracy": 0.02, "control_error": 0.01}, {}

    def rows(self, name, source, settings, clips=None, **_):
        self.asked.append((name, source, tuple(settings)))
        self.clips[name] = clips or self.sizes.clips
        return [self._row(name, setting) for setting in settings]

    def _row(self, name, setting):
        excess, concepts = self.found(name, setting)
        steps = int(re.search(r"@(\d+)", setting)[1])
        return replace(STUDIED, setting=setting, fvd_like=450 + excess, concept_accuracy=concepts, evaluations=steps)

    def less(self, first, second):
        for name, row in (first, second):
            assert row == self._row(name, row.setting)  # it is of that folder
        (_, ours), (_, other) = first, second
        figures = {}
        for name, spread in self.spread.items():
            value = getattr(ours, name) - getattr(other, name)
            figures[name] = Difference(value, spread, value - 2 * spread, value + 2 * spread, 0.95, 200, 0)
        return Pair(other, ours, figures)

    def trained(self, config):
        return ModelSource(model=config.name)

    def sheet(self, name, shown, **_):
        self.shown[name] = shown
        return f"{name}.png"


def _few_steps(tmp_path, found):
    made = _Canned(tmp_path, Sizes(), found)
    return sampled.few_steps(made), made


def test_each_baseline_has_the_guidance_that_suits_it_best(tmp_path):
    def found(name, setting):
        if name == "few_steps_ours":
            return 100.0, 0.9
        return (120.0 if ":2/" in setting else 300.0), 0.5

    section, made = _few_steps(tmp_path, found)
    claims = {claim.claim.split(" ")[0]: claim for claim in section.claims}
    assert claims["nearer"].ours.endswith("against DDIM 120 / 120 / 120 / 120, DPM++ 120 / 120 / 120 / 120")
    assert claims["nearer"].holds is True  # 20 over 2 x 8
    assert claims["shows"].holds is True
    assert claims["more"].holds is None
    assert claims["four"].holds is True
    (_, _, ours), (_, source, taught) = made.asked
    assert source.teacher
    assert len(ours) == 4
    assert len(taught) == len(set(taught)) == 2 * 4 * 3 + 1
    assert (tmp_path / "few-steps.png").read_bytes().startswith(b"\x89PNG")
    assert [setting for _, setting in made.shown["few-steps-clips"].values()] == [*ours, "ddim@25:4"]
    assert section.plots == ["few-steps.png", "few-steps-clips.png"]
    line = "| clips | emoji lcm@1 less emoji ddim@1:2/trailing | -20 +- 8 (-36 .. -4) | +40 +- 2 (36 .. 44) |"
    assert line in section.text
    assert section.text.count("| clips | emoji lcm@1 less ") == 2  # the nearest does not show the most
    assert section.text.count(" less emoji lcm@") == 3


def test_a_baseline_that_pairs_do_not_tell_apart_leaves_doubt(tmp_path):
    made = _Canned(tmp_path, Sizes(), lambda name, setting: (100.0 if name == "few_steps_ours" else 120.0, 0.5))
    made.spread["fvd_like"] = 12.0
    assert sampled.few_steps(made).claims[0].holds is None


@pytest.mark.parametrize("better", ["ddim", "dpm++"])
def test_ours_are_held_against_the_better_baseline(tmp_path, better):
    def found(name, setting):
        if name == "few_steps_ours":
            return 100.0, 0.5
        return (50.0, 0.9) if setting.startswith(better) else (300.0, 0.1)

    section, _ = _few_steps(tmp_path, found)
    assert [claim.holds for claim in section.claims[:2]] == [False, False]
    assert f"| clips | emoji lcm@8 less emoji {better}@8/trailing | +50 +- 8 " in section.text


@pytest.mark.parametrize(
    ("excesses", "said"), [((100, 80, 80, 80), True), ((100, 80, 97, 80), False), ((100, 90, 80, 70), None)]
)
def test_more_steps_are_better_where_none_is_worse_than_the_one_before(tmp_path, excesses, said):
    def found(name, setting):
        by_step = dict(zip(("lcm@1", "lcm@2", "lcm@4", "lcm@8"), excesses, strict=True))
        return float(by_step.get(setting, 100)), 0.5

    section, _ = _few_steps(tmp_path, found)
    assert section.claims[2].claim == "more steps are better"
    assert section.claims[2].holds is said


@pytest.mark.parametrize(
    ("farther", "lost", "said"), [(-30, 0.0, (True, True)), (30, 0.1, (False, False)), (10, 0.02, (None, None))]
)
def test_a_style_is_told_by_pairs_and_may_cost_five_points(tmp_path, farther, lost, said):
    def found(name, setting):
        return (200 + farther, 0.5 - lost) if name == "style_with" else (200, 0.5)

    section = sampled.style(_Canned(tmp_path, Sizes(), found))
    assert tuple(claim.holds for claim in section.claims) == said
    assert section.text.count(f"| clips | emoji lcm@4 less emoji lcm@4 | {farther:+.3g} +- 8 ") == 1


def test_a_baseline_that_is_nearer_fails_the_claim_and_says_so(tmp_path):
    section, _ = _few_steps(tmp_path, lambda name, setting: (200.0 if name == "few_steps_ours" else 150.0, 0.5))
    near, shows, _, four = section.claims
    assert near.holds is False
    assert shows.holds is None
    assert four.holds is False  # 200 against 1.25 x 150
    assert "| **no** |" in claims_table([near])
    assert section.text.count("| clips | emoji lcm@1 less ") == 1  # the nearest shows the most as well


@pytest.mark.parametrize(("full", "other", "said"), [(100, 130, True), (130, 100, False), (100, 110, None)])
def test_an_ablation_that_is_as_good_is_not_told_apart(tmp_path, monkeypatch, full, other, said):
    monkeypatch.setattr(learned, "plan", lambda config: SimpleNamespace(flops=1.0))
    ours = ("ablation_full", "ablation_clean_full")
    made = _Canned(tmp_path, Sizes(), lambda name, setting: (full, 0.5) if name in ours else (other, 0.55))
    claims = [*learned.ablations(made).claims, *learned.images_first(made).claims]
    assert [claim.holds for claim in claims] == [said] * 3
    away = f"{abs(full - other)}.0 +- 8.0 {'nearer' if full < other else 'farther'}"
    for claim in claims:
        assert claim.ours.endswith(f"; paired by prompt {away}, 5.0 +- 2.0 points of subjects less")
    assert set(made.clips.values()) == {256}


def test_both_ways_of_an_ablation_cost_the_same(tmp_path, monkeypatch):
    counted = {}  # counting takes seconds: once for each kind of run

    def plan(config):
        if config.name not in counted:
            counted[config.name] = planning.plan(config)
        return counted[config.name]

    monkeypatch.setattr(learned, "plan", plan)
    made = _Canned(tmp_path, Sizes(image_steps=2400, video_steps=1200), None)
    first, second = learned._stage_1(made), learned._stage_2(made, "full", "emoji", degrade=True)
    coupled = learned._coupled(made, "coupled", degrade=True)
    cost = first.steps * plan(first).flops + second.steps * plan(second).flops
    assert coupled.steps * plan(coupled).flops == pytest.approx(cost, rel=1e-3)
    assert plan(second).flops < plan(coupled).flops  # LoRA layers that learn cost more than frozen ones
    assert coupled.data == second.data
    assert not coupled.consistency.decouple


def test_the_adaptation_holds_where_a_quarter_of_the_error_goes(tmp_path):
    made = _Canned(tmp_path, Sizes(), None)
    free = "adapter_without_a_teacher"
    errors = {
        "adapter_as_it_is": 0.4,
        free: 0.29,
        "adapter_guided_by_the_image_model": 0.3,
        "adapter_with_a_teacher": 0.35,
    }
    made._row = lambda name, setting: replace(STUDIED, control_error=errors[name])
    direct, adapted = learned.adaptation(made).claims
    assert direct.holds
    assert adapted.holds
    assert "(-28%)" in adapted.ours
    assert adapted.ours.endswith("; paired by prompt 0.110 +- 0.010 less error, 0.0 +- 2.0 points of subjects more")
    errors[free] = 0.31
    assert learned.adaptation(made).claims[1].holds is False
