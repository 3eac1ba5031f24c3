"""One LoRA is one LoRA in every dialect, and what is none is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig
from animatelcm.weights.files import read_header, read_metadata
from animatelcm.weights.identify import identify
from animatelcm.weights.lora import read_lora, write_lora
from lora_files import (
    DIALECTS,
    TINY,
    Weights,
    chosen,
    drawn,
    kohya,
    ldm,
    ldm_by_diffusers,
    modules_of,
    numbered,
    same_bits,
    sd15,
    spelled,
    unet_weights,
)

LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""What a latent consistency LoRA changes."""


@pytest.fixture(scope="module")
def base() -> Weights:
    """Weights of Stable Diffusion 1.5's blocks, narrow, and of a text encoder as transformers 5 names them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNetConfig(
        block_out_channels=(4, 8, 16, 16), cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4
    )
    text = CLIPTextConfig(hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        texts = CLIPTextModel(text).state_dict()
        return unet_weights(config=unet) | {f"text_encoder.{name}": value for name, value in texts.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_read_is_identified(dialect, base, tmp_path):
    lora = drawn(base, chosen(base), alpha=lambda i, rank: rank)
    save_file(spelled(lora, dialect), tmp_path / "x.safetensors")
    found = identify(read_header(tmp_path / "x.safetensors"))
    assert (found.kind, found.modules, found.ranks, found.method) == ("lora", len(lora), (2, 3, 4), "")
    word = "kohya" if dialect.startswith(("kohya", "ComfyUI")) else "peft" if "PEFT" in dialect else "old-diffusers"
    assert found.layout == word


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_lora_in_every_dialect_is_one_lora(dialect, suffix, base, tmp_path):
    lora = drawn(base, chosen(base), alpha=lambda i, rank: rank)
    state, path = spelled(lora, dialect), tmp_path / f"x{suffix}"
    assert len(state) == 2 * len(lora)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if suffix == ".bin" else {"global_step": 3, "state_dict": state}, path)
    assert same_bits(read_lora(path, modules_of(base)), lora)


@pytest.mark.parametrize("dialect", ["kohya", "kohya, LDM", "diffusers", "old diffusers", "PEFT"])
@pytest.mark.parametrize("ending", [".alpha", ".lora.alpha", "_lora.alpha", ".processor.to_q_lora.down.weight.alpha"])
def test_alphas_in_every_dialect(dialect, ending, base, tmp_path):
    """Kohya's have one ending; in the others some tools put what follows the module before it."""
    module = next(module for module in chosen(base) if module.endswith("attn1.to_q"))
    state = spelled(drawn(base, [module], alpha=lambda i, rank: rank), dialect)
    block = module.removesuffix(".to_q") if ending.startswith(".processor") else module
    key = f"{min(state).partition('.')[0]}.alpha" if dialect.startswith("kohya") else f"{block}{ending}"
    save_file(state | {key: torch.tensor(0.5)}, tmp_path / "x.safetensors")
    assert read_lora(tmp_path / "x.safetensors", modules_of(base))[module].alpha == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kohya_to_peft_and_back_is_the_same_bit_for_bit(dtype, base, tmp_path):
    modules = modules_of(base)
    first, between, last = (tmp_path / f"{name}.safetensors" for name in ("first", "between", "last"))
    lora = drawn(base, modules, alpha=lambda i, rank: (8.0, 0.1, float(rank))[i % 3])
    write_lora(lora, first, metadata={}, dtype=dtype)
    write_lora(read_lora(first, modules), between, metadata={}, dtype=dtype, layout="peft")
    write_lora(read_lora(between, modules), last, metadata={}, dtype=dtype)
    assert same_bits(read_lora(between, modules), read_lora(first, modules))
    there, back = load_file(first), load_file(last)
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)
    assert read_metadata(first) == read_metadata(last)


@pytest.mark.parametrize(("spelling", "alpha"), [("kohya", 2), ("PEFT", 5), ("diffusers", 5), ("old diffusers", 5)])
def test_settings_are_of_every_dialect_but_kohya_s(spelling, alpha, base, tmp_path):
    """Diffusers renames attention's keys and leaves the others where it saves what PEFT trained."""
    module = next(module for module in chosen(base) if module.endswith("attn1.to_q"))
    state = spelled(drawn(base, [module], alpha=lambda i, rank: rank), spelling)
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 5}'})
    assert read_lora(tmp_path / "x.safetensors", modules_of(base))[module].alpha == alpha


def test_every_name_of_ldm_is_the_module_that_diffusers_converts_it_to(tmp_path):
    modules, by_diffusers = sd15(), ldm_by_diffusers()
    assert {f"unet.{name}" for name in by_diffusers} == set(modules)
    save_file(numbered([ldm("unet", name) for name in by_diffusers]), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", modules)
    assert {module: layer.down.item() for module, layer in lora.items()} == {
        f"unet.{name}": i for i, name in enumerate(by_diffusers)
    }


@pytest.mark.parametrize("name", ["input_blocks_1_1_proj_in", "middle_block_1_proj_in", "out_2"])
def test_ldm_s_numbers_mean_nothing_for_other_blocks(name, tmp_path):
    save_file(numbered([f"lora_unet_{name}.lora_*.weight"]), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors: lora_unet_{name}\.lora_down\.weight .*this architecture"):
        read_lora(tmp_path / "x.safetensors", modules_of(unet_weights(config=TINY)))
    assert len(read_lora(tmp_path / "x.safetensors", sd15())) == 1


def test_a_latent_consistency_lora_has_278_layers(tmp_path):
    modules = [module for module in sd15() if module.endswith(LCM_TARGETS)]
    names = [kohya("unet", module.removeprefix("unet.")) for module in modules]
    alphas = {name.partition(".")[0] + ".alpha": torch.tensor(8.0) for name in names}
    save_file(numbered(names) | alphas, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", sd15(MotionConfig()))
    assert list(lora) == sorted(lora)
    assert (len(lora), {layer.alpha for layer in lora.values()}) == (278, {8.0})
    assert set(lora) == set(modules)


def motion_names(*, mid_block: bool) -> list[str]:
    """Factors of an AnimateDiff motion LoRA."""
    blocks = [f"down_blocks.{i}.motion_modules.{j}" for i in range(4) for j in range(2)]
    blocks += [f"up_blocks.{i}.motion_modules.{j}" for i in range(4) for j in range(3)]
    blocks += ["mid_block.motion_modules.0"] * mid_block
    inner = "temporal_transformer.transformer_blocks.0.attention_blocks"
    maps = [f"{n}.processor.to_{x}_lora.*.weight" for n in (0, 1) for x in ("q", "k", "v", "out")]
    return [f"{block}.{inner}.{x}" for block in blocks for x in maps]


def test_a_motion_lora_of_animatediff_has_168_layers_and_is_written_as_it_was(tmp_path):
    state = numbered(motion_names(mid_block=True))
    assert len(state) == 336
    torch.save(state, tmp_path / "x.ckpt")
    lora = read_lora(tmp_path / "x.ckpt", sd15(MotionConfig()))
    write_lora(lora, tmp_path / "x.safetensors", metadata={}, dtype=torch.float32, layout="animatediff")
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())
    assert len(lora) == 168
    assert "unet.mid_block.motion_modules.0.transformer_blocks.0.attn2.to_out.0" in lora


@pytest.mark.parametrize(
    ("motion", "reason"),
    [(None, "the model has none"), (MotionConfig(use_mid_block=False), "temporal layers like its own")],
)
def test_a_motion_lora_for_a_model_with_fewer_temporal_layers(motion, reason, tmp_path):
    names = [name for name in motion_names(mid_block=True) if motion is None or name.startswith("mid")]
    torch.save(numbered(names), tmp_path / "x.ckpt")
    first = min(names).replace("*", "down")
    with pytest.raises(ValueError, match=rf"x\.ckpt: {re.escape(first)} is for a temporal layer.*{reason}"):
        read_lora(tmp_path / "x.ckpt", sd15(motion))


def test_animatediff_s_layout_folds_the_alpha_and_has_no_other_layers(tmp_path):
    base = {f"{module}.weight": torch.zeros(6, 5) for module in sd15(MotionConfig())}
    module = "unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.to_out.0"
    lora = drawn(base, [module], alpha=lambda i, rank: 0.25 * rank)
    path = tmp_path / "x.safetensors"
    write_lora(lora, path, metadata={}, dtype=torch.float32, layout="animatediff")
    again = read_lora(path, modules_of(base))[module]
    assert again.alpha == again.rank
    torch.testing.assert_close(again.delta((6, 5)), lora[module].delta((6, 5)), atol=1e-6, rtol=1e-5)
    path.unlink()
    for other in (module.replace("attn1.to_out.0", "ff.net.2"), "unet.conv_in", "text_encoder.encoder.layers.0.fc1"):
        with pytest.raises(
            ValueError, match=rf"x\.safetensors: {re.escape(other)} has no name in AnimateDiff's layout"
        ):
            write_lora({**lora, other: lora[module]}, path, metadata={}, layout="animatediff")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("middle matrix", ("lora_mid.weight", "alpha", "lora_down.weight", "lora_up.weight")),
        ("DoRA", ("dora_scale", "alpha", "lora_down.weight", "lora_up.weight")),
        ("OFT", ("oft_blocks", "alpha")),
        ("IA3", ("on_input", "weight")),
        ("GLoRA", ("a1.weight", "a2.weight", "alpha", "b1.weight", "b2.weight")),
        ("full difference", ("diff", "diff_b")),
    ],
)
def test_other_kinds_of_networks_are_refused_by_name(kind, keys, tmp_path):
    """The first key of that kind is named, though an alpha comes before it."""
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{stem}.{key}": torch.ones(1, 1) + i for i, key in enumerate(keys)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors: {stem}\.{re.escape(keys[0])} .*{kind}.*; \w+"):
        read_lora(tmp_path / "x.safetensors", sd15())
    found = identify(read_header(tmp_path / "x.safetensors"))
    assert (found.kind, found.layout) == ("lora", "lycoris")
    assert kind in found.method


@pytest.mark.parametrize("key", ["emb_params", "bundle_emb.cat.string_to_param.*"])
def test_textual_inversions_are_refused_by_name(key, tmp_path):
    state = numbered(["lora_unet_mid_block_attentions_0_proj_in.lora_*.weight"])
    save_file(state | {key: torch.ones(2, 768)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors: {re.escape(key)} .*textual inversion"):
        read_lora(tmp_path / "x.safetensors", sd15())
