"""The command line: one object on stdout, wrong input is one sentence, and what was made can be made again."""

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
from animatelcm.bundle import load
from animatelcm.weights.lora import LoraLayer, write_lora


@pytest.fixture(scope="module")
def folder(fresh_folder):
    return str(fresh_folder)


def fails(words, capsys) -> str:
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


def test_a_video_that_memory_does_not_hold_goes_on_from_its_latents(folder, tmp_path, capsys, monkeypatch):
    from animatelcm.model import VideoModel

    monkeypatch.chdir(tmp_path)
    words = ["generate", "a parrot", "--model", folder, "--steps", "1", "--frames", "2"]
    cli.main([*words, "--out", "whole.webp", "--offload", "none"])

    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(VideoModel, "draw", full)
        message = fails([*words, "--out", "x.webp"], capsys).strip()
    assert "too little memory to decode" in message
    assert {path.name for path in tmp_path.iterdir()} == {"whole.webp", "x.latents.safetensors"}
    command = shlex.split(message[message.index("animatelcm decode") :])
    assert command == ["animatelcm", "decode", "x.latents.safetensors", "--model", folder, "--out", "x.webp"]
    cli.main(command[1:])
    assert "x.webp: decoded in" in capsys.readouterr().out
    whole, later = video.read("whole.webp"), video.read("x.webp")
    assert (whole.frames == later.frames).all()
    assert whole.metadata == later.metadata
    assert "x.webp exists" in fails(command[1:], capsys)
    cli.main([*command[1:], "--force", "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == ["x.webp"]
    (tmp_path / "broken.latents.safetensors").write_bytes(b"12345678901234567890")
    assert "broken.latents" in fails(["decode", "broken.latents.safetensors", "--model", folder], capsys)
    assert "no safetensors file" in fails(["decode", "whole.webp", "--model", folder], capsys)


def test_nothing_is_overwritten_without_force(folder, tmp_path, capsys):
    out = tmp_path / "x.gif"
    out.write_bytes(b"precious")
    words = ["generate", "a parrot", "--model", folder, "--steps", "1", "--frames", "1", "--out", str(out)]
    assert "--force" in fails(words, capsys)
    assert out.read_bytes() == b"precious"
    cli.main([*words, "--force"])
    assert out.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "num_inference_steps"),
        (["--frames", "100000"], "num_frames"),
        (["--context-overlap", "16"], "context_overlap"),
        (["--size", "big"], "--size"),
        (["--size", "60x64"], "width"),
        (["--model", "nothing-here"], "nothing-here"),
        (["--sampler", "euler"], "euler"),
        (["--stpes", "4"], "--stpes"),
        (["--out", "x.avi2"], "avi2"),
        (["--out", "x.gif", "--fps", "60", "--model", "nothing-here"], "fps=60.0, but .gif takes"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(words, named, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in fails(["generate", "a parrot", "--model", folder, *words], capsys)
    assert not list(tmp_path.iterdir())


def strong_style(path: Path) -> Path:
    """A style LoRA of one strong layer."""
    layer = LoraLayer(torch.ones(1, 16, 3, 3), torch.ones(96, 1, 1, 1), alpha=1.0)
    write_lora({"unet.conv_in": layer}, path, metadata={}, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    return strong_style(tmp_path_factory.mktemp("style") / "mine.safetensors")


def test_generate_with_a_style_writes_down_how(folder, style, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a parrot", "--model", folder, "--steps", "1", "--frames", "1"]
    cli.main([*words, "--out", "plain.webp"])
    cli.main([*words, "--style", f"{style}:0.5", "--style", f"{style}:0.25", "--out", "styled.webp", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["style"] == [f"{style}:0.5", f"{style}:0.25"]
    styled = video.read("styled.webp")
    assert styled.metadata["style"] == f"{style}:0.5 {style}:0.25"
    cli.main([*shlex.split(styled.metadata["command"])[1:], "--out", "again.webp"])
    assert (video.read("again.webp").frames == styled.frames).all()
    assert (video.read("plain.webp").frames != styled.frames).any()


def test_fuse_writes_the_sum_as_a_plain_model(folder, style, tmp_path, capsys):
    words = ["fuse", "--model", folder, "--style", f"{style}:0.5", "--out", str(tmp_path / "sum")]
    cli.main(words)
    assert str(tmp_path / "sum") in capsys.readouterr().out
    before, after = (load(path).unet.state_dict() for path in (folder, tmp_path / "sum"))
    changed = {key for key, value in after.items() if not torch.allclose(value, before[key], atol=1e-3, rtol=1e-3)}
    assert changed == {"conv_in.weight"}
    assert torch.allclose(after["conv_in.weight"], before["conv_in.weight"] + 0.5, atol=1e-3)
    assert "--force" in fails(words, capsys)
    cli.main([*words, "--force"])
    (tmp_path / "sum" / "model_index.json").unlink()
    assert "sum exists" in fails([*words, "--force"], capsys)  # no model folder: it may be anything


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--style", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--style", "x:much"], "'much' is no scale"),
        (["--image-scale", "0.8"], "image_scale=0.8"),
    ],
)
def test_fuse_refuses_in_a_sentence(words, named, folder, tmp_path, capsys):
    assert named in fails(["fuse", "--model", folder, "--out", str(tmp_path / "sum"), *words], capsys)
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_a_thing_is(folder, tmp_path, capsys):
    cli.main(["inspect", folder, "--json"])
    model = json.loads(capsys.readouterr().out)
    assert model["kind"] == "model"
    assert model["parameters"] == sum(v for k, v in model.items() if k.endswith(" parameters"))
    cli.main(["inspect", str(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"), "--json"])
    weights = json.loads(capsys.readouterr().out)
    assert weights["parameters"] == model["unet parameters"]
    (tmp_path / "x.txt").write_text("hello")
    assert "x.txt" in fails(["inspect", str(tmp_path / "x.txt")], capsys)
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    assert "broken.safetensors" in fails(["inspect", str(tmp_path / "broken.safetensors")], capsys)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"animatelcm {__version__}\n"


def test_an_interrupt_is_one_word_and_its_own_status(capsys, monkeypatch):
    def pressed(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", pressed)
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", "emoji"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "animatelcm: interrupted\n"
