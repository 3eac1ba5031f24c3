"""The scripts in ``runs/``, as they are typed, a few steps a stage: ``pytest -m slow tests/test_runs.py`` (minutes)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from animatelcm.bundle import load

RUNS = Path(__file__).parents[1] / "runs"
SMALL = ["--steps", "2", "--batch-size", "2", "--data.length", "8", "--log-every", "1"]
pytestmark = pytest.mark.slow


def run(name: str, folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """A script's copy, which works in the folder that it lies in."""
    (folder / "runs").mkdir(exist_ok=True)
    script = shutil.copy(RUNS / name, folder / "runs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words, environment = ["bash", script, *flags], {**os.environ, "PATH": path, **variables}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_the_chain_leads_from_data_to_a_bundle_and_goes_on_where_it_stopped(tmp_path) -> None:
    first = run("emoji_all_stages.sh", tmp_path, *SMALL)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.endswith("the bundle is in runs/out/video_lcm_emoji/model\n")
    model = load(tmp_path / "runs" / "out" / "video_lcm_emoji" / "model")
    assert model.image_lora
    assert model.teacher_motion
    assert list(model.styles) == ["twemoji"]
    out = tmp_path / "runs" / "out"
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/model/animatelcm.json")}
    assert len(written) == 8
    shutil.rmtree(out / "video_lcm_emoji" / "model")
    again = run("emoji_all_stages.sh", tmp_path, *SMALL)
    assert again.returncode == 0, again.stderr[-2000:]
    changed = [path.parts[-3] for path, at in written.items() if path.stat().st_mtime_ns != at]
    assert changed == ["video_lcm_emoji"]
