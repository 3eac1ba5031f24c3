"""What diffusers and PEFT make of the files that we read and write."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import read_lora, write_lora
from lora_files import Weights, chosen, drawn, modules_of, same_bits, spelled


@pytest.fixture(scope="module")
def pipe():
    """Stable Diffusion 1.5's blocks and a text encoder, narrow, with random weights."""
    pytest.importorskip("peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 16, 16),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    text = CLIPTextConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    nothing = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=unet.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        scheduler=DDIMScheduler(),
        requires_safety_checker=False,
        **nothing,
    )


@pytest.fixture(scope="module")
def base(pipe) -> Weights:
    return weights(pipe)


def weights(pipe) -> Weights:
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{part}.{name}": v.clone() for part, net in networks.items() for name, v in net.state_dict().items()}


def fused_by_diffusers(pipe, path: Path) -> Weights:
    """All weights after diffusers has loaded a file and fused it; the pipeline is as before then."""
    before = weights(pipe)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = weights(pipe)
    for part in ("unet", "text_encoder"):
        old = {name.removeprefix(f"{part}."): v for name, v in before.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(old)
    return after


@pytest.mark.parametrize("dialect", ["kohya", "PEFT", "diffusers", "old diffusers"])
def test_diffusers_fuses_the_same_from_a_file_of_others(dialect, pipe, base, tmp_path):
    """Kohya's alphas are one number here: diffusers 0.42 loses those of attention layers where they differ."""
    lora = drawn(base, chosen(base), alpha=lambda i, rank: 3.0 if dialect == "kohya" else rank)
    state = spelled(lora, dialect)
    if dialect == "kohya":
        state |= {f"{key.partition('.')[0]}.alpha": torch.tensor(3.0) for key in list(state)}
    save_file(state, tmp_path / "x.safetensors")
    assert_fuses_as_diffusers(pipe, base, tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_diffusers_fuses_the_same_from_our_files(layout, pipe, base, tmp_path):
    """Ranks and alphas differ from module to module; kohya's alphas do not, as above."""
    lora = drawn(base, chosen(base), alpha=lambda i, rank: 3.0 if layout == "kohya" else (8, 1.5, rank)[i % 5 % 3])
    write_lora(lora, tmp_path / "x.safetensors", metadata={}, dtype=torch.float32, layout=layout)
    assert same_bits(read_lora(tmp_path / "x.safetensors", modules_of(base)), lora)
    assert_fuses_as_diffusers(pipe, base, tmp_path / "x.safetensors")


def assert_fuses_as_diffusers(pipe, base: Weights, path: Path) -> None:
    ours = base | fused(base, [(read_lora(path, modules_of(base)), 1.0)])
    theirs = fused_by_diffusers(pipe, path)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
    changed = {name.partition(".")[0] for name in base if not torch.equal(base[name], theirs[name])}
    assert changed == {module.partition(".")[0] for module in read_lora(path, modules_of(base))}


@pytest.mark.parametrize("scale", [{"alpha_pattern": {"attn1.to_q": 6, "mid_block.*": 3}}, {"use_rslora": True}])
def test_peft_and_diffusers_save_what_is_read(scale, pipe, base, tmp_path):
    """An adapter's folder and diffusers' own file, whose module names and settings do not say "unet".

    Both sort the patterns, of which the first that fits counts.
    """
    from peft import LoraConfig, get_peft_model

    ranks = {} if "use_rslora" in scale else {"rank_pattern": {"^mid_block.*": 3}}
    targets = ["attn1.to_q", "attn2.to_out.0", "conv1", "proj_in"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False, **scale, **ranks)
    adapted = get_peft_model(deepcopy(pipe.unet), config)
    adapted.save_pretrained(str(tmp_path))
    other = deepcopy(pipe.unet)
    other.add_adapter(config, "default")
    other.load_state_dict(adapted.base_model.model.state_dict())
    other.save_lora_adapter(str(tmp_path), weight_name="other.safetensors")
    for path in (tmp_path / "adapter_model.safetensors", tmp_path / "other.safetensors"):
        lora = read_lora(path, modules_of(base))
        layers = {name: layer for name, layer in other.named_modules() if hasattr(layer, "get_delta_weight")}
        assert lora.keys() == {f"unet.{name}" for name in layers}
        for name, layer in layers.items():
            found = lora[f"unet.{name}"].delta(layer.get_base_layer().weight.shape)
            torch.testing.assert_close(found, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    assert len({layer.alpha for layer in lora.values()}) == (3 if ranks else 1)


@pytest.fixture(scope="module")
def motion_pipe(pipe):
    from diffusers import UNetMotionModel

    torch.manual_seed(1)
    unet = UNetMotionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=12,
        num_attention_heads=2,
        norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    return type(pipe)(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_motion_lora_changes_what_diffusers_changes(wrapped, motion_pipe, tmp_path):
    """AnimateDiff's file for us, its conversion for diffusers: fused weights are the same."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    base = weights(motion_pipe)
    keys = [name for name in base if re.search(r"motion_modules.*\.attn[12]\.to_\w+(\.0)?\.weight", name)]
    source, state = torch.Generator().manual_seed(0), {}
    for key in keys:
        block, layer = re.fullmatch(r"unet\.(.+)\.(to_\w+?)(?:\.0)?\.weight", key).groups()
        block = block.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")
        block = block.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")
        for end, shape in {"down": (4, base[key].shape[1]), "up": (base[key].shape[0], 4)}.items():
            state[f"{block}.processor.{layer}_lora.{end}.weight"] = 0.3 * torch.randn(shape, generator=source)
    theirs = {f"unet.{name}": value for name, value in convert_animatediff_checkpoint_to_diffusers(state).items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    ours = {f"module.{name}": value for name, value in state.items()}
    torch.save(
        {"state_dict": ours, "epoch": 1} if wrapped else {**state, "animatediff_config": {}}, tmp_path / "x.ckpt"
    )
    lora = read_lora(tmp_path / "x.ckpt", modules_of(base))
    assert {f"{module}.weight" for module in lora} == set(keys)
    assert same_bits(read_lora(tmp_path / "theirs.safetensors", modules_of(base)), lora)
    expected = fused_by_diffusers(motion_pipe, tmp_path / "theirs.safetensors")
    for name, value in (base | fused(base, [(lora, 1.0)])).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
        assert torch.equal(value, base[name]) == (name not in keys)
    write_lora(lora, tmp_path / "peft.safetensors", metadata={}, dtype=torch.float32, layout="peft")
    again = fused_by_diffusers(motion_pipe, tmp_path / "peft.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in keys)
