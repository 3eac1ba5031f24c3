"""Kernels are their formulas in float64, rounded. Without a GPU they run in Triton's interpreter, which is slow."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from animatelcm.nets import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MULTIPLIED = DTYPES if DEVICE == "cuda" else DTYPES[:2]  # the interpreter has no matrix products of bfloat16
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""What results may be off by, times their size and at least times 1: for the halves a unit in their last place."""


@pytest.fixture(scope="module")
def _triton():
    """Kernels that run on this machine: by the interpreter where there is no GPU, for this file alone."""
    tl = pytest.importorskip("triton.language")
    if DEVICE == "cuda":
        yield
        return
    from triton import jit

    kernels._kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("sum", "max"):  # Triton's own functions were made for GPUs if it was imported before
            patch.setattr(tl, name, jit(getattr(tl, name).fn))
        yield
    kernels._kernel.cache_clear()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, times: float = 1.0) -> None:
    unit = times * ROUNDING[found.dtype]
    torch.testing.assert_close(found.double(), exact, atol=unit, rtol=unit)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise with another mean and deviation in every channel."""
    x = noise(*shape) * (1 + noise(shape[1], 1, 1, seed=1).abs()) + noise(shape[1], 1, 1, seed=2)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """GroupNorm in float64, as its formula has it."""
    grouped = x.double().unflatten(1, (groups, -1))
    away = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    unit = away / (away.square().mean(dim=(2, 3, 4), keepdim=True) + eps).sqrt()
    return unit.flatten(1, 2) * weight.double()[:, None, None] + bias.double()[:, None, None]


@pytest.fixture(params=[2**13, 2**7], ids=["one block", "tiles"])
def _tile(request, monkeypatch):
    """Small images fit one block, or are cut into tiles as large ones are."""
    monkeypatch.setattr(kernels, "TILE", request.param)


@pytest.mark.usefixtures("_triton", "_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 6, 5, 13), 2),
        ((1, 15, 9, 4), 3),
        ((1, 320, 3, 6), 32),
        ((1, 40, 13, 1), 2),
        ((1, 80, 4, 4), 2),
        ((1, 120, 5, 3), 2),
        ((1, 160, 2, 6), 2),
        ((3, 10, 1, 1), 2),
        ((1, 8, 6, 6), 8),
        ((1, 8, 6, 6), 1),
    ],
)
def test_group_norm_is_its_formula(shape, groups, dtype):
    x, (weight, bias) = images(*shape, dtype=dtype), noise(2, shape[1], seed=3, dtype=dtype)
    exact = normalised(x, weight, bias, groups, 1e-5)
    for silu in (False, True):
        y = kernels.group_norm_silu(x, weight, bias, groups, 1e-5, silu=silu)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_rounded(y, F.silu(exact) if silu else exact)


@pytest.mark.usefixtures("_triton")
def test_large_images_obey_the_same_laws():
    x, (weight, bias) = images(2, 12, 71, 67), noise(2, 12, seed=3)
    y = kernels.group_norm_silu(x, weight, bias, 2, 1e-6)
    assert_rounded(y, F.silu(normalised(x, weight, bias, 2, 1e-6)))
    plain = kernels.group_norm_silu(torch.full_like(x, 1000.1), weight, bias, 2, 1e-6, silu=False)
    assert torch.equal(plain, bias[:, None, None].expand_as(plain))


@pytest.mark.usefixtures("_triton", "_tile")
def test_a_mean_far_from_zero_costs_no_digits():
    """Neighbours of 1000 are 6e-5 apart in float32; squares less the square of the mean would be 0.1 apart."""
    x, (weight, bias) = images(2, 12, 9, 11) + 1000, noise(2, 12, seed=3)
    y = kernels.group_norm_silu(x, weight, bias, 4, 1e-5, silu=False)
    assert_rounded(y, normalised(x, weight, bias, 4, 1e-5), times=10)


@pytest.mark.usefixtures("_triton", "_tile")
@pytest.mark.parametrize("value", [0.0, 1000.1, -3e-4])
def test_equal_values_become_the_bias(value):
    x, (weight, bias) = torch.full((1, 10, 7, 9), value, device=DEVICE), noise(2, 10, seed=3)
    y = kernels.group_norm_silu(x, weight, bias, 2, 1e-6, silu=False)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.usefixtures("_triton")
def test_group_norm_takes_other_orders_and_weights_of_other_types():
    x, (weight, bias) = images(2, 6, 5, 4, dtype=torch.float16), noise(2, 6, seed=3)
    exact = normalised(x, weight, bias, 3, 1e-5)
    for other in (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), x[:, :, ::2, 1:]):
        y = kernels.group_norm_silu(other, weight, bias, 3, 1e-5, silu=False)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_rounded(y, exact if other.shape == x.shape else normalised(other, weight, bias, 3, 1e-5))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 20), (7, 768), (1, 2), (2, 19, 10), (3, 2 * 1280)])
def test_geglu_is_its_formula(shape, dtype):
    x = 3 * noise(*shape, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    y = kernels.geglu(x)
    assert (y.dtype, y.shape) == (x.dtype, value.shape)
    assert_rounded(y, value * gate * torch.special.ndtr(gate))


@pytest.mark.usefixtures("_triton")
def test_far_gates_are_shut_or_open():
    value, gate = noise(5), torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], device=DEVICE)
    assert torch.equal(kernels.geglu(torch.cat([value, gate])), value * gate.clamp(min=0))
    columns = noise(6, 5)
    assert torch.equal(kernels.geglu(columns.T), kernels.geglu(columns.T.contiguous()))


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / q.shape[4] ** 0.5).softmax(dim=4) @ v


def projected(
    batch: int, pixels: int, heads: int, frames: int, width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Queries, keys and values (B, P, H, F, d) as maps of tokens (B, F, P, H d) leave them in memory."""
    shape = (batch, frames, pixels, heads, width)
    return [noise(*shape, seed=seed, dtype=dtype).permute(0, 2, 3, 1, 4) for seed in range(3)]


def assert_attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    y = kernels.temporal_attention(q, k, v)
    assert (y.dtype, y.shape) == (q.dtype, q.shape)
    assert y.permute(0, 3, 1, 2, 4).is_contiguous()
    assert_rounded(y, attended(q, k, v), times=2)  # weights are rounded, and then results


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize(
    ("batch", "pixels", "heads", "frames", "width"),
    [
        (2, 1, 5, 16, 40),
        (1, 3, 1, 17, 24),
        (1, 1, 2, 64, 80),
        (2, 1, 1, 33, 160),
        (1, 3, 3, 5, 8),
        (2, 1, 7, 1, 3),
        (1, 2, 2, 16, 72),
    ],
)
def test_attention_is_its_formula(batch, pixels, heads, frames, width, dtype):
    assert_attended(*projected(batch, pixels, heads, frames, width, dtype))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_attention_reads_parts_of_one_product(dtype):
    """As joined projections leave them: of each pixel the heads' queries, then their keys, then their values."""
    whole = noise(2, 5, 3, 3 * 4 * 8, dtype=dtype)
    assert_attended(*(part.unflatten(3, (4, 8)).permute(0, 2, 3, 1, 4) for part in whole.chunk(3, dim=3)))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_attention_reads_any_strides(dtype):
    q, k, v = projected(2, 3, 2, 7, 8, dtype)
    assert_attended(q.contiguous(), k, v[:, :1].expand_as(v))
    assert_attended(q[:, ::2], k.flip(1)[:, ::2], v[:, 1:])
    odd = noise(2, 7, 6, 3 * 9, dtype=dtype).transpose(1, 2)[:, None]
    assert_attended(*(part[..., 1:] for part in odd.chunk(3, dim=-1)))
    assert_attended(*(part.mT.contiguous().mT for part in (q, k, v)))


@pytest.mark.usefixtures("_triton")
def test_attention_at_its_ends():
    q, k, v = projected(1, 1, 3, 6, 8)
    one = kernels.temporal_attention(q[..., :1, :], k[..., :1, :], v[..., :1, :])
    assert torch.equal(one, v[..., :1, :])  # one frame attends to itself
    sharp = kernels.temporal_attention(1e4 * k, 1e4 * k, v)
    best = (k @ k.mT).argmax(dim=4, keepdim=True)
    torch.testing.assert_close(sharp, v.gather(3, best.expand_as(v)))
    for frames, width in ((kernels.MAX_FRAMES + 1, 8), (4, kernels.MAX_WIDTH + 1)):
        beyond = projected(1, 1, 2, frames, width)
        assert_rounded(kernels.temporal_attention(*beyond), attended(*beyond))


@pytest.mark.usefixtures("_triton")
def test_torch_knows_the_operators():
    """Their schemas are true, and what torch.compile is told of results is so."""
    operators, x = torch.ops.animatelcm, images(2, 6, 3, 4)
    torch.library.opcheck(operators.group_norm_silu.default, (x, x[0, :, 0, 0], x[0, :, 0, 1], 2, 1e-5, True))
    torch.library.opcheck(operators.geglu.default, (noise(3, 8),))
    torch.library.opcheck(operators.temporal_attention.default, tuple(projected(1, 1, 2, 3, 8)))


def test_errors_say_what_to_give():
    x, weight = images(2, 6, 3, 3), noise(6)
    for wrong in ((x[0], weight, weight, 2), (x, weight, weight, 4), (x, weight[:5], weight, 2), (x, weight, x, 2)):
        with pytest.raises(ValueError, match=r"give \(N, C, h, w\)"):
            kernels.group_norm_silu(*wrong, 1e-5)
    with pytest.raises(ValueError, match="7 channels; give an even number"):
        kernels.geglu(noise(2, 7))
    q, k, v = projected(1, 2, 1, 3, 4)
    for wrong in ((q, k[:, :1], v), (q, k, v[..., :2]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="of one shape"):
            kernels.temporal_attention(*wrong)


def test_usable_where_a_gpu_works_and_no_gradients_are_wanted(monkeypatch):
    monkeypatch.setattr(kernels, "_works", lambda device: device.index == 0)
    monkeypatch.setattr(kernels, "TRITON", True)
    first, second = (
        {"is_cuda": True, "dtype": torch.float16, "device": torch.device("cuda", index)} for index in range(2)
    )
    with torch.no_grad():
        assert kernels.usable(SimpleNamespace(**first))
        assert not kernels.usable(SimpleNamespace(**second))
        assert not kernels.usable(SimpleNamespace(**first | {"dtype": torch.float64}))
        assert not kernels.usable(noise(2).cpu())
        monkeypatch.setattr(kernels, "TRITON", False)
        assert not kernels.usable(SimpleNamespace(**first))
    monkeypatch.setattr(kernels, "TRITON", True)
    assert not kernels.usable(SimpleNamespace(**first))


@pytest.mark.usefixtures("_triton")
def test_a_triton_that_fails_is_told_of_once(monkeypatch, recwarn):
    kernels._works.cache_clear()
    device = torch.device(DEVICE)
    assert kernels._works(device)
    assert not recwarn
    kernels._works.cache_clear()
    monkeypatch.setattr(kernels, "geglu", lambda x: 1 / 0)
    assert [kernels._works(device) for _ in range(2)] == [False, False]
    assert [str(each.message).split(" on ")[0] for each in recwarn] == ["Triton does not work"]
    kernels._works.cache_clear()


def test_triton_may_be_absent():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from animatelcm.nets import kernels
x = torch.zeros(2)
with torch.no_grad():
    print(kernels.TRITON, kernels.usable(x))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]
