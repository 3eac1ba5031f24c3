"""VBench: the names that it looks for, and a tool that fails in all of its ways."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from animatelcm.evaluate.vbench import SETTINGS, find_tool, missing, names, plan, run, suite
from animatelcm.evaluate.vbench_scores import ALL, scores
from animatelcm.request import SampleRequest

# A suite of our own in the official file's format: one prompt twice, one for flickering, one beyond ASCII.
SUITE = [
    {"prompt_en": "A still lamp", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a fox runs", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": 'a "caf\u00e9", $5: l\'heure', "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a fox runs", "dimension": ["overall_consistency"]},
]


@pytest.fixture
def entries(tmp_path):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(SUITE))
    return suite(path)


# What is asked for


def test_names_are_those_that_the_tool_looks_for(entries):
    assert names(entries[1]) == [f"a fox runs-{i}.mp4" for i in range(5)]
    assert names(entries[0])[-1] == "A still lamp-24.mp4"


def test_every_file_is_made_once_with_a_seed_of_its_own(entries):
    rows = plan(entries, seed=100)
    assert len(rows) == 25 + 5 + 5
    assert len({row["file"] for row in rows}) == 35
    assert [row["seed"] for row in rows] == list(range(100, 135))
    assert all(row["file"].startswith(f"{row['prompt']}-") for row in rows)


def test_seeds_stay_whichever_dimensions_are_asked_for(entries):
    whole = {row["file"]: row for row in plan(entries, seed=3)}
    for name in ("subject_consistency", "overall_consistency", "color"):
        part = plan(entries, seed=3, dimensions=[name])
        assert len(part) == 5
        assert all(whole[row["file"]] == row for row in part)
    assert not plan(entries, dimensions=["scene"])


def test_the_folder_of_the_suite_will_do(entries, tmp_path):
    (tmp_path / "suite.json").rename(tmp_path / "VBench_full_info.json")
    assert suite(tmp_path) == entries


def test_rows_are_requests(entries):
    rows = plan(entries, settings={**SETTINGS, "guidance_scale": 1.5})
    for row in rows:
        SampleRequest(**{key: value for key, value in row.items() if key != "file"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no prompt suite"),
        ("{}", "holds no prompts"),
        ("[]", "holds no prompts"),
        ("[1]", "no prompt suite"),
        ('[{"prompt_en": "a"}]', "no prompt suite of VBench .*dimension"),
        ('[{"prompt_en": "a", "dimension": ["colour"]}]', "'colour' of 'a' is none"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "cannot be the name of a file"),
        (json.dumps([{"prompt_en": "\u00e9" * 126, "dimension": ["color"]}]), "cannot be the name of a file"),
    ],
)
def test_what_is_no_suite_is_said(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        suite(tmp_path / "a.json")


def test_unknown_dimensions_are_said(entries, tmp_path):
    with pytest.raises(ValueError, match="'speed' is none of VBench's; choose subject_consistency"):
        plan(entries, dimensions=["speed"])
    with pytest.raises(ValueError, match="no dimension"):
        run(sys.executable, entries, tmp_path, tmp_path, dimensions=[])


# The tool


FAKE = '''#!{python}
"""Finds videos as vbench 0.1.5 does: by prompt, index and the first file's suffix; a score is the share it found."""
import json, os, shutil, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "-c":
    if "vbench" not in words[1] or "version" in words[1]:
        print("9.9")
        sys.exit()
    words = words[2:]
verb, given = words[0], dict(zip(words[1::2], words[2::2]))
assert not any(" " in word for word in words), words
assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.argv[0]).parent)
files = sorted(os.listdir(given["--videos_path"]))
assert all(file.endswith(".mp4") for file in files), files
mode = {mode!r}
if verb == "static_filter":
    kept = Path(given["--result_path"]) / "filtered_videos"
    kept.mkdir(parents=True)
    for index, file in enumerate(files[:5] if mode != "moving" else []):
        shutil.copy(Path(given["--videos_path"]) / file, kept / (file.rpartition("-")[0] + f"-{{index}}.mp4"))
    sys.exit()
if mode == "crash":
    print("CUDA error: no device")
    sys.exit()  # as the tool does
name, wanted = given["--dimension"], 0
for entry in json.load(open(given["--full_json_dir"])):
    assert name in entry["dimension"]
    wanted += 5
    for i in range(5):
        assert mode != "whole" or f"{{entry['prompt_en']}}-{{i}}.mp4" in files
mean = float("nan") if mode == "nan" else len(files) / wanted
out = Path(given["--output_path"])
(out / "results_2025-01-01-00:00:00_full_info.json").write_text("[]")
(out / "results_2025-01-01-00:00:00_eval_results.json").write_text(json.dumps({{name: [mean, []]}}))
'''
ASKED = ["temporal_flickering", "subject_consistency", "color", "overall_consistency"]


def fake(folder: Path, mode: str = "whole", name: str = "vbench") -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE.format(python=sys.executable, mode=mode))
    path.chmod(0o755)
    return path


@pytest.fixture
def made(entries, tmp_path) -> Path:
    """Videos of the whole suite, in a folder that a shell would trip over, beside what a batch leaves."""
    folder = tmp_path / 'my "videos" $HOME'
    folder.mkdir()
    for row in plan(entries):
        (folder / row["file"]).write_bytes(b"video")
    (folder / ".hidden").touch()
    (folder / "0manifest.jsonl").touch()
    return folder


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
@pytest.mark.parametrize("name", ["vbench", "python3"])
def test_the_tool_sees_the_videos_alone_and_its_results_are_read(entries, made, tmp_path, name):
    before = sorted(made.iterdir())
    out, heard = tmp_path / "a folder" / "out", []
    said = run(fake(tmp_path, name=name), entries, made, out, dimensions=ASKED, progress=lambda *x: heard.append(x))
    assert scores(said).dimensions == dict.fromkeys(sorted(ASKED, key=ALL.index), 100)
    assert sorted(made.iterdir()) == before
    assert sorted(path.name for path in out.iterdir()) == ["logs", "results", "run.json"]
    about = json.loads((out / "run.json").read_text())
    assert about["judged"] == dict.fromkeys(ASKED, 5)
    assert about["missing"] == 0
    assert [done for _, done, _ in heard] == [0, 1, 2, 3, 4]


def test_fewer_videos_are_judged_and_counted(entries, made, tmp_path):
    (made / "a fox runs-3.mp4").unlink()
    assert missing(entries, made, ["subject_consistency"]) == ["a fox runs-3.mp4"]
    out = tmp_path / "out"
    found = scores(run(fake(tmp_path, "some"), entries, made, out, dimensions=["subject_consistency"]))
    assert found.dimensions == {"subject_consistency": 80}
    assert json.loads((out / "run.json").read_text())["missing"] == 1


@pytest.mark.parametrize(
    ("mode", "dimension", "said"),
    [
        ("crash", "color", r"no result for color: 'CUDA error: no device'; see .*color\.log"),
        ("nan", "color", "has nan for color"),
        ("moving", "temporal_flickering", "no video without motion for temporal_flickering: it said nothing"),
    ],
)
def test_a_tool_that_fails_is_said_and_old_results_do_not_stand_in(entries, made, tmp_path, mode, dimension, said):
    out = tmp_path / "out"
    run(fake(tmp_path), entries, made, out, dimensions=[dimension])
    with pytest.raises(ValueError, match=said):
        run(fake(tmp_path, mode), entries, made, out, dimensions=[dimension])
    with pytest.raises(ValueError, match=r"has nan|holds no results"):
        scores(out)
    assert not list(out.glob("vbench-*"))


def test_what_is_missing_is_said_before_anything_runs(entries, made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no program .*absent; install VBench in an environment of its own"):
        run(tmp_path / "absent", entries, made, out)
    for path in made.glob("a fox*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no video for subject_consistency; they are named like 'a fox runs-0\.mp4'"):
        run(fake(tmp_path), entries, made, out, dimensions=ASKED)
    with pytest.raises(ValueError, match="no video for scene"):
        run(fake(tmp_path), entries, made, out, dimensions=["scene"])
    assert not out.exists()


def test_a_python_without_vbench_is_said():
    with pytest.raises(ValueError, match=r"knows no VBench; install it there \(.* -m pip install vbench\)"):
        find_tool(sys.executable)
