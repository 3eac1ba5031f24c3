"""Clips that an evaluation keeps: which, under what names, and that their line makes them again."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch

from animatelcm import cli, control_maps, video
from animatelcm.data.emoji import drawn
from animatelcm.evaluate import emoji, steered
from animatelcm.evaluate.emoji import Setting, evaluate
from animatelcm.evaluate.judge import PROMPT_SEED, Protocol
from animatelcm.evaluate.takes import Take, keep_clips, kept_clips
from animatelcm.model_source import ModelSource
from animatelcm.request import ControlSource
from animatelcm.saving import save
from results import request

FEW = ("parrot", "banana", "rocket", "zebra")
PROTOCOL = Protocol(clips=3, real=4, concepts=FEW)
SHOTS = [PROTOCOL.data(PROMPT_SEED, 3).shot(i) for i in range(3)]


def takes(colour: int = 9) -> list[Take]:
    frames = np.full((16, 64, 64, 3), colour, np.uint8)
    return [Take(frames, 0.5, 4, request=request(shot.caption, seed=i)) for i, shot in enumerate(SHOTS)]


def keep(out, count=3, *, kind="clips", setting="lcm@4", protocol=PROTOCOL, colour=9):
    options = {"protocol": protocol, "source": ModelSource(), "fps": 8}
    keep_clips(out, kind, setting, SHOTS[:count], takes(colour)[:count], **options)


def test_the_line_of_a_kept_clip_makes_it_again(fresh_model, tmp_path):
    model, out = str(tmp_path / "model"), tmp_path / "out"
    save(fresh_model, tmp_path / "model", dtype=torch.float32)
    settings = {"settings": [Setting.parse("lcm@1")], "kinds": ("clips", "images"), "keep": 2}
    evaluate(fresh_model, model, protocol=PROTOCOL, out=out, source=ModelSource(model=model), **settings)
    records = kept_clips(out)
    assert [record["file"] for record in records] == [
        f"lcm@1/{kind}-00{i}.{suffix}" for kind, suffix in (("clips", "mp4"), ("images", "png")) for i in (0, 1)
    ]
    assert [record["seed"] for record in records] == [0, 1, 0, 1]
    assert all(record["seconds"] > 0 for record in records)
    for record, name in ((records[1], "again.mp4"), (records[3], "again")):
        cli.main([*shlex.split(record["command"])[1:], "--out", str(tmp_path / name)])
        path = out / "clips" / record["file"]
        one = video.read(path).frames if path.suffix == ".mp4" else video.read_image(path)[None]
        assert np.array_equal(video.read(tmp_path / name).frames, one)
        assert video.read_metadata(path)["prompt"] == record["prompt"]
        assert video.read_metadata(path)["command"] == record["command"]


def test_rows_that_are_there_are_left_with_their_clips(fresh_model, tmp_path, monkeypatch):
    options = {"settings": [Setting.parse("lcm@1")], "protocol": PROTOCOL, "out": tmp_path}
    evaluate(fresh_model, "m", keep=1, **options)
    (path,) = tmp_path.glob("clips/*/*.mp4")
    path.unlink()
    monkeypatch.setattr(emoji, "sample", None)
    evaluate(fresh_model, "m", keep=2, **options)
    assert not list(tmp_path.glob("clips/*/*.mp4"))
    with pytest.raises(ValueError, match="keep=-1"):
        evaluate(fresh_model, "m", keep=-1, **options)


def test_clips_replace_those_of_their_setting_and_kind_alone(tmp_path):
    keep(tmp_path, 3)
    keep(tmp_path, 2, kind="plain")
    keep(tmp_path, 2, setting="ddim@4:2")
    keep(tmp_path, 1, colour=200)
    records = [(r["setting"], r["kind"], r["file"]) for r in kept_clips(tmp_path)]
    assert sorted(records) == sorted(
        [(s, k, f"{s.replace(':', '-')}/{k}-00{i}.mp4") for s, k, n in KEPT for i in range(n)]
    )
    files = {path.relative_to(tmp_path / "clips").as_posix() for path in tmp_path.rglob("*.mp4")}
    assert files == {name for _, _, name in records}
    assert video.read(tmp_path / "clips" / "lcm@4" / "clips-000.mp4").frames.mean() > 190
    keep(tmp_path, 0)
    assert {r["setting"] for r in kept_clips(tmp_path) if r["kind"] == "clips"} == {"ddim@4:2"}


KEPT = (("lcm@4", "clips", 1), ("lcm@4", "plain", 2), ("ddim@4:2", "clips", 2))


def test_nothing_is_written_where_nothing_is_kept(tmp_path):
    keep(tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steer", ["edge", "pose", "i2v"])
def test_what_steered_is_kept_without_loss_and_named_in_the_line(steer, tmp_path):
    protocol = Protocol(clips=3, real=4, concepts=FEW, steer=steer)
    keep(tmp_path, 2, protocol=protocol)
    records = kept_clips(tmp_path)
    assert [r["setting"] for r in records] == ["real", "real", "lcm@4", "lcm@4"]
    assert [r["command"] for r in records[:2]] == ["", ""]
    for shot, record, real in zip(SHOTS, records[2:], records[:2], strict=False):
        assert record["prompt"] == real["prompt"] == shot.caption
        words = shlex.split(record["command"])
        given = steered.condition(shot, protocol.pack, steer)
        if steer == "i2v":
            assert np.array_equal(video.read_image(words[words.index("--image") + 1]), given.image)
        else:
            source = ControlSource.parse(words[words.index("--control") + 1])
            size = {"num_frames": 16, "height": 64, "width": 64}
            maps, _ = control_maps.read(source.file, source.name, ready=source.ready, fps=8, **size)
            assert np.array_equal(maps, given.controls[0].maps)
        shown = video.read(tmp_path / "clips" / real["file"]).frames.astype(int)
        assert np.abs(shown - drawn(shot, protocol.pack)).mean() < 4


def test_without_a_source_there_is_no_line_that_would_be_wrong(tmp_path):
    keep_clips(tmp_path, "clips", "lcm@4", SHOTS, takes(), protocol=PROTOCOL, source=None, fps=8)
    assert {record["command"] for record in kept_clips(tmp_path)} == {""}
    assert "command" not in video.read_metadata(tmp_path / "clips" / "lcm@4" / "clips-000.mp4")


def test_lines_that_are_torn_are_no_clips(tmp_path):
    keep(tmp_path, 1)
    with (tmp_path / "clips" / "clips.jsonl").open("a") as file:
        file.write('[1]\n{"setting": "x"}\n{"file": "lcm')
    assert len(kept_clips(tmp_path)) == 1
    keep(tmp_path, 1, kind="plain")
    lines = (tmp_path / "clips" / "clips.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["clips", "plain"]
