from __future__ import annotations

import hashlib
import json
import math
import re
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.files import read_metadata
from animatelcm.weights.lora import Lora, LoraLayer, modelspec, read_lora, write_lora
from animatelcm.weights.lora_peft import Pattern
from lora_files import TINY

LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Ends of the module paths that a latent consistency LoRA changes."""
Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"
MLP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
MODULES = (Q, CONV, MLP)
KOHYA_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int) -> torch.Tensor:
    """Small whole numbers: sums of their products are exact in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def same_bits(ours: Lora, theirs: Lora) -> bool:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[module], theirs[module]) for module in ours]
    return all(torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha for a, b in pairs)


def network(config: UNetConfig, motion: MotionConfig | None) -> list[str]:
    """Module paths of everything in a network that has a weight."""
    with torch.device("meta"):
        unet = VideoUNet(config, motion)
    return [f"unet.{name.removesuffix('.weight')}" for name, _ in unet.named_parameters() if name.endswith(".weight")]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_linear_delta_is_its_two_maps_in_a_row(rank, inputs, outputs, seed):
    layer = LoraLayer(whole(rank, inputs, seed=seed), whole(outputs, rank, seed=seed + 1), alpha=rank / 2)
    x = whole(3, inputs, seed=seed + 2)
    expected = F.linear(F.linear(x, layer.down), layer.up) / 2
    assert torch.equal(F.linear(x, layer.delta((outputs, inputs))), expected)


@pytest.mark.parametrize(("kernel", "up"), [(3, (5, 2, 1, 1)), (3, (5, 2)), (1, (5, 2, 1, 1))])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_s_delta_is_its_two_maps_in_a_row(kernel, up, stride):
    layer = LoraLayer(whole(2, 4, kernel, kernel, seed=1), whole(*up, seed=2), alpha=8.0)
    x = whole(2, 4, 6, 7, seed=3)
    low = F.conv2d(x, layer.down, stride=stride, padding=kernel // 2)
    found = F.conv2d(x, layer.delta((5, 4, kernel, kernel)), stride=stride, padding=kernel // 2)
    assert torch.equal(found, 4 * F.conv2d(low, layer.up.reshape(5, 2, 1, 1)))


def test_linear_maps_and_1x1_convolutions_take_each_other_s():
    linear = LoraLayer(noise(2, 4), noise(5, 2, seed=1), alpha=1.0)
    conv = LoraLayer(linear.down[..., None, None], linear.up[..., None, None], alpha=1.0)
    assert torch.equal(linear.delta((5, 4, 1, 1))[..., 0, 0], linear.delta((5, 4)))
    assert torch.equal(conv.delta((5, 4)), linear.delta((5, 4)))
    assert torch.equal(conv.delta((5, 4, 1, 1)), linear.delta((5, 4, 1, 1)))


@pytest.mark.parametrize("shape", [(4, 5), (20,), (5, 4, 3, 3), (5, 4, 1, 3), (5, 2, 2, 1), (5, 4, 4)])
def test_equal_sizes_or_broadcasts_are_no_fit(shape):
    assert not LoraLayer(noise(2, 4), noise(5, 2), alpha=1.0).fits(shape)


def test_a_3x3_convolution_is_no_wide_linear_map():
    layer = LoraLayer(noise(2, 4, 3, 3), noise(5, 2, 1, 1), alpha=1.0)
    assert layer.fits((5, 4, 3, 3))
    assert not layer.fits((5, 36))
    assert not LoraLayer(noise(2, 36), noise(5, 2), alpha=1.0).fits((5, 4, 3, 3))


def test_half_precision_factors_are_multiplied_in_float32():
    layer = LoraLayer(noise(64, 32).half(), noise(48, 64, seed=1).half(), alpha=8.0)
    found = layer.delta((48, 32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), layer.up.double() @ layer.down.double() / 8, rtol=1e-5, atol=1e-5)


@given(
    rank=st.integers(1, 4),
    alpha=st.floats(0.0078125, 100, width=32),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(max_examples=15, deadline=None)
def test_written_and_read_is_the_same_bit_for_bit(rank, alpha, seed, dtype, tmp_path_factory):
    lora = {
        Q: LoraLayer(noise(rank, 6, seed=seed).to(dtype), noise(5, rank, seed=seed + 1).to(dtype), alpha),
        CONV: LoraLayer(noise(rank, 3, 3, 3, seed=seed).to(dtype), noise(7, rank, 1, 1).to(dtype), alpha / 2),
        MLP: LoraLayer(noise(rank, 2, seed=seed).to(dtype), noise(8, rank).to(dtype), float(rank)),
    }
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    write_lora(lora, path, metadata={"modelspec.title": "x"}, dtype=dtype)
    again = read_lora(path, MODULES)
    assert same_bits(again, lora)
    assert {layer.down.dtype for layer in again.values()} == {dtype}
    assert read_metadata(path)["modelspec.title"] == "x"


def test_half_precision_is_the_default_and_the_only_rounding(tmp_path):
    layer = LoraLayer(noise(2, 6), noise(5, 2), alpha=1e-9)
    write_lora({Q: layer}, tmp_path / "x.safetensors", metadata={})
    half = LoraLayer(layer.down.half(), layer.up.half(), alpha=torch.tensor(1e-9).item())
    assert same_bits(read_lora(tmp_path / "x.safetensors", MODULES), {Q: half})


@pytest.mark.parametrize("config", [TINY, UNetConfig(cross_attention_dim=768)], ids=["tiny", "sd15"])
def test_every_module_of_the_network_has_a_name_of_its_own(config, tmp_path):
    """Underscores could make two paths one name; every module's own number comes back from the file."""
    modules = network(config, MotionConfig(num_attention_heads=4, norm_num_groups=8))
    lora = {module: LoraLayer(torch.ones(1, 1), torch.ones(1, 1), alpha=i) for i, module in enumerate(modules)}
    write_lora(lora, tmp_path / "x.safetensors", metadata={})
    again = read_lora(tmp_path / "x.safetensors", reversed(modules))
    assert len(again) == len(set(modules)) > 100
    assert {module: layer.alpha for module, layer in again.items()} == {m: i for i, m in enumerate(modules)}


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_a_text_encoder_s_two_ways_of_naming_are_one_file(prefix, tmp_path):
    modules = [f"{prefix}encoder.layers.{i}.self_attn.{name}" for i in (0, 11) for name in ("q_proj", "out_proj")]
    lora = {module: LoraLayer(noise(1, 3), noise(2, 1), alpha=i + 0.5) for i, module in enumerate(modules)}
    write_lora(lora, tmp_path / "x.safetensors", metadata={}, dtype=torch.float32)
    assert "lora_te_text_model_encoder_layers_11_self_attn_out_proj.alpha" in load_file(tmp_path / "x.safetensors")
    assert same_bits(read_lora(tmp_path / "x.safetensors", modules), lora)
    # PEFT names of the one way for a model of the other way.
    for theirs in ("text_encoder.", "text_encoder.text_model."):
        state = {}
        for module, layer in lora.items():
            name = theirs + module.removeprefix(prefix)
            state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        save_file(state, tmp_path / "peft.safetensors")
        again = read_lora(tmp_path / "peft.safetensors", modules)
        assert all(torch.equal(again[module].down, lora[module].down) for module in modules)


def test_diffusers_finds_the_same_modules_and_alphas(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    modules = [module for module in network(TINY, None) if module.endswith(LCM_TARGETS)]
    assert {end for end in LCM_TARGETS for module in modules if module.endswith(end)} == set(LCM_TARGETS)
    lora = {m: LoraLayer(torch.full((1, 1), i), torch.full((1, 1), -i), alpha=i) for i, m in enumerate(modules, 1)}
    write_lora(lora, tmp_path / "x.safetensors", metadata={}, dtype=torch.float32)
    state, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "x.safetensors"))
    theirs = {key: value.item() for key, value in convert_unet_state_dict_to_peft(state).items()}
    assert theirs == {f"{m}.lora_A.weight": i for i, m in enumerate(modules, 1)} | {
        f"{m}.lora_B.weight": -i for i, m in enumerate(modules, 1)
    }
    assert sorted(alphas.values()) == list(range(1, len(modules) + 1))


@pytest.mark.parametrize("name", ["unet.{}", "base_model.model.unet.{}", "unet.base_model.model.{}"])
@pytest.mark.parametrize(("facts", "alpha"), [({"unet.lora_alpha": 8, "unet.r": 2}, 8), ({}, 2), (None, 2)])
def test_peft_keys_with_the_alpha_of_their_header(name, facts, alpha, tmp_path):
    stem, down, up = name.format(Q.removeprefix("unet.")), noise(2, 6), noise(5, 2)
    metadata = None if facts is None else {"lora_adapter_metadata": json.dumps(facts)}
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "x.safetensors", metadata)
    assert same_bits(read_lora(tmp_path / "x.safetensors", MODULES), {Q: LoraLayer(down, up, alpha)})


@pytest.mark.parametrize(
    "facts",
    [
        "{damaged",
        '["unet.lora_alpha"]',
        '{"unet.lora_alpha": "eight"}',
        '{"unet.lora_alpha": Infinity}',
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        '{"unet.lora_alpha": 1e300}',
        '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": ["to_q"]}',
        '{"unet.alpha_pattern": {"to_q": [1]}}',
        json.dumps({"unet.alpha_pattern": {f"a{i}": 1 for i in range(10_001)}}),
        "[" * 10**6,
        '{"unet.alpha_pattern": ' + '{"to_q":' * 10**6,
    ],
    ids=lambda facts: facts[:40],
)
def test_headers_that_would_be_misread_are_refused(facts, tmp_path):
    state = {f"{Q}.lora_A.weight": noise(2, 6), f"{Q}.lora_B.weight": noise(5, 2)}
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": facts})
    with pytest.raises(ValueError, match=r"x\.safetensors: its lora_adapter_metadata is damaged"):
        read_lora(tmp_path / "x.safetensors", MODULES)


HOSTILE = ["((a|a)*)*b", "(.*.*.*)*x", "([a-z0-9_.]+)+!", "(.*)*$", "a{9999}{9999}", "(?:" * 10**4, "to_(q", "q+"]


@pytest.mark.parametrize(
    "pattern", [*HOSTILE, "a|b", "x.*y", ".*to_q.*", "^^a", "a$$", "\\d", "a\\", "\u0661", "a\n", "[q]"]
)
def test_patterns_that_are_more_than_a_name_are_refused(pattern, tmp_path):
    state = {f"{Q}.lora_A.weight": noise(2, 6), f"{Q}.lora_B.weight": noise(5, 2)}
    facts = json.dumps({"unet.alpha_pattern": {"to_k": 1, pattern: 4}})
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": facts})
    with pytest.raises(ValueError, match=r"x\.safetensors: its lora_adapter_metadata has the pattern") as caught:
        read_lora(tmp_path / "x.safetensors", MODULES)
    assert repr(pattern[:80]) in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["." * 10**5, "a." * 10**5, "\\." * 10**5, "to_q" + ".*" * 10**5, "to_q" * 10**5 + "("]
)
def test_long_patterns_take_no_time(pattern, tmp_path):
    before = time.process_time()
    found = Pattern.parse(pattern)
    assert found is None or not found.fits(Q)
    assert time.process_time() - before < 1


NAMES = [
    *(
        "to_q",
        "attn1.to_q",
        "xattn1.to_q",
        "attn1_to_q",
        "a.attn1.to_q",
        "a.battn1.to_q",
        "a.attn1xto_q",
        "a.attn1.to_q.0",
    ),
    *("mid_block.a.to_q", "b.mid_block.a", "mid_block", "mid_blocks.a", "a-b.to_q", "to_q.", "", "a", "."),
]
"""Of modules, as near to each other as can be."""
CORES = ["to_q", "attn1.to_q", r"attn1\.to_q", "mid_block", r"a\-b.to_q", "a-b", r"\.to_q", ".to_q", "q", "", ".", "a."]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("end", ["", "$", ".*", ".*$"])
@pytest.mark.parametrize("begin", ["", "^", ".*", "^.*"])
def test_patterns_fit_what_they_fit_in_peft(begin, core, end):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    text = begin + core + end
    if (found := Pattern.parse(text)) is None:
        assert "*" in begin
        assert "*" in end
        return
    assert [found.fits(name) for name in NAMES] == [get_pattern_key([text], name) is text for name in NAMES]


@given(st.text("ab.", max_size=6), st.text("ab.", max_size=4), st.sampled_from(["", "^", ".*"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_name_fits_as_python_s_expressions_do(name, core, begin, escaped):
    text = begin + (core.replace(".", r"\.") if escaped else core)
    assert Pattern.parse(text).fits(name) == bool(re.match(rf"(.*\.)?({text})$", name))


@pytest.mark.parametrize(("alpha", "expected"), [(None, 2), (torch.tensor(8), 8), (torch.tensor([0.5]).half(), 0.5)])
def test_alpha_is_the_rank_if_absent_and_may_be_whole(alpha, expected, tmp_path):
    state = {f"{KOHYA_Q}.lora_down.weight": noise(2, 6), f"{KOHYA_Q}.lora_up.weight": noise(5, 2)}
    save_file(state | ({} if alpha is None else {f"{KOHYA_Q}.alpha": alpha}), tmp_path / "x.safetensors")
    assert read_lora(tmp_path / "x.safetensors", MODULES)[Q].alpha == expected


DOWN, UP = f"{KOHYA_Q}.lora_down.weight", f"{KOHYA_Q}.lora_up.weight"
NAN = torch.full((2, 6), math.nan)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": noise(2, 6)}, None, "this architecture"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": noise(1)}, None, "this architecture"),
        ({"transformer.to_q.lora_A.weight": noise(2, 6)}, None, "this architecture"),
        ({f"{KOHYA_Q}.dora_scale": noise(5, 1)}, None, "DoRA"),
        ({f"{KOHYA_Q}.lora_C.weight": noise(5, 1)}, None, "no part of a plain LoRA"),
        ({f"{Q}.lora_B.bias": noise(5)}, None, "no part of a plain LoRA"),
        ({f"{Q}.alpha": noise(1), f"{KOHYA_Q}.alpha": noise(1)}, f"{Q}.alpha", "second"),
        ({UP: None}, DOWN, "no lora_up.weight beside it"),
        ({DOWN: None}, UP, "no lora_down.weight beside it"),
        ({f"{Q}.lora_B.weight": noise(5, 2)}, None, "no lora_A.weight beside it"),
        ({"lora_unet_mid_block_resnets_0_conv1.alpha": noise(1)}, None, "no factors beside it"),
        ({f"{KOHYA_Q}.alpha": noise(2)}, None, "one number"),
        ({f"{KOHYA_Q}.alpha": torch.tensor([8, 8])}, None, "one number"),
        ({f"{KOHYA_Q}.alpha": noise(0)}, None, "one number"),
        ({f"{KOHYA_Q}.alpha": torch.tensor(True)}, None, "a real number"),
        ({f"{KOHYA_Q}.alpha": torch.tensor(math.inf)}, None, "not finite"),
        ({DOWN: NAN}, None, "not finite"),
        ({UP: torch.full((5, 2), math.inf).half()}, None, "not finite"),
        ({DOWN: torch.ones(2, 6, dtype=torch.int64)}, None, "torch.int64"),
        ({DOWN: noise(3, 6)}, None, r"down \(3, 6\)"),
        ({UP: noise(5, 2, 3, 3)}, DOWN, r"up \(5, 2, 3, 3\)"),
        ({UP: noise(2)}, DOWN, r"up \(2,\)"),
        ({DOWN: noise(0, 6), UP: noise(5, 0)}, DOWN, r"down \(0, 6\)"),
        ({f"{Q}.lora_A.weight": noise(2, 6), f"{Q}.lora_B.weight": noise(5, 2)}, f"{Q}.lora_A.weight", "second"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(changes, key, reason, tmp_path):
    state = {DOWN: noise(2, 6), UP: noise(5, 2), **changes}
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=reason) as caught:
        read_lora(tmp_path / "x.safetensors", MODULES)
    assert f"{tmp_path / 'x.safetensors'}: {key or next(iter(changes))} " in str(caught.value)


def test_the_first_of_many_wrong_keys_is_named(tmp_path):
    state = {f"lora_unet_{name}.lora_down.weight": noise(2, 6) for name in ("zebra", "ant", "mouse")}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"lora_unet_ant\.lora_down"):
        read_lora(tmp_path / "x.safetensors", MODULES)


@pytest.mark.parametrize(("state", "named"), [({"b.weight": noise(2), "a.bias": noise(2)}, "a.bias"), ({}, "missing")])
def test_other_weight_files_are_no_loras(state, named, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors is no LoRA.*{named}"):
        read_lora(tmp_path / "x.safetensors", MODULES)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_hashes_are_of_what_follows_the_header(layout, tmp_path):
    path = tmp_path / "x.safetensors"
    lora = {Q: LoraLayer(noise(2, 6), noise(5, 2), alpha=1.0), CONV: LoraLayer(noise(2, 3, 3, 3), noise(7, 2), 2.0)}
    write_lora(lora, path, metadata={"sshs_model_hash": "of another file", "modelspec.title": "x"}, layout=layout)
    content = path.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    found = read_metadata(path)
    assert (found["modelspec.hash_sha256"], found["sshs_model_hash"]) == (f"0x{digest}", digest)


@pytest.mark.parametrize("layout", ["kohya", "peft", "animatediff"])
@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alphas_that_are_not_finite_leave_no_file(alpha, layout, tmp_path):
    lora = {Q: LoraLayer(noise(2, 6), noise(5, 2), alpha)}
    with pytest.raises(ValueError, match=rf"x\.safetensors: the alpha of {Q} is {alpha}"):
        write_lora(lora, tmp_path / "x.safetensors", metadata={}, layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1e5, math.nan])
def test_numbers_that_the_file_cannot_hold_leave_no_file(value, tmp_path):
    lora = {Q: LoraLayer(torch.full((2, 6), value), noise(5, 2), alpha=1.0)}
    with pytest.raises(ValueError, match=rf"{KOHYA_Q}\.lora_down.*float16"):
        write_lora(lora, tmp_path / "x.safetensors", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("base", "architecture"), [("sd15", "stable-diffusion-v1"), ("emoji", "animatelcm-emoji")])
def test_the_header_has_what_modelspec_requires(base, architecture, tmp_path):
    facts = modelspec(title="Chalk", kind="style", base=base, rank=4, alpha=2, date="2024-02-29")
    write_lora({Q: LoraLayer(noise(4, 6), noise(5, 4), alpha=2.0)}, tmp_path / "x.safetensors", metadata=facts)
    found = read_metadata(tmp_path / "x.safetensors")
    required = {f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title")}
    assert required <= {key for key, value in found.items() if value}
    assert found["modelspec.architecture"] == f"{architecture}/lora"
    assert (int(found["ss_network_dim"]), float(found["ss_network_alpha"])) == (4, 2)
