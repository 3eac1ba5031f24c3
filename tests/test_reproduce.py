"""A reproduction: what is kept and what runs again, when a claim holds, and the arithmetic behind both."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import results
from animatelcm import planning, training, video
from animatelcm.data.emoji import drawn
from animatelcm.data.sprites import SpritePack
from animatelcm.evaluate.bootstrap import Difference, average, interval
from animatelcm.evaluate.frechet import distances, gaussian
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.paired import Pair, keep_samples
from animatelcm.evaluate.prompts import prompts
from animatelcm.evaluate.report import row_path, write_row
from animatelcm.model_source import ModelSource
from animatelcm.reproduce import bias, learned, page, plots, sampled, study
from animatelcm.reproduce.claims import (
    Claim,
    Section,
    all_of,
    claims_table,
    nearer,
    paired_text,
    shows_more,
    some_of,
    verdict,
)
from animatelcm.reproduce.study import QUICK, Sizes, Study
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.files import write_safetensors

ROW = replace(
    results.ROW,
    n=64,
    motion_accuracy=0.9,
    fvd_like=600.0,
    fvd_floor=450.0,
    control_error=0.2,
    intervals={"fvd_like": (580.0, 640.0)},
)
CLAIM = Claim(claim="a | b", source="s", paper="1", ours="2", holds=True, n=3)


@pytest.fixture
def begun(tmp_path):
    made = Study(out=tmp_path / "r", sizes=Sizes())
    made.begin()
    return made


# What is kept


def test_a_measurement_is_made_once(begun):
    calls = []
    for _ in range(2):
        assert begun.measured("x", lambda _: calls.append(1) or {"value": 2.5}) == {"value": 2.5}
    assert calls == [1]
    assert list(begun.seconds()) == ["measure x"]


def test_a_measurement_that_fails_leaves_none_and_its_time(begun):
    with pytest.raises(ZeroDivisionError):
        begun.measured("x", lambda _: {"value": 1 / 0})
    assert begun.measured("x", lambda _: {"value": 1}) == {"value": 1}
    assert list(begun.seconds()) == ["measure x"]


def test_a_run_that_was_stopped_goes_on_and_a_finished_one_is_taken(begun, monkeypatch):
    outcomes, seen = [None, "model"], []

    def train(config, *, resume):
        seen.append((config.folder, resume))
        if (outcome := outcomes.pop(0)) is None:
            return None
        (config.folder / outcome).mkdir(parents=True)
        return config.folder / outcome

    monkeypatch.setattr(training, "train", train)
    config = learned._stage_1(begun)
    with pytest.raises(KeyboardInterrupt):
        begun.trained(config)
    for _ in range(2):
        assert begun.trained(config) == ModelSource(model=str(begun.out / "runs" / "image" / "model"))
    assert seen == [(begun.out / "runs" / "image", True)] * 2


def test_a_folder_of_other_sizes_is_refused(begun):
    begun.begin()
    with pytest.raises(ValueError, match="other sizes"):
        replace(begun, sizes=QUICK).begin()


def test_rows_share_what_is_kept_of_real_clips(begun, monkeypatch):
    folder = begun.out / "before"
    folder.mkdir()
    (folder / "real-abc.safetensors").write_bytes(b"features")
    monkeypatch.setattr(study, "load_sum", lambda source, device: None)

    def evaluate(model, label, *, settings, protocol, out, **_):
        assert (out / "real-abc.safetensors").read_bytes() == b"features"
        assert (protocol.clips, protocol.real, protocol.steer) == (64, 512, "edge")
        return [replace(ROW, model=label, setting=str(setting)) for setting in settings]

    monkeypatch.setattr(study.emoji, "evaluate", evaluate)
    rows = begun.rows("after", ModelSource(style=("twemoji",)), ["lcm@1", "ddim@4:2/trailing"], steer="edge")
    assert [row.setting for row in rows] == ["lcm@1", "ddim@4:2/trailing"]
    assert rows[0].model == "emoji --style twemoji"
    assert json.loads((begun.out / "after" / "report.json").read_text())["rows"][0] == json.loads(
        json.dumps(asdict(rows[0]))
    )


def test_a_sheet_has_the_real_clip_and_what_each_model_makes_of_it_and_is_drawn_once(begun, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "load_sum", lambda source, device: source.style)

    def sampled(model, setting, protocol, shot, seed):
        asked.append((model, str(setting), protocol.steer, shot.caption, seed))
        return SimpleNamespace(frames=np.full((16, 64, 64, 3), 200 if model else 90, np.uint8))

    monkeypatch.setattr(study.emoji, "sampled", sampled)
    shown = {"plain": (ModelSource(), "lcm@1"), "styled": (ModelSource(style=("twemoji",)), "lcm@4")}
    for _ in range(2):
        assert begun.sheet("clips", shown, steer="edge") == "clips.png"
    assert [entry[:3] for entry in asked] == [((), "lcm@1", "edge")] * 4 + [(("twemoji",), "lcm@4", "edge")] * 4
    assert asked[0][3:] == asked[4][3:]
    sheet = video.read(begun.out / "clips.png").frames[0]
    shot = prompts("clips", Protocol(clips=64, real=512).data(PROMPT_SEED, 64))[0]
    rows = np.split(sheet[2:], 12)  # of 80 pixels: words, frames, a gap
    assert np.array_equal(rows[0][14:78, 2:66], drawn(shot, SpritePack())[0])
    assert [(rows[i][14:78, 2:66] == grey).all() for i, grey in ((1, 90), (2, 200), (4, 90))] == [True] * 3


def test_four_steps_are_always_among_the_steps():
    with pytest.raises(ValueError, match="four"):
        Sizes(steps=(1, 2))


# When a claim holds


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
    row, shots = replace(ROW, n=N), [Protocol(clips=N).data(PROMPT_SEED, N).shot(i) for i in range(N)]
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
    return Pair(ROW, ROW, said)


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
        return replace(ROW, setting=setting, fvd_like=450 + excess, concept_accuracy=concepts, evaluations=steps)

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
    made._row = lambda name, setting: replace(ROW, control_error=errors[name])
    direct, adapted = learned.adaptation(made).claims
    assert direct.holds
    assert adapted.holds
    assert "(-28%)" in adapted.ours
    assert adapted.ours.endswith("; paired by prompt 0.110 +- 0.010 less error, 0.0 +- 2.0 points of subjects more")
    errors[free] = 0.31
    assert learned.adaptation(made).claims[1].holds is False


# The estimate that takes the teacher's place


class _Teacher:
    """On latents N(0, 1) the best prediction is sigma x_t: given the text as it is, and nothing without."""

    schedule = NoiseSchedule()

    def __init__(self, share):
        self.share, self.source = share, torch.Generator().manual_seed(0)

    def encode(self, pixels):
        return torch.randn(1, 16, 16, 8, 8, generator=self.source)

    def embed(self, texts):
        return torch.zeros(len(texts), 1, 1)

    def predict(self, x, t, *, text, motion):
        assert motion
        best = self.share * self.schedule.level(t).sigma.reshape(-1, 1, 1, 1, 1) * x
        return torch.cat([0 * best[:1], best[1:]])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_slope_over_a_perfect_teacher_is_one_and_over_a_strong_one_its_share(share, monkeypatch):
    teacher = _Teacher(share)
    monkeypatch.setattr(bias, "load_sum", lambda source: teacher)
    monkeypatch.setattr(bias, "to_pixels", lambda frames: None)
    found = bias.measure(4, lambda *_: None)
    late = [i for i, t in enumerate(found["t"]) if t > 300]
    assert len(late) > 4
    for i in late:
        assert found["slope_unguided"][i] == pytest.approx(1 / share, rel=0.02)
        assert found["slope_guided"][i] == pytest.approx(1 / share / bias.SCALE, rel=0.02)
        sigma = float(teacher.schedule.level(torch.tensor(found["t"][i])).sigma)
        wanted = (1 - 2 * share * sigma**2 + share**2 * sigma**2) ** 0.5
        assert found["noise_error"][i] == pytest.approx(wanted, rel=0.02)
    assert bias.table(found).count("\n") == 2 + len(found["t"])


# The page


def test_the_page_has_every_claim_the_time_and_a_warning_where_it_is_quick(tmp_path):
    for sizes in (Sizes(), QUICK):
        made = Study(out=tmp_path / str(sizes.quick), sizes=sizes)
        made.begin()
        made.measured("x", lambda _: {})
        section = Section(title="Few steps", claims=[CLAIM], text="| t |", plots=["few-steps.png"])
        text = page.write(made, [section]).read_text()
        assert r"| a \| b | s | 1 | 2 | yes | 3 |" in text
        assert "![Few steps](few-steps.png)" in text
        assert "| measure x |" in text
        assert ("mean nothing" in text) == sizes.quick
        said = json.loads((made.out / "claims.json").read_text())
        assert said["rows"] == [asdict(CLAIM)]
        assert ("quick" in said["title"]) == sizes.quick


def test_every_experiment_runs_in_turn_and_the_page_grows(tmp_path, monkeypatch):
    made, seen = Study(out=tmp_path, sizes=Sizes()), []

    def experiment(given):
        """Something."""
        seen.append(len(json.loads((tmp_path / "claims.json").read_text())["rows"]) if seen else 0)
        return Section(title="T", claims=[CLAIM])

    monkeypatch.setattr(page, "EXPERIMENTS", (experiment, experiment))
    page.reproduce(made)
    assert seen == [0, 1]
    assert len(json.loads((tmp_path / "claims.json").read_text())["rows"]) == 2


def test_a_distance_is_drawn_over_the_floor_with_its_own_interval(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.few_steps(tmp_path / "x.png", {"ours": [ROW]}, None)
    left = figures[0].axes[0]
    assert left.lines[0].get_ydata().tolist() == [150]
    assert left.collections[0].get_segments()[0][:, 1].tolist() == [130, 190]


def test_losses_are_drawn_of_runs_that_have_some(tmp_path):
    (tmp_path / "a").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n{"step": 20, "sample": 1}\n')
    plots.losses(tmp_path / "l.png", {"a": tmp_path / "a", "b": tmp_path / "absent"})
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert SimpleNamespace(files=sorted(p.name for p in tmp_path.iterdir())).files == ["a", "l.png"]
