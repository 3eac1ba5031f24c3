"""Pictures, layouts and videos that steer, from the command line."""

from __future__ import annotations

import json
import shlex
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from animatelcm import cli, images, video
from animatelcm.bundle import load
from test_cli import fails, strong_style
from test_condition import clip


@pytest.fixture(scope="module")
def folder(fresh_folder):
    return str(fresh_folder)


@pytest.fixture(scope="module")
def steered(steered_folder):
    """A model folder with an image encoder, and adapters that read edges and poses."""
    return str(steered_folder)


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
        ("--adapter edge=empty", "has no config.json"),
        ("--adapter edge=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_what_cannot_steer_is_a_sentence_and_no_file(words, named, steered, media, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(media)
    message = fails(_words(steered, *words.split(), "--out", str(tmp_path / "x.mp4")), capsys)
    assert named in " ".join(message.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["--image nowhere.png", "--image text.png", "--image huge.png", "--control edge=text.png", "--video a.mp4"]
)
def test_files_that_cannot_be_read_are_told_before_the_model_is_loaded(words, media, capsys, monkeypatch):
    monkeypatch.chdir(media)
    monkeypatch.setattr("animatelcm.verbs.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert words.split("=")[-1].split()[-1] in " ".join(fails(["generate", "a parrot", *words.split()], capsys).split())


def test_a_picture_for_a_model_without_an_encoder_is_a_sentence(folder, media, tmp_path, capsys):
    words = ["--image", str(media / "a.png"), "--out", str(tmp_path / "x.mp4")]
    message = fails(_words(folder, *words), capsys)
    assert "an image encoder (i2v) is needed, and this model's adapters are: none" in message
    assert not list(tmp_path.iterdir())


def test_a_sum_keeps_the_adapters(steered, tmp_path):
    style = strong_style(tmp_path / "mine.safetensors")
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
    assert "a ControlNet without its weights" in fails(["inspect", str(tmp_path)], capsys)


def test_convert_writes_the_encoder_with_its_motion_modules(steered, folder, tmp_path, capsys):
    out = tmp_path / "i2v.safetensors"
    cli.main(["convert", steered, str(out), "--to", "animatediff", "--part", "i2v", "--json"])
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    cli.main(["inspect", str(out)])
    assert "image encoder" in capsys.readouterr().out
    missing = ["convert", folder, str(tmp_path / "x.safetensors"), "--to", "animatediff", "--part", "i2v"]
    assert "has no image encoder" in fails(missing, capsys)
