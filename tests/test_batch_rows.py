"""Rows of a file of prompts: three formats, settings, and a sentence for each thing that is wrong with them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from animatelcm import batch
from animatelcm.request import SampleRequest
from batch_runs import hashes, lines, runner


@pytest.fixture(scope="module")
def about(fresh_model):
    return batch.about(fresh_model)


@pytest.fixture
def go(fresh_model, about, tmp_path):
    return runner(fresh_model, about, tmp_path / "out")


def test_three_formats_say_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("a fox, running\r\n\n  a cat \n")
    (tmp_path / "a.csv").write_text('\ufeffprompt,steps\n"a fox, running",\na cat,\n')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox, running"}\n\n{"prompt": "a cat", "steps": null}\n')
    rows = [batch.read_rows(tmp_path / f"a.{kind}", seed=7) for kind in ("txt", "csv", "jsonl")]
    assert rows[0] == rows[1] == rows[2]
    assert [row.request for row in rows[0]] == [
        SampleRequest(prompt="a fox, running", seed=7),
        SampleRequest(prompt="a cat", seed=8),
    ]


def test_a_row_sets_any_field_and_comes_before_what_holds_for_all(tmp_path):
    wanted = SampleRequest(
        prompt="a fox",
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=9,
        sampler="ddim",
        control=("edge=a b.mp4:0.5", "pose=map:c.mp4"),
    )
    (tmp_path / "a.csv").write_text(
        "prompt,steps,guidance_scale,seed,sampler,control\n"
        "a fox,3,2,9,ddim,\"'edge=a b.mp4:0.5' pose=map:c.mp4\"\na cat,,,,,\n"
    )
    fields = {"prompt": "a fox", "num_inference_steps": 3, "guidance": 2, "seed": 9, "sampler": "ddim"}
    fields["control"] = ["edge=a b.mp4:0.5", "pose=map:c.mp4"]
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + '\n{"prompt": "a cat"}\n')
    for kind in ("csv", "jsonl"):
        first, second = batch.read_rows(tmp_path / f"a.{kind}", settings=("steps=5", "spacing=trailing"))
        assert first.request == replace(wanted, spacing="trailing")
        assert second.request == SampleRequest(prompt="a cat", num_inference_steps=5, spacing="trailing", seed=1)


def test_a_size_is_width_and_height(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,size\na fox,32x48\na cat,\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox", "size": "32x48"}\n{"prompt": "a cat", "size": null}\n')
    for kind in ("csv", "jsonl"):
        rows = batch.read_rows(tmp_path / f"a.{kind}", settings=("size=64x96",))
        assert [(row.request.width, row.request.height) for row in rows] == [(32, 48), (64, 96)]
    (tmp_path / "a.csv").write_text("prompt,width\na fox,32\n")
    (row,) = batch.read_rows(tmp_path / "a.csv", settings=("size=64x96",))
    assert (row.request.width, row.request.height) == (32, 96)


@pytest.mark.parametrize(
    ("name", "text", "settings", "named"),
    [
        ("a.csv", "prompt,stpes\na fox,3\n", (), "column 'stpes' is no setting"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "sede": 1}', (), "column 'sede' is no setting"),
        ("a.txt", "a fox", ("stpes=3",), "'stpes=' is not NAME=VALUE"),
        ("a.txt", "a fox", ("steps",), "'steps' is not NAME=VALUE"),
        ("a.txt", "a fox", ("steps=0",), "num_inference_steps=0"),
        ("a.txt", "a fox", ("steps=few",), "steps='few' is not a whole number"),
        ("a.txt", "a fox", ("size=big",), "size 'big' is not WIDTHxHEIGHT"),
        ("a.txt", "a fox", ("size=",), "size '' is not WIDTHxHEIGHT"),
        ("a.txt", "a fox", ("size=8x8", "width=8"), "size is width and height"),
        ("a.txt", "a fox", ("seed=-1",), "seed=-1 draws another one each time"),
        ("a.txt", "\n \n", (), "holds no prompts"),
        ("a.md", "a fox", (), "no file of prompts"),
        ("a.txt", b"\xff\xfe", (), "as UTF-8 txt"),
    ],
)
def test_what_is_wrong_with_all_rows_is_a_sentence(name, text, settings, named, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(named)):
        batch.read_rows(path, settings=settings)
    with pytest.raises(ValueError, match="seed=-1 draws"):
        batch.read_rows(path, seed=-1)


def test_a_bad_row_is_recorded_and_stops_no_other(go, tmp_path):
    bad = [
        ('{"prompt": "a", "steps": 0}', "num_inference_steps=0"),
        ('{"prompt": "a", "steps": "four"}', "steps='four' is not a whole number"),
        ('{"prompt": "a", "steps": 1.5}', "steps=1.5 is not a whole number"),
        ('{"prompt": "a", "steps": true}', "steps=True is not a whole number"),
        ('{"prompt": "a", "steps": 1, "num_inference_steps": 2}', "are one setting"),
        ('{"prompt": 3}', "prompt=3 is not text"),
        ('{"prompt": "a", "seed": -1}', "seed=-1 draws another one each time"),
        ('{"prompt": "a", "size": 64}', "size=64 is not text"),
        ('{"prompt": "a", "size": "64"}', "size '64' is not WIDTHxHEIGHT"),
        ('{"prompt": "a", "size": ""}', "size '' is not WIDTHxHEIGHT"),
        ('{"prompt": "a", "size": 0}', "size=0 is not text"),
        ('{"prompt": "a", "size": []}', "size=[] is not text"),
        ('{"prompt": "a", "fps": 101}', "fps=101.0, but .webp takes 0 < fps <= 100"),
        ('{"prompt": "a", "control": "nonsense"}', "'nonsense' is not KIND=FILE"),
        ('{"prompt": "a", "width": 60}', "width=60 is not a multiple"),
        ('{"prompt": "a", "n": 2}', "a row is one video"),
        ('{"prompt": "a", "image": "nowhere.png"}', "image encoder (i2v) is needed"),
        ('{"prompt": ""}', "no prompt"),
        ("{}", "no prompt"),
        ("[1]", "no JSON object"),
        ('{"prompt": "a"', "no JSON object"),
    ]
    good = '{"prompt": "a fox"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, *(line for line, _ in bad), good]))
    counts = go(path)
    assert (counts.made, counts.failed, counts.done_before) == (2, len(bad), 0)
    said = lines(tmp_path / "out")
    errors = {line["row"]: line["error"] for line in said if "error" in line}
    assert sorted(errors) == list(range(1, len(bad) + 1))
    for number, (_, named) in enumerate(bad, 1):
        assert named in errors[number], number
    assert sorted(hashes(tmp_path / "out")) == ["000000.webp", f"{len(bad) + 1:06}.webp"]
    again = go(path)
    assert (again.made, again.failed, again.done_before) == (0, len(bad), 2)
    assert lines(tmp_path / "out") == said  # nothing new is to be said
    (tmp_path / "b.csv").write_text("prompt,steps\na fox, running,1\na cat,1\n")
    assert go(tmp_path / "b.csv", out=tmp_path / "b").failed == 1
