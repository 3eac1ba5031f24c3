from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from animatelcm import batch, cli, cluster
from animatelcm.model import Facts

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="pip install animatelcm[cluster]")
ABOUT = batch.About(Facts(name="x"), 8, "0123")


# What becomes of rows, with actors that are played


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@pytest.fixture
def stage(monkeypatch):
    """Ray of one thread: a call is answered when it is waited for, the one that has waited longest first."""
    ray, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")

    def get(call):
        answer = call()
        if isinstance(answer, Exception):
            raise answer
        return answer

    ray.wait = lambda calls, timeout: (calls[:1], calls[1:])
    ray.get, ray.available_resources = get, dict
    exceptions.RayError, exceptions.RayTaskError = RayError, RayTaskError
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)


def _actors(make, about=lambda actor: ABOUT):
    """What starts actors, and how many were started."""
    started = []

    def start():
        actor = len(started)
        started.append(actor)
        return SimpleNamespace(
            about=SimpleNamespace(remote=lambda: lambda: about(actor)),
            make=SimpleNamespace(remote=lambda row, suffix: lambda: make(actor, row.number)),
        )

    return start, started


def _run(pool: cluster.Pool, count: int) -> list:
    said = []
    pool.work([batch.Row(i, "") for i in range(count)], ".mp4", lambda row, outcome: said.append((row.number, outcome)))
    return sorted(said)


def test_every_row_is_made_once(stage):
    pool = cluster.Pool(_actors(lambda actor, row: f"{row}")[0], 3)
    assert pool.wait() == ABOUT
    assert _run(pool, 7) == [(i, f"{i}") for i in range(7)]
    assert _run(pool, 2) == [(0, "0"), (1, "1")]
    assert _run(pool, 0) == []


def test_a_row_whose_actor_dies_is_made_by_another(stage):
    start, started = _actors(lambda actor, row: RayError() if actor < 2 else f"{row} by {actor}")
    said = _run(cluster.Pool(start, 2), 4)
    assert [number for number, _ in said] == [0, 1, 2, 3]
    assert all(int(outcome[-1]) >= 2 for _, outcome in said)
    assert len(started) == 4


def test_a_row_that_kills_every_actor_fails_alone(stage):
    start, started = _actors(lambda actor, row: RayError() if row == 1 else "made")
    said = _run(cluster.Pool(start, 2), 4)
    assert [outcome for _, outcome in said] == [
        "made",
        "3 actors died of this row; perhaps memory does not suffice for it",
        "made",
        "made",
    ]
    assert len(started) == 2 + 3


def test_models_that_differ_are_refused(stage):
    start, _ = _actors(lambda actor, row: "made", lambda actor: ABOUT._replace(fingerprint=f"{actor}"))
    with pytest.raises(ValueError, match=r"another one on some machine \(1, and 0 before\)"):
        _run(cluster.Pool(start, 2), 9)


def test_a_model_that_kills_or_cannot_be_loaded_ends_the_run(stage):
    with pytest.raises(ValueError, match="actors die while they load the model"):
        cluster.Pool(_actors(None, lambda actor: RayError())[0], 2).wait()
    with pytest.raises(ValueError, match="no model"):
        cluster.Pool(_actors(None, lambda actor: RayTaskError(ValueError("no model")))[0], 2).wait()
    full = RayTaskError(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        _run(cluster.Pool(_actors(lambda actor, row: full)[0], 2), 3)


def test_without_ray_a_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.txt").write_text("a fox")
    with pytest.raises(SystemExit):
        cli.main(["batch", str(tmp_path / "a.txt"), "--engine", "ray", "--out", str(tmp_path / "out")])
    assert "pip install 'animatelcm[cluster]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Ray itself, in processes of its own


def _words(folder: Path, name: str, *more: str) -> list[str]:
    words = [sys.executable, "-m", "animatelcm", "batch", str(folder / "a.txt"), "--out", str(folder / name)]
    return [*words, "--ext", "webp", "--json", *more]


def _hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.webp")}


def _lines(out: Path) -> list[dict]:
    manifest = out / batch.MANIFEST
    return [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []


@needs_ray
def test_an_actor_is_killed_and_the_files_are_those_of_the_local_engine(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a parrot\na fox\na cat\na ghost\n" * 3)
    settings = ["--settings", "frames=8", "steps=2"]
    running = subprocess.Popen(
        _words(tmp_path, "ray", *settings, "--engine", "ray", "--actors", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while running.poll() is None and len(_lines(tmp_path / "ray")) < 3:
        time.sleep(0.01)
    victim = int(_lines(tmp_path / "ray")[-1]["host"].rpartition(":")[2])
    os.kill(victim, signal.SIGKILL)
    before = len(_lines(tmp_path / "ray"))
    said, told = running.communicate()
    assert running.returncode == 0, told.decode()
    assert "another one takes its place" in told.decode()
    counts = json.loads(said)
    assert (counts["made"], counts["failed"], counts["done_before"]) == (12, 0, 0)
    lines = _lines(tmp_path / "ray")
    assert sorted(line["row"] for line in lines) == list(range(12))
    assert not any(line["host"].endswith(f":{victim}") for line in lines[before + 1 :])
    cli.main(_words(tmp_path, "local", *settings)[3:])
    assert _hashes(tmp_path / "ray") == _hashes(tmp_path / "local")
    (tmp_path / "ray" / "000007.webp").unlink()
    capsys.readouterr()
    cli.main(_words(tmp_path, "ray", *settings)[3:])  # an engine goes on where the other one ended
    assert json.loads(capsys.readouterr().out)["done_before"] == 11


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_two_nodes_makes_the_same_files(tmp_path):
    (tmp_path / "a.txt").write_text("a parrot\na fox\na cat\na ghost\n" * 3)
    settings = ["--settings", "frames=4", "steps=2"]
    serving = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        address = ""
        while not address.startswith("1"):
            address = serving.stdout.readline().decode().strip()
        words = _words(tmp_path, "ray", *settings, "--engine", "ray", "--address", address)
        said = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=120).stdout)
    finally:
        serving.communicate(timeout=60)
    assert (said["made"], said["failed"]) == (12, 0)
    assert len({line["host"] for line in _lines(tmp_path / "ray")}) == 2
    subprocess.run(_words(tmp_path, "local", *settings), check=True, capture_output=True)
    assert _hashes(tmp_path / "ray") == _hashes(tmp_path / "local")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--address", "127.0.0.1:9"], "no Ray cluster answers at '127.0.0.1:9'"),
        (["--model", "nothing-here"], "nothing-here"),
    ],
)
def test_what_ray_cannot_do_is_one_sentence(words, named, tmp_path):
    (tmp_path / "a.txt").write_text("a fox")
    run = subprocess.run(_words(tmp_path, "out", "--engine", "ray", *words), capture_output=True, timeout=120)
    assert run.returncode == 2
    assert named in run.stderr.decode()
    assert run.stderr.decode().count("\n") == 1
    assert not (tmp_path / "out").exists()
