"""Intervals: known values, other ways to compute the same, and how often they hold the truth."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.interval import Z


@pytest.mark.parametrize(('share', 'n', 'low', 'high'), [
    # Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3.
    (81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0 / 20, 20, 0.0, 0.1611),
    (1 / 29, 29, 0.0061, 0.1718)])
def test_known_wilson_intervals(share: float, n: int, low: float, high: float) -> None:
    assert interval.wilson(share, n) == pytest.approx((low, high), abs=5e-5)
    assert interval.wilson(1 - share, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(('share', 'n'), [(0.5, 10), (0.9, 33.3), (0.02, 400), (0.0, 7), (1.0, 2)])
def test_the_ends_are_where_the_score_test_changes_its_mind(share: float, n: float) -> None:
    for end in interval.wilson(share, n):
        assert abs(share - end) == pytest.approx(Z * np.sqrt(end * (1 - end) / n), abs=1e-9)
        assert 0 <= end <= 1 and (end in (0, 1)) == (end == share)


def draws(num: int, size: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Values around a mean of their cluster, and the names of the clusters, shuffled."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(num, 1)) + rng.normal(size=(num, size))).ravel()
    order = rng.permutation(num * size)
    return values[order], [f'prompt {i // size}' for i in order]


def test_variance_against_the_sum_over_pairs() -> None:
    """The formula of the sandwich, pair by pair; clusters of several sizes."""
    values, clusters = draws(9, 4)
    values, clusters = values[:29], clusters[:29]
    off = values - values.mean()
    pairs = sum(off[i] * off[j] for i, j in product(range(29), repeat=2) if clusters[i] == clusters[j])
    assert interval.variance_of_mean(values.tolist(), clusters) == pytest.approx(9 / 8 * pairs / 29 ** 2)


@pytest.mark.parametrize('size', [1, 5])
def test_variance_of_equal_clusters_is_that_of_their_means(size: int) -> None:
    values, clusters = draws(12, size)
    means = [np.mean([v for v, c in zip(values, clusters, strict=True) if c == name]) for name in set(clusters)]
    assert interval.variance_of_mean(values.tolist(), clusters) == pytest.approx(np.var(means, ddof=1) / 12)


def test_one_cluster_says_nothing_of_others() -> None:
    assert interval.mean([0.4, 0.6], ['a', 'a']) == (0.5, 0.0, 1.0, 2, None)
    assert interval.share([1, 0, 1], ['a'] * 3) == (2 / 3, *interval.wilson(2 / 3, 1), 3, None)


def test_independent_values_have_the_plain_wilson_interval() -> None:
    values = [1.0] * 31 + [0.0] * 9
    assert interval.share(values, list(range(40)))[:4] == pytest.approx((0.775, *interval.wilson(0.775, 40), 40))


def test_values_that_repeat_in_their_cluster_count_once() -> None:
    """Four equal values of each of 40 prompts are worth 40 values, not 160."""
    values, clusters = [1.0] * 31 + [0.0] * 9, list(range(40))
    assert interval.share(values * 4, clusters * 4)[:3] == interval.share(values, clusters)[:3]
    assert interval.mean(values * 4, clusters * 4)[:3] == pytest.approx(interval.mean(values, clusters)[:3])


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_equal_values_are_worth_their_clusters(value: float) -> None:
    estimate = interval.share([value] * 60, [i % 20 for i in range(60)])
    assert estimate == (value, *interval.wilson(value, 20), 60, None) and estimate.high - estimate.low > 0.1


def test_never_more_than_the_values() -> None:
    """Each prompt right in one of two: no variance between prompts at all."""
    values, clusters = [1.0, 0.0] * 25, [i // 2 for i in range(50)]
    assert interval.variance_of_mean(values, clusters) == 0
    assert interval.share(values, clusters)[:4] == pytest.approx((0.5, *interval.wilson(0.5, 50), 50))
    values[0] = 0.0
    assert 0 < interval.variance_of_mean(values, clusters) < 0.49 * 0.51 / 50
    assert interval.share(values, clusters)[:4] == pytest.approx((0.48, *interval.wilson(0.48, 50), 50))


def coverage(truth: float, correlation: float, num: int = 60, size: int = 4, runs: int = 1500) -> tuple[float, float]:
    """How often the interval of a share holds the truth: ours, and Wilson's as if all values were independent.

    Chances of the prompts are beta distributed; `correlation` is that of two values of one prompt.
    """
    rng = np.random.default_rng(1)
    scale = (1 - correlation) / correlation
    clusters, hits = [i // size for i in range(num * size)], np.zeros(2)
    for _ in range(runs):
        chances = rng.beta(truth * scale, (1 - truth) * scale, size=num).repeat(size)
        values = (rng.random(num * size) < chances).astype(float)
        estimate, (low, high) = interval.share(values.tolist(), clusters), interval.wilson(values.mean(), num * size)
        hits += (estimate.low <= truth <= estimate.high, low <= truth <= high)
    return hits[0] / runs, hits[1] / runs


@pytest.mark.parametrize('truth', [0.5, 0.85, 0.95])
@pytest.mark.parametrize('correlation', [0.05, 0.5, 0.9])
def test_share_holds_the_truth_in_95_of_100(truth: float, correlation: float) -> None:
    ours, naive = coverage(truth, correlation)
    assert 0.925 <= ours <= 0.985
    if correlation >= 0.5:
        assert naive < 0.88


def test_mean_holds_the_truth_in_95_of_100() -> None:
    rng, hits = np.random.default_rng(2), 0
    clusters = [i // 4 for i in range(240)]
    for _ in range(1500):
        values = np.clip(0.8 + 0.05 * rng.normal(size=60).repeat(4) + 0.05 * rng.normal(size=240), 0, 1)
        estimate = interval.mean(values.tolist(), clusters)
        hits += estimate.low <= 0.8 <= estimate.high
    assert 0.925 <= hits / 1500 <= 0.965


def test_mean_stays_between_0_and_1() -> None:
    values, clusters = [1.0, 1.0, 1.0, 0.0], list(range(4))
    assert interval.mean(values, clusters).high == 1 and interval.mean([1 - v for v in values], clusters).low == 0


# Differences

def test_a_difference_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    values, others = rng.normal(0.3, 1, 9), rng.normal(0, 1, 9)
    found, paired = interval.difference(values, others, list(range(9))), stats.ttest_rel(values, others)
    low, high = paired.confidence_interval(0.95)
    assert found == pytest.approx((np.mean(values - others), low, high, 9, paired.pvalue), abs=1e-12)


def test_few_differences_prove_little_however_equal_they_are() -> None:
    """No less than the test by their signs: that of all 2^K has the observed one and its opposite."""
    for num in (2, 5, 9):
        found = interval.difference([1.0 + 1e-9 * i for i in range(num)], [0.0] * num, list(range(num)))
        sums = [abs(sum(signs)) for signs in product((1, -1), repeat=num)]
        assert found.p == np.mean(np.array(sums) >= num) == 2 ** (1 - num)
    assert interval.difference([1, 1], [0, 0], [0, 1]).p == 0.5 and interval.difference([1, 1], [1, 1], [0, 1]).p == 1
    assert interval.difference([np.nan, 1], [0, 0], [0, 1]).p is None


def test_an_interval_without_0_and_a_small_p_go_together() -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        clusters = np.repeat(np.arange(12), rng.integers(1, 4, 12)).tolist()
        values = rng.normal(0.4, 1, len(clusters))
        found = interval.difference(values, np.zeros(len(clusters)), clusters)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_seeds_of_a_sample_are_one_difference() -> None:
    """Four times the images without more samples: neither a narrower interval nor a smaller p."""
    rng = np.random.default_rng(4)
    values, others, clusters = rng.normal(size=10).tolist(), rng.normal(size=10).tolist(), list(range(10))
    once, often = (interval.difference(values * n, others * n, clusters * n) for n in (1, 4))
    assert often[:3] == pytest.approx(once[:3]) and often.p == pytest.approx(once.p) and often.num_samples == 40
    assert interval.difference([1, 2], [0, 0], ['a', 'a']) == (1.5, -np.inf, np.inf, 2, None)


@pytest.mark.parametrize(('both', 'first', 'second', 'neither', 'low', 'high'), [
    # By Newcombe's formula, method 10; where both * neither <= first * second it has no correction.
    (36, 12, 2, 0, 0.0569, 0.3404), (36, 14, 0, 0, 0.1528, 0.4167), (0, 0, 0, 50, -0.0713, 0.0713)])
def test_newcombes_interval_of_paired_shares(both: int, first: int, second: int, neither: int, low: float,
                                             high: float) -> None:
    values = [1] * (both + first) + [0] * (second + neither)
    others = [1] * both + [0] * first + [1] * second + [0] * neither
    found = interval.share_difference(values, others, list(range(50)))
    assert found[:4] == pytest.approx(((first - second) / 50, low, high, 50), abs=5e-5)
    (low_1, high_1), (low_2, high_2) = interval.wilson(np.mean(values), 50), interval.wilson(np.mean(others), 50)
    one, other = np.mean(values), np.mean(others)
    root = np.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    phi = (both * neither - first * second) / root if root else 0
    down, up = (np.sqrt(a * a - 2 * phi * a * b + b * b) for a, b in ((one - low_1, high_2 - other),
                                                                    (high_1 - one, other - low_2)))
    assert (found.low, found.high) == pytest.approx((one - other - down, one - other + up), abs=1e-12)


def test_jackknife_of_a_mean_and_of_a_variance_against_closed_forms() -> None:
    """With a group for each value the variance is s^2 / n; of the plug-in variance it is Tukey's, by moments."""
    x = np.random.default_rng(5).normal(size=18)
    found = interval.jackknife(lambda kept: float(x[kept].mean()), list(range(18)))
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert found[:4] == pytest.approx((x.mean(), low, high, 18), abs=1e-12)
    assert found.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=1e-12)
    n, off = 18, x - x.mean()
    squares = off ** 2
    # Leaving i out: (n * var - off_i^2 * n / (n - 1)) / (n - 1).
    left_out = (squares.sum() - squares * n / (n - 1)) / (n - 1)
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    found = interval.jackknife(lambda kept: float(x[kept].var()), list(range(18)), (0.0, np.inf))
    assert found[:3] == pytest.approx((x.var(), max(0, x.var() - half), x.var() + half), abs=1e-12) and found.p is None


def test_jackknife_leaves_out_whole_samples() -> None:
    """All seeds of a sample at once, in at most 20 groups; a single sample has no interval."""
    seen: list[int] = []
    clusters = [i // 3 for i in range(90)]
    interval.jackknife(lambda kept: float(seen.append(int(kept.sum())) or kept.mean()), clusters)
    assert seen[0] == 90 and len(seen) == 21 and {90 - n for n in seen[1:]} == {3, 6}
    assert interval.jackknife(lambda kept: 0.5, ['a'] * 4, (0.0, 1.0)) == (0.5, 0.0, 1.0, 4, None)


def test_a_jackknife_that_tells_nothing() -> None:
    """A statistic that is not finite without some, or always the same."""
    def undefined(kept: np.ndarray) -> float:
        return 0.5 if kept[0] else float('nan')
    assert interval.jackknife(undefined, [0, 1, 2]) == (0.5, -np.inf, np.inf, 3, None)
    assert interval.jackknife(undefined, [0, 1, 2], (0.0, 1.0)) == (0.5, 0.0, 1.0, 3, None)
    assert interval.jackknife(lambda kept: 0.5, [0, 1, 2]) == (0.5, 0.5, 0.5, 3, None)
    assert interval.jackknife(lambda kept: 0.0, [0, 1, 2]) == (0.0, 0.0, 0.0, 3, 1.0)


def test_p_of_no_difference_is_uniform() -> None:
    """Of 300 comparisons of equal things 5 % are below 0.05."""
    rng, ps = np.random.default_rng(6), []
    for _ in range(300):
        values, others = rng.normal(size=8), rng.normal(size=8)
        ps.append(interval.difference(values, others, list(range(8))).p)
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.08 and stats.kstest(ps, 'uniform').pvalue > 0.01
