"""The Frechet distance of two sets of features, each taken for a Gaussian (Dowson & Landau 1982), in float64.

Fewer features than dimensions are no special case: traces come from singular values of what there is, which are the
roots of the eigenvalues, and nothing is added to a diagonal. ``Gaussian.rank`` says how much of a covariance is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Mean (D,), a factor (R, D) of the covariance, which is factor^T factor, and how many features it is of; float64.

    The centred features are such a factor, so few of them in many dimensions need no D x D matrix and lose no digits.
    """

    mean: Tensor
    factor: Tensor
    n: int

    @property
    def cov(self) -> Tensor:
        """(D, D)."""
        return self.factor.T @ self.factor

    @property
    def rank(self) -> int:
        """Directions that the covariance is known in: those whose deviation is above float32's rounding of the largest.

        At most min(n - 1, D). Below D a distance is finite and exact all the same, yet leans on n.
        """
        deviations = torch.linalg.svdvals(self.factor)
        return int((deviations > deviations.max() * torch.finfo(torch.float32).eps).sum())

    @classmethod
    def of_moments(cls, mean: Tensor, cov: Tensor, n: int) -> Gaussian:
        """From a mean (D,) and a covariance (D, D); its eigenvalues within rounding of zero are zero."""
        values, vectors = torch.linalg.eigh(cov.double())
        rounding = values[-1] * len(values) * torch.finfo(torch.float64).eps
        return cls(mean.double(), values.where(values > rounding, 0.0).sqrt()[:, None] * vectors.T, n)


def gaussian(features: Tensor) -> Gaussian:
    """The Gaussian with the mean and the unbiased covariance of features (N, D), N >= 2.

    Raises ValueError where there are fewer, or where one is not a finite number.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a distribution needs features (N, D) of two clips at least, got {tuple(features.shape)}")
    if not features.isfinite().all():
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {len(features)} features are NaN or infinite, first that of clip {bad[0]}, counted from "
            "0; look at that clip"
        )
    features = features.double()
    mean = features.mean(dim=0)
    factor = (features - mean) / math.sqrt(len(features) - 1)
    if len(features) > features.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return Gaussian(mean, factor, len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, in squared units of the features.

    With A = X^T X and B = Y^T Y the last trace is the sum of the singular values of X Y^T: the roots of the same
    symmetric eigenvalues, without the root of a rounding error where A or B has no full rank.
    """
    _check_dimensions(a, b)
    shared = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum()
    return max(float((a.mean - b.mean).square().sum() + spread - 2 * shared), 0.0)


def distances(features: Tensor, to: Gaussian) -> Callable[[Tensor], float]:
    """Rows -> ``frechet_distance(gaussian(features[rows]), to)``, for the many draws of a bootstrap: of features (N, D)
    some rows, int64 (n,), that may repeat.

    Products of all pairs are taken once, so that a draw costs the eigenvalues of a matrix of the m different rows in
    it, (m, m), whatever D and ``to.n`` are.
    """
    whole = gaussian(features)
    _check_dimensions(whole, to)
    away, seen = features.double() - to.mean, (features.double() - whole.mean) @ to.factor.T
    products, shared, spread = away @ away.T, seen @ seen.T, to.factor.square().sum()

    def distance(rows: Tensor) -> float:
        found, counts = rows.unique(return_counts=True)
        n, weights = len(rows), counts.double() / len(rows)
        own, both = products[found][:, found], shared[found][:, found]
        mean, mid = weights @ own @ weights, both @ weights
        trace = (weights @ own.diagonal() - mean) * n / (n - 1)
        both = both - mid - mid[:, None] + weights @ mid
        values = torch.linalg.eigvalsh(both * weights.outer(weights).sqrt() * n / (n - 1))
        rounding = values[-1] * len(values) * torch.finfo(torch.float64).eps
        roots = values.where(values > rounding, 0.0).sqrt().sum()
        return max(float(mean + trace + spread - 2 * roots), 0.0)

    return distance


def _check_dimensions(a: Gaussian, b: Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared; use one network")
