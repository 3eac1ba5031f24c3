from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from animatelcm import __version__, cli, images, video
from animatelcm.bundle import load, save
from animatelcm.config import TrainConfig
from animatelcm.recipes import base_emoji
from animatelcm.weights.lora import LoraLayer, write_lora
from test_condition import beside, clip


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


def test_a_video_that_memory_does_not_hold_goes_on_from_its_latents(folder, tmp_path, capsys, monkeypatch):
    from animatelcm.model import VideoModel

    monkeypatch.chdir(tmp_path)
    words = ["generate", "a parrot", "--model", folder, "--steps", "1", "--frames", "2"]
    cli.main([*words, "--out", "whole.webp", "--offload", "none"])

    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(VideoModel, "draw", full)
        message = _fails([*words, "--out", "x.webp"], capsys).strip()
    assert "too little memory to decode" in message
    assert {path.name for path in tmp_path.iterdir()} == {"whole.webp", "x.latents.safetensors"}
    command = shlex.split(message[message.index("animatelcm decode") :])
    assert command == ["animatelcm", "decode", "x.latents.safetensors", "--model", folder, "--out", "x.webp"]
    cli.main(command[1:])
    assert "x.webp: decoded in" in capsys.readouterr().out
    whole, later = video.read("whole.webp"), video.read("x.webp")
    assert (whole.frames == later.frames).all()
    assert whole.metadata == later.metadata
    assert "x.webp exists" in _fails(command[1:], capsys)
    cli.main([*command[1:], "--force", "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == ["x.webp"]
    (tmp_path / "broken.latents.safetensors").write_bytes(b"12345678901234567890")
    assert "broken.latents" in _fails(["decode", "broken.latents.safetensors", "--model", folder], capsys)
    assert "no safetensors file" in _fails(["decode", "whole.webp", "--model", folder], capsys)


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
        (["--frames", "100000"], "num_frames"),
        (["--context-overlap", "16"], "context_overlap"),
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
    words = ["eval", "emoji", "--model", folder, "--settings", "lcm@1", "ddim@1:2", "--clips", "2", "--real", "3"]
    words += ["--kinds", "images", "clips", "--keep", "1", "--out", str(tmp_path)]
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
    assert len(list((tmp_path / "clips").rglob("*.mp4"))) == 2  # one of each setting
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
    message = _fails(["eval", "emoji", "--model", folder, "--out", str(tmp_path), *words], capsys)
    assert named in message
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"animatelcm {__version__}\n"


# Pictures, layouts and videos that steer


@pytest.fixture(scope="module")
def steered(fresh_model, tmp_path_factory):
    """A model folder with an image encoder, and adapters that read edges and poses."""
    path = tmp_path_factory.mktemp("steered") / "model"
    save(beside(fresh_model), path)
    return str(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A picture, a clip, and what is neither."""
    folder = tmp_path_factory.mktemp("media")
    images.write_image(clip(1, 60, 90)[0], folder / "a.png")
    video.write(clip(6), folder / "clip.mp4", fps=8)
    (folder / "text.png").write_text("no picture at all, but a sentence\n" * 20)
    (folder / "huge.png").write_bytes(_png(30_000, 30_000))
    (folder / "empty").mkdir()
    return folder


def _png(width: int, height: int) -> bytes:
    """The head of a black-and-white picture, and a hundred bytes of its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _words(steered: str, *more: str) -> list[str]:
    return ["generate", "a parrot", "--model", steered, "--steps", "1", "--frames", "2", *more]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--image a.png --motion-scale 0.5 --fit pad --colour-match 0.3", {"image": "a.png", "motion_scale": "0.5"}),
        ("--control edge=clip.mp4:0.5@0-1", {"control": "edge=clip.mp4:0.5@0-1"}),
        ("--control pose=map:clip.mp4 --control edge=a.png", {"control": "pose=map:clip.mp4 edge=a.png"}),
        ("--video clip.mp4 --strength 0.4", {"video": "clip.mp4", "strength": "0.4"}),
        ("--init-video clip.mp4 --sampler lcm --image a.png", {"video": "clip.mp4", "image": "a.png"}),
    ],
)
def test_what_steers_a_video_is_in_the_command_that_makes_it_again(
    words, said, steered, media, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(media)
    one, again, plain = (str(tmp_path / f"{name}.webp") for name in ("one", "again", "plain"))
    cli.main(_words(steered, *words.split(), "--out", one))
    shown = capsys.readouterr()
    assert "nan" not in shown.out
    assert ("clip.mp4: frames 0 to 1 of 6 (every frame, 8 fps)" in shown.err) == ("clip.mp4" in words)
    made = video.read(one)
    assert said.items() <= made.metadata.items()
    cli.main([*shlex.split(made.metadata["command"])[1:], "--out", again])
    assert (video.read(again).frames == made.frames).all()
    cli.main(_words(steered, "--out", plain))
    assert (video.read(plain).frames != made.frames).any()


def test_adapters_from_elsewhere_are_in_the_command_too(folder, steered, media, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(media)
    adapters = Path(steered) / "adapters"
    words = ["--adapter", f"canny={adapters / 'edge'}", "--adapter", f"i2v={adapters / 'i2v'}", "--image", "a.png"]
    cli.main(_words(folder, *words, "--control", "canny=clip.mp4", "--out", str(tmp_path / "one.webp"), "--json"))
    shown = json.loads(capsys.readouterr().out)
    assert shown["adapter"] == [f"canny={adapters / 'edge'}", f"i2v={adapters / 'i2v'}"]
    assert shown["control"] == ["canny=clip.mp4"]
    made = video.read(tmp_path / "one.webp")
    cli.main([*shlex.split(made.metadata["command"])[1:], "--out", str(tmp_path / "again.webp")])
    assert (video.read(tmp_path / "again.webp").frames == made.frames).all()


def test_of_a_long_control_only_its_beginning_is_decoded_and_the_log_says_so(steered, tmp_path, capsys, monkeypatch):
    """Ten minutes at 8 frames a second."""
    with av.open(str(tmp_path / "long.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        planes = np.full((48, 32), 128, np.uint8)
        for i in range(4_800):
            planes[:32] = i % 200
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    monkeypatch.setattr(
        "animatelcm.streams._decoded", lambda frame: decoded.append(frame.pts) or np.zeros((8, 8, 3), "u1")
    )
    decoded: list[int] = []
    words = ["--control", f"edge={tmp_path / 'long.mp4'}", "--out", str(tmp_path / "x.webp")]
    cli.main(_words(steered, *words))
    assert "long.mp4: frames 0 to 1 of 4800 (every frame, 8 fps)" in capsys.readouterr().err
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--image nowhere.png", "nowhere.png"),
        ("--image text.png", "cannot read text.png"),
        ("--image huge.png", "huge.png has 900,000,000 pixels, more than"),
        ("--image clip.mp4", "clip.mp4"),
        ("--image empty", "empty"),
        ("--image a.png --fit squeeze", "squeeze"),
        ("--image a.png --motion-scale 5", "motion_scale=5"),
        ("--control edge=nowhere.mp4", "nowhere.mp4"),
        ("--control edge=text.png", "text.png"),
        ("--control edge=huge.png", "huge.png has 900,000,000 pixels"),
        ("--control edge=empty", "holds no images"),
        ("--control nonsense", "control 'nonsense' is not KIND=FILE"),
        ("--control edge=clip.mp4:1@0.9-0.1", "within 0-1"),
        ("--control depth=map:clip.mp4", "an adapter that reads depth maps is needed, and this model's adapters are:"),
        ("--control sketch=clip.mp4", "reads sketch maps"),
        ("--control i2v=clip.mp4", "i2v sees a picture, and follows no layout"),
        ("--control pose=clip.mp4", "a pose control needs ready maps: give a clip of them, as pose=map:FILE"),
        ("--video nowhere.mp4", "nowhere.mp4"),
        ("--video text.png", "text.png"),
        ("--video clip.mp4 --strength 2", "strength=2"),
        ("--video clip.mp4 --strength 0.01 --sampler lcm", "strength=0.01 leaves 0 of the 50 timesteps"),
        ("--adapter edge", "adapter 'edge' is not NAME=PLACE"),
        ("--adapter edge=empty", "config.json is missing"),
        ("--adapter edge=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_what_cannot_steer_is_a_sentence_and_no_file(words, named, steered, media, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(media)
    message = _fails(_words(steered, *words.split(), "--out", str(tmp_path / "x.mp4")), capsys)
    assert named in " ".join(message.split())
    assert not list(tmp_path.iterdir())


def test_a_picture_for_a_model_without_an_encoder_is_a_sentence(folder, media, tmp_path, capsys):
    words = ["--image", str(media / "a.png"), "--out", str(tmp_path / "x.mp4")]
    message = _fails(_words(folder, *words), capsys)
    assert "an image encoder (i2v) is needed, and this model's adapters are: none" in message
    assert not list(tmp_path.iterdir())


def test_a_sum_keeps_the_adapters(steered, style, tmp_path):
    cli.main(["fuse", "--model", steered, "--style", f"{style}:0.5", "--out", str(tmp_path / "sum")])
    before, after = load(steered).adapters, load(tmp_path / "sum").adapters
    assert list(after) == list(before)
    for name, network in before.items():
        state = after[name].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_inspect_names_adapters_and_counts_them(steered, tmp_path, capsys):
    cli.main(["inspect", steered, "--json"])
    model = json.loads(capsys.readouterr().out)
    assert model["adapters"] == "edge (T2I-Adapter), i2v (image encoder), pose (ControlNet)"
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in load(steered).adapters.items()}
    assert {name: model[f"adapter {name} parameters"] for name in counts} == counts
    assert model["parameters"] == sum(v for k, v in model.items() if k.endswith(" parameters"))
    for name, word in (("edge", "T2I-Adapter"), ("i2v", "Image encoder"), ("pose", "ControlNet")):
        folder = Path(steered) / "adapters" / name
        cli.main(["inspect", str(folder), "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert shown["kind"] == f"{word} ({counts[name]:,} parameters)"
        assert shown["parameters"] == counts[name]
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    assert "a ControlNet without its weights" in _fails(["inspect", str(tmp_path)], capsys)


def test_convert_writes_the_encoder_with_its_motion_modules(steered, folder, tmp_path, capsys):
    out = tmp_path / "i2v.safetensors"
    cli.main(["convert", steered, str(out), "--to", "animatediff", "--part", "i2v", "--json"])
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    cli.main(["inspect", str(out)])
    assert "image encoder" in capsys.readouterr().out
    missing = ["convert", folder, str(tmp_path / "x.safetensors"), "--to", "animatediff", "--part", "i2v"]
    assert "has no image encoder" in _fails(missing, capsys)


def test_an_interrupt_is_one_word_and_its_own_status(capsys, monkeypatch):
    def pressed(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", pressed)
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", "emoji"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "animatelcm: interrupted\n"
