"""Motion modules that are written are read again bit for bit, here and by other tools."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter
from safetensors.torch import load_file

import standins
from animatelcm.weights.files import read_metadata
from animatelcm.weights.motion import config, motion_modelspec, read_motion, write_motion
from motion_files import OURS, SMALL, TINY, ours, same_bits


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
