from __future__ import annotations

from functools import partial

import pytest
import torch

from animatelcm import objectives
from animatelcm.data.batches import ClipBatch
from animatelcm.rng import generator

DRAW = partial(generator, 0, 0, 0)


def _batch(size: int, frames: int) -> ClipBatch:
    latents = torch.randn(size, 16, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    return ClipBatch(captions=tuple("abcdefgh"[:size]), latents=latents)


@pytest.mark.parametrize("frames", [1, 4])
def test_the_diffusion_loss_is_that_of_the_definition(fresh_model, frames):
    batch = _batch(3, frames)
    terms = objectives.diffusion(fresh_model, batch, DRAW, text_dropout=0.0)
    t = (1000 * torch.rand(3, generator=DRAW("timestep"), dtype=torch.float64)).long()
    eps = torch.randn(batch.latents.shape, generator=DRAW("noise"))
    product = fresh_model.schedule.alphas_cumprod[t].view(3, 1, 1, 1, 1)
    noisy = (product.sqrt() * batch.latents.double() + (1 - product).sqrt() * eps.double()).float()
    wanted = [
        (fresh_model.unet(noisy[i : i + 1], t[i : i + 1], fresh_model.embed([batch.captions[i]]), motion=frames > 1)
         - eps[i : i + 1]).square().mean()
        for i in range(3)
    ]  # fmt: skip
    assert torch.allclose(terms.loss, torch.stack(wanted), rtol=1e-4)


def test_one_clip_more_changes_no_other_loss(fresh_model):
    # the loss is one number a clip: the third clip's does not leak into the second's
    batch = _batch(3, 1)
    one = objectives.diffusion(fresh_model, batch, DRAW, text_dropout=0.0).loss
    louder = ClipBatch(captions=batch.captions, latents=batch.latents * torch.tensor([1, 1, 9.0]).view(3, 1, 1, 1, 1))
    two = objectives.diffusion(fresh_model, louder, DRAW, text_dropout=0.0).loss
    assert torch.allclose(one[:2], two[:2], rtol=1e-4)
    assert not torch.allclose(one[2], two[2], rtol=1e-2)


def test_text_is_dropped_as_often_as_asked():
    texts = ["x"] * 4000
    for probability in (0.0, 0.1, 1.0):
        kept = objectives.dropped(texts, probability, DRAW("text")).count("x") / 4000
        assert kept == pytest.approx(1 - probability, abs=0.02)


def test_the_autoencoder_loss_sees_pixels_and_latents(fresh_model):
    pixels = torch.rand(4, 3, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = ClipBatch(captions=("",) * 4, pixels=pixels)
    terms = objectives.autoencoder(fresh_model, batch, DRAW)
    assert terms.loss.shape == (4,)
    assert (terms.loss > 0).all()
    assert set(terms.logs) == {"mse", "variance"}


def test_a_shift_draws_noisy_timesteps_as_often_as_its_formula_says():
    size = 40_000
    for shift in (1.0, 3.0, 5.0):
        drawn = objectives.shifted_draw(1000, size, shift, DRAW("timestep"))
        assert drawn.min() >= 0
        assert drawn.max() <= 999
        for edge in (500, 950):
            below = edge / (shift * 1000 - (shift - 1) * edge)  # the u that lands on the edge
            assert (drawn >= edge).float().mean().item() == pytest.approx(1 - below, abs=0.01)
