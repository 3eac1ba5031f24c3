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
from animatelcm.bundle import load, save
from animatelcm.config import TrainConfig
from animatelcm.recipes import base_emoji
from animatelcm.weights.lora import LoraLayer, write_lora


@pytest.fixture(scope="module")
def folder(fresh_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    save(fresh_model, path, dtype=torch.float32)
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


def test_every_part_of_a_distillation_is_a_flag(capsys):
    flags = "--lora.rank 8 --lora.targets to_q to_v --consistency.init direct --consistency.mu 0.9"
    cli.main(["train", "image_lcm_emoji", *flags.split(), "--dry-run"])
    config = TrainConfig.from_json(capsys.readouterr().out)
    assert (config.lora.rank, config.lora.targets) == (8, ("to_q", "to_v"))
    assert (config.consistency.init, config.consistency.mu) == ("direct", 0.9)


MOTION = 5 * 2_259_520 + 5 * 9_024_640 + 11 * 36_071_680
"""AnimateDiff's 21 temporal modules of 320, 640 and 1280 channels."""
SPATIAL, LCM_LORA = 859_520_964, 67_252_224
STYLE_LORA = 32 * (16 * 2 * 768 + 32 * (5 * 320 + 5 * 640 + 6 * 1280))
"""Rank 32 on 16 transformers: text 2 (C + 768); the rest of their attentions, in and out maps, feed-forward 30 C."""


@pytest.mark.parametrize(
    ("recipe", "trainable", "parameters"),
    [
        ("style_lora_sd15", STYLE_LORA, SPATIAL + STYLE_LORA),
        ("image_lcm_sd15", LCM_LORA, SPATIAL + LCM_LORA),
        ("video_lcm_sd15", MOTION, SPATIAL + LCM_LORA + MOTION),
        ("video_lcm_sd15_n100", MOTION, SPATIAL + LCM_LORA + MOTION),
    ],
)
def test_dry_run_counts_stable_diffusion_before_any_weight_is_there(recipe, trainable, parameters, capsys):
    pytest.importorskip("peft")
    cli.main(["train", recipe, "--dry-run"])
    shown = capsys.readouterr()
    assert TrainConfig.from_json(shown.out).name == recipe
    costs = {name: float(value.replace(",", "")) for name, value in map(str.split, shown.err.splitlines())}
    assert costs["trainable"] == trainable
    assert costs["parameters"] == parameters
    assert costs["flops"] > 1e12
    assert costs["weights_gib"] > 4 * parameters / 2**30
    assert 0 < costs["activations_gib"] < 80


def test_dry_run_of_an_autoencoder_prints_its_recipe(capsys):
    cli.main(["train", "vae_emoji", "--dry-run"])
    assert TrainConfig.from_json(capsys.readouterr().out).name == "vae_emoji"


@pytest.fixture(scope="module")
def style(fresh_model, tmp_path_factory):
    """A style LoRA of one strong layer."""
    path = tmp_path_factory.mktemp("style") / "mine.safetensors"
    layer = LoraLayer(torch.ones(1, 16, 3, 3), torch.ones(96, 1, 1, 1), alpha=1.0)
    write_lora({"unet.conv_in": layer}, path, metadata={}, dtype=torch.float32)
    return path


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
    assert "--force" in _fails(words, capsys)
    cli.main([*words, "--force"])
    (tmp_path / "sum" / "model_index.json").unlink()
    assert "sum exists" in _fails([*words, "--force"], capsys)  # no model folder: it may be anything


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--style", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--style", "x:much"], "'much' is no scale"),
        (["--image-scale", "0.8"], "image_scale=0.8"),
    ],
)
def test_fuse_refuses_in_a_sentence(words, named, folder, tmp_path, capsys):
    assert named in _fails(["fuse", "--model", folder, "--out", str(tmp_path / "sum"), *words], capsys)
    assert not list(tmp_path.iterdir())


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


def test_eval_measures_once_and_prints_one_object(folder, tmp_path, capsys):
    words = ["eval", "--model", folder, "--settings", "lcm@1", "ddim@1:2", "--clips", "2", "--real", "3"]
    words += ["--kinds", "images", "clips", "--out", str(tmp_path)]
    cli.main([*words, "--json"])
    first = json.loads(capsys.readouterr().out)
    assert [(row["setting"], row["kind"]) for row in first["rows"]] == [
        ("lcm@1", "images"),
        ("lcm@1", "clips"),
        ("ddim@1:2", "images"),
        ("ddim@1:2", "clips"),
    ]
    assert [row["evaluations"] for row in first["rows"]] == [1, 1, 2, 2]
    assert {row["model"] for row in first["rows"]} == {folder}
    assert json.loads((tmp_path / "report.json").read_text()) == first
    assert json.loads((tmp_path / "rows" / "ddim@1-2.json").read_text()) == first["rows"][3]
    cli.main(words)
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2 + 4 + 2  # and the protocol
    assert shown.out.count(folder) == 4
    assert json.loads((tmp_path / "report.json").read_text()) == first  # the seconds too: nothing was measured again
    assert "choose another folder, or --force" in _fails([*words, "--real", "4"], capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--settings", "lcm"], "SAMPLER@STEPS"),
        (["--settings", "euler@4"], "euler"),
        (["--clips", "1"], "clips=1"),
        (["--style-truth", "nobody"], "nobody"),
        (["--kinds", "dreams"], "dreams"),
        (["--style", "nowhere.safetensors:0.8"], "nowhere.safetensors"),
    ],
)
def test_eval_refuses_in_a_sentence(words, named, folder, tmp_path, capsys):
    message = _fails(["eval", "--model", folder, "--out", str(tmp_path), *words], capsys)
    assert named in message
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"animatelcm {__version__}\n"
