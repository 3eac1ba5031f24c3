"""A distilled model whose teacher's temporal layers are gone: a sentence where they are asked for, and only there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from animatelcm import cli, recipes, stages
from animatelcm.bundle import FACTS_FILE, TEACHER, load
from animatelcm.hub import find
from animatelcm.nets import lora
from animatelcm.saving import save


@pytest.fixture
def folder(tmp_path) -> Path:
    """The embedded model without its teacher's layers."""
    return Path(shutil.copytree(find("emoji"), tmp_path / "model", ignore=shutil.ignore_patterns(TEACHER)))


def test_asking_for_the_teacher_is_refused_in_a_sentence(folder, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "a fox", "--model", str(folder), "--teacher", "--out", str(out)])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert str(folder) in said
    assert "lacks motion_adapter_teacher" in said
    assert "no --teacher" in said
    assert not out.exists()


def test_a_distillation_from_it_is_refused_too(folder):
    with pytest.raises(ValueError, match="lacks motion_adapter_teacher"):
        stages.starting_model(replace(recipes.video_lcm_emoji(), model=str(folder)))


def test_the_few_step_model_needs_no_teacher(folder):
    ours, whole = load(folder), load("emoji")
    assert all(torch.equal(value, whole.unet.state_dict()[name]) for name, value in ours.unet.state_dict().items())


@pytest.mark.parametrize(("recipe", "own"), [(recipes.image_lcm_emoji, False), (recipes.video_lcm_emoji, True)])
def test_a_bundle_says_whether_its_teacher_has_temporal_layers_of_its_own(recipe, own, tmp_path):
    model = stages.starting_model(replace(recipe(), model="emoji"))
    assert model.facts.teacher.get("motion", False) == own
    assert bool(model.teacher_motion) == own
    lora.eject(model.unet)
    save(model, tmp_path / "model")
    assert (tmp_path / "model" / TEACHER).is_dir() == own
    assert load(tmp_path / "model", teacher=True).facts == load("emoji", teacher=True).facts


def test_a_teacher_with_the_same_temporal_layers_is_loaded_without_a_folder(folder):
    """As stage 1 leaves one: the image acceleration alone is what the teacher lacks."""
    path = folder / FACTS_FILE
    facts = json.loads(path.read_text())
    del facts["teacher"]["motion"]
    path.write_text(json.dumps(facts))
    teacher, own = load(folder, teacher=True), load(folder, image_scale=0.0)
    assert teacher.facts.sampler == "ddim"
    assert all(torch.equal(value, own.unet.state_dict()[name]) for name, value in teacher.unet.state_dict().items())
