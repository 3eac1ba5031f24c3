"""What is wrong with a file or a folder of motion modules is named in a sentence, before it costs memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import standins
from animatelcm.nets.motion import MotionConfig
from animatelcm.weights.motion import config, read_motion
from motion_files import OURS, PE, TINY, Q, adapter_folder

LAST = "up_blocks.1.motion_modules.2.temporal_transformer.proj_out.bias"


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({Q: None}, Q, "is missing"),
        ({LAST: None}, LAST, "is missing"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": None}, None, "is missing"),
        ({"up_blocks.2.motion_modules.0.temporal_transformer.norm.weight": torch.ones(32)}, None, "no part of"),
        ({"mid_block.motion_modules.0.temporal_transformer.norm.scale": torch.ones(64)}, None, "no part of"),
        ({"motion.motion_modules.0.norm": torch.ones(64)}, None, "no part of"),
        ({Q: torch.ones(32, 64)}, Q, r"\(32, 64\), expected \(32, 32\)"),
        ({Q: torch.ones(32, 32, 1, 1)}, Q, r"expected \(32, 32\)"),
        ({Q: torch.full((32, 32), torch.nan)}, Q, "not finite"),
        ({LAST: torch.full((32,), torch.inf).half()}, LAST, "not finite"),
        ({Q: torch.ones(32, 32, dtype=torch.int8)}, Q, "torch.int8"),
        ({Q: torch.ones(32, 32).to(torch.float8_e4m3fn)}, Q, "float8"),
        ({f"{OURS}.attn1.to_q.weight": torch.ones(32, 32)}, None, "second tensor"),
        ({PE: torch.ones(1, 24, 32)}, None, "the same rows for all|not the sinusoid"),
        ({PE: torch.ones(24)}, None, r"expected \(1, rows, 32\)"),
        ({PE: torch.ones(1, 0, 32)}, PE, r"expected \(1, rows, 32\)"),
        ({f"{OURS}.attn7.pos_encoder.pe": torch.ones(1, 32, 32)}, None, "no positions there"),
        ({PE: None, PE.replace("blocks.0.pos", "blocks.1.pos"): None}, None, f"{OURS}.pos_embed.pe is missing"),
        ({"img_encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}, "img_encoder.body.0.block1.bias", "is missing"),
        ({"img_encoder.conv_in.weight": torch.ones(2)}, "img_encoder.body.0.block1.bias", "is missing"),
        ({"img_encoder.body.9.weight": torch.ones(2)}, "img_encoder.body.0.block1.bias", "is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(changes, key, reason, tmp_path):
    state = standins.fill(standins.mm_v2(TINY)) | changes
    path = standins.write({name: value for name, value in state.items() if value is not None}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=reason) as caught:
        read_motion(path)
    assert str(caught.value).startswith(f"{path}: {key or ''}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "down_blocks.8.motion_modules.0.temporal_transformer.norm.weight",
        "down_blocks.0.motion_modules.8.temporal_transformer.norm.weight",
        "up_blocks.0.motion_modules.9.temporal_transformer.norm.weight",
        "up_blocks.08.motion_modules.0.temporal_transformer.norm.weight",
        f"mid_block.motion_modules.{'9' * 50}.temporal_transformer.norm.weight",
        Q.replace("transformer_blocks.0", "transformer_blocks.8"),
    ],
)
def test_numbers_of_blocks_and_modules_have_bounds(key, tmp_path):
    """All that a file should hold is listed from these numbers, whose product has no bound of its own."""
    others = [key.replace("8", f"9{i}") for i in range(3)]
    state = standins.fill(standins.mm_v2(TINY)) | dict.fromkeys((key, *others), torch.ones(32))
    path = standins.write(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="beyond the 8 levels") as caught:
        read_motion(path)
    assert str(caught.value).startswith(f"{path}: {key} ")


def test_eight_levels_and_nine_modules_are_in_bounds(tmp_path):
    state = standins.fill(standins.motion((32,) * 8, layers=8))
    assert read_motion(standins.write(state, tmp_path / "x.ckpt")).structure == ((32,) * 8, 8, True, 1)


@pytest.mark.parametrize("width", [0, 16_385])
def test_channels_have_bounds(width, tmp_path):
    key = "down_blocks.1.motion_modules.0.temporal_transformer.norm.weight"
    path = standins.write(standins.fill(standins.mm_v2(TINY)) | {key: torch.ones(width)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"{key} is for {width} channels, expected 1 to 16384"):
        read_motion(path)


@pytest.mark.parametrize("latent", [0, 16_385])
def test_an_image_encoder_s_latents_have_bounds(latent, tmp_path):
    state = standins.fill(standins.animatelcm_i2v(TINY))
    state["img_encoder.conv_in.weight"] = torch.ones(32, latent, 3, 3)
    with pytest.raises(ValueError, match=f"img_encoder.conv_in.weight takes {latent} channels"):
        read_motion(standins.write(state, tmp_path / "x.ckpt"))


NUMBERS = {
    "motion_max_seq_length": 1024,
    "motion_transformer_layers_per_block": 8,
    "motion_num_attention_heads": 128,
    "motion_norm_num_groups": 1024,
}
"""Settings of a motion adapter, and the largest number that is read."""
DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 10**8, 10**4000, True, None, 4.0, float("nan"), "8", "8" * 10**6, {}, {"a": 8}, DEEP, [DEEP, DEEP]),
        *([], [8, 9], [[]], [{}], [10**8] * 4, [None], ["8"], [[8], [9]], [[[8]]], [True]),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_any_number_of_a_config_is_in_bounds_or_a_value_error(key, value):
    with pytest.raises(ValueError, match="motion") as caught:
        MotionConfig.from_diffusers({key: value})
    assert key in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("key", "most"), NUMBERS.items())
def test_the_bounds_of_a_config_are_what_they_say(key, most):
    depth = {"motion_transformer_layers_per_mid_block": most} if "layers" in key else {}
    assert most in vars(MotionConfig.from_diffusers({key: most} | depth)).values()
    with pytest.raises(ValueError, match=f"{key}.* 1 to {most}"):
        MotionConfig.from_diffusers({key: most + 1} | dict.fromkeys(depth, most + 1))


@pytest.mark.parametrize(("key", "shown"), [("motion_norm", "motion norm"), ("use_motion_mid_block",) * 2])
@pytest.mark.parametrize(
    "value", [None, 2, "yes", [], {}, DEEP, "joint" * 10**6], ids=lambda value: type(value).__name__
)
def test_any_word_of_a_config_is_known_or_a_value_error(key, shown, value):
    with pytest.raises(ValueError, match=shown) as caught:
        MotionConfig.from_diffusers({key: value})
    assert len(str(caught.value)) < 300


def test_a_folder_s_config_has_no_say_in_how_much_memory_is_taken(tmp_path):
    """Without positions in the weights nothing contradicts the number of rows."""
    adapter_folder(tmp_path)
    weights, file = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    save_file({key: value for key, value in load_file(weights).items() if not key.endswith(".pe")}, weights)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"motion_max_seq_length": 10**8}))
    with pytest.raises(ValueError, match=r"motion_max_seq_length\) is 100000000; give a whole number from 1 to 1024"):
        MotionConfig.from_diffusers(config(read_motion(tmp_path)))


@pytest.mark.parametrize("depth", [400, 10**6])
def test_a_folder_s_config_of_lists_in_lists_is_refused(depth, tmp_path):
    adapter_folder(tmp_path)
    file = tmp_path / "config.json"
    file.write_text('{"block_out_channels": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match=r"damaged|block_out_channels") as caught:
        read_motion(tmp_path)
    assert str(caught.value).startswith(f"{file}")


@pytest.mark.parametrize("key", ["img_encoder.conv_in.weight", "img_encoder.body.2.block1.weight"])
def test_the_image_encoder_is_checked_too(key, tmp_path):
    state = standins.fill(standins.animatelcm_i2v(TINY))
    state[key][0] = torch.nan
    with pytest.raises(ValueError, match=f"{key} holds numbers that are not finite"):
        read_motion(standins.write(state, tmp_path / "x.ckpt"))


@pytest.mark.parametrize("state", [{"conv_in.weight": torch.ones(2)}, {"img_encoder.conv_in.bias": torch.ones(2)}])
def test_other_files_have_no_motion_modules(state, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors has no motion modules"):
        read_motion(standins.write(state, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"motion_max_seq_length": 24}, "motion_max_seq_length is 24, and the weights say 32"),
        ({"use_motion_mid_block": False}, "use_motion_mid_block is False"),
        ({"block_out_channels": [32, 64, 128, 128]}, "block_out_channels"),
        ({"motion_layers_per_block": 1}, "motion_layers_per_block is 1, and the weights say 2"),
        (None, "damaged"),
        ([], "no settings"),
    ],
)
def test_a_folder_whose_config_is_of_another_model_is_refused(change, reason, tmp_path):
    adapter_folder(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text()) | change if isinstance(change, dict) else change
    file.write_text("{damaged" if change is None else json.dumps(settings))
    with pytest.raises(ValueError, match=reason) as caught:
        read_motion(tmp_path)
    assert str(caught.value).startswith(str(file))


def test_a_lora_of_motion_modules_is_no_motion_module(tmp_path):
    path = standins.write(standins.fill(standins.motion_lora(TINY, rank=2)), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt is a LoRA of motion modules"):
        read_motion(path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_half_a_folder_is_named(name, tmp_path):
    (adapter_folder(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{name} is missing"):
        read_motion(tmp_path)
