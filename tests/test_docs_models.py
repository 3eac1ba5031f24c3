"""What docs/using-your-models.md shows for other tools runs as shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler

from animatelcm.bundle import load
from animatelcm.cli import VERBS, main
from animatelcm.conversion import convert

PAGE = (Path(__file__).parent.parent / "docs" / "using-your-models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_commands_parse(monkeypatch):
    ran = []
    for verb in VERBS.values():
        monkeypatch.setattr(verb, "run", lambda self: ran.append(self))
    text = "\n".join(code for language, code in BLOCKS if language == "bash").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("animatelcm ")]
    assert len(lines) > 15
    for line in lines:
        main(shlex.split(line, comments=True)[1:])
    assert len(ran) == len(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands of the page were run with the miniature as the model: converted, and fused."""
    place = tmp_path_factory.mktemp("page")
    convert("emoji", place / "one" / "my-model-diffusers", to="diffusers")
    main(["fuse", "--out", str(place / "two" / "my-model-diffusers")])
    return place


def _frames(place: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the code draws in a folder, from one and the same noise, as floating-point numbers of 0..255."""
    names: dict[str, object] = {}
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    exec(compile(code, "using-your-models.md", "exec"), names)
    assert isinstance(names["pipeline"].scheduler, LCMScheduler)
    return np.stack([np.asarray(frame, dtype=float) for frame in names["frames"]])


def test_diffusers_draws_what_was_converted_and_the_same_of_the_sum(folder, monkeypatch):
    (code,) = [code for language, code in BLOCKS if language == "python" and "AnimateDiffPipeline" in code]
    (lora,) = [line for line in code.splitlines() if "load_lora_weights" in line]
    converted = _frames(folder / "one", code, monkeypatch)
    assert converted.shape == (16, 64, 64, 3)
    fused = _frames(folder / "two", code.replace(lora, ""), monkeypatch)
    assert np.abs(fused - converted).mean() < 2
    bare = _frames(folder / "one", code.replace(lora, ""), monkeypatch)
    assert np.abs(bare - converted).mean() > 4


def test_a_sum_begins_with_the_scheduler_of_its_steps(folder, tmp_path):
    few = DiffusionPipeline.from_pretrained(folder / "two" / "my-model-diffusers", torch_dtype=torch.float32).scheduler
    assert isinstance(few, LCMScheduler)
    assert few.config.original_inference_steps == load("emoji").schedule.solver_steps
    main(["fuse", "--out", str(tmp_path / "many"), "--teacher"])
    many = DiffusionPipeline.from_pretrained(tmp_path / "many", torch_dtype=torch.float32).scheduler
    assert isinstance(many, DDIMScheduler)
    assert many.config.beta_schedule == few.config.beta_schedule == load("emoji").schedule.beta_schedule
