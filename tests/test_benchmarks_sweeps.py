"""The sweeps over the bench: a line of figures a case, what memory does not suffice for, and how they go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import inference as sweeping
import scaling

from animatelcm.bench import comparison, workload
from animatelcm.bench.workload import Case

TINY = Case(steps=1, frames=2, size=32)
LARGE = Case(steps=1, frames=2, size=4096)


def _sweep(monkeypatch, tmp_path, *cases, **options):
    monkeypatch.setattr(sweeping.Sweep, "cases", lambda self: list(cases))
    return sweeping.Sweep(rounds=1, device="cpu", out=tmp_path / "new" / "rows.jsonl", **options)


@pytest.fixture
def failing(monkeypatch):
    """What ``compare`` raises for LARGE instead of trying it."""
    raised, compare = [], comparison.compare

    def maybe(model, case, **options):
        if case == LARGE:
            raise raised[-1]
        return compare(model, case, **options)

    monkeypatch.setattr(comparison, "compare", maybe)
    return raised


def test_a_sweep_writes_a_line_a_case_and_does_not_measure_it_again(monkeypatch, tmp_path, capsys, failing):
    sweep = _sweep(monkeypatch, tmp_path, LARGE, TINY)
    failing.append(torch.OutOfMemoryError("CUDA out of memory."))
    sweeping.main(sweep)
    shown = capsys.readouterr().out
    left_out, row = map(json.loads, sweep.out.read_text().splitlines())
    assert left_out["left_out"] == "out of memory"
    assert (left_out["case"]["size"], row["case"]["size"]) == (4096, 32)
    assert row["denoise_speedup_vs_diffusers"] > 0
    assert row["seconds"].keys() == {"denoise", "decode", "prompt_to_frames", "prompt_to_file"}
    assert row["weights_bytes"].keys() == row["process_bytes"].keys() == {"ours", "diffusers"}
    assert "left out, out of memory: Case(" in shown
    heading, _, last = shown.splitlines()[-3:]
    assert last.startswith("| 1 | 1 | 2 | 32 | 1 |")
    assert last.count("|") == heading.count("|")

    monkeypatch.setattr(workload, "subject", None)  # nothing is loaded
    sweeping.main(sweep)
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert len(sweep.out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("cuda has too little memory to denoise this video; a size of 8x8 may fit"), "out of memory"),
        (torch._dynamo.exc.FailOnRecompileLimitHit("Hard failure"), "compiled too often"),
    ],
)
def test_what_is_left_out_says_why(monkeypatch, tmp_path, failing, error, why):
    monkeypatch.setattr(workload, "subject", lambda *_: None)
    sweep = _sweep(monkeypatch, tmp_path, LARGE)
    failing.append(error)
    sweeping.main(sweep)
    assert json.loads(sweep.out.read_text())["left_out"] == why


def test_another_error_is_no_lack_of_memory(monkeypatch, tmp_path, failing):
    monkeypatch.setattr(workload, "subject", lambda *_: None)
    failing.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        sweeping.main(_sweep(monkeypatch, tmp_path, LARGE))


def test_a_sweep_that_has_run_for_its_minutes_begins_no_case(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workload, "subject", lambda *_: None)
    sweep = _sweep(monkeypatch, tmp_path, TINY, LARGE, minutes=0)
    sweeping.main(sweep)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 cases are left")
    assert not sweep.out.exists()


def test_cases_of_another_precision_or_compiled_ones_are_others(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(workload, "subject", lambda *_: None)
    monkeypatch.setattr(sweeping, "measured", lambda model, case, **options: asked.append(options) or "out of memory")
    for changes in ({}, {"precision": "bf16"}, {"compiled": True}, {}):
        sweeping.main(_sweep(monkeypatch, tmp_path, TINY, **changes))
    assert [options["compiled"] for options in asked] == [False, False, True]


def test_each_number_of_a_sweep_is_changed_by_itself():
    usual, *others = sweeping.Sweep(model="sd15-random").cases()
    assert usual == Case(size=512)
    assert len(others) == len(set(others)) == 3 + 1 + 3 + 2 + 1
    for case in others:
        assert sum(getattr(case, name) != value for name, value in vars(usual).items()) == 1
    assert {case.size for case in others} == {256, 512, 768}
    assert {case.size for case in sweeping.Sweep().cases()} == {64, 128}


@pytest.mark.parametrize(("model", "sizes"), [("emoji", [32, 64, 96, 128]), ("sd15-random", [256, 512, 768])])
def test_sizes_of_a_scaling_are_the_models(model, sizes):
    cases = scaling.Scaling(model=model).cases()
    assert [case.size for case in cases["size"]] == sizes
    assert [case.size for case in scaling.Scaling(model=model, size=(8,)).cases()["size"]] == [8]
    assert {case.size for axis in ("frames", "steps", "batch") for case in cases[axis]} == {sizes[1]}


def test_a_scaling_reports_seconds_and_memory_and_leaves_out_what_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling.Scaling, "cases", lambda self: {"frames": [TINY, LARGE], "size": [TINY]})
    denoised, drawn = workload.denoised, []

    def maybe(model, case, *others):
        if case == LARGE:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return denoised(model, case, *others)

    monkeypatch.setattr(workload, "denoised", maybe)
    monkeypatch.setattr(scaling, "draw", lambda found, out: drawn.append((found, out)))
    scaling.main(scaling.Scaling(rounds=1, device="cpu", out=tmp_path / "picture.png"))
    *said, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [line.partition(":")[0] for line in said] == ["frames 2", "left out, out of memory", "size 32"]
    (frames,), (size,) = found["measured"]["frames"], found["measured"]["size"]
    assert frames["seconds"] > 0
    assert frames["bytes"] == size["bytes"] > 0
    assert frames["file_bytes"] >= frames["bytes"]
    assert "file_bytes" not in size
    assert found["weights_bytes"] > 10 * 2**20
    assert [out.name for _, out in drawn] == ["picture.png"]


def test_a_scaling_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"case": {"frames": 8, "size": 64}, "seconds": 1.0, "bytes": 2**20}
    scaling.draw({"frames": [row | {"file_bytes": 2**21}], "size": []}, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000
