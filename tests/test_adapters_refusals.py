"""Files that are given as an adapter and cannot be one: a sentence that begins with the file, before much is built."""

from __future__ import annotations

import time

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file

import control_files
import standins
from animatelcm.adapters import Beside, read, read_file
from animatelcm.nets.unet import UNetConfig
from standins import SD15, SMALL, fill
from weight_files import SLOW, memory

TEXT = 64
BESIDE = Beside(UNetConfig(block_out_channels=SMALL, cross_attention_dim=TEXT), 4, 8)
CONTROL = {"block_out_channels": SMALL, "cross_attention_dim": TEXT}


@pytest.fixture(scope="module")
def controlnet():
    return fill(control_files.controlnet(text=TEXT))


@pytest.fixture(scope="module")
def t2i():
    return fill(control_files.t2i_adapter())


def refusal(state, path, name: str = "canny") -> str:
    """What is said of a file with these tensors."""
    standins.write(state, path)
    begun = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is returned
        read_file(path, name, BESIDE, torch.float32)
    assert time.monotonic() - begun < SLOW
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text) - len(str(path)) < 300
    return text.removeprefix(str(path))


def empty(*shape: int) -> torch.Tensor:
    """A shape that claims much and holds nothing."""
    return torch.empty(*shape)


# Other kinds, and other architectures

XS = {"control_to_base_for_conv_in.weight": (3,), "controlnet_cond_embedding.conv_in.weight": (1,)}
SPARSE = {"controlnet_cond_embedding.weight": (3,)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (standins.ldm_checkpoint, "Checkpoint (LDM keys, "),
        (standins.ldm_unet, "UNet (LDM keys, "),
        (standins.unet, "UNet (diffusers keys, "),
        (lambda: standins.lcm_lora(rank=4), "LoRA (kohya keys, "),
        (standins.ldm_vae, "Autoencoder (LDM keys, "),
        (
            lambda: {"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)},
            "Weights of an unknown kind (",
        ),
        (lambda: control_files.controlnet(text=1024), "Stable Diffusion 2 ControlNet ("),
        (lambda: control_files.controlnet(text=2048), "Stable Diffusion XL ControlNet ("),
        (lambda: control_files.t2i_adapter(cell=16), "Stable Diffusion XL T2I-Adapter ("),
        (
            lambda: {"input_hint_block.0.weight": (16, 3, 3, 3), "input_blocks.1.0.in_layers.2.down": (4, 32)},
            "Control-LoRA",
        ),
        (lambda: control_files.controlnet() | {"difference": (1,)}, "ControlNet as a difference from its base ("),
        (lambda: XS, "ControlNet-XS ("),
        (lambda: SPARSE | standins.motion(mid=False, rows=32), "SparseCtrl ("),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_no_such_adapter_is_said_with_what_is_expected(shapes, said, suffix, tmp_path):
    text = refusal(fill(shapes(), torch.float16), tmp_path / f"x{suffix}")
    assert text.startswith(f" is {said}")
    assert "--adapter canny=FILE takes a ControlNet or T2I-Adapter of Stable Diffusion 1.x; give one" in text


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (lambda: control_files.controlnet((32, 64, 64, 64), TEXT), "block_out_channels=(32, 64, 64, 64)"),
        (lambda: control_files.controlnet((32, 64, 128), TEXT), "block_out_channels=(32, 64, 128)"),
        (lambda: control_files.controlnet(text=32), "cross_attention_dim=32, and this model needs 64"),
        (lambda: control_files.t2i_adapter((32, 64, 64, 64)), "channels=(32, 64, 64, 64)"),
        (lambda: control_files.light_adapter((32, 64, 64, 64)), "channels=(32, 64, 64)"),
        (lambda: control_files.t2i_adapter(seen=5), "in_channels=5, and this model needs 3 or 1"),
        (lambda: control_files.t2i_adapter(cell=4), "takes 48 channels, and a T2I-Adapter's for this model 64 or 192"),
    ],
)
def test_other_widths_than_the_models_are_named(shapes, named, tmp_path):
    assert named in refusal(fill(shapes()), tmp_path / "x.safetensors")


def test_a_published_size_beside_a_small_model_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "animatelcm.adapters.read_header", lambda _: standins.header(control_files.controlnet(SD15, TEXT))
    )
    monkeypatch.setattr("animatelcm.adapters.read_state", lambda *_: pytest.fail("read"))
    assert "block_out_channels=(320, 640, 1280, 1280)" in refusal({"x": torch.ones(1)}, tmp_path / "x.safetensors")


# Damage


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("time_embed.0.weight", "time_embedding.linear_1.weight"),
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ("input_blocks.2.1.transformer_blocks.0.attn1.to_v.weight", "down_blocks.0.attentions.1.transformer_blocks.0"),
        ("input_blocks.6.0.op.bias", "down_blocks.1.downsamplers.0.conv.bias"),
        ("input_hint_block.6.weight", "controlnet_cond_embedding.blocks.2.weight"),
        ("input_hint_block.14.bias", "controlnet_cond_embedding.conv_out.bias"),
        ("zero_convs.11.0.weight", "controlnet_down_blocks.11.weight"),
        ("middle_block.1.norm.bias", "mid_block.attentions.0.norm.bias"),
        ("middle_block_out.0.bias", "controlnet_mid_block.bias"),
    ],
)
def test_a_tensor_that_a_controlnet_lacks_is_named(controlnet, tmp_path, key, named):
    state = {name: value for name, value in controlnet.items() if name != f"control_model.{key}"}
    assert len(state) == 339
    text = refusal(state, tmp_path / "x.safetensors")
    assert f": {named}" in text
    assert "is missing" in text


@pytest.mark.parametrize("key", ["conv_in.bias", "body.0.block2.bias", "body.2.in_conv.weight", "body.7.block1.weight"])
def test_a_tensor_that_an_adapter_lacks_is_named(t2i, tmp_path, key):
    text = refusal({name: value for name, value in t2i.items() if name != key}, tmp_path / "x.pth")
    assert key.rpartition(".")[2] in text
    assert f"{key.split('.')[-2]}." in text
    assert "is missing" in text


def test_a_tensor_more_or_of_another_kind_is_named(controlnet, t2i, tmp_path):
    path = tmp_path / "x.safetensors"
    assert "control_model.guess.weight is for no layer" in refusal(
        controlnet | {"control_model.guess.weight": torch.ones(2)}, path
    )
    assert "adapter.body.1.resnets.1.in_conv.weight is for no layer" in refusal(
        t2i | {"body.3.in_conv.weight": torch.ones(64, 64, 1, 1)}, path
    )
    way_up = controlnet | {"control_model.output_blocks.0.1.conv.weight": torch.ones(2)}
    assert "is incomplete or of another family" in refusal(way_up, path)
    key = "control_model.zero_convs.0.0.weight"
    assert "controlnet_down_blocks.0.weight is (32, 32, 3, 3)" in refusal(
        controlnet | {key: torch.ones(32, 32, 3, 3)}, path
    )
    spoilt = controlnet | {key: torch.full((32, 32, 1, 1), torch.nan)}
    assert "controlnet_down_blocks.0.weight holds numbers that are not finite" in refusal(spoilt, path)
    assert f"{key} holds I64 numbers" in refusal(controlnet | {key: torch.ones(32, 32, 1, 1, dtype=torch.int64)}, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_a_sentence(t2i, tmp_path, suffix, share):
    whole = standins.write(t2i, tmp_path / f"whole{suffix}")
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^{path} (is cut short|is damaged)"):
        read_file(path, "canny", BESIDE, torch.float32)


# Sizes without end

HINT = "control_model.input_hint_block"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({f"{HINT}.0.weight": empty(10**9, 3, 0, 3)}, "encoder of maps"),
        ({f"{HINT}.0.weight": empty(16, 10**12, 0, 3)}, "conditioning_channels=1000000000000"),
        ({f"{HINT}.4.weight": empty(10**9, 16, 0, 3)}, "encoder of maps"),
        ({"control_model.input_blocks.0.0.weight": empty(32, 10**12, 0, 3)}, "in_channels=1000000000000"),
        ({"control_model.input_blocks.1.0.in_layers.2.weight": empty(10**12, 0, 3, 3)}, "block_out_channels="),
        ({f"control_model.input_blocks.{i}.0.x": empty(0) for i in range(1600)}, "is for no layer of a ControlNet"),
        ({f"control_model.input_blocks.{i}.0.x": empty(0) for i in range(9000)}, "has 9340 tensors"),
    ],
)
def test_a_small_file_cannot_ask_for_much(controlnet, tmp_path, more, named):
    refusal(controlnet | more, tmp_path / "first.safetensors")  # what is imported does not count
    with memory(2**28):
        assert named in refusal(controlnet | more, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"conv_in.weight": empty(32, 64 * 10**12, 0, 3)}, "in_channels=1000000000000"),
        ({"body.0.block1.weight": empty(10**12, 0, 3, 3)}, "channels="),
        ({f"body.{i}.block1.weight": empty(32, 0, 3, 3) for i in range(8, 100)}, "channels="),
        ({f"body.{i}.x": empty(0) for i in range(9000)}, "has 9038 tensors"),
    ],
)
def test_a_small_adapter_cannot_ask_for_much(t2i, tmp_path, more, named):
    assert named in refusal(t2i | more, tmp_path / "x.safetensors")


def test_a_light_adapter_cannot_ask_for_many_layers(tmp_path):
    state = fill(control_files.light_adapter())
    state |= {f"body.0.body.{j}.block1.weight": empty(8, 8, 0, 3) for j in range(400)}
    assert "num_res_blocks=400, and this model needs 1 or 2 or 3 or 4" in refusal(state, tmp_path / "x.safetensors")


@pytest.mark.parametrize("network", [ControlNetModel(**CONTROL), T2IAdapter(channels=list(SMALL))])
def test_a_file_of_diffusers_lacks_a_key_by_its_own_name(network, tmp_path):
    for i, key in enumerate(list(network.state_dict())[::40]):
        state = {name: value for name, value in network.state_dict().items() if name != key}
        save_file(state, tmp_path / f"{i}.safetensors")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{i}\.safetensors: {key} is missing"):
            read_file(tmp_path / f"{i}.safetensors", "canny", BESIDE, torch.float32)


def test_a_folder_without_settings_says_how_its_files_go_in(t2i, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json.*OWNER/NAME/FILE"):
        read(tmp_path, "canny", BESIDE, torch.float32)
    standins.write(t2i, tmp_path / "t2iadapter_canny.pth")
    with pytest.raises(ValueError, match=r"name one of its files, canny=.*/t2iadapter_canny\.pth"):
        read(tmp_path, "canny", BESIDE, torch.float32)
