from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import standins
from animatelcm.weights.keys import (
    Structure,
    image_encoder_shapes,
    is_motion,
    is_positions,
    motion_shapes,
    position_widths,
    to_animatediff,
    to_diffusers,
)

ALL = (standins.mm_v1, standins.mm_v2, standins.mm_v3, standins.animatelcm_t2v)
SPATIAL = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.norm3.bias",
    "down_blocks.0.resnets.0.norm1.weight",
    "module.conv_in.weight",
    "img_encoder.conv_in.weight",
    "",
]


def weights(shapes: standins.Shapes) -> list[str]:
    return [key for key in shapes if not key.endswith(".pe")]


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.__name__)
def test_weights_names_are_one_to_one(file):
    theirs = weights(file())
    ours = [to_diffusers(key) for key in theirs]
    assert len(set(ours)) == len(theirs)
    assert [to_animatediff(key) for key in ours] == theirs
    assert all(is_motion(key) and not is_positions(key) for key in (*ours, *theirs))


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.__name__)
def test_diffusers_converts_to_the_same_names(file):
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    theirs = convert_animatediff_checkpoint_to_diffusers({key: key for key in file()})
    assert theirs == {to_diffusers(key): key for key in weights(file())}


@pytest.mark.parametrize("rows", [24, 32])
@pytest.mark.parametrize("mid", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_motion_adapter_has_these_names_and_shapes(mid, rows, depth):
    from diffusers import MotionAdapter

    with torch.device("meta"):
        adapter = MotionAdapter(
            block_out_channels=standins.SMALL,
            use_motion_mid_block=mid,
            motion_max_seq_length=rows,
            motion_transformer_layers_per_block=depth,
            motion_transformer_layers_per_mid_block=depth,
        )
    theirs = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    structure = Structure(standins.SMALL, 2, mid, depth)
    positions = {key: (1, rows, width) for key, width in position_widths(structure).items()}
    assert motion_shapes(structure) | positions == theirs
    if depth == 1:
        file = standins.motion(standins.SMALL, mid=mid, rows=rows)
        assert {to_diffusers(key): shape for key, shape in file.items()} == theirs


def test_both_attentions_positions_are_their_block_s():
    file = standins.mm_v2()
    positions = [key for key in file if key.endswith(".pe")]
    assert len(positions) == 42
    assert all(is_positions(key) and is_positions(to_diffusers(key)) for key in positions)
    blocks = {to_diffusers(key) for key in positions}
    assert len(blocks) == 21
    assert {to_diffusers(to_animatediff(key)) for key in blocks} == blocks
    assert {to_animatediff(key) for key in blocks} == {key for key in positions if "attention_blocks.0" in key}
    assert {to_diffusers(key.replace(".pe", ".pos_encoding")) for key in positions} == blocks


@given(
    place=st.sampled_from(["down_blocks.{}", "up_blocks.{}", "mid_block"]),
    numbers=st.tuples(*[st.integers(0, 120)] * 3),
    layer=st.sampled_from(["attention_blocks.0.to_q", "attention_blocks.1.to_out.0", "norms.0", "norms.1", "ff_norm"]),
    more=st.sampled_from([".weight", ".bias", ".processor.to_q_lora.down.weight"]),
)
def test_any_number_of_blocks_modules_and_layers(place, numbers, layer, more):
    a, b, c = numbers
    key = f"{place.format(a)}.motion_modules.{b}.temporal_transformer.transformer_blocks.{c}.{layer}{more}"
    ours = to_diffusers(key)
    assert "temporal_transformer" not in ours
    assert not any(word in ours for word in ("attention_blocks", "norms", "ff_norm"))
    assert to_animatediff(ours) == key
    assert to_diffusers(ours) == ours
    assert to_animatediff(key) == key
    assert to_diffusers(f"module.{key}") == ours


@pytest.mark.parametrize("key", SPATIAL)
def test_names_of_other_layers_stay(key):
    assert not is_motion(key)
    assert to_diffusers(key) == to_animatediff(key) == key


@pytest.mark.parametrize("channels", [standins.SD15, (8, 16, 24, 32), (8, 8)])
def test_the_image_encoder_has_these_names_and_shapes(channels):
    ours = {f"img_encoder.{key}": shape for key, shape in image_encoder_shapes(channels).items()}
    assert ours == standins.image_encoder(channels)
