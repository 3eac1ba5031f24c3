"""VBench's published arithmetic, and files that are no results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from animatelcm.evaluate.vbench_scores import ALL, DIMENSIONS, scores, table, total

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


def test_no_scale_is_empty():
    assert all(math.isfinite(d.low) and d.low < d.high and d.weight > 0 for d in DIMENSIONS.values())
    assert len(DIMENSIONS) == 16


def test_a_table_has_a_line_a_figure(tmp_path):
    raw = {name.replace(" ", "_"): value / 100 for name, value in PUBLISHED.items()}
    whole = table(scores(results(tmp_path / "a.json", raw))).splitlines()
    assert len(whole) == 2 + 16 + 3
    assert whole[2] == "| subject_consistency | 96.85 |"
    assert whole[-3:] == ["| quality | 82.20 |", "| semantic | 73.42 |", "| total | 80.44 |"]
    assert table(scores(results(tmp_path / "b.json", {"color": 0.5}))).endswith("| total | - |")
