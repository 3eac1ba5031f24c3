"""VBench: its published arithmetic, the names that it looks for, and a tool that fails in all of its ways."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from animatelcm.evaluate.vbench import ALL, DIMENSIONS, SETTINGS, missing, names, plan, run, scores, suite, total
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


# Scores


PUBLISHED = {  # VBench's leaderboard, VideoCrafter-2.0: percent; quality 82.20, semantic 73.42, total 80.44
    "subject consistency": 96.85,
    "background consistency": 98.22,
    "temporal flickering": 98.41,
    "motion smoothness": 97.73,
    "dynamic degree": 42.50,
    "aesthetic quality": 63.13,
    "imaging quality": 67.22,
    "object class": 92.55,
    "multiple objects": 40.66,
    "human action": 95.00,
    "color": 92.92,
    "spatial relationship": 35.86,
    "scene": 55.29,
    "appearance style": 25.13,
    "temporal style": 25.84,
    "overall consistency": 28.23,
}


def results(path: Path, raw: dict[str, float]) -> Path:
    """As the tool writes them: a mean, and one figure a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({name: [value, [{"video_path": "x", "video_results": 1}]] for name, value in raw.items()})
    )
    return path


def test_a_published_row_to_its_printed_digits(tmp_path):
    found = scores(results(tmp_path / "all_eval_results.json", {k: v / 100 for k, v in PUBLISHED.items()}))
    assert [f"{value:.2f}" for value in found[:3]] == ["82.20", "73.42", "80.44"]
    assert found.dimensions == pytest.approx({name.replace(" ", "_"): value for name, value in PUBLISHED.items()})
    assert list(found.dimensions) == list(ALL)


def test_published_totals_from_their_halves():
    """AnimateLCM's own, and the others of its table 2; both halves are rounded there, so the last digit may differ."""
    assert f"{total(82.36, 67.65):.2f}" == "79.42"
    rows = [(80.69, 82.92, 71.77), (80.58, 82.47, 73.03), (79.72, 81.59, 72.22), (79.23, 80.71, 73.30)]
    rows += [(78.93, 80.42, 72.98), (77.99, 80.90, 66.38), (77.46, 80.24, 66.32), (77.29, 79.72, 67.58)]
    for printed, quality, semantic in [*rows, (75.91, 78.82, 64.28)]:
        assert abs(total(quality, semantic) - printed) <= 0.01


def test_the_ends_of_every_scale_are_0_and_100(tmp_path):
    low = scores(results(tmp_path / "low.json", {name: d.low for name, d in DIMENSIONS.items()}))
    high = scores(results(tmp_path / "high.json", {name: d.high for name, d in DIMENSIONS.items()}))
    assert low[:3] == pytest.approx((0, 0, 0), abs=1e-12)
    assert high[:3] == pytest.approx((100, 100, 100))


@pytest.mark.parametrize("name", ALL)
def test_each_dimension_weighs_what_it_should(tmp_path, name):
    """From the bottom of its scale to the top one dimension moves its group by its share of the weights."""
    raw = {name: d.low for name, d in DIMENSIONS.items()}
    found = scores(results(tmp_path / "a.json", {**raw, name: DIMENSIONS[name].high}))
    whole = {"quality": 6.5, "semantic": 9}[DIMENSIONS[name].group]
    share = 100 * (0.5 if name == "dynamic_degree" else 1) / whole
    assert found.quality + found.semantic == pytest.approx(share)
    assert found.total == pytest.approx(share * (0.8 if DIMENSIONS[name].group == "quality" else 0.2))


def test_a_folder_is_its_files_and_what_is_missing_is_no_zero(tmp_path):
    for name, value in PUBLISHED.items():
        if DIMENSIONS[name.replace(" ", "_")].group == "quality":
            results(tmp_path / name / "results_2025-01-01-00:00:00_eval_results.json", {name: value / 100})
    (tmp_path / "run.json").write_text("{}")
    found = scores(tmp_path)
    assert f"{found.quality:.2f}" == "82.20"
    assert (found.semantic, found.total, len(found.dimensions)) == (None, None, 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no results"),
        ("[1]", "holds no results"),
        ('{"color": [NaN, []]}', "has nan for color: the tool found no videos"),
        ('{"color": null}', "has None for color"),
        ('{"color": [92.9, []]}', "not percent"),
        ('{"colour": [0.9, []]}', "'colour', none of VBench's sixteen"),
        ("{}", "holds no results"),
    ],
)
def test_what_is_no_result_is_said(tmp_path, text, said):
    (tmp_path / "a_eval_results.json").write_text(text)
    for path in (tmp_path, tmp_path / "a_eval_results.json"):
        with pytest.raises(ValueError, match=said):
            scores(path)


def test_results_that_disagree_are_not_mixed(tmp_path):
    results(tmp_path / "a_eval_results.json", {"color": 0.5})
    results(tmp_path / "b_eval_results.json", {"color": 0.5})
    assert scores(tmp_path).dimensions == {"color": 50}
    results(tmp_path / "b_eval_results.json", {"color": 0.6})
    with pytest.raises(ValueError, match=r"differ in color \(0\.5, 0\.6\)"):
        scores(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        scores(tmp_path / "absent")


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


def test_no_scale_is_empty():
    assert all(math.isfinite(d.low) and d.low < d.high and d.weight > 0 for d in DIMENSIONS.values())
    assert len(DIMENSIONS) == 16
