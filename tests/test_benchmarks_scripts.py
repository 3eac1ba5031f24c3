"""The scripts for a GPU: which commands they give, and what they do where one fails or has been run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from animatelcm import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import inference as sweeping
import scaling
import training

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash")
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then
  [[ -z $REAL ]] || exec "$REAL" "$@"
  echo "$LACKS"
  exit
fi
printf '%s\\t' "$@" "$PYTHONPATH" >> "$LOG"
echo >> "$LOG"
echo begun
[[ -z $FAILS || "$*" != *$FAILS* ]]
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script with a python that only writes down its words -> the process, and the commands."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(script, *words, **changes):
        log.write_text("")
        settings = {"PYTHON": str(python), "LOG": str(log), "OUT": str(tmp_path / "out"), "PYTHONPATH": "elsewhere"}
        environment = {**os.environ, **settings, "FAILS": "", "LACKS": "", "REAL": "", **changes}
        environment.pop("MINUTES", None)
        command = [str(ROOT / "runs" / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]
        assert all(line[-1] == f"{ROOT / 'src'}:elsewhere" for line in lines)
        return done, [line[:-1] for line in lines]

    return run


def _parsed(words, monkeypatch):
    """What the command would do, as its dataclass."""
    found = []
    for verb in cli.VERBS.values():
        monkeypatch.setattr(verb, "run", lambda self: found.append(self))
    monkeypatch.setattr(cli, "_train", lambda config, options: found.append((config, options)))
    if words[:2] == ["-m", "animatelcm"]:
        cli.main(words[2:])
        return found[0]
    kind = {"inference": sweeping.Sweep, "scaling": scaling.Scaling, "training": training.Options}
    return tyro.cli(kind[Path(words[0]).stem], args=words[1:])


# bench_gpu.sh


def test_all_parts_run_in_order_and_each_command_is_one(run, monkeypatch, tmp_path):
    done, commands = run("bench_gpu.sh")
    assert done.returncode == 0, done.stderr
    bars, full, sweep, compiled, image, video, adapter, scale, steer, tests = commands
    *others, steered = (_parsed(words, monkeypatch) for words in (bars, full, steer))
    shown = [(asked.model, asked.json, asked.compiled, asked.compile) for asked in others]
    assert shown == [("sd15-random", True, True, "auto"), ("sd15-random", True, False, "full")]
    assert steered.steer == ("i2v", "edge", "pose")
    sweeps = [_parsed(words, monkeypatch) for words in (sweep, compiled)]
    assert [asked.compiled for asked in sweeps] == [False, True]
    assert [asked.out.name for asked in sweeps] == ["inference.jsonl", "inference-compiled.jsonl"]
    assert {asked.minutes for asked in sweeps} == {600.0}
    stages = [_parsed(words, monkeypatch).stages for words in (image, video, adapter)]
    assert stages == [("image",), ("video",), ("adapter",)]
    assert _parsed(scale, monkeypatch).out == tmp_path / "out" / "scaling.png"
    assert tests[:2] == ["-m", "pytest"]
    assert all((ROOT / word).is_file() for word in tests if word.startswith("tests/"))
    files = {"bars.json", "bars-full.json", "scaling.txt", "steer.json", "tests.txt"}
    files |= {f"training-{stage}.json" for stage in ("image", "video", "adapter")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_what_is_finished_is_not_made_again(run):
    assert len(run("bench_gpu.sh", "bars")[1]) == 1
    done, commands = run("bench_gpu.sh", "bars", "train")
    assert [words[0] for words in commands] == ["benchmarks/training.py"] * 3
    assert "bars.json is there" in done.stdout


def test_a_part_that_fails_leaves_nothing_finished_and_lets_the_others_run(run, tmp_path):
    done, commands = run("bench_gpu.sh", "bars", "train", "scale", FAILS="--stages video")
    assert done.returncode == 1
    assert "failed: train" in done.stderr
    assert len(commands) == 1 + 2 + 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"bars.json", "training-image.json", "training-video.json.partial", "scaling.txt"}
    assert [words[-2] for words in run("bench_gpu.sh", "train")[1]] == ["video", "adapter"]


def test_a_part_by_itself_is_short_and_its_failure_is_the_scripts(run, monkeypatch):
    done, (words,) = run("bench_gpu.sh", "compiled", FAILS="benchmarks/inference.py")
    assert done.returncode == 1
    assert _parsed(words, monkeypatch).minutes < 10


def test_unknown_parts_and_missing_packages_are_told_before_anything_runs(run):
    done, commands = run("bench_gpu.sh", "bar")
    assert (done.returncode, commands) == (2, [])
    assert "no part bar; the parts are bars full" in done.stderr
    done, commands = run("bench_gpu.sh", "bars", LACKS="av tyro")
    assert (done.returncode, commands) == (2, [])
    assert "lacks av tyro" in done.stderr


def test_packages_that_are_there_are_found(run):
    done, commands = run("bench_gpu.sh", "bars", REAL=sys.executable)
    assert done.returncode == 0, done.stderr
    assert len(commands) == 1


# emoji_gpu.sh


def test_stages_build_on_each_other_where_out_says(run, monkeypatch, tmp_path):
    done, commands = run("emoji_gpu.sh")
    assert done.returncode == 0, done.stderr
    stages = [_parsed(words, monkeypatch) for words in commands]
    out = tmp_path / "out"
    names = ["base_emoji", "teacher_emoji", "style_lora_emoji", "image_lcm_emoji", "video_lcm_emoji"]
    assert [config.folder for config, _ in stages] == [out / name for name in names]
    assert [config.model for config, _ in stages] == ["emoji", *(str(out / name / "model") for name in names[:-1])]
    assert {config.mixed_precision for config, _ in stages} == {"bf16"}
    assert all(options.resume for _, options in stages)


def test_a_stage_is_run_by_name_with_flags_of_its_own(run, monkeypatch):
    done, commands = run("emoji_gpu.sh", "teacher_emoji", "image_lcm_emoji", "--steps", "7", "--dry-run")
    assert done.returncode == 0
    stages = [_parsed(words, monkeypatch) for words in commands]
    assert [config.name for config, _ in stages] == ["teacher_emoji", "image_lcm_emoji"]
    assert all(config.steps == 7 and options.dry_run for config, options in stages)


def test_a_stage_that_fails_ends_the_chain_and_an_unknown_one_begins_none(run):
    done, commands = run("emoji_gpu.sh", FAILS="train teacher_emoji")
    assert done.returncode == 1
    assert len(commands) == 2
    done, commands = run("emoji_gpu.sh", "base_emoji", "base")
    assert (done.returncode, commands) == (2, [])
    assert "no stage base; the stages are base_emoji" in done.stderr
