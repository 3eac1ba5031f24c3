"""ControlNets and T2I-Adapters from one file beside a Stable Diffusion 1.x, against diffusers on the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file
from torch import Tensor

import control_files
import standins
from animatelcm.adapters import Beside, read_file
from animatelcm.assembly import load_sum
from animatelcm.bundle import load
from animatelcm.inspection import describe
from animatelcm.ldm import read_checkpoint
from animatelcm.model_source import ModelSource
from animatelcm.nets.adapters import control_hints, t2i_hints
from animatelcm.nets.unet import UNetConfig
from animatelcm.saving import save
from standins import SMALL, fill

TEXT = 64
BESIDE = Beside(UNetConfig(block_out_channels=SMALL, cross_attention_dim=TEXT), 4, 8)
CONTROL = {"block_out_channels": SMALL, "cross_attention_dim": TEXT}


def read(path: Path, name: str = "canny", beside: Beside = BESIDE, dtype: torch.dtype = torch.float32):
    return read_file(path, name, beside, dtype)


def lively(shapes: standins.Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Numbers that keep their size from layer to layer, so that every layer shows in what comes out."""
    state = fill(shapes, seed=seed)
    return {key: value * 50 / max(1, value[0].numel()) ** 0.5 for key, value in state.items()}


@pytest.fixture(scope="module")
def state():
    return lively(control_files.controlnet(text=TEXT))


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("control") / "control_v11p_sd15_canny.safetensors"
    save_file(state, path)
    return path


def same(ours, theirs) -> bool:
    found, wanted = ours.state_dict(), theirs.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(value, found[key]) for key, value in wanted.items())


def hints(network):
    source = torch.Generator().manual_seed(1)
    x, maps = (torch.randn(1, c, 2, s, s, generator=source) for c, s in ((4, 8), (3, 64)))
    text = torch.randn(1, 5, TEXT, generator=source)
    with torch.no_grad():
        found = control_hints(network, x, torch.tensor([500]), text, maps.sigmoid())
    return [*found.skip_residuals, found.mid_residual]


# ControlNets


def test_a_controlnet_of_its_authors_is_the_one_that_diffusers_makes_of_it(file, tmp_path):
    ControlNetModel(**CONTROL).save_config(tmp_path)
    theirs = ControlNetModel.from_single_file(str(file), config=str(tmp_path), torch_dtype=torch.float32)
    ours = read(file)
    assert same(ours, theirs)
    said = {key: tuple(v) if isinstance(v, list) else v for key, v in theirs.config.items() if not key.startswith("_")}
    assert {key: ours.config[key] for key in said} == said
    for one, two in zip(hints(ours), hints(theirs.eval()), strict=True):
        assert torch.allclose(one, two, atol=1e-5 * two.abs().max())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("spelling", ["x.pth", "old.pth", "x.ckpt", "bare.safetensors", "half.safetensors"])
def test_containers_prefixes_and_types_are_one_network(file, state, tmp_path, spelling):
    bare = {key.removeprefix("control_model."): value for key, value in state.items()}
    half = {key: value.half() for key, value in state.items()}
    path, content = tmp_path / spelling, {"bare": bare, "half": half, "x": state, "old": bare}[spelling.split(".")[0]]
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        whole = {"state_dict": content, "global_step": 3} if path.suffix == ".ckpt" else content
        torch.save(whole, path, _use_new_zipfile_serialization=spelling != "old.pth")
    dtype = torch.float16 if "half" in spelling else torch.float32
    assert same(read(path, dtype=dtype), read(file, dtype=dtype))


def test_a_way_down_has_the_names_of_the_unet_that_it_was_copied_from(tmp_path):
    base = fill(standins.ldm_checkpoint(text=TEXT, layers=1), seed=4)
    save_file(base, tmp_path / "base.safetensors")
    own = fill(control_files.controlnet(text=TEXT), seed=5)
    copied = {key: base.get(key.replace("control_model", "model.diffusion_model"), value) for key, value in own.items()}
    save_file(copied, tmp_path / "canny.safetensors")
    unet = read_checkpoint(tmp_path / "base.safetensors").unet
    found = read(tmp_path / "canny.safetensors").state_dict()
    shared = [key for key in found if not key.startswith("controlnet_")]
    assert len(shared) == len(found) - 2 * (12 + 1 + 8)
    assert all(torch.equal(found[key], unet[key]) for key in shared)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_file_of_diffusers_needs_no_config(tmp_path, name):
    torch.manual_seed(0)
    network = ControlNetModel(**CONTROL, conditioning_embedding_out_channels=(8, 16, 16, 24))
    network.save_pretrained(tmp_path, variant="fp16" if "fp16" in name else None)
    (tmp_path / "config.json").unlink()
    ours = read(tmp_path / name)
    assert same(ours, network)
    assert ours.config.conditioning_embedding_out_channels == (8, 16, 16, 24)


def test_a_config_beside_a_file_of_diffusers_is_believed(tmp_path):
    ControlNetModel(**CONTROL, global_pool_conditions=True).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert read(file).config.global_pool_conditions
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 10**9}))
    with pytest.raises(ValueError, match="layers_per_block=1000000000"):
        read(file)
    file.rename(tmp_path / "control.safetensors")  # of any other name it is not the folder's
    assert not read(tmp_path / "control.safetensors").config.global_pool_conditions


def test_what_shapes_do_not_say_is_the_models(tmp_path):
    unet = UNetConfig(
        block_out_channels=(32, 48), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
        norm_num_groups=16, norm_eps=1e-6, layers_per_block=1,
    )  # fmt: skip
    settings = {key: getattr(unet, key) for key in ("block_out_channels", "down_block_types", "cross_attention_dim")}
    settings |= {key: getattr(unet, key) for key in ("attention_head_dim", "norm_num_groups", "norm_eps")}
    network = ControlNetModel(**settings, layers_per_block=1, conditioning_embedding_out_channels=(8, 16, 16))
    save_file(network.state_dict(), tmp_path / "pose.safetensors")
    ours = read(tmp_path / "pose.safetensors", "pose", Beside(unet, 4, 4))
    assert same(ours, network)
    assert {key: ours.config[key] for key in settings} == settings


def test_a_shuffle_controlnet_is_known_by_its_name(file, state, tmp_path):
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    save_file(state, path)
    pooled, whole = hints(read(path, "shuffle")), hints(read(file))
    assert all(torch.allclose(p, w.mean((3, 4), keepdim=True), atol=1e-4) for p, w in zip(pooled, whole, strict=True))
    assert any(w.std((3, 4)).max() > 0.1 for w in whole)


# T2I-Adapters

FULL = {
    "adapter.conv_in": "conv_in",
    "adapter.body.0.resnets.0": "body.0",
    "adapter.body.0.resnets.1": "body.1",
    "adapter.body.1.in_conv": "body.2.in_conv",
    "adapter.body.1.resnets.0": "body.2",
    "adapter.body.1.resnets.1": "body.3",
    "adapter.body.2.in_conv": "body.4.in_conv",
    "adapter.body.2.resnets.0": "body.4",
    "adapter.body.2.resnets.1": "body.5",
    "adapter.body.3.resnets.0": "body.6",
    "adapter.body.3.resnets.1": "body.7",
}
LIGHT = {f"adapter.body.{i}.{part}": f"body.{i}.{part}" for i in range(4) for part in ("in_conv", "out_conv")}
LIGHT |= {f"adapter.body.{i}.resnets.{j}": f"body.{i}.body.{j}" for i in range(4) for j in range(4)}


def renamed(state: dict[str, Tensor], words: dict[str, str]) -> dict[str, Tensor]:
    """In diffusers' names."""
    stems = {key: key.partition(".block")[0] if ".block" in key else key.rpartition(".")[0] for key in state}
    back = {theirs: ours for ours, theirs in words.items()}
    return {back[stems[key]] + key.removeprefix(stems[key]): value for key, value in state.items()}


def conv(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def block(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    return x + conv(state, F.relu(conv(state, x, f"{name}.block1")), f"{name}.block2")


def full_features(state: dict[str, Tensor], maps: Tensor) -> list[Tensor]:
    """What T2I-Adapter's authors compute with their names, for SD 1.x: maps (N, C, H, W) -> a level's features each."""
    x, found = conv(state, F.pixel_unshuffle(maps, 8), "conv_in"), []
    for i in range(8):
        x = F.avg_pool2d(x, 2) if i in (2, 4, 6) else x
        x = conv(state, x, f"body.{i}.in_conv") if f"body.{i}.in_conv.weight" in state else x
        x = block(state, x, f"body.{i}")
        found += [x] if i % 2 else []
    return found


def light_features(state: dict[str, Tensor], maps: Tensor) -> list[Tensor]:
    """The same of a light one."""
    x, found = F.pixel_unshuffle(maps, 8), []
    for i in range(4):
        x = conv(state, F.avg_pool2d(x, 2) if i else x, f"body.{i}.in_conv")
        for j in range(4):
            x = block(state, x, f"body.{i}.body.{j}")
        x = conv(state, x, f"body.{i}.out_conv")
        found.append(x)
    return found


@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("kind", ["full", "light"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_adapter_of_its_authors_computes_what_they_compute(tmp_path, kind, seen, suffix):
    shapes = (control_files.t2i_adapter if kind == "full" else control_files.light_adapter)(seen=seen)
    state = lively(shapes, seed=7)
    ours = read(standins.write(state, tmp_path / f"t2iadapter_canny_sd15v2{suffix}"))
    maps = torch.rand(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(2))
    flat = maps[0].transpose(0, 1)
    theirs = (full_features if kind == "full" else light_features)(state, flat if seen == 3 else flat.mean(1, True))
    with torch.no_grad():
        features = t2i_hints(ours, maps).features
    assert [feature.shape[1] for feature in features] == list(SMALL)
    for feature, their in zip(features, theirs, strict=True):
        assert torch.allclose(feature[0].transpose(0, 1), their, atol=1e-3 * their.abs().max())
    channels = SMALL if kind == "full" else SMALL[:3]
    settings = {"num_res_blocks": 2} if kind == "full" else {"num_res_blocks": 4, "adapter_type": "light_adapter"}
    network = T2IAdapter(in_channels=seen, channels=channels, **settings)
    network.load_state_dict(renamed(state, FULL if kind == "full" else LIGHT))
    assert same(ours, network)
    network.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert same(read(tmp_path / "bare" / "diffusion_pytorch_model.safetensors"), network)


def test_a_light_adapter_needs_two_last_levels_of_one_width(tmp_path):
    save_file(fill(control_files.light_adapter((32, 64, 64))), tmp_path / "light.safetensors")
    settings = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    fits, other = (
        Beside(UNetConfig(block_out_channels=widths, cross_attention_dim=TEXT, **settings), 4, 8)
        for widths in ((32, 64, 64), (32, 64, 96))
    )
    assert read(tmp_path / "light.safetensors", beside=fits).config.channels == (32, 64)
    with pytest.raises(ValueError, match="adapter_type='light_adapter', and this model needs 'full_adapter'"):
        read(tmp_path / "light.safetensors", beside=other)


# Beside a model


def test_files_stand_beside_a_checkpoint(file, tmp_path):
    base = standins.write(fill(standins.ldm_checkpoint(text=TEXT, layers=1), seed=1), tmp_path / "base.safetensors")
    t2i = standins.write(fill(control_files.t2i_adapter(), seed=2), tmp_path / "t2iadapter_sketch_sd14v1.pth")
    model = load_sum(ModelSource(model=str(base), adapter=(f"canny={file}", f"edge={t2i}")))
    assert {name: type(network).__name__ for name, network in model.adapters.items()} == {
        "canny": "ControlNetModel",
        "edge": "T2IAdapter",
    }
    assert same(model.adapters["canny"], read(file))
    save(model, tmp_path / "model", dtype=torch.float32)  # there they are diffusers' folders
    again = load(tmp_path / "model")
    for name, network in model.adapters.items():
        assert same(again.adapters[name], network)
    with pytest.raises(ValueError, match=r"canny.* is a ControlNetModel, which 'i2v' does not name"):
        load_sum(ModelSource(model=str(base), adapter=(f"i2v={file}",)))
    with pytest.raises(ValueError, match=r"base\.safetensors is Checkpoint .* --adapter canny=FILE takes a ControlNet"):
        load_sum(ModelSource(model=str(base), adapter=(f"canny={base}",)))
    assert "goes in as --adapter" in describe(file)["kind"]
