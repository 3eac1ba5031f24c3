"""The distance of Gaussians: closed forms, symmetries, and covariances of too few features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm.evaluate.frechet import Gaussian, distances, frechet_distance, gaussian


def cloud(n, dimensions, seed, rank=None):
    """Correlated features, within a random subspace where a rank is given."""
    source = torch.Generator().manual_seed(seed)
    inner = torch.randn(n, rank or dimensions, generator=source, dtype=torch.float64)
    return inner @ torch.randn(rank or dimensions, dimensions, generator=source, dtype=torch.float64)


def rotation(dimensions, seed):
    source = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimensions, dimensions, generator=source, dtype=torch.float64)).Q


def around(mean, cov):
    return Gaussian.of_moments(torch.tensor(mean, dtype=torch.float64), torch.as_tensor(cov), 1000)


def test_diagonal_gaussians_are_apart_by_means_and_deviations():
    a = around([1.0, -2, 0, 5], torch.diag(torch.tensor([4.0, 9, 0, 1])))
    b = around([1.0, 1, 4, 5], torch.diag(torch.tensor([1.0, 9, 16, 0.25])))
    assert frechet_distance(a, b) == pytest.approx((9 + 16) + (1 + 0 + 16 + 0.25), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_covariances_that_commute_are_apart_by_their_deviations(seed, dimensions):
    axes, source = rotation(dimensions, seed), np.random.default_rng(seed)
    first, second = (torch.from_numpy(source.uniform(0.1, 3, dimensions)) for _ in "ab")
    shift = source.normal(size=dimensions)
    a = around([0.0] * dimensions, axes @ torch.diag(first**2) @ axes.T)
    b = around(shift.tolist(), axes @ torch.diag(second**2) @ axes.T)
    expected = float((shift**2).sum() + (first - second).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_two_by_two_covariances_that_do_not_commute(seed):
    # a 2x2 matrix of eigenvalues p, q has sqrt p + sqrt q = sqrt(trace + 2 sqrt(determinant)); AB has those of the root
    a, b = (gaussian(cloud(5, 2, seed + i)) for i in range(2))
    product = a.cov @ b.cov
    shared = math.sqrt(product.trace() + 2 * math.sqrt(max(float(torch.linalg.det(product)), 0.0)))
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-10)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_turning_moving_and_swapping_both_changes_nothing(seed, n):
    turn = rotation(10, seed)
    x, y = cloud(n, 10, seed), cloud(25, 10, seed + 1) + 0.5
    distance = frechet_distance(gaussian(x), gaussian(y))
    assert frechet_distance(gaussian(y), gaussian(x)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(gaussian(x @ turn + 7), gaussian(y @ turn + 7)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(gaussian(3 * x), gaussian(3 * y)) == pytest.approx(9 * distance, rel=1e-9)


@pytest.mark.parametrize("n", [2, 5, 64, 200])
def test_a_set_is_at_no_distance_from_itself_and_at_the_square_from_itself_moved(n):
    x = cloud(n, 64, seed=n)
    scale = float(gaussian(x).cov.trace())
    assert frechet_distance(gaussian(x), gaussian(x)) < 1e-10 * scale
    assert frechet_distance(gaussian(x), gaussian(x + 2)) == pytest.approx(64 * 4, abs=1e-10 * scale)


def test_covariances_of_rank_one_are_apart_by_the_angle():
    a, b = cloud(2, 50, seed=3).unbind()
    apart = frechet_distance(around([0.0] * 50, torch.outer(a, a)), around([0.0] * 50, torch.outer(b, b)))
    assert apart == pytest.approx(float(a @ a + b @ b - 2 * (a @ b).abs()), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (5, 40), (60, 90)])
def test_features_agree_with_square_roots_of_their_covariances(n, m):
    def root(cov):
        values, vectors = np.linalg.eigh(cov)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T

    x, y = cloud(n, 40, seed=1), cloud(m, 40, seed=2)
    a, b = (np.cov(part.numpy(), rowvar=False) for part in (x, y))
    shared = np.trace(root(root(a) @ b @ root(a)))
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b) - 2 * shared
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "m", "tolerance"), [(90, 120, 1e-10), (90, 12, 1e-6), (20, 30, 1e-6)])
def test_features_agree_with_scipys_square_root(n, m, tolerance):
    """Where a covariance has no full rank, SciPy's root of the product has lost half of its digits."""
    x, y = cloud(n, 40, seed=1).numpy(), cloud(m, 40, seed=2).numpy() + 0.3
    a, b = (np.cov(part, rowvar=False) for part in (x, y))
    shared = float(np.trace(scipy.linalg.sqrtm(a @ b)).real)
    expected = float(np.square(x.mean(axis=0) - y.mean(axis=0)).sum()) + np.trace(a) + np.trace(b) - 2 * shared
    found = frechet_distance(*(gaussian(torch.from_numpy(part)) for part in (x, y)))
    assert found == pytest.approx(expected, rel=tolerance)


def test_gaussians_of_one_covariance_are_apart_by_their_means():
    cov = gaussian(cloud(30, 6, seed=5)).cov
    a, b = around([0.0] * 6, cov), around([1.0, -1, 2, 0, 0, 3], cov)
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 4 + 9, rel=1e-10)


@pytest.mark.parametrize(
    ("n", "within", "rank"), [(2, 20, 1), (13, 20, 12), (21, 20, 20), (90, 20, 20), (90, 7, 7), (5, 7, 4)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_rank_is_what_the_features_span(n, within, rank, kind):
    assert gaussian(cloud(n, 20, seed=n, rank=within).to(kind)).rank == rank
    assert gaussian(1e-6 * cloud(n, 20, seed=n, rank=within).to(kind)).rank == rank


def test_repeated_features_add_no_rank():
    x = cloud(8, 20, seed=0)
    assert gaussian(torch.cat([x, x, x])).rank == 7
    assert gaussian(torch.ones(9, 4)).rank == 0


def test_the_covariance_is_the_unbiased_one_in_double_precision():
    x = (cloud(30, 6, seed=0) + 1000).float()
    np.testing.assert_allclose(gaussian(x).cov.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)
    assert gaussian(x).n == 30


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad):
    x = cloud(5, 3, seed=0)
    x[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 5 features are NaN or infinite, first that of clip 2"):
        gaussian(x)


def test_too_few_features_and_unequal_dimensions_are_refused():
    with pytest.raises(ValueError, match="two clips"):
        gaussian(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        frechet_distance(gaussian(cloud(9, 4, seed=0)), gaussian(cloud(9, 3, seed=0)))


@pytest.mark.parametrize(("count", "dimensions", "real"), [(12, 40, 20), (12, 40, 90), (30, 5, 9), (2, 3, 4)])
def test_the_distance_of_drawn_rows_is_that_of_their_gaussian(count, dimensions, real):
    features, to = 3 + cloud(count, dimensions, 1), gaussian(cloud(real, dimensions, 2))
    distance, source = distances(features, to), torch.Generator().manual_seed(3)
    assert distance(torch.arange(count)) == pytest.approx(frechet_distance(gaussian(features), to), rel=1e-9)
    for length in (count, 2 * count, 2, 1 + count // 2):
        rows = torch.randint(count, (length,), generator=source)
        expected = frechet_distance(gaussian(features[rows]), to)
        assert distance(rows) == pytest.approx(expected, rel=1e-9), length


def test_rows_that_are_all_one_have_its_distance():
    features, to = cloud(6, 8, 4), gaussian(cloud(9, 8, 5))
    expected = float((features[2] - to.mean).square().sum() + to.cov.trace())
    assert distances(features, to)(torch.full((6,), 2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("features", "said"), [(torch.zeros(3, 5), "5 and 4 dimensions"), (torch.zeros(1, 4), "two")])
def test_rows_of_what_has_no_distance_are_refused(features, said):
    with pytest.raises(ValueError, match=said):
        distances(features, gaussian(cloud(9, 4, 5)))
