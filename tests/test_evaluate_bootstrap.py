"""Intervals: closed forms for means, addresses, and distances that grow where rows repeat."""

from __future__ import annotations

import pytest
import torch

from animatelcm.evaluate.bootstrap import average, ends, interval, paired
from animatelcm.evaluate.frechet import distances, frechet_distance, gaussian


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


def averages(values):
    return lambda rows: average(values[rows])


def test_the_paired_deviation_of_means_is_that_of_the_differences():
    prompts, noise = 10 * normal(400, seed=3), normal(400, seed=4)
    found = paired(averages(prompts), averages(prompts + 1.5 + noise), 400, resamples=3000)
    assert found.value == pytest.approx(1.5 + mean(noise), abs=1e-12)
    expected = float(noise.std(correction=0)) / 20
    assert found.deviation == pytest.approx(expected, rel=0.08)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((1.96 * expected,) * 2, rel=0.12)
    apart = [interval(mean, each) for each in (prompts, prompts + noise)]
    assert min(each.high - each.low for each in apart) > 8 * (found.high - found.low)


def test_what_prompts_do_to_both_alike_leaves_no_doubt():
    prompts = 10 * normal(50, seed=5)
    found = paired(averages(prompts), averages(prompts + 2), 50)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2), abs=1e-12)
    assert found.deviation < 1e-12
    assert paired(averages(prompts), averages(prompts.flip(0)), 50).deviation > 1  # the same figures, other pairs


def test_paired_distances_are_told_apart_where_each_alone_is_not():
    """Of one dimension the distance is (difference of means)^2 + (difference of deviations)^2."""
    prompts, real = 4 * normal(300, 1, seed=6), gaussian(normal(500, 1, seed=7))
    moved = prompts + 0.2  # prompts alone move the first term by 2 * mean * 4 / sqrt(300), the second by more
    first, second = (distances(each, real) for each in (prompts, moved))
    found = paired(first, second, 300, resamples=400)
    offset = mean(prompts) - float(real.mean)
    assert found.value == pytest.approx(0.2**2 + 2 * 0.2 * offset, abs=1e-9)
    assert found.deviation == pytest.approx(2 * 0.2 * float(prompts.std(correction=0)) / 300**0.5, rel=0.1)
    alone = interval(second, torch.arange(300), resamples=400)
    assert alone.high - alone.low > 10 * 4 * found.deviation


def test_pairs_are_drawn_together_by_address():
    seen = []
    paired(lambda rows: seen.append(rows) or 0.0, lambda rows: seen.append(rows) or 0.0, 9, resamples=3)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert len({tuple(rows.tolist()) for rows in seen}) == 4  # all clips, then three draws
    x, y = averages(normal(30, seed=1)), averages(normal(30, seed=2))
    assert paired(x, y, 30, resamples=20) == paired(x, y, 30, resamples=20) != paired(x, y, 30, resamples=20, seed=1)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"n": 1}, "got 1"), ({"n": 4, "resamples": 1}, "resamples=1"), ({"n": 4, "level": 1.0}, r"level=1\.0")],
)
def test_senseless_pairs_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        paired(averages(torch.zeros(4)), averages(torch.zeros(4)), **wrong)


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
