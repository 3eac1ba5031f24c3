"""Operations that keep less give the values and the gradients of the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.nets import lean


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def image(*shape: int, order: torch.memory_format = torch.channels_last, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(*shape, dtype=dtype).detach().contiguous(memory_format=order).requires_grad_()


def plain_gated(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def plain_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def same(ours, theirs, *inputs: Tensor, atol: float = 1e-12) -> None:
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
    upstream, wanted = torch.randn_like(b), [x for x in inputs if x.requires_grad]
    for x, y in zip(torch.autograd.grad(a, wanted, upstream), torch.autograd.grad(b, wanted, upstream), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    h, weight, bias = noise(3, 2, 8), noise(5, 4, seed=1), noise(5, seed=2)
    assert torch.autograd.gradcheck(lean.gated, h)
    assert torch.autograd.gradcheck(lean.gated_linear, (h, weight, bias))
    x, scale, shift = image(2, 4, 3, 2), noise(4, seed=1), noise(4, seed=2)
    assert torch.autograd.gradcheck(lambda *a: lean.norm_silu(a[0], 2, *a[1:], 1e-5), (x, scale, shift))


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (1,)])
def test_a_gate_and_its_map_have_the_plain_gradients_whatever_is_frozen(frozen) -> None:
    inputs = [noise(3, 2, 8), noise(5, 4, seed=1), noise(5, seed=2)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    same(lean.gated_linear, lambda h, w, b: F.linear(plain_gated(h), w, b), *inputs)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_a_norm_has_the_plain_gradients_whatever_is_frozen(order, frozen) -> None:
    if frozen == (0,) and order == torch.channels_last:
        pytest.skip("torch's own crashes, and layers.GroupNorm never asks for it")
    inputs = [image(3, 8, 4, 5, order=order), noise(8, seed=1), noise(8, seed=2)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    ours, theirs = (
        lambda x, w, b, call=call: call(x, 4, w, b, 1e-5).contiguous() for call in (lean.norm_silu, plain_norm)
    )
    same(ours, theirs, *inputs)


def test_under_autocast_types_are_the_plain_ones() -> None:
    h, weight, bias = noise(4, 8, dtype=torch.bfloat16), *(noise(*s, dtype=torch.float32) for s in ((5, 4), (5,)))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = lean.gated_linear(h, weight, bias), F.linear(plain_gated(h), weight, bias)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    for call in (ours, theirs):
        found = torch.autograd.grad(call.sum(), (h, weight, bias))
        assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32]


def _kept(call) -> int:
    """Bytes that a call leaves for its backward pass."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = call()
    assert made.requires_grad
    return sum(found.values())


def test_what_is_quickly_made_again_is_not_kept() -> None:
    h, weight, bias = noise(64, 512), noise(32, 256, seed=1), noise(32, seed=2)
    small = weight.numel() * 8
    assert _kept(lambda: lean.gated(h)) == h.numel() * 8
    assert _kept(lambda: plain_gated(h)) == 1.5 * h.numel() * 8
    assert _kept(lambda: lean.gated_linear(h, weight, bias)) == h.numel() * 8 + small
    assert _kept(lambda: F.linear(plain_gated(h), weight, bias)) == 2 * h.numel() * 8 + small
    x, w, b = image(4, 8, 16, 16), noise(8, seed=1), noise(8, seed=2)
    few = 8 * (2 * 8 + 2 * 4 * 2)  # weight and bias, mean and deviation
    assert _kept(lambda: lean.norm_silu(x, 2, w, b, 1e-5)) <= x.numel() * 8 + few
    assert _kept(lambda: plain_norm(x, 2, w, b, 1e-5)) >= 2 * x.numel() * 8
