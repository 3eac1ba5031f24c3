from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from safetensors.torch import load_file, save_file

import standins
from animatelcm.nets.motion import MotionConfig, sinusoid
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.files import State, read_metadata
from animatelcm.weights.keys import Structure, motion_shapes, to_diffusers
from animatelcm.weights.motion import MotionFile, config, motion_modelspec, read_motion, write_motion

SMALL = (32, 32, 64, 32)
TINY = (32, 64)
FILES = {
    # file: positions, mid block, image encoder
    standins.mm_v1: (24, False, False),
    standins.mm_v2: (32, True, False),
    standins.mm_v3: (32, False, False),
    standins.animatelcm_t2v: (None, True, False),
    standins.animatelcm_i2v: (None, True, True),
}
Q = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight"
PE = Q.replace("to_q.weight", "pos_encoder.pe")


def same_bits(ours: State, theirs: State) -> bool:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key], theirs[key]) for key in ours]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def expected(state: State) -> tuple[State, State]:
    """What a file in AnimateDiff's layout holds, by our names: motion weights, image encoder."""
    weights = {to_diffusers(key): value for key, value in state.items() if "motion_modules" in key and "pe" not in key}
    encoder = {key.removeprefix("img_encoder."): value for key, value in state.items() if key.startswith("img_")}
    return weights, encoder


def ours(path: Path, *, rows: int | None = None, channels: tuple[int, ...] = TINY) -> MotionFile:
    """Random motion modules by our names, as if from a file."""
    state, encoder = expected(standins.fill(standins.animatelcm_i2v(channels), seed=3))
    facts = {"structure": Structure(channels, 2, True), "layout": "animatediff", "rows": rows}
    return MotionFile(state=state, image_encoder=encoder, **facts)


def adapter_folder(folder: Path) -> Path:
    """What diffusers saves of a motion adapter."""
    MotionAdapter(block_out_channels=TINY).save_pretrained(folder)
    return folder


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


LAST = "up_blocks.1.motion_modules.2.temporal_transformer.proj_out.bias"
OURS = "down_blocks.0.motion_modules.0.transformer_blocks.0"


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


def test_our_network_at_full_width_has_these_weights():
    structure = Structure(standins.SD15, 2, True)
    found = MotionFile(state={}, structure=structure, layout="animatediff", rows=None)
    made = MotionConfig.from_diffusers(config(found))
    assert made.max_frames == 64
    with torch.device("meta"):
        unet = VideoUNet(UNetConfig(cross_attention_dim=768), made)
    theirs = {key: tuple(value.shape) for key, value in unet.state_dict().items() if "motion_modules" in key}
    assert theirs == motion_shapes(structure)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_half_a_folder_is_named(name, tmp_path):
    (adapter_folder(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{name} is missing"):
        read_motion(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("layout", "rows", "encoder"),
    [("animatediff", None, True), ("animatediff", None, False), ("animatediff", 24, False), ("diffusers", 64, False)],
)
def test_written_and_read_is_the_same_bit_for_bit(layout, rows, encoder, dtype, tmp_path):
    motion, path = ours(tmp_path), tmp_path / "deep" / "x.safetensors"
    image_encoder = motion.image_encoder if encoder else {}
    kinds = {"layout": layout, "dtype": dtype, "rows": rows, "image_encoder": image_encoder}
    write_motion(motion.state, path, **kinds, metadata={"modelspec.title": "x"})
    again = read_motion(path)
    assert same_bits(again.state, {key: value.to(dtype) for key, value in motion.state.items()})
    assert same_bits(again.image_encoder, {key: value.to(dtype) for key, value in image_encoder.items()})
    assert (again.rows, again.layout, again.structure) == (rows, layout, motion.structure)
    assert read_metadata(path)["modelspec.title"] == "x"
    # And what a file holds is what is written of it.
    write_motion(again.state, tmp_path / "y.safetensors", **kinds)
    assert same_bits(load_file(tmp_path / "y.safetensors"), load_file(path))


@pytest.mark.parametrize("file", [standins.animatelcm_t2v, standins.animatelcm_i2v, standins.mm_v1])
def test_a_published_file_is_written_as_it_was(file, tmp_path):
    state = standins.fill(file(TINY))
    found = read_motion(standins.write(state, tmp_path / "x.ckpt"))
    kinds = {"dtype": torch.float32, "rows": found.rows, "image_encoder": found.image_encoder}
    write_motion(found.state, tmp_path / "y.safetensors", layout="animatediff", **kinds)
    again = load_file(tmp_path / "y.safetensors")
    positions = {key for key in state if key.endswith(".pe")}
    for key in positions:
        torch.testing.assert_close(again[key], state[key], atol=1e-5, rtol=0)
    rest = [{key: value for key, value in s.items() if key not in positions} for s in (again, state)]
    assert same_bits(*rest)


def test_other_tools_know_an_animatelcm_by_its_names(tmp_path):
    """ComfyUI-AnimateDiff-Evolved: no "pos_encoder" nor "pos_embed" anywhere, every tensor "temporal" or the image
    encoder's, "down_blocks.3", "mid_block."; sd-webui-animatediff: "mid_block" and no "pe" anywhere."""
    motion = ours(tmp_path, channels=SMALL)
    write_motion(
        motion.state, tmp_path / "x.safetensors", layout="animatediff", image_encoder=motion.image_encoder, metadata={}
    )
    keys = load_file(tmp_path / "x.safetensors").keys()
    assert not [key for key in keys if "pe" in key or "pos_e" in key]
    assert all("temporal" in key or key.startswith("img_encoder.") for key in keys)
    assert max(int(key.split(".")[1]) for key in keys if "down_blocks" in key) == 3
    assert any(key.startswith("mid_block.") for key in keys)
    assert keys == standins.animatelcm_i2v(SMALL).keys()


def test_diffusers_loads_what_is_written_for_it(tmp_path):
    motion = replace(ours(tmp_path), rows=40)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write_motion(motion.state, path, layout="diffusers", dtype=torch.float32, rows=40)
    settings = {"_class_name": "MotionAdapter", **config(motion)}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    adapter, report = MotionAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = adapter.state_dict()
    assert same_bits({key: value for key, value in theirs.items() if not key.endswith(".pe")}, motion.state)
    fresh = MotionAdapter.from_config(adapter.config).state_dict()
    for key in theirs.keys() - motion.state.keys():
        torch.testing.assert_close(theirs[key], fresh[key])
    assert read_motion(tmp_path).rows == 40


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        (
            {"layout": "animatediff"},
            {f"{OURS}.attn1.to_q.weight": torch.full((32, 32), 1e5)},
            "not finite in .*float16",
        ),
        ({"layout": "animatediff"}, {f"{OURS}.attn1.to_q.weight": torch.ones(2, 2)}, r"expected \(32, 32\)"),
        ({"layout": "animatediff"}, {"conv_in.weight": torch.ones(2)}, "conv_in.weight is no part"),
        ({"layout": "diffusers"}, {}, "needs rows"),
        ({"layout": "diffusers", "rows": 32, "image_encoder": True}, {}, "no place for an image encoder"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(options, changes, reason, tmp_path):
    motion = ours(tmp_path)
    options = options | {"image_encoder": motion.image_encoder if "image_encoder" in options else None}
    with pytest.raises(ValueError, match=reason) as caught:
        write_motion(motion.state | changes, tmp_path / "x.safetensors", **options)
    assert str(caught.value).startswith(str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("base", "architecture"), [("sd15", "stable-diffusion-v1"), ("emoji", "animatelcm-emoji")])
def test_the_header_has_what_modelspec_requires(base, architecture, tmp_path):
    facts = motion_modelspec(title="Wind", base=base, layout="animatediff", date="2024-02-29")
    write_motion(ours(tmp_path).state, tmp_path / "x.safetensors", layout="animatediff", metadata=facts)
    found = read_metadata(tmp_path / "x.safetensors")
    required = {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title")}
    assert required <= {key for key, value in found.items() if value}
    assert found["modelspec.architecture"] == f"{architecture}/motion-module"
