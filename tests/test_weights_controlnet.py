"""Names and settings of ControlNets and T2I-Adapters in one file, against diffusers' networks and conversion."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter

import control_files
import standins
from animatelcm.weights.controlnet import control_file, t2i_file
from animatelcm.weights.identify import identify
from standins import SD15, SMALL, TEXT, header

PATH = Path("x.safetensors")
CONTROL_V11P = {
    "time_embedding.linear_1.weight": ("time_embed.0.weight", (1280, 320)),
    "time_embedding.linear_2.bias": ("time_embed.2.bias", (1280,)),
    "conv_in.weight": ("input_blocks.0.0.weight", (320, 4, 3, 3)),
    "down_blocks.0.resnets.0.norm1.weight": ("input_blocks.1.0.in_layers.0.weight", (320,)),
    "down_blocks.0.resnets.0.conv1.weight": ("input_blocks.1.0.in_layers.2.weight", (320, 320, 3, 3)),
    "down_blocks.0.resnets.1.time_emb_proj.weight": ("input_blocks.2.0.emb_layers.1.weight", (320, 1280)),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        (320, 768),
    ),
    "down_blocks.0.downsamplers.0.conv.weight": ("input_blocks.3.0.op.weight", (320, 320, 3, 3)),
    "down_blocks.1.resnets.0.conv_shortcut.weight": ("input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
    "down_blocks.2.attentions.1.proj_in.weight": ("input_blocks.8.1.proj_in.weight", (1280, 1280, 1, 1)),
    "down_blocks.2.downsamplers.0.conv.bias": ("input_blocks.9.0.op.bias", (1280,)),
    "down_blocks.3.resnets.1.norm2.bias": ("input_blocks.11.0.out_layers.0.bias", (1280,)),
    "down_blocks.3.resnets.1.conv2.weight": ("input_blocks.11.0.out_layers.3.weight", (1280, 1280, 3, 3)),
    "mid_block.resnets.0.conv1.weight": ("middle_block.0.in_layers.2.weight", (1280, 1280, 3, 3)),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        (10240, 1280),
    ),
    "mid_block.resnets.1.conv2.bias": ("middle_block.2.out_layers.3.bias", (1280,)),
    "controlnet_cond_embedding.conv_in.weight": ("input_hint_block.0.weight", (16, 3, 3, 3)),
    "controlnet_cond_embedding.blocks.0.weight": ("input_hint_block.2.weight", (16, 16, 3, 3)),
    "controlnet_cond_embedding.blocks.1.weight": ("input_hint_block.4.weight", (32, 16, 3, 3)),
    "controlnet_cond_embedding.blocks.3.weight": ("input_hint_block.8.weight", (96, 32, 3, 3)),
    "controlnet_cond_embedding.blocks.5.bias": ("input_hint_block.12.bias", (256,)),
    "controlnet_cond_embedding.conv_out.weight": ("input_hint_block.14.weight", (320, 256, 3, 3)),
    "controlnet_down_blocks.0.weight": ("zero_convs.0.0.weight", (320, 320, 1, 1)),
    "controlnet_down_blocks.4.weight": ("zero_convs.4.0.weight", (640, 640, 1, 1)),
    "controlnet_down_blocks.11.bias": ("zero_convs.11.0.bias", (1280,)),
    "controlnet_mid_block.weight": ("middle_block_out.0.weight", (1280, 1280, 1, 1)),
}
"""Of ``control_v11p_sd15_canny``: diffusers' name of a tensor -> its own, without ``control_model.``, and its shape."""
T2I_CANNY_V2 = {
    "adapter.conv_in.weight": ("conv_in.weight", (320, 64, 3, 3)),
    "adapter.body.0.resnets.0.block1.weight": ("body.0.block1.weight", (320, 320, 3, 3)),
    "adapter.body.0.resnets.1.block2.bias": ("body.1.block2.bias", (320,)),
    "adapter.body.1.in_conv.weight": ("body.2.in_conv.weight", (640, 320, 1, 1)),
    "adapter.body.1.resnets.0.block1.weight": ("body.2.block1.weight", (640, 640, 3, 3)),
    "adapter.body.2.in_conv.bias": ("body.4.in_conv.bias", (1280,)),
    "adapter.body.3.resnets.0.block2.weight": ("body.6.block2.weight", (1280, 1280, 1, 1)),
    "adapter.body.3.resnets.1.block1.bias": ("body.7.block1.bias", (1280,)),
}
T2I_COLOR = {
    "adapter.body.0.in_conv.weight": ("body.0.in_conv.weight", (80, 192, 1, 1)),
    "adapter.body.0.resnets.3.block2.weight": ("body.0.body.3.block2.weight", (80, 80, 3, 3)),
    "adapter.body.1.in_conv.weight": ("body.1.in_conv.weight", (160, 320, 1, 1)),
    "adapter.body.2.resnets.0.block1.bias": ("body.2.body.0.block1.bias", (320,)),
    "adapter.body.3.out_conv.weight": ("body.3.out_conv.weight", (1280, 320, 1, 1)),
}


def shapes_by_name(found, shapes: standins.Shapes) -> standins.Shapes:
    return {name: shapes[key] for name, key in found.names.items()}


def built(network, settings) -> standins.Shapes:
    """What diffusers builds from settings, without numbers."""
    with torch.device("meta"):
        state = network.from_config(settings).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


# What is published


@pytest.mark.parametrize("prefix", ["control_model.", "", "module.control_model."])
def test_a_controlnet_of_its_authors_is_diffusers_network(prefix):
    shapes = control_files.controlnet(SD15, TEXT, prefix)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (340, 361_279_120)
    found = control_file(PATH, header(shapes))
    for name, (key, shape) in CONTROL_V11P.items():
        assert shapes[prefix + key] == shape
        assert found.names[name] == prefix + key
    assert shapes_by_name(found, shapes) == built(ControlNetModel, found.settings)
    said = found.settings
    assert (said["block_out_channels"], said["cross_attention_dim"], said["in_channels"]) == (SD15, 768, 4)
    assert (said["conditioning_embedding_out_channels"], said["conditioning_channels"]) == ((16, 32, 96, 256), 3)


@pytest.mark.parametrize(
    ("file", "known", "seen", "kind", "millions"),
    [
        (lambda: control_files.t2i_adapter(SD15, seen=1), T2I_CANNY_V2, 1, "full_adapter", 77.0),
        (lambda: control_files.t2i_adapter(SD15, seen=3), {}, 3, "full_adapter", 77.4),
        (lambda: control_files.light_adapter(SD15), T2I_COLOR, 3, "light_adapter", 18.7),
    ],
)
def test_an_adapter_of_its_authors_is_diffusers_network(file, known, seen, kind, millions):
    shapes = file()
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 1) == millions
    found = t2i_file(PATH, header(shapes), 8)
    for name, (key, shape) in known.items():
        assert shapes[key] == shape
        assert found.names[name] == key
    assert shapes_by_name(found, shapes) == built(T2IAdapter, found.settings)
    assert (found.settings["in_channels"], found.settings["adapter_type"]) == (seen, kind)


# Oracles


def test_diffusers_converts_to_the_same_names():
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    shapes = control_files.controlnet()
    theirs = convert_controlnet_checkpoint({key: key for key in shapes}, {"layers_per_block": 2})
    assert control_file(PATH, header(shapes)).names == theirs


@pytest.mark.parametrize("channels", [SMALL, (32, 32, 32, 32), (64, 32, 96, 32)])
@pytest.mark.parametrize("text", [16, 768])
def test_settings_are_read_off_the_shapes(channels, text):
    for shapes in (control_files.controlnet(channels, text), built(ControlNetModel, _settings(channels, text))):
        found = control_file(PATH, header(shapes))
        assert shapes_by_name(found, shapes) == built(ControlNetModel, found.settings)
        assert found.settings["block_out_channels"] == channels


def _settings(channels: tuple[int, ...], text: int):
    return {"block_out_channels": channels, "cross_attention_dim": text}


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": SMALL},
        {"channels": (32, 32, 64, 32), "num_res_blocks": 3, "in_channels": 1},
        {"channels": (64, 32), "downscale_factor": 4},
        {"channels": SMALL[:3], "adapter_type": "light_adapter", "num_res_blocks": 4},
        {"channels": (32,), "adapter_type": "light_adapter", "num_res_blocks": 1, "in_channels": 1},
    ],
)
def test_settings_of_diffusers_adapters_are_read_off_the_shapes(settings):
    whole = {"in_channels": 3, "num_res_blocks": 2, "downscale_factor": 8, "adapter_type": "full_adapter"} | settings
    shapes = built(T2IAdapter, whole)
    found = t2i_file(PATH, header(shapes), whole["downscale_factor"])
    assert found.names == {key: key for key in shapes}
    assert found.settings == {"_class_name": "T2IAdapter", **whole}


def test_a_whole_model_beside_a_controlnet_is_left_out():
    """The first ControlNets came with the Stable Diffusion that they were trained beside."""
    alone, model = control_files.controlnet(), standins.ldm_checkpoint()
    assert control_file(PATH, header(alone | model)) == control_file(PATH, header(alone))
    found = identify(header(alone | model))
    assert (found.kind, found.vae, found.text_encoder) == ("controlnet", True, True)


# What a file is


UP = {
    "control_model.input_blocks.1.0.in_layers.2.up": (32, 4),
    "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
}
SMALL_XL = {"controlnet_down_blocks.0.weight": (3,), "add_embedding.linear_1.weight": (3, 3)}
XS = {"control_to_base_for_conv_in.weight": (3,), "controlnet_cond_embedding.conv_in.weight": (1,)}
RGB = {"controlnet_cond_embedding.weight": (3,)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (lambda: control_files.controlnet(SD15, TEXT), "Stable Diffusion 1 ControlNet (LDM keys, 361.3 M parameters, "),
        (lambda: control_files.controlnet(prefix=""), "ControlNet (LDM keys, "),
        (lambda: built(ControlNetModel, _settings(SMALL, 16)), "ControlNet (diffusers keys, "),
        (control_files.t2i_adapter, "Stable Diffusion 1 T2I-Adapter (TencentARC keys, "),
        (control_files.light_adapter, "Stable Diffusion 1 T2I-Adapter (TencentARC keys, "),
        (lambda: built(T2IAdapter, {"channels": SMALL}), "Stable Diffusion 1 T2I-Adapter (diffusers keys, "),
        (lambda: control_files.t2i_adapter(cell=4), "T2I-Adapter (TencentARC keys, "),
    ],
)
def test_inspect_says_how_an_adapter_is_used(shapes, said):
    found = identify(header(shapes()))
    assert str(found).startswith(said)
    assert str(found).endswith(" parameters, goes in as --adapter KIND=FILE)")
    assert found.is_adapter


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (lambda: control_files.controlnet(SMALL, 1024), "Stable Diffusion 2 ControlNet (LDM keys, "),
        (lambda: built(ControlNetModel, _settings(SMALL, 2048)), "Stable Diffusion XL ControlNet (diffusers keys, "),
        (lambda: SMALL_XL, "Stable Diffusion XL ControlNet (diffusers keys, "),
        (
            lambda: control_files.controlnet() | {"control_model.label_emb.0.0.weight": (4, 4)},
            "Stable Diffusion XL ControlNet (LDM keys, ",
        ),
        (lambda: control_files.t2i_adapter(cell=16), "Stable Diffusion XL T2I-Adapter (TencentARC keys, "),
        (lambda: built(T2IAdapter, {"downscale_factor": 16}), "Stable Diffusion XL T2I-Adapter (diffusers keys, "),
        (lambda: UP, "Control-LoRA (LDM keys, "),
        (lambda: control_files.controlnet(prefix="") | {"lora_controlnet": ()}, "Control-LoRA (LDM keys, "),
        (
            lambda: control_files.controlnet() | {"difference": ()},
            "ControlNet as a difference from its base (LDM keys, ",
        ),
        (lambda: XS, "ControlNet-XS (diffusers keys, "),
        (lambda: {"control_model.enc_zero_convs_out.0.weight": (3, 3)}, "ControlNet-XS (LDM keys, "),
        (lambda: RGB | standins.mm_v3(), "SparseCtrl (diffusers keys, 20 modules, "),
        # AnimateLCM's encoder of a picture, as a bundle keeps it, and nothing at all
        (lambda: {k[12:]: shape for k, shape in standins.image_encoder().items()}, "Weights of an unknown kind ("),
        (lambda: {"adapter.x": (3,)}, "Weights of an unknown kind ("),
        (lambda: {"body.0.weight": (3, 3), "head.weight": (3, 3)}, "Weights of an unknown kind ("),
    ],
)
def test_inspect_names_what_cannot_be_used(shapes, said):
    found = identify(header(shapes()))
    assert str(found).startswith(said)
    assert "--adapter" not in str(found)
    assert not found.is_adapter


# What is refused


@pytest.mark.parametrize(
    ("file", "read", "named"),
    [
        (control_files.controlnet, control_file, 1 + 4 + 1 + 3),  # conv_in, a level's width, maps' first and strides
        (control_files.t2i_adapter, lambda path, shapes: t2i_file(path, shapes, 8), 1 + 4),
        (control_files.light_adapter, lambda path, shapes: t2i_file(path, shapes, 8), 1 + 3),
    ],
)
def test_what_is_missing_changes_no_other_name(file, read, named):
    """Each tensor in turn: it is named at once where a setting is read off it, and else for whoever builds it."""
    shapes = header(file())
    whole, said = read(PATH, shapes).names, 0
    for ours, theirs in whole.items():
        try:
            names = read(PATH, {key: info for key, info in shapes.items() if key != theirs}).names
        except ValueError as error:
            assert str(error).startswith(f"x.safetensors: {ours} is missing")  # noqa: PT017 - most of them raise nothing
            said += 1
        else:
            assert names == {name: key for name, key in whole.items() if name != ours}
    assert said == named


def test_a_block_that_is_missing_changes_no_other_name():
    shapes = header(control_files.controlnet())
    whole = control_file(PATH, shapes).names
    for block in ("input_blocks.2.", "input_blocks.3.", "input_blocks.11.", "middle_block.1.", "zero_convs.4."):
        names = control_file(PATH, {key: info for key, info in shapes.items() if block not in key}).names
        assert names == {name: key for name, key in whole.items() if block not in key}
        assert len(names) < len(whole)
    with pytest.raises(ValueError, match=r"^x\.safetensors: controlnet_cond_embedding\.blocks\.5\.weight is missing"):
        control_file(PATH, {key: info for key, info in shapes.items() if "hint_block.12." not in key})


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"control_model.guess.weight": (3,)}, "control_model.guess.weight is for no layer of a ControlNet"),
        ({"control_model.input_hint_block.16.weight": (3,)}, "input_hint_block.16.weight is for no layer"),
        ({"module.control_model.zero_convs.0.0.bias": (32,)}, None),  # the same name twice: one of them
        ({"control_model.input_blocks.0.0.weight": (32, 4)}, "has 2 dimensions, expected 4"),
        ({f"control_model.{i}.weight": (3,) for i in range(2000)}, "has 2340 tensors, and adapters up to 2000"),
    ],
)
def test_tensors_that_no_controlnet_has_are_named(more, named):
    shapes = control_files.controlnet() | more
    if named is None:
        assert len(control_file(PATH, header(shapes)).names) == 340
        return
    with pytest.raises(ValueError, match=named):
        control_file(PATH, header(shapes))


def test_a_first_layer_of_other_cells_is_refused():
    with pytest.raises(ValueError, match=r"takes 48 channels, and a T2I-Adapter's for this model 64 or 192"):
        t2i_file(PATH, header(control_files.t2i_adapter(cell=4)), 8)


def test_many_tensors_are_refused_at_once():
    shapes = {f"control_model.input_blocks.{i}.0.in_layers.0.weight": (3,) for i in range(1990)}
    for refused in (shapes, shapes | {f"control_model.input_blocks.{i}.1.x": (3,) for i in range(50_000)}):
        begun = time.process_time()
        with pytest.raises(ValueError, match=r"^x\.safetensors"):
            control_file(PATH, header(refused))
        assert time.process_time() - begun < 5
