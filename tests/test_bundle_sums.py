"""What a distillation leaves is kept apart on disk, and added up again when it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from animatelcm.assembly import load_sum
from animatelcm.bundle import load
from animatelcm.fusion import baked, base_state, fuse
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.saving import save
from animatelcm.weights.files import State, read_safetensors
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import Lora, LoraLayer
from networks import same_state


def random_lora(model: VideoModel, seed: int) -> Lora:
    source = torch.Generator().manual_seed(seed)
    part: Lora = {}
    for path in model.modules()[seed % 3 :: 3]:
        out, *rest = base_state(model)[f"{path}.weight"].shape
        down = 0.1 * torch.randn(4, *rest, generator=source)
        up = 0.1 * torch.randn(out, 4, *[1] * (len(rest) - 1), generator=source)
        part[path] = LoraLayer(down, up, alpha=2.0)
    return {path: layer for path, layer in part.items() if "motion_modules" not in path and "embed" not in path}


def same_lora(one: Lora, two: Lora) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(layer.down, two[path].down)
        and torch.equal(layer.up, two[path].up)
        and layer.alpha == two[path].alpha
        for path, layer in one.items()
    )


def weights(folder: Path) -> dict[Path, State]:
    return {path.relative_to(folder): read_safetensors(path) for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def distilled(fresh_model):
    """With all that a distillation leaves in a model, and two styles."""
    motion = {key: value for key, value in fresh_model.unet.state_dict().items() if "motion_modules" in key}
    facts = replace(fresh_model.facts, num_inference_steps=4, guidance_scale=1.0, sampler="lcm")
    return replace(
        fresh_model,
        image_lora=random_lora(fresh_model, 0),
        styles={"hard": random_lora(fresh_model, 1), "soft": random_lora(fresh_model, 2)},
        teacher_motion={key: value + 0.01 for key, value in motion.items()},
        facts=replace(facts, teacher={"num_inference_steps": 25, "guidance_scale": 4.0, "sampler": "ddim"}),
    )


@pytest.fixture(scope="module")
def distilled_folder(distilled, tmp_path_factory):
    path = tmp_path_factory.mktemp("distilled") / "model"
    save(distilled, path, dtype=torch.float32)
    return path


def test_all_that_belongs_to_a_distilled_model_survives(distilled, distilled_folder):
    again = load(distilled_folder)
    assert same_lora(again.image_lora, distilled.image_lora)
    assert list(again.styles) == ["hard", "soft"]
    assert all(same_lora(lora, distilled.styles[name]) for name, lora in again.styles.items())
    assert same_state(again.teacher_motion, distilled.teacher_motion)
    assert same_state(base_state(again), base_state(distilled))
    assert again.facts == distilled.facts


def test_a_distilled_model_comes_with_its_acceleration(distilled, distilled_folder):
    base, again = base_state(distilled), load(distilled_folder)
    sums = fused(base, [(distilled.image_lora, 1.0)])
    assert sums.keys() == again.kept.keys() != set()
    for part in ("unet", "text_encoder"):
        found = again.networks[part].state_dict()
        assert all(torch.equal(v, sums.get(f"{part}.{k}", base[f"{part}.{k}"])) for k, v in found.items())


def test_its_teacher_is_the_model_it_was_distilled_from(distilled, distilled_folder):
    teacher = load(distilled_folder, teacher=True)
    expected = base_state(distilled) | {f"unet.{key}": value for key, value in distilled.teacher_motion.items()}
    assert same_state(base_state(teacher), expected)
    assert teacher.kept == {} == teacher.teacher_motion
    settings = {"num_inference_steps": 25, "guidance_scale": 4.0, "sampler": "ddim", "teacher": {}}
    assert teacher.facts == replace(distilled.facts, **settings)


def test_what_was_fused_is_not_saved(distilled_folder, tmp_path):
    model = load(distilled_folder)
    fuse(model, style=[("soft", 0.7), ("hard", 0.2)], image=0.5, motion=(model.teacher_motion, 0.5))
    save(model, tmp_path / "model", dtype=torch.float32)
    before, after = weights(distilled_folder), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    assert len(before) == 8
    assert all(same_state(state, after[path]) for path, state in before.items())


def test_a_baked_sum_is_a_plain_model(distilled_folder, tmp_path):
    model = load(distilled_folder)
    fuse(model, style=("soft", 0.7), image=1.0)
    state = {name: value.clone() for name, value in model.unet.state_dict().items()}
    save(baked(model), tmp_path / "model", dtype=torch.float32)
    again = load(tmp_path / "model")
    assert same_state(again.unet.state_dict(), state)
    assert again.image_lora == again.styles == again.teacher_motion == again.kept == again.facts.teacher == {}
    spatial = read_safetensors(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same_state(spatial, {name: value for name, value in state.items() if "motion_modules" not in name})
    assert {path.name for path in (tmp_path / "model").iterdir()}.isdisjoint(
        {"loras", "styles", "motion_adapter_teacher"}
    )
    assert again.facts.num_inference_steps == 4


@pytest.mark.parametrize(
    ("source", "style", "image"),
    [
        (ModelSource(), (), 1.0),
        (ModelSource(image_scale=0.8), (), 0.8),
        (ModelSource(style=("soft:0.5", "hard"), image_scale=0.0), [("soft", 0.5), ("hard", 1.0)], 0.0),
        (ModelSource(style=("soft:-0.5",)), ("soft", -0.5), 1.0),
        (ModelSource(style=("soft",), teacher=True), ("soft", 1.0), 0.0),
    ],
)
def test_a_source_is_the_sum_it_describes(distilled_folder, source, style, image):
    found = load_sum(replace(source, model=str(distilled_folder)))
    expected = load(distilled_folder, teacher=source.teacher)
    fuse(expected, style=style, image=image)
    for part, network in expected.networks.items():
        assert same_state(found.networks[part].state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (ModelSource(style=("nobody:0.5",)), "no LoRA 'nobody': .* hard, soft"),
        (ModelSource(style=("soft:much",)), "'much' is no scale"),
        (ModelSource(image_scale=0.8, teacher=True), "image_scale=0.8: this model has no image acceleration"),
        (ModelSource(image_scale=float("nan")), "scale=nan"),
    ],
)
def test_a_source_that_cannot_be_is_a_sentence(distilled_folder, source, named):
    with pytest.raises(ValueError, match=named):
        load_sum(replace(source, model=str(distilled_folder)))


def test_a_plain_model_has_no_acceleration_to_scale(fresh_folder):
    with pytest.raises(ValueError, match=r"image_scale=0\.8"):
        load_sum(ModelSource(model=str(fresh_folder), image_scale=0.8))
    assert load_sum(ModelSource(model=str(fresh_folder), image_scale=0.0)).kept == {}
