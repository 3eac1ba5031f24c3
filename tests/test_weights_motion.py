"""Motion modules as they are published, in every container: read bit for bit, and as diffusers reads them."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding

import standins
from animatelcm.nets.motion import MotionConfig, sinusoid
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.keys import Structure, motion_shapes
from animatelcm.weights.motion import MotionFile, config, read_motion
from motion_files import PE, SMALL, TINY, adapter_folder, expected, same_bits

FILES = {
    # file: positions, mid block, image encoder
    standins.mm_v1: (24, False, False),
    standins.mm_v2: (32, True, False),
    standins.mm_v3: (32, False, False),
    standins.animatelcm_t2v: (None, True, False),
    standins.animatelcm_i2v: (None, True, True),
}


@pytest.mark.parametrize("container", ["x.ckpt", "trained.ckpt", "beside.pth", "x.safetensors", "half.safetensors"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_published_files_in_every_container(file, container, tmp_path):
    state = standins.fill(file(SMALL), torch.float16 if container == "half.safetensors" else torch.float32)
    content = dict(state)
    if container == "trained.ckpt":
        content |= {"down_blocks.0.resnets.0.conv1.weight": torch.ones(2), "conv_in.weight": torch.ones(3)}
        content = standins.training_checkpoint(content)
    if container == "beside.pth":
        content["animatediff_config"] = {"motion_module_type": "Vanilla"}
    found = read_motion(standins.write(content, tmp_path / container))
    weights, encoder = expected(state)
    assert same_bits(found.state, weights)
    assert same_bits(found.image_encoder, encoder)
    assert (found.rows, found.mid_block, bool(found.image_encoder)) == FILES[file]
    assert (found.channels, found.layers, found.layout) == (SMALL, 2, "animatediff")


def test_diffusers_converts_to_the_same_bits_and_our_network_takes_them(tmp_path):
    state = standins.fill(standins.mm_v2(SMALL))
    path = standins.write(state, tmp_path / "mm.ckpt")
    MotionAdapter(block_out_channels=SMALL).save_config(tmp_path / "config")
    theirs = MotionAdapter.from_single_file(str(path), config=str(tmp_path / "config"))

    found = read_motion(path)
    unet_config = UNetConfig(block_out_channels=SMALL, cross_attention_dim=8)
    unet = VideoUNet(unet_config, MotionConfig.from_diffusers(config(found)))
    missing, unexpected = unet.load_state_dict(found.state, strict=False)
    assert not unexpected
    assert not [key for key in missing if "motion_modules" in key]

    loaded = {key: value for key, value in unet.state_dict().items() if "motion_modules" in key}
    by_adapter = {key: value for key, value in theirs.state_dict().items() if not key.endswith(".pe")}
    assert same_bits(loaded, by_adapter)
    image = UNet2DConditionModel(block_out_channels=SMALL, cross_attention_dim=8)
    whole = UNetMotionModel.from_unet2d(image, theirs).state_dict()
    by_network = {key: value for key, value in whole.items() if "motion_modules" in key and not key.endswith(".pe")}
    assert same_bits(loaded, by_network)
    for key, positions in unet.positions().items():
        torch.testing.assert_close(positions, theirs.state_dict()[key])


@pytest.mark.parametrize(
    ("saved", "settings"),
    [
        ({}, {}),
        ({"variant": "fp16"}, {"motion_max_seq_length": 24, "use_motion_mid_block": False}),
        ({"safe_serialization": False}, {"motion_num_attention_heads": 4, "motion_norm_num_groups": 16}),
    ],
)
def test_folders_of_a_motion_adapter(saved, settings, tmp_path):
    adapter = MotionAdapter(block_out_channels=SMALL, **settings)
    adapter.to(torch.float16 if saved.get("variant") else torch.float32).save_pretrained(tmp_path, **saved)
    weights = {key: value for key, value in adapter.state_dict().items() if not key.endswith(".pe")}
    for path in (tmp_path, next(file for file in tmp_path.iterdir() if file.suffix != ".json")):
        found = read_motion(path)
        assert same_bits(found.state, weights)
        assert (found.layout, found.rows) == ("diffusers", settings.get("motion_max_seq_length", 32))
        assert found.mid_block == settings.get("use_motion_mid_block", True)
    made = MotionConfig.from_diffusers(config(read_motion(tmp_path)))
    assert made == MotionConfig.from_diffusers(dict(adapter.config))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_any_number_of_layers(layers, depth, tmp_path):
    adapter = MotionAdapter(
        block_out_channels=TINY,
        motion_layers_per_block=layers,
        motion_transformer_layers_per_block=depth,
        motion_transformer_layers_per_mid_block=depth,
    )
    adapter.save_pretrained(tmp_path)
    found = read_motion(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.structure == (TINY, layers, True, depth)
    assert MotionConfig.from_diffusers(config(found)).layers == depth


@pytest.mark.parametrize(("rows", "frames"), [(None, 64), (24, 24), (32, 32)])
def test_files_that_say_nothing_are_animatediff_s(rows, frames, tmp_path):
    path = standins.write(standins.fill(standins.motion(TINY, mid=False, rows=rows)), tmp_path / "x.ckpt")
    made = MotionConfig.from_diffusers(config(read_motion(path)))
    assert made == MotionConfig(
        num_attention_heads=8, norm="per_frame", norm_num_groups=32, use_mid_block=False, max_frames=frames
    )


@pytest.mark.parametrize(("said", "norm"), [({}, "per_frame"), ({"motion_norm": "joint"}, "joint")])
def test_what_a_folder_says_of_its_norm_comes_first(said, norm, tmp_path):
    adapter_folder(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | said))
    assert MotionConfig.from_diffusers(config(read_motion(tmp_path))).norm == norm


@pytest.mark.parametrize("rows", [24, 64])
@pytest.mark.parametrize("channels", [32, 320])
def test_positions_are_the_sinusoid_of_diffusers_and_of_the_formula(rows, channels):
    torch.testing.assert_close(sinusoid(rows, channels), SinusoidalPositionalEmbedding(channels, rows).pe[0])
    torch.testing.assert_close(sinusoid(rows, channels).double(), standins.waves(rows, channels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rounded", [torch.float32, torch.float16])
def test_positions_may_be_rounded(stored, rounded, tmp_path):
    state = standins.fill(standins.mm_v1(TINY), rounded)
    path = standins.write({key: value.to(stored) for key, value in state.items()}, tmp_path / "x.safetensors")
    assert read_motion(path).rows == 24


def one_row_on(pe: torch.Tensor) -> torch.Tensor:
    return pe.roll(1, dims=1)


@pytest.mark.parametrize(
    "change",
    [one_row_on, lambda pe: pe + 0.01, lambda pe: pe[..., torch.arange(pe.shape[-1]) ^ 1], lambda pe: pe * torch.nan],
    ids=["one row on", "trained", "cosines first", "NaN"],
)
def test_other_positions_are_not_read(change, tmp_path):
    state = standins.fill(standins.mm_v2(TINY))
    for key in state:
        state[key] = change(state[key]) if key.endswith(".pe") else state[key]
    path = standins.write(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not the sinusoid") as caught:
        read_motion(path)
    assert str(caught.value).startswith(f"{path}: {PE}")


def test_our_network_at_full_width_has_these_weights():
    structure = Structure(standins.SD15, 2, True)
    found = MotionFile(state={}, structure=structure, layout="animatediff", rows=None)
    made = MotionConfig.from_diffusers(config(found))
    assert made.max_frames == 64
    with torch.device("meta"):
        unet = VideoUNet(UNetConfig(cross_attention_dim=768), made)
    theirs = {key: tuple(value.shape) for key, value in unet.state_dict().items() if "motion_modules" in key}
    assert theirs == motion_shapes(structure)
