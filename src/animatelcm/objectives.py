"""Methods of training: functions of a model, a batch and addressed randomness, returning one loss a clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.config import ConsistencyConfig
from animatelcm.consistency import consistency_function, renoise
from animatelcm.data.batches import ClipBatch
from animatelcm.feedback import disagreement
from animatelcm.losses import mse, pseudo_huber, pseudo_huber_norm, step_weight
from animatelcm.nets.adapters import Adapter, Clues
from animatelcm.nets.emoji import LATENT_NOISE
from animatelcm.rng import sent
from animatelcm.roles import Role, Roles
from animatelcm.solver import DDIMSolver, guided_eps, to_x0

if TYPE_CHECKING:
    from animatelcm.model import VideoModel

DISTANCES = {"elements": pseudo_huber, "clip": pseudo_huber_norm}

Draw = Callable[[str], torch.Generator]
"""Stream name -> the generator of this step (``rng.generator`` with seed, step and rank filled in)."""


class Terms(NamedTuple):
    """What an objective returns: the loss of each clip (B,), and figures worth a line in the log."""

    loss: Tensor
    logs: dict[str, Tensor]


def diffusion(
    model: VideoModel,
    batch: ClipBatch,
    draw: Draw,
    *,
    text_dropout: float,
    timestep_shift: float = 1.0,
    max_weight: float = 1.0,
    word_weight: float = 0.0,
    adapter: Adapter | None = None,
) -> Terms:
    """Mean squared error of the predicted noise (DDPM), on images (F = 1, no temporal layers) and on clips.

    The text of a clip is dropped with probability ``text_dropout``, which is what guidance needs. Timesteps are
    uniform, or pushed towards noise by ``timestep_shift`` > 1 (``shifted_draw``). ``max_weight`` > 1 weights each clip
    as the error of v would (1 + 1 / SNR, Salimans and Ho 2022), up to that bound. ``word_weight`` > 0 adds that much of
    ``illegibility``, for a text encoder that trains too. ``adapter`` gives its hints to the network.
    """
    x_0 = latents(model, batch)
    size, frames = x_0.shape[0], x_0.shape[2]
    captions = dropped(batch.captions, text_dropout, draw("text"))
    text = embedded(model, batch, captions)
    t = sent(shifted_draw(model.schedule.num_train_timesteps, size, timestep_shift, draw("timestep")), x_0.device)
    eps = sent(torch.randn(x_0.shape, generator=draw("noise")), x_0.device)
    x_t = model.schedule.add_noise(x_0, eps, t)
    predicted = Role(model.unet, adapter=adapter)(x_t, t, text, motion=frames > 1, clues=clues(batch, x_0))
    error = mse(predicted - eps)
    weight = model.schedule.level(t).alpha.square().reciprocal().clamp(max=max_weight)
    loss, logs = weight * error, {"mse": error.mean().detach()}
    if word_weight > 0:
        words = illegibility(model, captions, text)
        loss, logs = loss + word_weight * words, {**logs, "words": words.mean().detach()}
    return Terms(loss, logs)


def illegibility(model: VideoModel, captions: Sequence[str], text: Tensor) -> Tensor:
    """Cross-entropy (B,) of telling each token of a caption from its own embedding in text (B, L, D), among the input
    embeddings. It keeps words apart that no image tells apart, as CLIP's contrastive training does: temporal layers
    could not steer by a word that the text encoder has dropped.
    """
    tokens = model.tokens(captions)
    logits = text @ model.text_encoder.words.T
    wrong = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").unflatten(0, tokens.shape)
    spoken = tokens != model.tokenizer.pad_token_id
    return (wrong * spoken).sum(1) / spoken.sum(1).clamp(min=1)


def consistency(
    model: VideoModel,
    roles: Roles,
    batch: ClipBatch,
    draw: Draw,
    *,
    config: ConsistencyConfig,
    timestep_shift: float = 1.0,
    control: str = "",
) -> Terms:
    """Consistency distillation of images (F = 1, no temporal layers) and clips (AnimateLCM, eq. 10).

    A clip is noised to t_{n+1}, n uniform, or pushed towards noise by ``timestep_shift`` > 1. The teacher, guided with
    w ~ U[w_min, w_max], leads it one solver step back (eq. 7, 8); the student's prediction of x_0 there is pulled to
    the target's from the earlier point. Without a teacher the earlier point is the same clip with less of the same
    noise (section 4.3, eq. 12); a guide adds w times what the text changes in its own prediction of each frame. An
    adapter of maps of the kind ``control`` may hear what its frames show of them (``config.feedback``).
    """
    x_0 = latents(model, batch)
    size, motion, seen = x_0.shape[0], x_0.shape[2] > 1, clues(batch, x_0)
    solver = DDIMSolver(model.schedule, config.solver_steps, config.k)
    index = sent(shifted_draw(config.solver_steps, size, timestep_shift, draw("timestep")), x_0.device)
    eps = sent(torch.randn(x_0.shape, generator=draw("noise")), x_0.device)
    t, s = solver.times(index)
    x_t = model.schedule.add_noise(x_0, eps, t)
    text = embedded(model, batch, batch.captions)

    noise = roles.student(x_t, t, text, motion=motion, clues=seen).float()
    predicted = consistency_function(x_t, noise, t, model.schedule)
    with torch.no_grad():
        guiding = roles.teacher or roles.guide
        if guiding is None:
            x_s = renoise(x_0, eps, s, model.schedule)
        else:
            w = torch.rand(size, generator=draw("guidance")) * (config.w_max - config.w_min) + config.w_min
            texts = torch.cat([embedded(model, batch, [""] * size), text])
            both = _both(guiding, x_t, t, texts, motion=motion and guiding is roles.teacher, seen=seen)
            solved = _guided(*both, sent(w, x_0.device), sample=None if guiding is roles.teacher else eps)
            x_s = solver.step(to_x0(x_t, solved, model.schedule.level(t)), solved, index)
        noise = roles.target(x_s, s, text, motion=motion, clues=seen).float()
        target = consistency_function(x_s, noise, s, model.schedule)
    distance = DISTANCES[config.distance](predicted - target, config.huber_c, first_frame=config.first_frame)
    weight = step_weight(index, config.solver_steps, config.delta, config.gamma)
    loss, logs = weight * distance, {"mse": mse(predicted.detach() - target).mean()}
    if config.feedback > 0:
        assert seen.maps is not None
        source = draw("feedback")
        frames = sent(torch.randperm(x_0.shape[2], generator=source)[: config.feedback_frames], x_0.device)
        made = _begun_and_left(model, roles.student, text, seen, x_0, source, config.feedback_steps)
        away = disagreement(model, made[:, :, frames], seen.maps[:, :, frames], control)
        loss, logs = loss + config.feedback * away, {**logs, "feedback": away.mean().detach()}
    return Terms(loss, logs)


def _begun_and_left(
    model: VideoModel, role: Role, text: Tensor, seen: Clues, like: Tensor, source: torch.Generator, steps: int
) -> Tensor:
    """What a role makes of noise with the consistency sampler in ``steps`` evaluations, left after one of them: its
    prediction of x_0 there, (B, C, F, h, w). Gradients reach that last evaluation alone (DRaFT, Clark et al. 2023)."""
    times = sent(model.schedule.lcm_timesteps(steps), like.device)
    last = int(torch.randint(steps, (1,), generator=source))
    x_t = sent(torch.randn(like.shape, generator=source), like.device)
    for step, t in enumerate(times[: last + 1]):
        t_b = t.expand(len(like))
        with torch.set_grad_enabled(step == last):
            noise = role(x_t, t_b, text, motion=like.shape[2] > 1, clues=seen).float()
            x_0 = consistency_function(x_t, noise, t_b, model.schedule)
        if step < last:
            fresh = sent(torch.randn(like.shape, generator=source), like.device)
            x_t = renoise(x_0, fresh, times[step + 1].expand(len(like)), model.schedule)
    return x_0


def shifted_draw(count: int, size: int, shift: float, source: torch.Generator) -> Tensor:
    """``size`` integers in [0, count): floor(count * s u / (1 + (s - 1) u)) with u ~ U[0, 1) and s = ``shift``.

    The map is that of Stable Diffusion 3 (Esser et al. 2024, eq. 23), used here on the index; s = 1 is uniform, s = 5
    draws every fifth one from the noisiest 5 %, where a clip's course is decided: many frames show it even there.
    """
    u = torch.rand(size, generator=source, dtype=torch.float64)
    return (count * shift * u / (1 + (shift - 1) * u)).long().clamp(max=count - 1)


def _both(role: Role, x: Tensor, t: Tensor, texts: Tensor, *, motion: bool, seen: Clues) -> tuple[Tensor, Tensor]:
    """Predicted noise without and with the text, in one batch; texts (2 B, L, D) are those halves."""
    both = role(torch.cat([x, x]), torch.cat([t, t]), texts, motion=motion, clues=seen.repeated(2)).float()
    return both.chunk(2)


def _guided(uncond: Tensor, cond: Tensor, w: Tensor, *, sample: Tensor | None) -> Tensor:
    """Noise guided by w (B,): the predicted one, or ``sample``, one that has it as its mean, moved as far (eq. 7)."""
    solved = guided_eps(cond, uncond, w=w)
    return solved if sample is None else sample + (solved - cond)


def clues(batch: ClipBatch, x_0: Tensor) -> Clues:
    """What adapters may look at: the first frame's latent, its pixels and control maps where the batch has them."""
    pixels, maps = (None if found is None else sent(found, x_0.device) for found in (batch.first, batch.maps))
    return Clues(image=x_0[:, :, 0], pixels=pixels, maps=maps)


@torch.no_grad()
def latents(model: VideoModel, batch: ClipBatch) -> Tensor:
    """(B, C, F, h, w): those of the batch, or its pixels encoded now, where none were kept."""
    if batch.latents is not None:
        return sent(batch.latents, model.device)
    assert batch.pixels is not None
    return model.encode(batch.pixels)


def embedded(model: VideoModel, batch: ClipBatch, said: Sequence[str]) -> Tensor:
    """A batch's captions, or empty ones in their places, as text embeddings (B, L, D): those kept, or made now."""
    if batch.text is None or batch.no_text is None:
        return model.embed(said) if any(said) else model.embed([""]).expand(len(said), -1, -1)
    text, no_text = sent(batch.text, model.device), sent(batch.no_text, model.device)
    spoken = sent(torch.tensor([bool(caption) for caption in said]), model.device)
    return torch.where(spoken[:, None, None], text, no_text)


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
    pixels = sent(batch.pixels, model.device).squeeze(2).contiguous(memory_format=torch.channels_last)
    posterior = model.vae.encode(pixels)
    noise = sent(torch.randn(posterior.mean.shape, generator=draw("noise")), pixels.device)
    decoded = model.vae.decode(posterior.mean + LATENT_NOISE * noise)
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
