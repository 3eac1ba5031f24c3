from __future__ import annotations

import pytest
import torch

from animatelcm.losses import mse, pseudo_huber, pseudo_huber_norm, step_weight

DISTANCES = [mse, pseudo_huber, pseudo_huber_norm]


def clips(batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 4, 5, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_number_a_clip_that_no_other_clip_touches(distance) -> None:
    x = clips()
    apart = torch.cat([distance(clip[None]) for clip in x])
    torch.testing.assert_close(distance(x), apart)
    assert distance(x).shape == (3,)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_exactly_at_zero_with_zero_gradient(distance) -> None:
    x = torch.zeros(2, 4, 3, requires_grad=True)
    loss = distance(x)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2))
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("distance", DISTANCES)
def test_even_and_computed_in_float32(distance) -> None:
    x = clips(dtype=torch.float16) * 100
    assert distance(x).dtype == torch.float32
    assert torch.equal(distance(x), distance(-x))
    torch.testing.assert_close(distance(x), distance(x.float()))


def test_mse_is_torch_mse() -> None:
    x = clips()
    torch.testing.assert_close(mse(x).mean(), torch.nn.functional.mse_loss(x, torch.zeros_like(x)))


@pytest.mark.parametrize("c", [1e-3, 0.1, 2.0])
def test_pseudo_huber_is_its_definition_in_float64(c: float) -> None:
    x = clips().double()
    elementwise = ((x**2 + c**2).sqrt() - c).flatten(1).mean(1)
    of_norm = (x.flatten(1).square().sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(x, c).double(), elementwise, rtol=1e-6, atol=0)
    torch.testing.assert_close(pseudo_huber_norm(x, c).double(), of_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", [pseudo_huber, pseudo_huber_norm])
@pytest.mark.parametrize("times", [1, 3, 8])
def test_a_first_frame_that_counts_for_several_is_that_frame_several_times(distance, times: int) -> None:
    x = clips()
    again = torch.cat([x[:, :, :1]] * times + [x[:, :, 1:]], dim=2)
    torch.testing.assert_close(distance(x, 0.1, first_frame=times), distance(again, 0.1))


def test_of_one_frame_all_is_the_first() -> None:
    x = clips()[:, :, :1]
    torch.testing.assert_close(pseudo_huber(x, 0.1, first_frame=8.0), pseudo_huber(x, 0.1))


def test_pseudo_huber_is_a_square_below_c_and_an_absolute_value_above() -> None:
    c = 1e-3
    small, large = clips() * 1e-6, clips() * 1e4
    torch.testing.assert_close(pseudo_huber(small, c), mse(small) / (2 * c), rtol=1e-4, atol=0)
    torch.testing.assert_close(pseudo_huber(large, c), large.abs().flatten(1).mean(1) - c, rtol=1e-5, atol=0)


def test_pseudo_huber_keeps_differences_that_the_definition_loses_in_float32() -> None:
    d = torch.full((1, 10), 1e-7)
    naive = ((d**2 + 1e-3**2).sqrt() - 1e-3).mean(1)
    exact = 1e-14 / 2e-3
    assert abs(naive.item() - exact) > 0.5 * exact
    assert abs(pseudo_huber(d, 1e-3).item() - exact) < 1e-6 * exact


def test_gradient_of_the_norm_is_at_most_a_unit_vector() -> None:
    """The robustness that the paper asks of the Huber loss: no clip pulls harder than length one."""
    x = (clips() * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1, 1, 1)).requires_grad_()
    pseudo_huber_norm(x, 1e-3).sum().backward()
    lengths = x.grad.flatten(1).norm(dim=1)
    assert (lengths <= 1 + 1e-6).all()
    assert lengths[2] > 0.999


def test_step_weight_decays_from_one_towards_noise() -> None:
    index = torch.arange(50)
    weight = step_weight(index, 50, delta=0.8, gamma=2.0)
    assert weight[0] == 1
    assert (weight.diff() < 0).all()
    torch.testing.assert_close(weight[25], torch.tensor(0.6**2))
    assert torch.equal(step_weight(index, 50, delta=0.0, gamma=2.0), torch.ones(50))
    assert torch.equal(step_weight(index, 50, delta=0.8, gamma=0.0), torch.ones(50))
