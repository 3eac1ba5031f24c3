"""A model in one file: what CompVis' names are, read back here and by diffusers bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import standins
from animatelcm.assembly import load_sum
from animatelcm.bundle import load
from animatelcm.conversion import convert
from animatelcm.fusion import baked
from animatelcm.ldm import write_checkpoint
from animatelcm.model_source import ModelSource
from animatelcm.nets import sd15
from animatelcm.saving import save
from animatelcm.weights.files import read_header, read_metadata, sha256
from animatelcm.weights.identify import identify
from animatelcm.weights.ldm_keys import TEXT, UNET, VAE, ldm_unet, ldm_vae
from networks import same_state

WIDTH = 64
NETWORKS = (UNET, VAE, TEXT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(standins.fill(standins.ldm_checkpoint(text=WIDTH, layers=1), torch.float16, seed=5), file)
    return file


@pytest.fixture(scope="module")
def fused(base, tmp_path_factory):
    """A folder with a style, an acceleration and temporal layers added up."""
    folder = tmp_path_factory.mktemp("fused")
    save_file(standins.fill(standins.lcm_lora(text=WIDTH, rank=4), seed=6), folder / "fast.safetensors")
    save_file(standins.fill(standins.lcm_lora(text=WIDTH, rank=2), seed=7), folder / "style.safetensors")
    save_file(standins.fill(standins.animatelcm_t2v(), torch.float16, seed=8), folder / "motion.safetensors")
    loras = tuple(f"{folder / name}.safetensors:0.7" for name in ("fast", "style"))
    source = ModelSource(model=str(base), motion=str(folder / "motion.safetensors"), style=loras)
    save(baked(load_sum(source, keep=False)), folder / "model")
    return folder / "model"


def _networks(file) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(file).items() if key.startswith(NETWORKS)}


def test_a_checkpoint_through_a_folder_is_the_same_file_again(base, tmp_path):
    """Every name, shape and number but the noise's tables and the numbers of positions, which are in no network."""
    convert(base, tmp_path / "folder", to="diffusers")
    made = convert(tmp_path / "folder", tmp_path / "again.safetensors", to="checkpoint")
    expected = {key: value for key, value in _networks(base).items() if not key.endswith("position_ids")}
    assert same_state(load_file(made.path), expected)
    assert made.sha256 == sha256(made.path)
    assert read_metadata(made.path)["modelspec.architecture"] == "stable-diffusion-v1"
    kind = identify(read_header(made.path))
    assert (kind.kind, kind.layout, kind.vae, kind.text_encoder) == ("checkpoint", "ldm", True, True)


def test_a_fused_model_is_read_back_bit_for_bit(fused, tmp_path):
    made = convert(fused, tmp_path / "one.safetensors", to="checkpoint")
    assert "without temporal layers (--to animatediff)" in made.kind
    one, two = load(made.path, dtype=torch.float16), load(fused, dtype=torch.float16)
    for part, network in two.networks.items():
        spatial = {name: value for name, value in network.state_dict().items() if "motion_modules" not in name}
        assert same_state(one.networks[part].state_dict(), spatial)
    assert {info.dtype for info in read_header(made.path).values()} == {"F16"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["edge"], ", adapters (in adapters/)"),
        (["i2v"], ", image encoder (--to animatediff --part i2v)"),
        (["edge", "i2v"], ", image encoder (--to animatediff --part i2v), adapters (in adapters/)"),
    ],
)
def test_adapters_that_are_left_out_are_named(fused, tmp_path, names, said):
    shutil.copytree(fused, tmp_path / "model")
    for name in names:
        (tmp_path / "model" / "adapters" / name).mkdir(parents=True)
        (tmp_path / "model" / "adapters" / name / "config.json").write_text("{}")
    made = convert(tmp_path / "model", tmp_path / "one.safetensors", to="checkpoint")
    assert made.kind.endswith(f"without temporal layers (--to animatediff){said}")


def test_diffusers_reads_it_as_the_folder(fused, tmp_path):
    made = convert(fused, tmp_path / "one.safetensors", to="checkpoint", dtype=torch.float32)
    folder = StableDiffusionPipeline.from_pretrained(fused, torch_dtype=torch.float32)
    file = StableDiffusionPipeline.from_single_file(str(made.path), config=str(fused), torch_dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        assert same_state(getattr(file, part).state_dict(), getattr(folder, part).state_dict())


def test_names_of_the_published_sizes_are_compvis_own():
    """As tables that know neither diffusers' names nor this code."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(cross_attention_dim=768), AutoencoderKL(**sd15.VAE)
    assert {ldm_unet(name): tuple(value.shape) for name, value in unet.state_dict().items()} == standins.ldm_unet(
        standins.SD15, standins.TEXT
    )
    assert {ldm_vae(name) for name in vae.state_dict()} == standins.ldm_vae(standins.VAE).keys()


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("unet", {"attention_head_dim": 4}, "unet has attention_head_dim=4"),
        ("vae", {"scaling_factor": 0.5}, "vae has scaling_factor=0.5"),
        ("text_encoder", {"hidden_act": "gelu"}, "text_encoder has hidden_act='gelu'"),
        ("text_encoder", {"num_attention_heads": 2}, "num_attention_heads=2"),
    ],
)
def test_what_no_tensor_shows_is_not_lost_in_silence(base, tmp_path, part, change, named):
    model = load(base)
    network = model.networks[part]
    network.config = replace(network.config, **change)
    with pytest.raises(ValueError, match=named):
        write_checkpoint(model, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "options", "named"),
    [
        ("one.ckpt", {}, "written as .safetensors"),
        ("one.safetensors", {"part": "style"}, "part 'style' does not go with 'checkpoint'"),
        ("one.safetensors", {}, "unet has in_channels=16"),
    ],
)
def test_what_has_no_form_in_one_file_is_said(tmp_path, out, options, named):
    with pytest.raises(ValueError, match=named):
        convert("emoji", tmp_path / out, to="checkpoint", **options)
    assert not list(tmp_path.iterdir())
