"""``animatelcm eval PROTOCOL``: figures on stdout, remarks on stderr, files whole; wrong input is one sentence."""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from animatelcm import cli, video
from test_evaluate_clipsim import random_clip
from test_evaluate_i3d import Program


class Corners(Program):
    """In place of I3D: means of 400 places, NaN for a video that is white all over."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        seen = nn.functional.adaptive_avg_pool3d(x[:, 0], (4, 10, 10)).flatten(1)
        return seen / (seen.mean(dim=1, keepdim=True) < 0.99)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    return program(tmp_path_factory.mktemp("weights") / "i3d_torchscript.pt")


def program(path: Path) -> list[str]:
    """The flags that name a program which stands in for I3D's, written to a path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Corners()).save(path)
    return ["--weights", str(path), "--sha256", hashlib.sha256(path.read_bytes()).hexdigest()]


def films(folder: Path, count: int, *, side: int = 16, fps: int = 8, seed: int = 0, prompt: str = "a fox") -> Path:
    source = np.random.default_rng(seed)
    for number in range(count):
        frames = source.integers(0, 256, (17, side, side, 3), dtype=np.uint8)
        video.write(frames, folder / f"{seed}-{number}.webp", fps=fps, metadata={"prompt": prompt})
    return folder


@pytest.fixture
def places(tmp_path) -> Path:
    films(tmp_path / "real", 3)
    films(tmp_path / "good", 3, seed=1)
    return tmp_path


def run(words: list[object], capsys) -> tuple[str, str]:
    cli.main(["eval", *map(str, words)])
    shown = capsys.readouterr()
    return shown.out, " ".join(shown.err.split())


def fails(words: list[object], capsys) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", *map(str, words)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# Protocols


def test_help_names_each_protocol_in_a_line(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", "--help"])
    assert left.value.code == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if "•" in line]
    assert [line.split()[1] for line in lines] == list(cli.PROTOCOLS)
    assert all(line.endswith(".") for line in lines)  # a sentence that fits


@pytest.mark.parametrize("words", [[], ["--model", "emoji"], ["quality"]])
def test_without_a_protocol_they_are_named(words, capsys):
    said = fails(words, capsys)
    assert said.count("\n") == 1
    assert "protocols: emoji, fvd, clipsim, ucf101, vbench, stability" in said


def test_the_lines_of_the_page_about_it_parse(monkeypatch):
    ran = []
    for verb in (*cli.VERBS.values(), *cli.PROTOCOLS.values()):
        monkeypatch.setattr(verb, "run", lambda self: ran.append(self))
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("animatelcm ")]
    for line in lines:
        cli.main(shlex.split(line)[1:])
    assert len(ran) == len(lines)
    assert {type(verb) for verb in ran} >= {kind for name, kind in cli.PROTOCOLS.items() if name != "emoji"}


# FVD


def test_fvd_prints_a_line_a_folder_and_what_is_to_be_said(places, weights, capsys):
    films(places / "better", 3, seed=2)
    words = ["fvd", "--real", places / "real", "--generated", places / "good", places / "better", *weights]
    shown, said = run(words, capsys)
    head, _, first, second, _, last = shown.splitlines()
    assert head == "| of | metric | value | interval | n | rank |"
    assert [line.split(" | ")[0] for line in (first, second)] == [f"| {places / name}" for name in ("good", "better")]
    assert first.endswith("(95%) | 3 / 3 | 2 / 2 |")
    assert last.startswith("FVD by protocol ")
    assert said.count("n = 3 where papers use 2,048: not comparable") == 2
    assert said.count("rank real 2, generated 2, not 400") == 2


def test_fvd_keeps_what_it_measured_and_a_second_run_is_the_same(places, weights, capsys, monkeypatch):
    words = ["fvd", "--real", places / "real", "--generated", places / "good", *weights, "--out", places / "out"]
    first = json.loads(run([*words, "--json"], capsys)[0])
    assert [score["of"] for score in first["scores"]] == [str(places / "good")]
    assert first["scores"][0]["n"] == {"real": 3, "generated": 3}
    assert len(first["remarks"]) == 2
    assert json.loads((places / "out" / "scores.json").read_text()) == first
    monkeypatch.setattr(video, "read", None)
    assert json.loads(run([*words, "--json"], capsys)[0]) == first


def test_fvd_tells_mixed_sizes_and_frame_rates(places, weights, capsys):
    films(places / "good", 1, side=20, seed=5)
    films(places / "good", 1, fps=25, seed=6)
    words = ["fvd", "--real", places / "real", "--generated", places / "good", *weights, "--json"]
    said = json.loads(run(words, capsys)[0])["remarks"]
    assert (
        f"sizes are mixed (real, {places / 'real'}: 16x16 in 3; {places / 'good'}: 16x16 in 4, 20x20 in 1)" in said[0]
    )
    assert "8 in 4, 25 in 1" in said[1]


def test_fvd_does_not_put_two_protocols_in_one_table(places, weights, capsys):
    words = ["fvd", "--real", places / "real", "--generated", places / "good", films(places / "more", 4), *weights]
    assert "different counts of videos" in fails(words, capsys)
    shown, _ = run([*words, "--mixed"], capsys)
    assert len({line.split(" | ")[-1] for line in shown.splitlines()[2:4]}) == 2
    assert "FVD by protocol" in run([*words, "--limit", "3"], capsys)[0]


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ("empty", [], "real holds no videos"),
        ("single", [], "real holds a single video"),
        ("short", [], "has 15 frames, and 16 are needed; leave it out (1 of 4 videos"),
        ("torn", [], "cannot read"),
        ("white", [], "white.webp: its logits are NaN"),
        ("", ["--generated"], "nothing to measure"),
        ("", ["--limit", "1"], "limit=1 videos are too few"),
        ("", ["--out", __file__], "test_evaluating.py is a file; choose a folder"),
        ("", ["--sha256", ""], "is a program, which could do anything"),
        ("", ["--sha256", "0" * 64], "is asked for"),
        ("", ["--weights", "https://example.org/i3d.pt", "--sha256", ""], "needs the SHA-256 of the file"),
        ("page", [], "is a web page"),
        ("text", [], "is damaged or no file of torch.save"),
        ("cut", [], "cut short"),
    ],
)
def test_fvd_refuses_in_a_sentence_and_leaves_no_folder(places, weights, tmp_path, capsys, change, flags, said):
    real, given = places / "real", list(weights)
    if change in ("empty", "single"):
        for file in sorted(real.iterdir())[0 if change == "empty" else 1 :]:
            file.unlink()
    elif change in ("short", "white"):
        frames = np.full((15 if change == "short" else 16, 16, 16, 3), 255, np.uint8)
        video.write(frames, real / "white.webp", fps=8, quality=100)
    elif change == "torn":
        (real / "0-1.webp").write_bytes((real / "0-1.webp").read_bytes()[:99])
    elif change:
        texts = {"page": b"<html>404</html>", "text": b"not found", "cut": Path(weights[1]).read_bytes()[:2000]}
        (tmp_path / "bad.pt").write_bytes(texts[change])
        given = ["--weights", str(tmp_path / "bad.pt")]
    words = ["fvd", "--real", real, "--generated", places / "good", *given, "--out", places / "out", *flags]
    message = fails(words, capsys)
    assert said in message
    assert not (places / "out").exists()


# CLIPSIM


def test_clipsim_of_videos_that_say_what_they_show(places, tmp_path, capsys):
    clip = random_clip(tmp_path / "clip")
    capsys.readouterr()
    words = ["clipsim", "--clip", clip, "--videos", places / "real", places / "good"]
    shown, said = run(words, capsys)
    assert [line.split(" | ")[1] for line in shown.splitlines()[2:4]] == ["CLIPSIM", "CLIPSIM"]
    assert said == ""
    words.append(films(places / "other", 3, prompt="a cat"))
    assert "have different prompts, so their figures do not compare" in fails(words, capsys)
    assert run([*words, "--mixed"], capsys)[0].count("CLIPSIM") == 3


def test_clipsim_refuses_in_a_sentence(places, tmp_path, capsys):
    clip = random_clip(tmp_path / "clip")
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    video.write(frames, places / "good" / "foreign.gif", fps=8)
    words = ["clipsim", "--videos", places / "good", "--clip", clip, "--out", places / "out"]
    assert "1 of 4 videos do not say what they were asked to show" in fails(words, capsys)
    table = places / "table.jsonl"
    table.write_text('{"file": "foreign.gif", "prompt": "a fox"}\n')
    assert "3 of 4 videos have no prompt" in fails([*words, "--prompts", table], capsys)
    assert "no model" in fails([*words[:3], "--clip", "nowhere", "--out", places / "out"], capsys)
    assert "has no model.safetensors" in fails([*words[:3], "--clip", places / "real"], capsys)
    assert not (places / "out").exists()


# Stability


def test_stability_is_a_table_of_folders(tmp_path, capsys):
    pytest.importorskip("cv2")
    source = np.random.default_rng(0)
    for name in ("one", "two"):
        for number in range(2):
            frames = source.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
            video.write(frames, tmp_path / name / f"{number}.gif", fps=8)
    words = ["stability", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out"]
    shown, _ = run(words, capsys)
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {score["of"] for score in found["scores"]} == {str(tmp_path / name) for name in ("one", "two")}
    assert shown.count(str(tmp_path / "one")) == len(found["scores"]) / 2
    assert "holds no videos" in fails(["stability", tmp_path / "out"], capsys)
    video.write(frames[:1], tmp_path / "two" / "still.webp", fps=8)
    assert "still.webp has 1 frames, and 2 are needed" in fails(["stability", tmp_path / "two"], capsys)
