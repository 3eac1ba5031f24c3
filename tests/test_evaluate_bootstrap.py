"""Intervals: closed forms for means, addresses, and distances that grow where rows repeat."""

from __future__ import annotations

import pytest
import torch

from animatelcm.evaluate.bootstrap import average, ends, interval
from animatelcm.evaluate.frechet import frechet_distance, gaussian


def mean(values):
    return float(values.mean())


def distance(a, b):
    return frechet_distance(gaussian(a), gaussian(b))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_the_normal_one():
    x = 5 + 2 * normal(400, seed=0)
    found = interval(mean, x, resamples=3000)
    reach = 1.96 * float(x.std(correction=0)) / 20
    assert found.low == pytest.approx(mean(x) - reach, abs=0.08 * reach)
    assert found.high == pytest.approx(mean(x) + reach, abs=0.08 * reach)
    assert abs(found.bias) < 0.05 * reach


def test_the_interval_of_a_ratio_is_that_of_the_delta_method():
    both = torch.tensor([6.0, 4.0]) + normal(500, 2, seed=7) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]]).double()
    ratio = float(both[:, 0].mean() / both[:, 1].mean())
    assert average(both) == pytest.approx(ratio, rel=1e-12)
    spread = (both[:, 0] - ratio * both[:, 1]).std(correction=0) / both[:, 1].mean()
    reach = 1.96 * float(spread) / 500**0.5
    low, high = ends(average, both, resamples=3000)
    assert (ratio - low, high - ratio) == pytest.approx((reach, reach), rel=0.1)
    assert ends(average, both, (ratio - reach / 2, ratio)) == (ratio - reach / 2, ratio)
    assert ends(average, both[:1]) is None


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_an_interval_holds_the_truth_as_often_as_it_says(level):
    held = 0
    for trial in range(120):
        found = interval(mean, normal(60, seed=trial), level=level, resamples=120, seed=trial)
        held += found.low <= 0 <= found.high
    assert held / 120 == pytest.approx(level, abs=3 * (level * (1 - level) / 120) ** 0.5)


def test_constant_rows_leave_no_doubt():
    found = interval(mean, torch.full((9,), 3.0), resamples=20)
    assert (found.low, found.high, found.bias) == (3, 3, 0)


def test_draws_have_addresses():
    x, y = normal(30, seed=1), normal(40, seed=2)
    assert interval(mean, x, resamples=50) == interval(mean, x, resamples=50)
    assert interval(mean, x, resamples=50) != interval(mean, x, resamples=50, seed=1)
    seen = []
    interval(lambda a, b: seen.append((a, b)) or 0.0, x, y, resamples=3)
    interval(lambda a, b: seen.append((a, b)) or 0.0, x, y, resamples=5)
    for first, second in zip(seen[1:4], seen[5:8], strict=True):  # more draws begin with the same ones
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(part) for part in seen[-1]] == [30, 40]


def test_the_interval_of_a_distance_is_about_what_as_many_other_clips_give():
    """Plain quantiles would lie above: resampled distances are larger by about as much as the distance is too large."""

    def pair(seed):
        return normal(60, 30, seed=2 * seed), normal(150, 30, seed=2 * seed + 1) * 1.5

    others = torch.tensor([distance(*pair(seed)) for seed in range(100, 200)])
    held = above = 0
    for seed in range(20):
        found = interval(distance, *pair(seed), resamples=60, seed=seed)
        held += found.low <= others.mean() <= found.high
        above += found.low + found.bias > others.mean()
    assert held >= 16
    assert above >= 16
    endless = 30 * (1.5 - 1) ** 2
    assert found.bias == pytest.approx(float(others.mean()) - endless, rel=0.4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"level": 1.0}, r"level=1\.0"), ({"level": 0.0}, r"level=0\.0"), ({"resamples": 1}, "resamples=1")],
)
def test_senseless_intervals_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        interval(mean, torch.zeros(4), **wrong)


def test_one_row_has_no_interval():
    with pytest.raises(ValueError, match="two rows at least in each sample, got 1"):
        interval(distance, torch.zeros(4, 2), torch.zeros(1, 2))
