"""Facts about the machine, and its peak arithmetic against a product timed here."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import animatelcm
from animatelcm.bench import machine
from animatelcm.bench.timing import interleaved


def test_the_facts_are_those_of_this_process():
    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == torch.get_num_threads()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["animatelcm"] == animatelcm.__version__
    assert 1 <= facts["cores"] <= 4096
    assert facts["cpu"]
    assert bool(facts["gpu"]) == torch.cuda.is_available()
    assert abs(datetime.date.fromisoformat(facts["date"]) - datetime.date.today()).days <= 1


def test_what_is_not_installed_is_empty():
    assert machine._version("animatelcm-of-another-world") == ""
    assert machine._said("animatelcm-of-another-world") == ""
    assert machine._said("git", "no-such-verb") == ""


def _git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def test_the_commit_is_of_the_checkout_that_holds_the_package(tmp_path, monkeypatch):
    """Not of one that it merely lies in, as in a virtual environment inside somebody's repository."""
    source = tmp_path / "animatelcm" / "bench" / "machine.py"
    source.parent.mkdir(parents=True)
    (source.parents[1] / "__init__.py").touch()
    monkeypatch.setattr(machine, "__file__", str(source))
    _git(tmp_path, "init")
    assert machine._commit() == ""
    _git(tmp_path, "add", "--all")
    _git(tmp_path, "commit", "--message", "all")
    commit = machine._commit()
    assert 7 <= len(commit) <= 40
    (source.parents[1] / "__init__.py").write_text("changed")
    assert machine._commit() == f"{commit}-dirty"


def test_no_matrix_product_is_faster_than_the_peak():
    peak = machine.peak("cpu", torch.float32)
    a = torch.randn(256, 256)
    least = interleaved({"product": lambda: a @ a}, rounds=20)["product"].least
    assert 1e8 < 2 * 256**3 / least < 2 * peak.matmul_flops
    assert 0.02 < peak.conv_flops / peak.matmul_flops < 50


@pytest.mark.parametrize("module", ["timing", "machine"])
def test_importing_is_light(module):
    code = f"import sys, animatelcm.bench.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "False"
