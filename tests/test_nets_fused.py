from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from animatelcm.nets import fused, lean, lora
from animatelcm.nets.layers import FeedForward, GroupNorm, Linear
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import VideoUNet
from networks import SMALL


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def acting_unet() -> VideoUNet:
    torch.manual_seed(0)
    unet = VideoUNet(SMALL, MotionConfig(num_attention_heads=2, norm_num_groups=4)).eval()
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return unet


def both(call) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call gives where no gradients are wanted, and by torch's own operations."""
    with torch.inference_mode():
        fast = call()
    with torch.enable_grad():
        return fast.clone(), call().detach()


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_a_linear_map_is_its_formula_in_float64(bias, residual) -> None:
    x, weight = noise(3, 5, 7), noise(4, 7, seed=1)
    b, r = noise(4, seed=2) if bias else None, noise(3, 5, 4, seed=3) if residual else None
    exact = x.double() @ weight.double().T + (0 if b is None else b.double()) + (0 if r is None else r.double())
    for result in both(lambda: fused.linear(x, weight, b, r)):
        close(result.double(), exact)


def test_a_linear_map_takes_any_memory_order() -> None:
    x, weight, b = noise(6, 5, 7).transpose(0, 1), noise(4, 7, seed=1), noise(4, seed=2)
    fast, plain = both(lambda: fused.linear(x, weight, b))
    close(fast, plain)
    assert fast.shape == (5, 6, 4)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_torchs(order) -> None:
    x, weight, bias = noise(3, 6, 4, 5).contiguous(memory_format=order), noise(7, 6, 1, 1, seed=1), noise(7, seed=2)
    fast, _ = both(lambda: fused.pointwise(x, weight, bias))
    close(fast, F.conv2d(x, weight, bias))
    if order == torch.channels_last:
        assert fast.is_contiguous(memory_format=order)


def test_a_gate_is_the_exact_gelu() -> None:
    x, weight, bias = 4 * noise(9, 7), noise(10, 7, seed=1), noise(10, seed=2)
    value, gate = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=-1)
    exact = value * gate * torch.special.ndtr(gate)
    for result in both(lambda: fused.geglu(x, weight, bias)):
        close(result.double(), exact, atol=1e-4)  # values of a few hundred


@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_is_its_formula_and_leaves_its_input(silu) -> None:
    x = noise(3, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    before, weight, bias = x.clone(), noise(8, seed=1), noise(8, seed=2)
    y = x.double().reshape(3, 2, -1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    exact = y.view(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    exact = exact * torch.sigmoid(exact) if silu else exact
    for result in both(lambda: fused.group_norm(x, 2, weight, bias, 1e-5, silu=silu)):
        close(result.double(), exact)
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_that_keeps_less_is_the_cpus_alone(device, monkeypatch) -> None:
    """Other devices may refuse the memory order that its bare operation gets."""
    taken, norm = [], lean.norm_silu
    monkeypatch.setattr(lean, "norm_silu", lambda *given: (taken.append(given[0].device.type), norm(*given))[1])
    x = torch.ones(3, 8, 4, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = fused.group_norm(x, 2, torch.ones(8, device=device), torch.zeros(8, device=device), 1e-5, silu=True)
    assert y.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert taken == ["cpu"] * (device == "cpu")


@torch.inference_mode()
def test_a_doubled_image_is_convolved_with_what_was_kept() -> None:
    x, weight, bias = noise(3, 6, 4, 5).contiguous(memory_format=torch.channels_last), noise(8, 6, 3, 3), noise(8)
    exact, kept = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1), {}
    close(fused.doubled(x, weight, bias, kept), exact)
    assert list(kept) == [weight]
    assert len(kept[weight]) == 4
    close(fused.doubled(x, 0 * weight, bias, {}), bias[:, None, None].expand_as(exact))
    again = fused.doubled(2 * x, weight, bias, kept) - bias[:, None, None]
    close(again, 2 * (exact - bias[:, None, None]), atol=1e-4)


@pytest.mark.parametrize("limit", [0, fused.SMALL_KERNEL])
def test_a_convolution_keeps_small_weights_as_the_device_has_them(limit, monkeypatch) -> None:
    monkeypatch.setattr(fused, "SMALL_KERNEL", limit)
    x = noise(3, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    weights, biases, kept = [noise(8, 6, 3, 3, seed=i) for i in (1, 2)], noise(2, 8, seed=3), {}
    with torch.inference_mode():
        for weight, bias in zip([*weights, *weights], [*biases, *biases], strict=True):
            y = fused.convolution(x, weight, bias, kept)
            close(y, F.conv2d(x, weight, bias, padding=1))
            assert y.is_contiguous(memory_format=torch.channels_last)
    assert len(kept) == (2 if limit else 0)


@pytest.mark.parametrize("limit", [0, fused.SMALL_SCORES])
def test_attention_is_its_formula_spelled_out_or_not(limit, monkeypatch) -> None:
    monkeypatch.setattr(fused, "SMALL_SCORES", limit)
    q, k, v = (noise(2, n, 3, 5, seed=i).transpose(1, 2) for i, n in enumerate((4, 6, 6)))
    weights = (q.double() @ k.double().transpose(-1, -2) / 5**0.5).softmax(-1)
    for result in both(lambda: fused.attention(q, k, v)):
        close(result.double(), weights @ v.double(), atol=1e-6)


def test_attention_survives_scores_that_overflow_an_exponential() -> None:
    q = k = v = 100 * noise(1, 1, 4, 8)
    fast, plain = both(lambda: fused.attention(q, k, v))
    assert plain.isfinite().all()
    close(fast, plain)


def test_attention_has_torchs_gradients() -> None:
    q, k, v = (noise(2, 3, n, 5, seed=i).requires_grad_() for i, n in enumerate((4, 6, 6)))
    ours = torch.autograd.grad(fused.attention(q, k, v).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_the_network_draws_the_same_with_and_without_gradients() -> None:
    unet, x, t, text = acting_unet(), noise(2, 4, 3, 8, 6), torch.tensor([3, 900]), noise(2, 7, 6)
    fast, plain = both(lambda: unet(x, t, text))
    assert plain.std() > 0.1
    close(fast, plain)


def test_what_is_remembered_is_what_would_be_computed() -> None:
    unet, x, text = acting_unet(), noise(2, 4, 3, 8, 6), noise(2, 7, 6)
    times = [999, 499, 3]
    with torch.inference_mode():
        remembered = unet.remember(torch.tensor(times), text)
        assert len(remembered) == 3
        assert remembered[0].text is remembered[2].text
        for t, part in zip(times, remembered, strict=True):
            close(unet(x, torch.tensor([t, t]), text, remembered=part), unet(x, torch.tensor([t, t]), text), atol=1e-6)
        swapped = unet(x, torch.tensor([999, 999]), text, remembered=remembered[2])
        assert (swapped - unet(x, torch.tensor([999, 999]), text)).abs().max() > 1e-3


def test_what_is_remembered_is_not_computed_again(monkeypatch) -> None:
    unet, x, text = acting_unet(), noise(1, 4, 3, 8, 6), noise(1, 7, 6)
    with torch.inference_mode():
        (remembered,) = unet.remember(torch.tensor([999]), text)
        seen: list[int] = []
        kept = Linear.forward
        monkeypatch.setattr(Linear, "forward", lambda self, x, *more: (seen.append(id(self)), kept(self, x, *more))[1])
        unet(x, torch.tensor([999]), text, remembered=remembered)
    names = {id(module): name for name, module in unet.named_modules()}
    used = {names[key] for key in seen}
    assert used
    assert not [
        name
        for name in used
        if "time_emb" in name or (name.endswith(("attn2.to_k", "attn2.to_v")) and "motion" not in name)
    ]


def test_layers_of_a_lora_take_the_place_of_every_kind() -> None:
    unet, x, t, text = acting_unet(), noise(1, 4, 3, 8, 6), torch.tensor([500]), noise(1, 7, 6)
    with torch.no_grad():
        before = unet(x, t, text)
    kinds = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv1")
    lora.inject(unet, rank=2, alpha=2.0, targets=kinds)
    with torch.no_grad():
        close(unet(x, t, text), before)  # B is zero
        for _, b, _ in lora.factors(unet).values():
            torch.nn.init.normal_(b)
    fast, plain = both(lambda: unet(x, t, text))
    assert (plain - before).abs().max() > 0.01
    close(fast, plain)


def test_feed_forward_and_norm_go_the_fast_way_by_themselves(monkeypatch) -> None:
    called = []
    kept = fused.geglu
    monkeypatch.setattr(fused, "geglu", lambda *given: (called.append("geglu"), kept(*given))[1])
    with torch.inference_mode():
        FeedForward(6)(noise(3, 6))
        y = GroupNorm(2, 8, silu=True)(noise(3, 8, 4, 5).contiguous(memory_format=torch.channels_last))
    assert called == ["geglu"]
    assert y.min() > -0.3  # SiLU's least is -0.278


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 5)])
def test_a_doubling_in_one_is_a_doubling_in_two(size) -> None:
    """Repetition and convolution, in float64 and with channels that differ."""
    x, weight, bias = noise(2, 3, *size), noise(5, 3, 3, 3, seed=1), noise(5, seed=2)
    repeated = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(repeated, weight.double(), bias.double(), padding=1)
    for result in both(lambda: fused.doubled(x, weight, bias)):
        close(result.double(), expected)


def test_under_autocast_torch_converts() -> None:
    unet, x, t, text = acting_unet(), noise(1, 4, 3, 8, 6), torch.tensor([500]), noise(1, 7, 6)
    with torch.inference_mode():
        exact = unet(x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            half = unet(x, t, text)
    close(half, exact, atol=0.1)
    assert not torch.equal(half, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_near(dtype) -> None:
    unet, x, t, text = acting_unet(), noise(1, 4, 3, 8, 6), torch.tensor([500]), noise(1, 7, 6)
    with torch.inference_mode():
        exact, half = unet(x, t, text), unet.to(dtype)(x, t, text)
    assert half.dtype == torch.float32  # that of the latents
    close(half, exact, atol=0.1)
