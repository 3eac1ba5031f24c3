from __future__ import annotations

import hashlib

import pytest
import torch

from animatelcm.rng import generator

ADDRESS = (7, 120, 3, "noise")


def draws(*address: object) -> torch.Tensor:
    return torch.randn(64, generator=generator(*address))


def test_same_address_same_draws() -> None:
    assert torch.equal(draws(*ADDRESS), draws(*ADDRESS))


@pytest.mark.parametrize(
    "other",
    [
        (8, 120, 3, "noise"),
        (7, 121, 3, "noise"),
        (7, 120, 4, "noise"),
        (7, 120, 3, "timestep"),
        (120, 7, 3, "noise"),
        (7, 12, 3, "0/noise"),
        (71, 20, 3, "noise"),
        (7 + 2**32, 120, 3, "noise"),
    ],
)
def test_any_change_of_the_address_changes_the_draws(other: tuple) -> None:
    assert not torch.isclose(draws(*ADDRESS), draws(*other)).any()


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    alone = draws(*ADDRESS)
    torch.manual_seed(0)
    draws(7, 120, 3, "dropout")
    torch.randn(10)
    assert torch.equal(draws(*ADDRESS), alone)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(8)
    torch.manual_seed(5)
    draws(*ADDRESS)
    assert torch.equal(torch.randn(8), expected)


def test_draws_at_neighbouring_addresses_are_independent() -> None:
    x = torch.stack([draws(0, step, 0, "noise") for step in range(400)])
    assert x.mean().abs() < 4 / x.numel() ** 0.5
    off_diagonal = torch.corrcoef(x.T) - torch.eye(64)
    assert off_diagonal.abs().max() < 5 / 400**0.5


def test_an_address_means_the_same_everywhere() -> None:
    """The seed is a published function (BLAKE2b), not Python's salted hash."""
    digest = hashlib.blake2b(b"7/120/3/noise", digest_size=8).digest()
    assert generator(*ADDRESS).initial_seed() == int.from_bytes(digest, "little")
