from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from animatelcm.adapters import Beside, read
from animatelcm.assembly import load_sum
from animatelcm.bundle import load, save
from animatelcm.condition import Condition, Control
from animatelcm.fusion import baked, base_state, fuse
from animatelcm.hub import find
from animatelcm.model import VideoModel
from animatelcm.request import ModelSource, SampleRequest
from animatelcm.sampling import initial_noise, sample_steps
from animatelcm.weights.files import State, read_safetensors
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import Lora, LoraLayer
from test_condition import beside, clip


@pytest.fixture(scope="module")
def folder(fresh_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "model"
    save(fresh_model, path, dtype=torch.float32)
    return path


def _random_lora(model: VideoModel, seed: int) -> Lora:
    source = torch.Generator().manual_seed(seed)
    part: Lora = {}
    for path in model.modules()[seed % 3 :: 3]:
        out, *rest = base_state(model)[f"{path}.weight"].shape
        down = 0.1 * torch.randn(4, *rest, generator=source)
        up = 0.1 * torch.randn(out, 4, *[1] * (len(rest) - 1), generator=source)
        part[path] = LoraLayer(down, up, alpha=2.0)
    return {path: layer for path, layer in part.items() if "motion_modules" not in path and "embed" not in path}


@pytest.fixture(scope="module")
def distilled(fresh_model):
    """With all that a distillation leaves in a model, and two styles."""
    motion = {key: value for key, value in fresh_model.unet.state_dict().items() if "motion_modules" in key}
    facts = replace(fresh_model.facts, num_inference_steps=4, guidance_scale=1.0, sampler="lcm")
    return replace(
        fresh_model,
        image_lora=_random_lora(fresh_model, 0),
        styles={"hard": _random_lora(fresh_model, 1), "soft": _random_lora(fresh_model, 2)},
        teacher_motion={key: value + 0.01 for key, value in motion.items()},
        facts=replace(facts, teacher={"num_inference_steps": 25, "guidance_scale": 4.0, "sampler": "ddim"}),
    )


@pytest.fixture(scope="module")
def distilled_folder(distilled, tmp_path_factory):
    path = tmp_path_factory.mktemp("distilled") / "model"
    save(distilled, path, dtype=torch.float32)
    return path


def _same_lora(one: Lora, two: Lora) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(layer.down, two[path].down)
        and torch.equal(layer.up, two[path].up)
        and layer.alpha == two[path].alpha
        for path, layer in one.items()
    )


def _same_state(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def _weights(folder: Path) -> dict[Path, State]:
    return {path.relative_to(folder): read_safetensors(path) for path in folder.rglob("*.safetensors")}


def test_all_that_belongs_to_a_distilled_model_survives(distilled, distilled_folder):
    again = load(distilled_folder)
    assert _same_lora(again.image_lora, distilled.image_lora)
    assert list(again.styles) == ["hard", "soft"]
    assert all(_same_lora(lora, distilled.styles[name]) for name, lora in again.styles.items())
    assert _same_state(again.teacher_motion, distilled.teacher_motion)
    assert _same_state(base_state(again), base_state(distilled))
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
    assert _same_state(base_state(teacher), expected)
    assert teacher.kept == {} == teacher.teacher_motion
    settings = {"num_inference_steps": 25, "guidance_scale": 4.0, "sampler": "ddim", "teacher": {}}
    assert teacher.facts == replace(distilled.facts, **settings)


def test_what_was_fused_is_not_saved(distilled_folder, tmp_path):
    model = load(distilled_folder)
    fuse(model, style=[("soft", 0.7), ("hard", 0.2)], image=0.5, motion=(model.teacher_motion, 0.5))
    save(model, tmp_path / "model", dtype=torch.float32)
    before, after = _weights(distilled_folder), _weights(tmp_path / "model")
    assert before.keys() == after.keys()
    assert len(before) == 8
    assert all(_same_state(state, after[path]) for path, state in before.items())


def test_a_baked_sum_is_a_plain_model(distilled_folder, tmp_path):
    model = load(distilled_folder)
    fuse(model, style=("soft", 0.7), image=1.0)
    state = {name: value.clone() for name, value in model.unet.state_dict().items()}
    save(baked(model), tmp_path / "model", dtype=torch.float32)
    again = load(tmp_path / "model")
    assert _same_state(again.unet.state_dict(), state)
    assert again.image_lora == again.styles == again.teacher_motion == again.kept == again.facts.teacher == {}
    spatial = read_safetensors(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert _same_state(spatial, {name: value for name, value in state.items() if "motion_modules" not in name})
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
        assert _same_state(found.networks[part].state_dict(), network.state_dict())


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


def test_a_plain_model_has_no_acceleration_to_scale(folder):
    with pytest.raises(ValueError, match=r"image_scale=0\.8"):
        load_sum(ModelSource(model=str(folder), image_scale=0.8))
    assert load_sum(ModelSource(model=str(folder), image_scale=0.0)).kept == {}


def test_a_saved_bundle_is_the_same_model(fresh_model, folder):
    again = load(folder)
    assert again.schedule == fresh_model.schedule
    assert again.facts == fresh_model.facts
    for name, network in fresh_model.networks.items():
        ours, theirs = network.state_dict(), again.networks[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(again.embed(["a parrot", ""]), fresh_model.embed(["a parrot", ""]))


def test_half_precision_files_are_half_the_size_and_load_as_float32(fresh_model, folder, tmp_path):
    save(fresh_model, tmp_path / "half")
    sizes = [sum(f.stat().st_size for f in path.rglob("*.safetensors")) for path in (folder, tmp_path / "half")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.01)
    assert all(p.dtype == torch.float32 for n in load(tmp_path / "half").networks.values() for p in n.parameters())


@pytest.mark.parametrize("source", ["random weights", "the shipped bundle"])
def test_diffusers_draws_the_same_picture(folder, source):
    from diffusers import StableDiffusionPipeline

    path = find("emoji") if source == "the shipped bundle" else folder
    model = load(path, teacher=True)
    pipe = StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    request = SampleRequest(prompt="a parrot", num_frames=1, num_inference_steps=8, guidance_scale=4.0, seed=3)
    request = request.resolved(model.facts)
    noise = initial_noise(model, request)
    with torch.inference_mode():
        *_, last = sample_steps(model, request)
        ours = model.vae.decode(last.latents[:, :, 0] / model.vae.config.scaling_factor)[0]
    theirs = pipe(
        "a parrot",
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=noise[:, :, 0],
        height=64,
        width=64,
        output_type="np",
    ).images[0]
    assert np.abs(theirs - (ours.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)).max() < 1e-3


def test_diffusers_loads_the_temporal_layers(fresh_model, folder):
    from diffusers import MotionAdapter

    state = MotionAdapter.from_pretrained(folder / "motion_adapter", local_files_only=True).state_dict()
    ours = fresh_model.unet.state_dict()
    motion = {key for key in ours if "motion_modules" in key}
    assert {key for key in state if not key.endswith("pos_embed.pe")} == motion
    assert all(torch.equal(state[key], ours[key]) for key in motion)


def test_the_text_encoder_has_the_classic_keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_encode_and_decode_keep_shapes_and_chunks_do_not_matter(fresh_model):
    pixels = torch.rand(2, 3, 5, 64, 64) * 2 - 1
    with torch.inference_mode():
        latents = fresh_model.encode(pixels)
        assert latents.shape == (2, 16, 5, 8, 8)
        whole, parts = fresh_model.decode(latents), fresh_model.decode(latents, chunk=3)
    assert whole.shape == (2, 5, 64, 64, 3)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_frames_are_encoded_one_by_one(fresh_model):
    pixels = torch.rand(1, 3, 4, 64, 64) * 2 - 1
    with torch.inference_mode():
        video = fresh_model.encode(pixels)
        alone = fresh_model.encode(pixels[:, :, 2:3])
    assert torch.allclose(video[:, :, 2:3], alone, atol=1e-4)


@pytest.mark.parametrize("source", ["no/such/model", "nothing-here", "owner/absent"])
def test_a_model_that_is_not_there_is_one_sentence(source):
    with pytest.raises(ValueError, match=source):
        load(source)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"unet/config\.json"):
        load(tmp_path)


def test_a_hub_id_loads_from_the_local_cache(folder, tmp_path):
    """The cache as the hub lays it out: models--owner--name/{refs/main, snapshots/<commit>/...}."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--someone--emoji"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(folder)
    code = "from animatelcm.bundle import load; print(load('someone/emoji').facts.name)"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "emoji"


def test_saving_replaces_whole_or_not_at_all(fresh_model, folder, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save(fresh_model, target)
    before = sorted(p.name for p in target.rglob("*"))
    monkeypatch.setattr(type(fresh_model.tokenizer), "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(fresh_model, target)
    assert sorted(p.name for p in target.rglob("*")) == before
    assert json.loads((target / "animatelcm.json").read_text())["name"] == "emoji"


def test_an_image_model_gains_motion_without_changing(fresh_model):
    from animatelcm.miniature import fresh
    from animatelcm.model import with_motion
    from animatelcm.nets import emoji as shapes

    image = fresh(seed=5)
    video = with_motion(image, shapes.MOTION)
    x, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([500]), image.embed(["a parrot"])
    with torch.inference_mode():
        per_frame = torch.cat([image.unet(x[:, :, f : f + 1], t, text) for f in range(3)], dim=2)
        assert torch.allclose(video.unet(x, t, text), per_frame, atol=1e-5)


# Adapters


@pytest.fixture(scope="module")
def steered_folder(fresh_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("steered") / "model"
    save(beside(fresh_model), path, dtype=torch.float32)
    return path


def test_adapters_are_saved_and_loaded_by_name(fresh_model, steered_folder, tmp_path):
    before, after = beside(fresh_model), load(steered_folder)
    assert list(after.adapters) == ["edge", "i2v", "pose"]
    for name, network in after.adapters.items():
        assert type(network) is type(before.adapters[name])
        assert _same_state(network.state_dict(), before.adapters[name].state_dict())
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert _same_state(
            read(steered_folder / "adapters" / name, name, Beside.of(before), torch.float32).state_dict(),
            network.state_dict(),
        )
    assert list(load(steered_folder, adapters=("edge",)).adapters) == ["edge"]
    assert load(steered_folder, adapters=()).adapters == {}
    assert {p.dtype for p in load(steered_folder, dtype=torch.float16).adapters["pose"].parameters()} == {torch.float16}
    save(after, tmp_path / "again", dtype=torch.float32)
    assert _weights(tmp_path / "again").keys() == _weights(steered_folder).keys()
    for name in after.adapters:
        configs = [folder / "adapters" / name / "config.json" for folder in (tmp_path / "again", steered_folder)]
        assert json.loads(configs[0].read_text()) == json.loads(configs[1].read_text())


def test_sums_leave_adapters_alone(steered_folder, tmp_path):
    model = load(steered_folder)
    fuse(model, style=(_random_lora(model, 1), 0.5))
    save(baked(model), tmp_path / "sum", dtype=torch.float32)
    before, after = load(steered_folder), load(tmp_path / "sum")
    assert list(after.adapters) == list(before.adapters)
    assert all(_same_state(after.adapters[k].state_dict(), v.state_dict()) for k, v in before.adapters.items())
    assert not _same_state(after.unet.state_dict(), before.unet.state_dict())


@pytest.mark.parametrize(
    "damage", ["no weights", "no json", "another class", "no end of layers", "a key less", "not finite"]
)
def test_a_damaged_adapter_is_named(steered_folder, tmp_path, damage):
    shutil.copytree(steered_folder, tmp_path / "model")
    folder = tmp_path / "model" / "adapters" / "edge"
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    state = read_safetensors(weights)
    if damage == "no weights":
        weights.unlink()
    elif damage == "no json":
        config.write_text("[1, 2")
    elif damage == "another class":
        config.write_text('{"_class_name": "os.system"}')
    elif damage == "no end of layers":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_res_blocks": 10**9}))
    else:
        state.pop("adapter.conv_in.bias") if damage == "a key less" else state["adapter.conv_in.bias"].fill_(torch.nan)
        save_file(state, weights)
    with pytest.raises(ValueError, match=r"adapters.edge"):
        load(tmp_path / "model")
    assert list(load(tmp_path / "model", adapters=("pose",)).adapters) == ["pose"]


def test_diffusers_draws_the_same_controlled_picture(tmp_path):
    """The shipped model with a ControlNet that acts, in stock diffusers and here, from the same folder."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    save(beside(load("emoji", teacher=True), "pose"), tmp_path / "model", dtype=torch.float32)
    model = load(tmp_path / "model", image_scale=0.0)
    control = ControlNetModel.from_pretrained(tmp_path / "model" / "adapters" / "pose", local_files_only=True)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path / "model", controlnet=control, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    request = SampleRequest(prompt="a parrot", num_frames=1, num_inference_steps=3, guidance_scale=3.0, seed=3)
    request = request.resolved(model.facts)
    maps = clip(1)

    def picture(condition: Condition) -> np.ndarray:
        with torch.inference_mode():
            *_, last = sample_steps(model, request, condition=condition)
            drawn = model.vae.decode(last.latents[:, :, 0] / model.vae.config.scaling_factor)[0]
        return (drawn.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)

    def theirs(scale: float, start: float, end: float) -> np.ndarray:
        return pipe(
            "a parrot",
            image=torch.from_numpy(maps).permute(0, 3, 1, 2) / 255,
            num_inference_steps=3,
            guidance_scale=3.0,
            latents=initial_noise(model, request)[:, :, 0],
            height=64,
            width=64,
            controlnet_conditioning_scale=scale,
            control_guidance_start=start,
            control_guidance_end=end,
            output_type="np",
        ).images[0]

    plain = picture(Condition())
    for settings in ((0.2, 0.0, 1.0), (0.1, 0.0, 0.5)):
        ours = picture(Condition(controls=(Control("pose", maps, *settings),)))
        assert ours.std() > 0.05
        assert np.abs(ours - plain).max() > 0.1
        assert np.abs(theirs(*settings) - ours).max() < 1e-3
