"""Methods of training: functions of a model, a batch and addressed randomness, returning one loss a clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.data.batches import ClipBatch
from animatelcm.losses import mse
from animatelcm.nets.emoji import LATENT_NOISE

if TYPE_CHECKING:
    from animatelcm.model import VideoModel

Draw = Callable[[str], torch.Generator]
"""Stream name -> the generator of this step (``rng.generator`` with seed, step and rank filled in)."""


class Terms(NamedTuple):
    """What an objective returns: the loss of each clip (B,), and figures worth a line in the log."""

    loss: Tensor
    logs: dict[str, Tensor]


def diffusion(
    model: VideoModel, batch: ClipBatch, draw: Draw, *, text_dropout: float, max_weight: float = 1.0
) -> Terms:
    """Mean squared error of the predicted noise (DDPM), on images (F = 1, no temporal layers) and on clips.

    The text of a clip is dropped with probability ``text_dropout``, which is what guidance needs. ``max_weight`` > 1
    weights each clip as the error of v would (1 + 1 / SNR, Salimans and Ho 2022), up to that bound.
    """
    assert batch.latents is not None
    x_0 = batch.latents.to(model.device)
    size, frames = x_0.shape[0], x_0.shape[2]
    text = model.embed(dropped(batch.captions, text_dropout, draw("text")))
    t = torch.randint(model.schedule.num_train_timesteps, (size,), generator=draw("timestep")).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=draw("noise")).to(x_0.device)
    predicted = model.unet(model.schedule.add_noise(x_0, eps, t), t, text, motion=frames > 1)
    error = mse(predicted - eps)
    weight = model.schedule.level(t).alpha.square().reciprocal().clamp(max=max_weight)
    return Terms(weight * error, {"mse": error.mean().detach()})


def dropped(captions: Sequence[str], probability: float, source: torch.Generator) -> list[str]:
    """Each caption, or the empty one with the given probability."""
    drop = torch.rand(len(captions), generator=source) < probability
    return ["" if gone else text for text, gone in zip(captions, drop.tolist(), strict=True)]


def autoencoder(model: VideoModel, batch: ClipBatch, draw: Draw) -> Terms:
    """Reconstruction through noisy latents of unit variance: what a diffusion model can live in.

    Squared and absolute error of pixels, of their averages over 4x4 (colour) and of their differences (edges); latents
    are held at mean 0 and variance 1 a channel, and decoded with noise of standard deviation
    ``LATENT_NOISE``, which the encoder learns to report.
    """
    assert batch.pixels is not None
    pixels = batch.pixels.to(model.device).squeeze(2).contiguous(memory_format=torch.channels_last)
    posterior = model.vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=draw("noise")).to(pixels.device)
    decoded = model.vae.decode(posterior.mean + LATENT_NOISE * noise).sample
    error = decoded - pixels
    reconstruction = 4 * mse(error) + _absolute(error) + _absolute(F.avg_pool2d(error, 4)) + 0.5 * _edges(error)
    by_channel = posterior.mean.transpose(0, 1).flatten(1)
    spread = (by_channel.var(1) - 1).square().mean() + by_channel.mean(1).square().mean()
    reported = (posterior.logvar - 2 * torch.log(torch.tensor(LATENT_NOISE))).square().mean()
    loss = reconstruction + 0.1 * spread + 0.01 * reported
    return Terms(loss, {"mse": mse(error).mean().detach(), "variance": by_channel.var(1).mean().detach()})


def _absolute(error: Tensor) -> Tensor:
    return error.abs().flatten(1).mean(1)


def _edges(error: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): mean absolute error of horizontal and vertical differences, at full and half size."""
    total = torch.zeros(error.shape[0], device=error.device)
    for scale in (error, F.avg_pool2d(error, 2)):
        total = total + scale.diff(dim=2).abs().flatten(1).mean(1) + scale.diff(dim=3).abs().flatten(1).mean(1)
    return total
