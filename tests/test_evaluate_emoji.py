"""Settings as text, and the loop: seeds, rows that are kept, a model that is perfect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from animatelcm.data.emoji import drawn
from animatelcm.evaluate import emoji
from animatelcm.evaluate.emoji import Setting, contact_sheet, evaluate, fingerprint
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.report import read_row
from animatelcm.model import with_motion
from animatelcm.provenance import Video
from animatelcm.schedule import NoiseSchedule

PROTOCOL = Protocol(clips=3, real=4, concepts=("parrot", "banana", "rocket", "zebra"))
LCM = Setting.parse("lcm@1")


@given(
    st.builds(
        Setting,
        sampler=st.sampled_from(["lcm", "ddim", "dpm++"]),
        steps=st.integers(1, 1000),
        guidance=st.integers(100, 10_000).map(lambda hundredths: hundredths / 100),
    )
)
def test_a_setting_is_read_as_it_is_written(setting):
    assert Setting.parse(str(setting)) == setting


def test_guidance_is_off_unless_said():
    assert Setting.parse("lcm@4") == Setting(sampler="lcm", steps=4, guidance=1.0)
    assert str(Setting.parse("ddim@25:4.0")) == "ddim@25:4"


@pytest.mark.parametrize(
    "text", ["", "lcm", "lcm@", "@4", "4", "lcm@4:", "lcm@4:x", "lcm@-4", "lcm@4.5", "lcm@0", "euler@4", "ddim@9:0.5"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"setting|sampler|num_inference_steps|guidance_scale"):
        Setting.parse(text)


def perfect(asked):
    """A sampler that draws what its prompt was taken from."""
    data = PROTOCOL.data(PROMPT_SEED, PROTOCOL.clips)

    def sample(model, request, *, condition):
        assert condition.image is None
        asked.append(request)
        shot = data.shot(request.seed)
        assert request.prompt == shot.caption
        seconds = {"denoise": float(request.seed), "decode": 1.0}
        frames = drawn(shot, data.pack)
        return [Video(frames=frames, fps=8, request=request, model="", evaluations=2, seconds=seconds)]

    return sample


def test_a_perfect_model_gets_what_real_clips_get(fresh_model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(emoji, "sample", perfect(asked))
    made, real, coded = evaluate(fresh_model, "m", settings=[LCM], protocol=PROTOCOL, out=tmp_path, ceilings=True)
    assert [request.seed for request in asked] == [0, 1, 2]
    assert {request.num_inference_steps for request in asked} == {1}
    assert (made.setting, real.setting, coded.setting) == ("lcm@1", "real", "autoencoded")
    assert (made.seconds, made.evaluations) == (2.0, 2)  # the median of 1, 2, 3
    assert (real.seconds, real.evaluations) == (None, 0)
    figures = {"setting": "", "seconds": None, "evaluations": 0}
    assert replace(made, **figures) == replace(real, **figures)
    assert made.motion_amount == 1
    assert coded.concept_accuracy < 0.8 < real.concept_accuracy  # through random weights


def test_rows_are_kept_and_measured_once(fresh_model, tmp_path, monkeypatch):
    settings = [LCM, Setting.parse("ddim@1:4")]
    options = {"protocol": PROTOCOL, "out": tmp_path, "kinds": ("images", "clips")}
    first = evaluate(fresh_model, "m", settings=settings[:1], **options)
    asked = []
    monkeypatch.setattr(emoji, "sample", recording(asked, emoji.sample))
    both = evaluate(fresh_model, "m", settings=settings, **options)
    assert both[:2] == first
    assert {(r.sampler, r.guidance_scale) for r in asked} == {("ddim", 4)}
    assert [(row.kind, row.n, row.evaluations) for row in both] == [
        ("images", 3, 1),
        ("clips", 3, 1),
        ("images", 3, 2),
        ("clips", 3, 2),
    ]
    assert [r.num_frames for r in asked] == [1, 1, 1, None, None, None]
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == [
        f"{name}.{suffix}"
        for name in ("ddim@1-4", "images-ddim@1-4", "images-lcm@1", "lcm@1")
        for suffix in ("json", "safetensors")
    ]
    asked.clear()
    assert evaluate(fresh_model, "m", settings=settings, **options) == both
    assert not asked


def recording(asked, sample):
    def recorded(model, request, *, condition):
        asked.append(request)
        return sample(model, request, condition=condition)

    return recorded


def test_rows_of_another_model_are_not_taken_for_ones_own(fresh_model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(emoji, "sample", perfect(asked))
    options = {"settings": [LCM], "protocol": PROTOCOL, "out": tmp_path, "kinds": ("clips",)}
    evaluate(fresh_model, "m", **options)
    other = replace(fresh_model, schedule=NoiseSchedule(solver_steps=25))
    with pytest.raises(ValueError, match=r"lcm@1\.json is of another model or protocol"):
        evaluate(other, "m", **options)
    with pytest.raises(ValueError, match=r"lcm@1\.json is of another model or protocol"):
        evaluate(fresh_model, "m", **{**options, "protocol": replace(PROTOCOL, real=5)})
    assert len(asked) == 3
    (row,) = evaluate(other, "m", force=True, **options)
    assert len(asked) == 6
    assert read_row(tmp_path / "rows" / "lcm@1.json") == row


def test_the_fingerprint_is_of_every_network(fresh_model):
    before = fingerprint(fresh_model)
    for network in fresh_model.networks.values():
        weight = next(network.parameters())
        kept = weight.clone()
        weight.add_(1)
        assert fingerprint(fresh_model) != before
        weight.copy_(kept)
    assert fingerprint(fresh_model) == before


def test_models_that_make_no_such_clips_are_refused_but_for_images(fresh_model, tmp_path):
    options = {"settings": [LCM], "protocol": PROTOCOL, "out": tmp_path}
    still = with_motion(fresh_model, fresh_model.unet.motion)
    still.unet.motion = None
    with pytest.raises(ValueError, match="no temporal layers"):
        evaluate(still, "m", **options)
    short = replace(fresh_model, facts=replace(fresh_model.facts, num_frames=8))
    with pytest.raises(ValueError, match="16 frames"):
        evaluate(short, "m", **options)
    (row,) = evaluate(short, "m", kinds=("images",), **options)
    assert (row.kind, row.fvd_like) == ("images", None)


def test_the_sheet_shows_what_a_request_makes(fresh_model, monkeypatch):
    monkeypatch.setattr(emoji, "SHEET", ("a parrot", "a bus shaking"))
    titles = []
    sheet = contact_sheet(fresh_model, LCM, lambda *said: titles.append(said))
    (first,) = emoji.sample(fresh_model, LCM.request("a parrot", seed=0))
    rows = [i for i in range(len(sheet) - 63) if np.array_equal(sheet[i : i + 64, 2:66], first.frames[0])]
    assert len(rows) == 1
    assert np.array_equal(sheet[rows[0] : rows[0] + 64, 2 + 7 * 66 : 66 + 7 * 66], first.frames[-1])
    assert [done for _, done, total in titles if total == 2] == [1, 2]


def test_another_adapter_is_measured_anew(fresh_model):
    steered = replace(fresh_model, adapters={"edge": torch.nn.Linear(2, 2)})
    assert fingerprint(steered) == fingerprint(fresh_model)
    before = fingerprint(steered, "edge")
    torch.nn.init.zeros_(steered.adapters["edge"].weight)
    assert len({fingerprint(steered), before, fingerprint(steered, "edge")}) == 3


def test_what_cannot_be_steered_is_said_before_anything_is_drawn(fresh_model, tmp_path):
    asked = {"settings": [], "protocol": Protocol(clips=2, real=2, steer="edge"), "out": tmp_path}
    with pytest.raises(ValueError, match="reads edge maps is needed"):
        evaluate(replace(fresh_model, adapters={}), "x", **asked)
    steered = replace(fresh_model, adapters={"edge": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="leave the kind images out"):
        evaluate(steered, "x", **asked, kinds=("images",))
