"""Distances between predictions: one number a clip; the loop takes the mean over clips."""

from __future__ import annotations

import torch
from torch import Tensor


def mse(diff: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean of squares, in float32."""
    return diff.float().square().flatten(1).mean(1)


def pseudo_huber(diff: Tensor, c: float = 1e-3, *, first_frame: float = 1.0) -> Tensor:
    """(B, ...) -> (B,): the mean over elements of sqrt(diff^2 + c^2) - c, in float32; c in latent units.

    This is how LCM and AnimateLCM are trained in released code; the paper writes `pseudo_huber_norm`. The first frame
    of clips (B, C, F, ...) counts as much as ``first_frame`` others.
    """
    values = _huber(diff.float().square(), c)
    if first_frame == 1:
        return values.flatten(1).mean(1)
    return _counted(values, first_frame) / (values[0].numel() + (first_frame - 1) * values[0, :, 0].numel())


def pseudo_huber_norm(diff: Tensor, c: float = 1e-3, *, first_frame: float = 1.0) -> Tensor:
    """(B, ...) -> (B,): sqrt(||diff||^2 + c^2) - c over the whole clip (AnimateLCM, below eq. 10); ``first_frame`` as
    above."""
    return _huber(_counted(diff.float().square(), first_frame), c)


def step_weight(index: Tensor, n: int, delta: float, gamma: float) -> Tensor:
    """lambda_n = (1 - delta * n / N)^gamma of AnimateLCM's eq. 10: less weight to noisier steps.

    index (B,) int64 in 0..N-1 is the solver's, so eq. 10 compares timesteps[index] with its predecessor.
    """
    return (1 - delta * index.float() / n) ** gamma


def _counted(values: Tensor, first_frame: float) -> Tensor:
    """(B, C, F, ...) -> (B,): the sum, in which the first frame counts as often as that."""
    total = values.flatten(1).sum(1)
    return total if first_frame == 1 else total + (first_frame - 1) * values[:, :, 0].flatten(1).sum(1)


def _huber(square: Tensor, c: float) -> Tensor:
    # sqrt(d^2 + c^2) - c without the cancellation that would lose every d below about c / 3000.
    return square / (torch.sqrt(square + c**2) + c)
