from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from animatelcm.nets import fused
from animatelcm.nets.layers import Attention, FeedForward, Folded, GroupNorm, TimeEmbedding
from animatelcm.nets.unet import UNetConfig


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v, one head after the other."""
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    width = q.shape[-1] // attention.heads
    heads = [
        torch.softmax(a @ b.transpose(1, 2) / width**0.5, dim=-1) @ c
        for a, b, c in zip(q.split(width, -1), k.split(width, -1), v.split(width, -1), strict=True)
    ]
    return attention.to_out(torch.cat(heads, dim=-1))


@torch.no_grad()
def test_attention_is_its_formula() -> None:
    x, context = noise(2, 5, 12), noise(2, 7, 8, seed=1)
    itself, other = Attention(12, 3), Attention(12, 3, 8)
    torch.testing.assert_close(itself(x), by_hand(itself, x, x), atol=1e-6, rtol=0)
    torch.testing.assert_close(other(x, context), by_hand(other, x, context), atol=1e-6, rtol=0)


@torch.no_grad()
def test_frames_share_the_context_of_their_video() -> None:
    attention = Attention(12, 3, 8)
    frames, context = noise(2 * 4, 5, 12), noise(2, 7, 8, seed=1)
    repeated = attention(frames, context.repeat_interleave(4, 0))
    torch.testing.assert_close(attention(frames, context), repeated, atol=1e-6, rtol=0)
    attention.to_k.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    seen: list[int] = []
    attention(frames, context)
    assert seen == [2]


@pytest.mark.parametrize("length", [5, 40])
@torch.inference_mode()
def test_a_folded_context_is_attended_to_as_it_would_be(length) -> None:
    attention, x, context = Attention(12, 3, 8), noise(2 * 4, 5, 12), noise(2, length, 8, seed=1)
    known = attention.fold(context)
    assert isinstance(known, Folded) == (length == 5)  # a long one is more work folded
    expected = by_hand(attention, x, context.repeat_interleave(4, 0))
    torch.testing.assert_close(attention(x, {attention: known}), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        attention(x[:4], {attention: attention.fold(context[:1])}), expected[:4], atol=1e-6, rtol=0
    )


def test_nothing_is_folded_where_gradients_are_wanted() -> None:
    assert not isinstance(Attention(12, 3, 8).fold(noise(2, 5, 8)), Folded)


def spy_on_products(monkeypatch) -> list[int]:
    """How many channels each product makes."""
    widths, linear = [], fused.linear
    monkeypatch.setattr(fused, "linear", lambda x, w, *more: (widths.append(len(w)), linear(x, w, *more))[1])
    return widths


@pytest.mark.parametrize("frozen", [(), ("to_q",), ("to_k", "to_v"), ("to_q", "to_k", "to_v")])
def test_joined_weights_are_trained_as_they_would_be_apart(frozen, monkeypatch) -> None:
    joined, x = Attention(12, 3), noise(2, 5, 12).requires_grad_()
    for name in frozen:
        getattr(joined, name).requires_grad_(False)
    apart, widths = copy.deepcopy(joined), spy_on_products(monkeypatch)
    joined.join()
    results = []
    for attention in (joined, apart):
        widths.clear()
        wanted = [x, *(p for p in attention.parameters() if p.requires_grad)]
        y = attention(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        assert (36 in widths) == (attention is joined and len(frozen) == 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_joined_weights_are_one_product_where_nothing_is_trained(monkeypatch) -> None:
    attention, x, widths = Attention(12, 3), noise(2, 5, 12), spy_on_products(monkeypatch)
    expected = attention(x)
    assert widths == [12, 12, 12, 12]
    widths.clear()
    attention.join()
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=0)
    assert widths == [36, 12]


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="10 channels do not split into 4"):
        Attention(10, 4)


@torch.no_grad()
def test_feed_forward_is_its_formula() -> None:
    feed, x = FeedForward(6), noise(3, 6)
    value, gate = (feed.net[0].proj(x)[:, :24], feed.net[0].proj(x)[:, 24:])
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(feed(x), feed.net[2](value * gate * normal.cdf(gate)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("trained_input", [True, False])
def test_group_norm_has_torchs_gradients_whatever_is_frozen(trained_input) -> None:
    x = noise(3, 8, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_(trained_input)
    ours, theirs = GroupNorm(2, 8), torch.nn.GroupNorm(2, 8)
    plain = x.detach().contiguous().requires_grad_(trained_input)
    weight = noise(3, 8, 4, 5, seed=1)
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (y * weight).sum().backward()
    (theirs(plain) * weight).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, atol=1e-5, rtol=1e-5)
    if trained_input:
        torch.testing.assert_close(x.grad, plain.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
@torch.no_grad()
def test_time_embedding_is_diffusers(flip, shift) -> None:
    config = UNetConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=4, flip_sin_to_cos=flip, freq_shift=shift)
    ours, theirs = TimeEmbedding(config), TimestepEmbedding(16, 64)
    ours.load_state_dict(theirs.state_dict())
    t = torch.tensor([0, 1, 499, 999])
    torch.testing.assert_close(ours(t, None), theirs(Timesteps(16, flip, shift)(t)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_second_condition_starts_silent() -> None:
    config = UNetConfig(time_cond_proj_dim=6)
    embedding, t, condition = TimeEmbedding(config), torch.tensor([3, 4]), noise(2, 6)
    assert torch.equal(embedding(t, condition), embedding(t, None))
    torch.nn.init.normal_(embedding.cond_proj.weight)
    assert not torch.allclose(embedding(t, condition), embedding(t, None))


def test_condition_without_its_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        TimeEmbedding(UNetConfig())(torch.tensor([1]), noise(1, 6))
