"""The papers' row in one call: what it makes, what it compares, and that it goes on where it stopped.

Three classes, the miniature with random weights at 32x32 pixels, and means of places in place of I3D's logits.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from animatelcm import batch, video
from animatelcm.batch import engine
from animatelcm.evaluate import fvd, rows, ucf101, zero_shot
from animatelcm.evaluate.clipsim import load_clip, similarities
from animatelcm.evaluate.folders import chosen
from animatelcm.model_source import ModelSource
from test_evaluate_clipsim import random_clip
from test_evaluate_fvd import detector
from test_evaluate_ucf101 import LENGTHS, avi

SMALL = ("width=32", "height=32", "steps=1", "guidance=1")
CLASSES = ("Archery", "HandstandPushups", "YoYo")


@pytest.fixture(autouse=True)
def _three_classes(monkeypatch):
    monkeypatch.setattr(ucf101, "CAPTIONS", {name: ucf101.CAPTIONS[name] for name in CLASSES})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in LENGTHS.items():
        avi(folder / name, count)
    return folder


@pytest.fixture
def go(fresh_model, data, tmp_path):
    def run(per_class=1, real=2, seed=5, settings=SMALL, network=None, clip=None):
        asked = zero_shot.plan(per_class, seed, settings)
        drawn = ucf101.draws(data, real, seed=seed)
        given = (fresh_model, ModelSource(), asked, drawn, data, tmp_path / "out", network or detector(), clip)
        return zero_shot.figures(*given)

    return run


def test_the_figures_are_those_of_the_clips_that_were_drawn_and_made(go, data, tmp_path, monkeypatch):
    clip = load_clip(random_clip(tmp_path / "clip"))
    found = go(clip=clip)
    videos = tmp_path / "out" / "videos"
    names = [f"{name}-00.mp4" for name in CLASSES]
    assert sorted(path.name for path in videos.iterdir()) == names
    drawn = ucf101.draws(data, 2, seed=5)
    made = [video.read(videos / name, num_frames=16).frames for name in sorted(chosen(names, 2, 5))]
    assert made[0].shape == (16, 32, 32, 3)
    real = ucf101.clips(data, drawn)
    distance, similar = found.scores["emoji"]
    expected = fvd.fvd(fvd.features(detector(), real), fvd.features(detector(), made), detector())
    assert distance.value == pytest.approx(expected.value)
    assert distance.n == {"real": 2, "generated": 2}
    everything = [video.read(videos / name).frames for name in names]
    assert similar.value == pytest.approx(float(similarities(clip, everything, ucf101.CAPTIONS.values()).mean()))
    assert ucf101.read_draws(tmp_path / "out" / "draws.json") == drawn
    json.dumps(found.to_json())

    before = {path: path.stat().st_mtime_ns for path in videos.iterdir()}
    monkeypatch.setattr(
        batch, "here", lambda *_: lambda rows, suffix, done: pytest.fail("made again") if rows else None
    )
    again = go(clip=clip, network=detector()._replace(logits=lambda x: pytest.fail("asked again")))
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in videos.iterdir()} == before


def test_what_papers_do_otherwise_is_remarked(go):
    said = go().remarks
    assert len(said) == 6
    assert said[0].startswith("2 clips of 16 frames from 4 videos, where the papers draw 2,048")
    assert "videos were made with height=32, width=32 where the papers have height=512, width=512" in said[1]
    assert "n = 2 where papers use 2,048" in said[2]
    assert "sizes are mixed (real: 32x24 in 2; made: 32x32 in 2)" in said[4]
    assert "frame rates are mixed (real: 25 in 2; made: 8 in 2)" in said[5]


def test_the_protocol_knows_draws_and_captions_but_not_the_model(go):
    hashes = [go(**options).scores["emoji"][0].protocol for options in ({}, {"settings": (*SMALL[:3], "guidance=2")})]
    assert hashes[0] == hashes[1]
    assert go(real=3).scores["emoji"][0].protocol != hashes[0]
    assert go(seed=6).scores["emoji"][0].protocol != hashes[0]


def test_real_videos_that_were_passed_over_are_said(fresh_model, data, tmp_path):
    for name, count in LENGTHS.items():
        avi(tmp_path / "data" / name, count if count != 16 else 15)
    drawn = ucf101.draws(tmp_path / "data", 4)
    given = (fresh_model, ModelSource(), zero_shot.plan(1, 0, SMALL), drawn, tmp_path / "data", tmp_path / "out")
    said = zero_shot.figures(*given, detector()).remarks
    assert any("1 real videos were passed over, e.g. Archery/v_Archery_g01_c02.avi: 15 frames" in one for one in said)


def test_nothing_is_said_where_all_is_as_in_the_papers():
    as_theirs = [{"file": "a", "prompt": "a", "seed": 0, **ucf101.SETTINGS, "num_inference_steps": 4}]
    assert rows.differences(as_theirs, ucf101.SETTINGS) == []
    full = SimpleNamespace(n={"real": 2048, "generated": 2048}, rank={"real": 400, "generated": 400})
    assert fvd.remarks({"a": [full]}) == []


def test_settings_come_before_the_papers_and_rows_before_settings():
    asked = zero_shot.plan(2, 7, ("frames=20", "negative=blurry", "seed=99"))
    assert len(asked) == 2 * len(CLASSES)
    assert [row["seed"] for row in asked] == list(range(7, 13))
    for row in asked:
        assert row["prompt"] in ucf101.CAPTIONS.values()
        assert (row["num_frames"], row["height"], row["negative_prompt"]) == (20, 512, "blurry")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"settings": ("frames=8",)}, "8 frames are too few for FVD; ask for 16 at least"),
        ({"settings": ("speed=3",)}, "'speed=' is not NAME=VALUE of a known name"),
        ({"settings": ("steps=many",)}, "'many' is not a whole number"),
        ({"settings": ("-n=2",)}, "is not NAME=VALUE"),
        ({"settings": ("width=33", "height=32")}, "width=33 is not a multiple of 8"),
        ({"per_class": 0}, "per_class=0: ask for 1 at least"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_written(go, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        go(**options)
    assert not (tmp_path / "out").exists()


def test_a_video_that_fails_is_said_and_the_next_call_makes_it(go, tmp_path, monkeypatch):
    encoded, calls = engine._encoded, []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("it failed")
        return encoded(*args)

    monkeypatch.setattr(engine, "_encoded", fails_once)
    with pytest.raises(ValueError, match=r"1 of 3 videos could not be made, e\.g\. 'HandstandPushups-00\.mp4'"):
        go()
    assert go().scores["emoji"][0].value > 0
    assert len(calls) == 4


def test_numbers_that_are_none_name_the_clip(go):
    def logits(x):
        return torch.full((len(x), 400), torch.nan)

    with pytest.raises(ValueError, match=r"v_\w+\.avi: its logits are NaN"):
        go(network=detector(logits))
