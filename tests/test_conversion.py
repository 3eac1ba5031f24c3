"""Every format that exists both ways goes there and back bit for bit, and stock diffusers reads what is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import standins
from animatelcm.assembly import load_sum, with_temporal_layers
from animatelcm.bundle import load
from animatelcm.conversion import convert
from animatelcm.model_source import ModelSource
from animatelcm.saving import save
from animatelcm.verbs import Fuse
from animatelcm.weights.files import read_header, read_metadata, sha256
from animatelcm.weights.identify import identify
from animatelcm.weights.motion import read_motion
from networks import same_state


def _same(one, two) -> bool:
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) and value.dtype == two[key].dtype for key, value in one.items()
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """An image model in one file."""
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(standins.fill(standins.ldm_checkpoint(text=64, layers=1), torch.float16), file)
    return str(file)


@pytest.fixture(scope="module")
def image_model(base):
    return load_sum(ModelSource(model=base))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["animatelcm_t2v", "mm_v1", "mm_v2", "mm_v3"])
def test_a_motion_module_goes_to_diffusers_and_back(tmp_path, name, dtype):
    """Positions are what the tools tell AnimateDiff from AnimateLCM by: they stay, or stay away."""
    state = standins.fill(getattr(standins, name)(), dtype, seed=1)
    save_file(state, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "folder", to="diffusers", dtype=dtype)
    convert(tmp_path / "folder", tmp_path / "out.safetensors", to="animatediff", dtype=dtype)
    weights = {key: value for key, value in state.items() if not key.endswith(".pe")}
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == state.keys()
    assert all(torch.equal(value, out[key]) for key, value in weights.items())
    assert all(torch.allclose(state[key], value, atol=1e-3) for key, value in out.items())
    kinds = [identify(read_header(tmp_path / file)) for file in ("in.safetensors", "out.safetensors")]
    assert kinds[0] == kinds[1]
    adapter = MotionAdapter.from_pretrained(tmp_path / "folder", torch_dtype=dtype)
    assert adapter.config.block_out_channels == list(standins.SMALL)


@pytest.mark.parametrize("name", ["animatelcm_t2v", "mm_v1", "mm_v2", "mm_v3"])
def test_its_settings_go_with_a_motion_module(image_model, tmp_path, name):
    save_file(standins.fill(getattr(standins, name)(), torch.float16), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "folder", to="diffusers")
    file, folder = (with_temporal_layers(image_model, tmp_path / kept) for kept in ("in.safetensors", "folder"))
    assert file.schedule == folder.schedule
    assert replace(file.facts, name="") == replace(folder.facts, name="")


def test_an_image_encoder_stays_with_its_motion_module(tmp_path):
    save_file(standins.fill(standins.animatelcm_i2v(), seed=1), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="animatediff", dtype=torch.float32)
    assert _same(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="no place for an image encoder"):
        convert(tmp_path / "in.safetensors", tmp_path / "folder", to="diffusers")
    assert not (tmp_path / "folder").exists()


def test_the_embedded_model_gives_its_parts_and_takes_them_again(tmp_path):
    """Its motion module and its acceleration, as files for other tools, make it what it was."""
    convert("emoji", tmp_path / "motion.safetensors", to="animatediff")
    convert("emoji", tmp_path / "fast.safetensors", to="kohya")
    convert("emoji", tmp_path / "teacher.safetensors", to="animatediff", part="teacher")
    whole = load("emoji")
    source = ModelSource(motion=str(tmp_path / "motion.safetensors"), image_scale=0.0)
    parts = load_sum(ModelSource(**{**vars(source), "style": (str(tmp_path / "fast.safetensors"),)}))
    assert parts.schedule == whole.schedule
    assert parts.unet.motion == whole.unet.motion
    assert same_state(parts.unet.state_dict(), whole.unet.state_dict())
    teacher = load_sum(ModelSource(motion=str(tmp_path / "teacher.safetensors")))
    expected = load("emoji", teacher=True)
    assert same_state(teacher.unet.state_dict(), expected.unet.state_dict())
    settings = ("num_inference_steps", "guidance_scale", "sampler")
    assert all(getattr(teacher.facts, name) == getattr(expected.facts, name) for name in settings)


@pytest.mark.parametrize(
    ("file", "sampler", "rows"),
    [
        ("animatelcm_t2v", "lcm", None),  # known by that and its middle block
        ("mm_v2", "ddim", 32),
        ("mm_v3", "ddim", 32),
        ("mm_v1", "ddim", 24),
        ("mm_v3", "lcm", 32),  # without a middle block none is an AnimateLCM: sd-webui-animatediff would fail
        ("mm_v1", "lcm", 32),  # 24 say that spatial norms see all frames at once, as they do not here
    ],
)
def test_other_tools_know_a_models_motion_module(image_model, tmp_path, file, sampler, rows):
    """By positions and a middle block (sd-webui-animatediff's ``get_mm_type``, AnimateDiff-Evolved's versions)."""
    save_file(standins.fill(getattr(standins, file)(), torch.float16), tmp_path / "in.safetensors")
    model = with_temporal_layers(image_model, tmp_path / "in.safetensors")
    save(replace(model, facts=replace(model.facts, sampler=sampler)), tmp_path / "model")
    made = convert(tmp_path / "model", tmp_path / "out.safetensors", to="animatediff").path
    assert read_motion(made).rows == rows
    again = with_temporal_layers(image_model, made)
    assert again.unet.motion == model.unet.motion  # the header says how many frames it takes
    assert again.facts.sampler == sampler
    convert(made, tmp_path / "folder", to="diffusers")
    there = convert(tmp_path / "folder", tmp_path / "there.safetensors", to="animatediff").path
    assert _same(made, there)


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_a_lora_goes_through_the_other_layout_and_back(tmp_path, to):
    other = {"kohya": "peft", "peft": "kohya"}[to]
    convert("emoji", tmp_path / "one.safetensors", to=to, part="twemoji")
    convert(tmp_path / "one.safetensors", tmp_path / "between.safetensors", to=other)
    convert(tmp_path / "between.safetensors", tmp_path / "two.safetensors", to=to)
    assert _same(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert read_metadata(tmp_path / "two.safetensors")["modelspec.architecture"] == "animatelcm-emoji/lora"


def test_the_released_acceleration_is_known_as_stable_diffusions(tmp_path):
    shapes = standins.lcm_lora((320, 640, 1280, 1280), 768, rank=1)
    save_file(standins.fill(shapes, torch.float16), tmp_path / "in.safetensors")
    made = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="peft")
    assert read_metadata(made.path)["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert made.sha256 == sha256(made.path)
    with safe_open(made.path, "pt") as file:
        assert len(list(file.keys())) == 2 * 278


def test_a_checkpoint_becomes_a_model_folder(tmp_path):
    shapes = standins.ldm_checkpoint(text=64, layers=2)
    save_file(standins.fill(shapes, torch.float16), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "model", to="diffusers")
    one, two = load(tmp_path / "in.safetensors"), load(tmp_path / "model")
    for part, network in one.networks.items():
        assert same_state(two.networks[part].state_dict(), network.state_dict())


def test_a_few_step_model_for_diffusers_begins_with_its_scheduler(tmp_path):
    convert("emoji", tmp_path / "model", to="diffusers")
    scheduler = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    assert scheduler["original_inference_steps"] == load("emoji").schedule.solver_steps


@pytest.mark.parametrize(
    ("source", "to", "part", "said"),
    [
        ("emoji", "kohya", "watercolour", "no style 'watercolour'"),
        ("emoji", "animatediff", "twemoji", "part 'twemoji'"),
        ("lora", "bundle", "", "is a LoRA"),
        ("motion", "kohya", "", "is a motion module"),
        ("other", "kohya", "", "converts into nothing"),
    ],
)
def test_what_has_no_such_form_is_said(tmp_path, source, to, part, said):
    save_file(standins.fill(standins.mm_v2()), tmp_path / "motion")
    save_file(standins.fill(standins.lcm_lora()), tmp_path / "lora")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    for name in ("motion", "lora", "other"):
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    place = source if source == "emoji" else tmp_path / f"{source}.safetensors"
    with pytest.raises(ValueError, match=said):
        convert(place, tmp_path / "out.safetensors", to=to, part=part)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_a_lora_says_of_itself_stays_with_it(tmp_path):
    shapes = standins.lcm_lora((320, 640, 1280, 1280), 768, rank=1)
    said = {"ss_tag_frequency": "{}", "modelspec.author": "someone", "sshs_model_hash": "old"}
    save_file(standins.fill(shapes, torch.float16), tmp_path / "in.safetensors", metadata=said)
    made = read_metadata(convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="kohya").path)
    assert (made["ss_tag_frequency"], made["modelspec.author"]) == ("{}", "someone")
    assert made["sshs_model_hash"] != "old"


def test_only_a_models_folder_is_replaced(tmp_path):
    mine = tmp_path / "models" / "precious.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    save_file(standins.fill(standins.mm_v2()), tmp_path / "in.safetensors")
    for out in (mine.parent, mine):
        with pytest.raises(ValueError, match="is no model folder"):
            convert(tmp_path / "in.safetensors", out, to="diffusers")
    assert mine.read_text() == "years of work"
    convert(tmp_path / "in.safetensors", tmp_path / "adapter", to="diffusers")
    convert(tmp_path / "in.safetensors", tmp_path / "adapter", to="diffusers")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "said",
    [
        "[1]",
        "[" * 100_000,
        '{"motion": {"motion_max_seq_length": 100000000}}',
        '{"noise": {"beta_schedule": "steep"}}',
        '{"noise": {"solver_steps": true}}',
        '{"sampling": {"num_inference_steps": "many"}}',
        '{"sampling": 3}',
    ],
)
def test_a_header_that_lies_is_refused(image_model, tmp_path, said):
    save_file(standins.fill(standins.mm_v2()), tmp_path / "in.safetensors", metadata={"animatelcm": said})
    with pytest.raises(ValueError, match=r"in\.safetensors.*damaged"):
        with_temporal_layers(image_model, tmp_path / "in.safetensors")


@pytest.mark.parametrize(("source", "to"), [("emoji", "bundle"), ("emoji", "diffusers"), ("motion", "diffusers")])
def test_a_folder_is_not_named_like_a_file(tmp_path, source, to):
    save_file(standins.fill(standins.mm_v2()), tmp_path / "motion.safetensors")
    place = source if source == "emoji" else tmp_path / "motion.safetensors"
    for name in ("out.safetensors", "out.ckpt"):
        with pytest.raises(ValueError, match=f"{name} is a file's name, and this is written as a folder"):
            convert(place, tmp_path / name, to=to)
        with pytest.raises(ValueError, match=f"{name} is a file's name"):
            Fuse(out=tmp_path / name).run()
    assert [path.name for path in tmp_path.iterdir()] == ["motion.safetensors"]
    convert(place, tmp_path / "model-v1.5", to=to)


def test_a_fused_folder_says_where_its_loras_are(tmp_path):
    Fuse(out=tmp_path / "fused").run()
    for part in ("", "twemoji"):
        with pytest.raises(ValueError, match="what was fused is in its weights: --to checkpoint"):
            convert(tmp_path / "fused", tmp_path / "out.safetensors", to="kohya", part=part)


@pytest.fixture(scope="module")
def steered(steered_folder):
    return steered_folder


def test_motion_modules_and_image_encoder_go_into_one_file_and_out_of_it(steered, tmp_path):
    """As AnimateLCM's image-to-video file: by its name it is found again, bit for bit."""
    made = convert(steered, tmp_path / "i2v.safetensors", to="animatediff", part="i2v")
    encoder = load_file(steered / "adapters" / "i2v" / "diffusion_pytorch_model.safetensors")
    motion = load_file(steered / "motion_adapter" / "diffusion_pytorch_model.safetensors")
    found = read_motion(made.path)
    assert found.image_encoder.keys() == encoder.keys()
    assert all(torch.equal(value, encoder[key]) for key, value in found.image_encoder.items())
    assert all(torch.equal(value, motion[key]) for key, value in found.state.items())
    assert {key for key in read_header(made.path) if key.startswith("img_encoder.")} == {
        f"img_encoder.{key}" for key in encoder
    }
    assert identify(read_header(made.path)).image_encoder
    own, given = load(steered), load_sum(ModelSource(model=str(steered), motion=str(made.path)))
    assert list(given.adapters) == ["edge", "pose", "i2v"]
    for ours, theirs in ((own.unet, given.unet), (own.adapters["i2v"], given.adapters["i2v"])):
        after = theirs.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in ours.state_dict().items())
    assert not read_motion(convert(steered, tmp_path / "t2v.safetensors", to="animatediff").path).image_encoder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, r"has no image encoder \(adapters/i2v\)"),
        ({"_class_name": "ImageTokens"}, "another kind"),
        ({"sees": "pixels"}, "another kind"),
        ({"spread": "first"}, "another kind"),
    ],
)
def test_an_encoder_that_such_a_file_cannot_say_is_refused(steered, tmp_path, change, named):
    folder = tmp_path / "model"
    shutil.copytree(steered, folder)
    config = folder / "adapters" / "i2v" / "config.json"
    if change is None:
        shutil.rmtree(config.parent)
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        convert(folder, tmp_path / "out.safetensors", to="animatediff", part="i2v")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("to", "part"), [("animatediff", "edge"), ("bundle", "i2v"), ("diffusers", "i2v")])
def test_parts_that_do_not_go_with_a_format_are_refused(steered, tmp_path, to, part):
    with pytest.raises(ValueError, match=f"part '{part}' does not go with '{to}'"):
        convert(steered, tmp_path / "out.safetensors", to=to, part=part)


@pytest.mark.parametrize("to", ["bundle", "diffusers"])
def test_a_models_folder_keeps_its_adapters(steered, tmp_path, to):
    convert(steered, tmp_path / "out", to=to)
    for file in (steered / "adapters").rglob("*.safetensors"):
        assert _same(file, tmp_path / "out" / file.relative_to(steered))
    from diffusers import ControlNetModel, T2IAdapter

    for kind, name in ((ControlNetModel, "pose"), (T2IAdapter, "edge")):
        theirs = kind.from_pretrained(tmp_path / "out" / "adapters" / name, torch_dtype=torch.float16).state_dict()
        ours = load_file(steered / "adapters" / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
