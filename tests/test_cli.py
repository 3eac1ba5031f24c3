from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from animatelcm import __version__, cli, video
from animatelcm.config import TrainConfig
from animatelcm.recipes import base_emoji


@pytest.fixture(scope="module")
def folder(fresh_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    fresh_model.save(path, dtype=torch.float32)
    return str(path)


def _fails(words, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_help_answers_fast():
    def seconds() -> float:
        """Processor time: what it takes on a machine that is otherwise idle."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "animatelcm", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert min(seconds() for _ in range(5)) < 0.6


def test_generate_prints_one_object_and_writes_the_recipe(folder, tmp_path, capsys):
    out = tmp_path / "x.mp4"
    words = [
        "generate",
        "a parrot",
        "--model",
        folder,
        "--steps",
        "2",
        "--frames",
        "3",
        "--seed",
        "7",
        "--out",
        str(out),
    ]
    cli.main([*words, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_inference_steps"] == 2
    assert shown["seed"] == 7
    assert shown["files"] == [str(out)]
    assert shown["network_evaluations"] == 4
    assert set(shown["seconds"]) == {"load", "denoise", "decode", "total"}
    clip = video.read(out)
    assert clip.frames.shape == (3, 64, 64, 3)
    assert clip.fps == 8
    assert clip.metadata["prompt"] == "a parrot"
    assert clip.metadata["animatelcm"] == __version__


def test_inspect_prints_the_command_that_makes_it_again(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a parrot", "--model", folder, "--steps", "2", "--frames", "2", "--out", "one.webp"]
    cli.main([*words, "--negative", "a fox", "--size", "64x64", "-n", "2"])
    capsys.readouterr()
    cli.main(["inspect", "one-1.webp", "--json"])
    command = shlex.split(json.loads(capsys.readouterr().out)["command"])
    cli.main([*command[1:], "--out", "again.webp"])
    assert (video.read("again.webp").frames == video.read("one-1.webp").frames).all()


def test_nothing_is_overwritten_without_force(folder, tmp_path, capsys):
    out = tmp_path / "x.gif"
    out.write_bytes(b"precious")
    words = ["generate", "a parrot", "--model", folder, "--steps", "1", "--frames", "1", "--out", str(out)]
    assert "--force" in _fails(words, capsys)
    assert out.read_bytes() == b"precious"
    cli.main([*words, "--force"])
    assert out.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "num_inference_steps"),
        (["--frames", "100"], "num_frames"),
        (["--size", "big"], "--size"),
        (["--size", "60x64"], "width"),
        (["--model", "nothing-here"], "nothing-here"),
        (["--sampler", "euler"], "euler"),
        (["--stpes", "4"], "--stpes"),
        (["--out", "x.avi2"], "avi2"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(words, named, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in _fails(["generate", "a parrot", "--model", folder, *words], capsys)
    assert not list(tmp_path.iterdir())


def test_train_dry_run_prints_the_resolved_plan(capsys):
    cli.main(["train", "base_emoji", "--steps", "7", "--data.length", "9", "--dry-run"])
    config = TrainConfig.from_json(capsys.readouterr().out)
    assert (config.steps, config.data.length) == (7, 9)
    assert config.learning_rate == base_emoji().learning_rate


@pytest.mark.parametrize("words", [[], ["no_such_recipe"], ["--dry-run"], ["DataConfig"]])
def test_train_without_a_recipe_lists_them(words, capsys):
    assert "base_emoji" in _fails(["train", *words], capsys)


def test_inspect_says_what_a_thing_is(folder, tmp_path, capsys):
    cli.main(["inspect", folder, "--json"])
    model = json.loads(capsys.readouterr().out)
    assert model["kind"] == "model"
    assert model["parameters"] == sum(v for k, v in model.items() if k.endswith(" parameters"))
    cli.main(["inspect", str(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"), "--json"])
    weights = json.loads(capsys.readouterr().out)
    assert weights["parameters"] == model["unet parameters"]
    (tmp_path / "x.txt").write_text("hello")
    assert "x.txt" in _fails(["inspect", str(tmp_path / "x.txt")], capsys)
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    assert "broken.safetensors" in _fails(["inspect", str(tmp_path / "broken.safetensors")], capsys)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"animatelcm {__version__}\n"
