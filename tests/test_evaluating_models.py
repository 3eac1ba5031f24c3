"""``animatelcm eval emoji``, ``ucf101`` and ``vbench``: from a model to a table; wrong input is a sentence at once."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from animatelcm.evaluate import judge, ucf101
from test_evaluate_ucf101 import LENGTHS, avi
from test_evaluate_vbench import SUITE, fake
from test_evaluating import fails, program, run


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    return program(tmp_path_factory.mktemp("weights") / "i3d_torchscript.pt")


@pytest.fixture(scope="module")
def model(fresh_folder):
    return str(fresh_folder)


@pytest.fixture
def four_concepts(monkeypatch):
    """Subjects for a judge that knows few."""
    monkeypatch.setattr(judge, "Protocol", partial(judge.Protocol, concepts=("parrot", "banana", "rocket", "zebra")))


def test_emoji_measures_once_and_prints_one_object(model, four_concepts, tmp_path, capsys):
    words = ["emoji", "--model", model, "--settings", "lcm@1", "ddim@1:2", "--clips", "2", "--real", "3"]
    words += ["--kinds", "images", "clips", "--keep", "1", "--out", tmp_path]
    first = json.loads(run([*words, "--json"], capsys)[0])
    assert [(row["setting"], row["kind"]) for row in first["rows"]] == [
        ("lcm@1", "images"),
        ("lcm@1", "clips"),
        ("ddim@1:2", "images"),
        ("ddim@1:2", "clips"),
    ]
    assert [row["evaluations"] for row in first["rows"]] == [1, 1, 2, 2]
    assert {row["model"] for row in first["rows"]} == {model}
    assert json.loads((tmp_path / "report.json").read_text()) == first
    assert json.loads((tmp_path / "rows" / "ddim@1-2.json").read_text()) == first["rows"][3]
    assert len(list((tmp_path / "clips").rglob("*.mp4"))) == 2  # one of each setting
    shown, _ = run(words, capsys)
    assert shown.count("\n") == 2 + 4 + 2 + 1 + 2 + 2 + 2  # and the protocol; then a line a kind, and what they are
    assert shown.count(model) == 4 + 2 * 2
    assert json.loads((tmp_path / "report.json").read_text()) == first  # the seconds too: nothing was measured again
    assert "choose another folder, or --force" in fails([*words, "--real", "4"], capsys)


def test_rows_of_two_models_are_told_apart_by_their_files(model, four_concepts, tmp_path, capsys):
    words = ["emoji", "--model", model, "--clips", "3", "--real", "4", "--keep", "0", "--out"]
    several = json.loads(run([*words, tmp_path / "a", "--settings", "lcm@1", "ddim@1", "--json"], capsys)[0])
    (pair,) = several["paired"]
    run([*words, tmp_path / "b", "--settings", "ddim@1"], capsys)
    first, second = tmp_path / "a" / "rows" / "lcm@1.json", tmp_path / "b" / "rows" / "ddim@1.json"
    said = json.loads(run(["compare", first, second, first, "--json"], capsys)[0])["paired"]
    assert said[0] == pair  # the same clips, made again elsewhere
    rows = {row["setting"]: row for row in several["rows"]}
    for name, found in pair["figures"].items():
        assert found["value"] == pytest.approx(rows["ddim@1"][name] - rows["lcm@1"][name], rel=1e-6, abs=1e-9)
    assert pair["figures"].keys() >= {"fvd_like", "concept_accuracy", "motion_amount"}
    assert pair["figures"]["fvd_like"]["deviation"] > 0
    assert all(found["value"] == found["deviation"] == 0 for found in said[1]["figures"].values())
    shown, _ = run(["compare", first, second], capsys)
    assert shown.splitlines()[2].startswith(f"| clips | {model} ddim@1 less {model} lcm@1 | ")
    for few in ([], [first]):
        assert f"{len(few)} rows are no pair; give two or more" in fails(["compare", *few], capsys)
    assert "there is no row" in fails(["compare", first, tmp_path], capsys)
    run([*words, tmp_path / "c", "--real", "5", "--settings", "lcm@1"], capsys)
    (other,) = (tmp_path / "c" / "rows").glob("*.json")
    assert "measure both rows by the same flags" in fails(["compare", first, other], capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--settings", "lcm"], "SAMPLER@STEPS"),
        (["--settings", "euler@4"], "euler"),
        (["--clips", "1"], "clips=1"),
        (["--style-truth", "nobody"], "nobody"),
        (["--kinds", "dreams"], "dreams"),
        (["--style", "nowhere.safetensors:0.8"], "nowhere.safetensors"),
    ],
)
def test_emoji_refuses_in_a_sentence(words, named, model, tmp_path, capsys):
    assert named in fails(["emoji", "--model", model, "--out", tmp_path, *words], capsys)
    assert not list(tmp_path.iterdir())


SMALL = ["--size", "32x32", "--settings", "steps=1", "guidance=1"]


def test_ucf101_is_one_command(model, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ucf101, "CAPTIONS", {name: ucf101.CAPTIONS[name] for name in ("Archery", "YoYo")})
    for name, count in LENGTHS.items():
        avi(tmp_path / "UCF-101" / name, count)
    words = ["ucf101", tmp_path, "--model", model, *weights, "--per-class", "1", *SMALL, "--out", tmp_path / "out"]
    shown, said = run(words, capsys)
    assert shown.splitlines()[2].startswith(f"| {model} | FVD | ")
    assert "where the papers draw 2,048" in said
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["scores"][0]["n"] == {"real": 3, "generated": 2}
    assert found["draw"]["videos"] == 3
    assert set(found) >= {"scores", "remarks", "versions", "draw", "made"}
    assert json.loads(run([*words, "--json"], capsys)[0]) == found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data"], "holds none of the 101 classes of UCF-101 but videos"),
        (["--size", "big"], "--size 'big' is not WIDTHxHEIGHT"),
        (["--settings", "frames=8"], "8 frames are too few for FVD"),
        (["--per-class", "0"], "per_class=0"),
        (["--sha256", ""], "is a program"),
        (["--clip", "nowhere"], "no model 'nowhere'"),
        (["--model", "nothing-here"], "nothing-here"),
        (["--settings", "sampler=euler"], "euler"),
    ],
)
def test_ucf101_refuses_before_anything_is_made(model, weights, tmp_path, capsys, flags, said):
    avi(tmp_path / "Archery" / "v_Archery_g01_c01.avi", 20)
    data = tmp_path
    if flags == ["--data"]:
        flags, data = [], tmp_path / "other"
        (data / "videos").mkdir(parents=True)
    words = ["ucf101", data, "--model", model, *weights, *SMALL, *flags, "--out", tmp_path / "out"]
    assert said in fails(words, capsys)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def suite(tmp_path) -> Path:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "VBench_full_info.json").write_text(json.dumps(SUITE[1:2]))
    return tmp_path / "suite"


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_vbench_is_one_command(model, suite, tmp_path, capsys):
    small = [*SMALL, "frames=2", "--dimensions", "subject_consistency"]
    words = ["vbench", suite, "--model", model, *small, "--out", tmp_path / "out"]
    shown, said = run(words, capsys)
    assert "the same line with --python has VBench judge them" in shown
    assert "not comparable with their figures" in said
    names = sorted(path.name for path in (tmp_path / "out" / "videos").iterdir())
    assert names == [f"a fox runs-{number}.mp4" for number in range(5)]
    shown, _ = run([*words, "--python", fake(tmp_path)], capsys)
    assert "| subject_consistency | 100.00 |" in shown
    assert json.loads((tmp_path / "out" / "vbench.json").read_text())["dimensions"] == {"subject_consistency": 100}
    found = json.loads(run(["vbench", "--score-only", tmp_path / "out" / "results", "--json"], capsys)[0])
    assert (found["dimensions"], found["total"]) == ({"subject_consistency": 100}, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give VBench_full_info.json and --out for videos, or --score-only"),
        (["suite"], "and --out for videos"),
        (["absent", "--out", "out"], "is no prompt suite of VBench"),
        (["suite", "--out", "out", "--dimensions", "speed"], "'speed' is none of VBench's"),
        (["suite", "--out", "out", "--dimensions", "scene"], "no video is asked for"),
        (["suite", "--out", "out", "--python", "no/python"], "there is no program no/python"),
        (["--score-only", "suite"], "holds no results of VBench"),
        (["--score-only", "absent"], "there is no file or folder absent"),
    ],
)
def test_vbench_refuses_before_anything_is_made(suite, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(["vbench", *words], capsys)
    assert not (tmp_path / "out").exists()
