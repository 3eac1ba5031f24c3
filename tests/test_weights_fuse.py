from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from animatelcm.nets.unet import VideoUNet
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import Lora, LoraLayer, write_lora
from lora_files import TINY

Q, CONV, FREE = "unet.attn1.to_q", "unet.conv1", "unet.conv2"
SHAPES = {Q: (5, 6), CONV: (7, 3, 3, 3), FREE: (4, 4, 1, 1)}
SCALES = st.floats(-2, 2, width=32).filter(lambda scale: abs(scale) > 1e-3)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": noise(*shape, seed=9).to(dtype) for module, shape in SHAPES.items()}


def lora(seed: int, modules: tuple[str, ...] = (Q, CONV)) -> Lora:
    layers = {}
    for module in modules:
        out, *rest = SHAPES[module]
        layers[module] = LoraLayer(noise(2, *rest, seed=seed), noise(out, 2, seed=seed + 50), alpha=1.0 + seed / 8)
    return layers


def exactly(layer: LoraLayer, shape: torch.Size) -> torch.Tensor:
    """A delta in float64, term by term of the outer products."""
    terms = [torch.outer(layer.up[:, r].double(), layer.down[r].double().flatten()) for r in range(layer.rank)]
    return (layer.alpha / layer.rank * sum(terms)).reshape(shape)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, so that -0 is not 0 and a NaN is itself."""
    return a.keys() == b.keys() and all(torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)) for key in a)


@given(st.lists(st.tuples(st.integers(0, 20), SCALES), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_is_the_float64_sum(parts):
    base, found = weights(), fused(weights(), [(lora(seed), scale) for seed, scale in parts])
    assert found.keys() == {f"{Q}.weight", f"{CONV}.weight"}
    for key, value in found.items():
        deltas = [scale * exactly(lora(seed)[key.removesuffix(".weight")], value.shape) for seed, scale in parts]
        expected = base[key].double() + sum(deltas)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)


@given(SCALES, SCALES, st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_is_linear_in_the_scales(a, b, seed):
    one, apart = fused(weights(), [(lora(seed), a + b)]), fused(weights(), [(lora(seed), a), (lora(seed), b)])
    for key, value in apart.items():
        torch.testing.assert_close(one.get(key, weights()[key]), value, rtol=1e-6, atol=1e-5)


@given(st.permutations(range(3)), st.lists(SCALES, min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_order_of_parts_is_the_order_of_a_sum(order, scales):
    """Float32 sums of four terms in any order differ by at most a rounding of each partial sum."""
    parts = [(lora(seed), scale) for seed, scale in enumerate(scales)]
    one, other = fused(weights(), parts), fused(weights(), [parts[i] for i in order])
    for key, value in one.items():
        deltas = [scale * exactly(part[key.removesuffix(".weight")], value.shape) for part, scale in parts]
        size = weights()[key].double().abs() + sum(delta.abs() for delta in deltas)
        assert ((value - other[key]).abs() <= 6 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scale_0_is_the_base_bit_for_bit(dtype):
    base = weights(dtype)
    base[f"{Q}.weight"][0, :2] = torch.tensor([-0.0, math.nan])
    assert fused(base, [(lora(1), 0.0), (lora(2), -0.0)]) == {}
    assert fused(base, []) == {}
    acting = [(lora(3), 0.5)]
    silent = [(lora(1), 0.0), *acting, (lora(2, (Q, CONV, FREE)), 0.0)]
    assert same(fused(base, silent), fused(base, acting))


def test_a_part_taken_away_leaves_the_base():
    base = {f"{Q}.weight": noise(5, 6).abs().ceil()}
    part = {Q: LoraLayer(torch.ones(2, 6), torch.ones(5, 2), alpha=4.0)}
    there = fused(base, [(part, 1.0)])
    assert torch.equal(there[f"{Q}.weight"], base[f"{Q}.weight"] + 4)
    assert same(fused({**base, **there}, [(part, -1.0)]), {f"{Q}.weight": base[f"{Q}.weight"]})


def test_only_what_a_part_changes_is_there():
    parts = [(lora(1, (Q,)), 1.0), (lora(2, (FREE,)), 1.0)]
    together = fused(weights(), parts)
    assert same(together, {**fused(weights(), parts[:1]), **fused(weights(), parts[1:])})
    assert together.keys() == {f"{Q}.weight", f"{FREE}.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Each of 200 parts is less than half a step of the base's precision; together they are 0.04."""
    base = {f"{Q}.weight": torch.ones(5, 6, dtype=dtype)}
    part = {Q: LoraLayer(torch.full((1, 6), 2e-4), torch.ones(5, 1), alpha=1.0)}
    found = fused(base, [(part, 1.0)] * 200)[f"{Q}.weight"]
    assert found.dtype == dtype
    assert torch.equal(found, torch.full((5, 6), 1.04, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keeps_the_memory_format_and_shares_no_memory(dtype):
    network = torch.nn.ParameterDict({"w": weights(dtype)[f"{CONV}.weight"]}).to(memory_format=torch.channels_last)
    base = {f"{CONV}.weight": network["w"], f"{FREE}.weight": weights(dtype)[f"{FREE}.weight"]}
    kept = {key: value.detach().clone() for key, value in base.items()}
    found = fused(base, [(lora(1, (CONV, FREE)), 1.0)])
    assert not found[f"{CONV}.weight"].is_contiguous()
    assert not any(value.requires_grad for value in found.values())
    for key, value in base.items():
        assert (found[key].stride(), found[key].dtype) == (value.stride(), value.dtype)
        assert torch.equal(value, kept[key])
        assert not torch.equal(value, found[key])


def test_stays_on_the_device_of_the_base():
    base = {key: value.to("meta") for key, value in weights().items()}
    assert {value.device.type for value in fused(base, [(lora(1), 1.0)]).values()} == {"meta"}


def test_a_module_that_the_model_lacks_is_named():
    part = lora(1, (Q, CONV, FREE))
    with pytest.raises(ValueError, match=rf"^{CONV}\.weight is changed"):
        fused({f"{Q}.weight": weights()[f"{Q}.weight"]}, [(lora(2, (Q,)), 1.0), (part, 0.0)])


def test_a_shape_that_does_not_fit_is_explained():
    part = {Q: LoraLayer(noise(2, 8), noise(5, 2), alpha=1.0)}
    with pytest.raises(ValueError, match=rf"{Q}\.weight is \(5, 6\) in the model, and the LoRA is for \(5, 8\)"):
        fused(weights(), [(part, 1.0)])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_are_finite(scale):
    with pytest.raises(ValueError, match=f"scale={scale}"):
        fused(weights(), [(lora(1), scale)])


@torch.no_grad()
def test_diffusers_draws_from_the_file_what_the_sum_draws(tmp_path):
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    config = TINY
    torch.manual_seed(0)
    ours = VideoUNet(config, None).eval()
    theirs = UNet2DConditionModel.from_config(config.to_diffusers()).eval()
    theirs.load_state_dict(ours.state_dict())
    base = {f"unet.{key}": value for key, value in ours.state_dict().items()}
    part: Lora = {}
    for key, value in base.items():
        if value.dim() > 1:
            down, up = noise(2, *value.shape[1:], seed=len(part)), noise(value.shape[0], 2, *[1] * (value.dim() - 2))
            # One alpha: diffusers 0.42 hands PEFT those of attention layers under names that it does not find.
            part[key.removesuffix(".weight")] = LoraLayer(0.2 * down, 0.2 * up, alpha=3.0)
    write_lora(part, tmp_path / "x.safetensors", metadata={}, dtype=torch.float32)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "x.safetensors"))
    theirs.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="lcm")
    theirs.set_adapters(["lcm"], [0.7])

    x, t, text = noise(2, 4, 1, 8, 8), torch.tensor([3, 987]), noise(2, 7, 12, seed=1)
    before = ours(x, t, text)
    changed = fused(base, [(part, 0.7)])
    ours.load_state_dict({key.removeprefix("unet."): value for key, value in changed.items()}, strict=False)
    after = ours(x, t, text)
    torch.testing.assert_close(after[:, :, 0], theirs(x[:, :, 0], t, text).sample, atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-2
