"""A reproduction: what is kept and what runs again, when a claim holds, and the arithmetic behind both."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from animatelcm import training, video
from animatelcm.data.emoji import drawn
from animatelcm.data.sprites import SpritePack
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.prompts import prompts
from animatelcm.model_source import ModelSource
from animatelcm.reproduce import bias, learned, page, plots, study
from animatelcm.reproduce.claims import (
    Claim,
    Section,
)
from animatelcm.reproduce.study import QUICK, Sizes, Study
from animatelcm.schedule import NoiseSchedule
from results import STUDIED

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
        return [replace(STUDIED, model=label, setting=str(setting)) for setting in settings]

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
    plots.few_steps(tmp_path / "x.png", {"ours": [STUDIED]}, None)
    left = figures[0].axes[0]
    assert left.lines[0].get_ydata().tolist() == [150]
    assert left.collections[0].get_segments()[0][:, 1].tolist() == [130, 190]


def test_losses_are_drawn_of_runs_that_have_some(tmp_path):
    (tmp_path / "a").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n{"step": 20, "sample": 1}\n')
    plots.losses(tmp_path / "l.png", {"a": tmp_path / "a", "b": tmp_path / "absent"})
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert SimpleNamespace(files=sorted(p.name for p in tmp_path.iterdir())).files == ["a", "l.png"]
