"""95 % intervals over clustered images: several seeds of one prompt are not independent.

A cluster is what one sample of the data gives: its images of all seeds. Means have intervals by the variance between
clusters, statistics of whole sets (FID, mIoU) by leaving groups of clusters out. A difference is computed cluster by
cluster, so what makes a prompt hard for both sides does not widen its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

#: The normal distribution's 0.975 quantile.
Z = 1.959963984540054
#: Groups of clusters that `jackknife` leaves out in turn.
GROUPS = 20


class Estimate(NamedTuple):
    """A number with its 95 % interval and the number of images.

    Attributes:
        p: of a difference: how likely one at least as large is where there is none; None for other numbers.
    """

    value: float
    low: float
    high: float
    num_samples: int
    p: float | None = None


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % score interval of a share of n independent draws (any number above 0).

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    middle = (share + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n)
    half = Z / (1 + Z ** 2 / n) * np.sqrt(share * (1 - share) / n + Z ** 2 / (4 * n ** 2))
    # At 0 and 1 one bound is exact, which rounding would miss.
    return 0.0 if share == 0 else float(middle - half), 1.0 if share == 1 else float(middle + half)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the sum of each of K clusters, fp64 [K], in the order in which they first come."""
    index = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    return np.bincount([index[cluster] for cluster in clusters], weights=np.asarray(values, dtype=np.float64))


def variance_of_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return the cluster-robust variance of the mean of N values in K clusters; infinite for one cluster.

    K / (K - 1) * sum over clusters of (sum over the cluster of (value - mean)) ** 2 / N ** 2.

    Source: Liang and Zeger, Longitudinal Data Analysis Using Generalized Linear Models, Biometrika 73 (1986), for a
    constant only; the factor as in Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference (2015).
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums = cluster_sums((numbers - numbers.mean()).tolist(), clusters)
    if len(sums) < 2:
        return float('inf')
    return float(len(sums) / (len(sums) - 1) * (sums ** 2).sum() / len(numbers) ** 2)


def share(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of values 0 or 1 with a Wilson interval for the effective number of independent draws.

    That number is mean * (1 - mean) / variance_of_mean, at least the number of clusters and at most that of values; if
    all values are equal, the number of clusters.

    Source: Korn and Graubard, Confidence Intervals for Proportions with Small Expected Number of Positive Counts
    Estimated from Survey Data, Survey Methodology 24 (1998), for the effective number of draws.
    """
    num_clusters, count, value = len(set(clusters)), len(values), float(np.mean(values))
    variance = variance_of_mean(values, clusters)
    if value in (0.0, 1.0):
        effective = float(num_clusters)
    else:
        effective = value * (1 - value) / variance if variance > 0 else float(count)
    return Estimate(value, *wilson(value, min(max(effective, num_clusters), count)), count)


def mean(values: Sequence[float], clusters: Sequence[Hashable],
         bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Return the mean of values, +- Student's quantile times the cluster-robust standard error, within `bounds`.

    A single cluster has the interval `bounds`, as it tells nothing about others.
    """
    value, half = float(np.mean(values)), _half_width(variance_of_mean(values, clusters), len(set(clusters)) - 1)
    return Estimate(value, max(bounds[0], value - half), min(bounds[1], value + half), len(values))


def difference(values: Sequence[float], others: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of the paired differences `values` - `others`, with its interval and p.

    The interval is that of `mean`, without bounds, and p Student's from the same error: below 0.05 where the interval
    leaves out 0. But p is never below 2^(1 - K), the least that the signs of K clusters' differences can prove, however
    equal the differences are: with K = 5 clusters or fewer never below 0.05.

    Args:
        values, others: N measurements of images of the same sample and noise, in the same order.
        clusters: N samples.
    """
    gaps = (np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)).tolist()
    estimate, num = mean(gaps, clusters, (-np.inf, np.inf)), len(set(clusters))
    p = _student_p(estimate.value, variance_of_mean(gaps, clusters), num - 1)
    return estimate._replace(p=None if p is None else max(p, 2.0 ** (1 - num)))


def share_difference(values: Sequence[float], others: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return `difference` of values 0 or 1, with an interval made of the two shares' own and their correlation.

    So it has a width even where all differences are equal. p is that of `difference`; where the two disagree, near
    0.05, the interval is the better one.

    Source: Newcombe, Improved Confidence Intervals for the Difference between Binomial Proportions Based on Paired
    Data, Statistics in Medicine 17 (1998), method 10, without its continuity correction.
    """
    one, other, gap = share(values, clusters), share(others, clusters), difference(values, others, clusters)
    sums = [cluster_sums(v, clusters) for v in (values, others)]
    correlation = float(np.corrcoef(np.stack(sums))[0, 1]) if all(np.ptp(s) > 0 for s in sums) else 0.0

    def half(a: float, b: float) -> float:
        return float(np.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0)))
    return gap._replace(low=gap.value - half(one.value - one.low, other.high - other.value),
                        high=gap.value + half(one.high - one.value, other.value - other.low))


def jackknife(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable],
              bounds: tuple[float, float] = (-np.inf, np.inf), groups: int = GROUPS) -> Estimate:
    """Return a statistic of a set of images with the interval of a delete-a-group jackknife.

    The K clusters are dealt to g = min(groups, K) groups; the variance is (g - 1) / g times the sum of the squared
    deviations of the g statistics that leave one group out each from their mean; Student's quantile has g - 1 degrees
    of freedom. Unlike a bootstrap it repeats no image, which would bias FID and KID.

    Source: Shao and Tu, The Jackknife and Bootstrap (1995), section 2.3.

    Args:
        statistic: the number of the images that a mask of bools [N] keeps.
        clusters: N samples.
        bounds: within which the interval lies; it is all of them where a statistic is not finite. If both are infinite,
            p says how likely a value that far from 0 is; None where there is no telling: a statistic is not finite, or
            it is the same, and not 0, whatever is left out.
    """
    index = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    num = min(groups, len(index))
    group = np.array([index[cluster] % num for cluster in clusters])
    value = float(statistic(np.ones(len(group), dtype=bool)))
    if num < 2:
        return Estimate(value, *bounds, len(group))
    left_out = np.array([statistic(group != g) for g in range(num)], dtype=np.float64)
    if not np.isfinite([value, *left_out]).all():
        return Estimate(value, *bounds, len(group))
    variance = float((num - 1) / num * ((left_out - left_out.mean()) ** 2).sum())
    half, p = _half_width(variance, num - 1), None
    if bounds == (-np.inf, np.inf) and (variance > 0 or value == 0):
        p = _student_p(value, variance, num - 1)
    return Estimate(value, max(bounds[0], value - half), min(bounds[1], value + half), len(group), p)


def _half_width(variance: float, degrees: int) -> float:
    """Return half the width of a 95 % interval by Student's distribution; infinite without a degree of freedom."""
    from scipy.special import stdtrit
    return float(stdtrit(degrees, 0.975) * np.sqrt(variance)) if degrees > 0 else float('inf')


def _student_p(value: float, variance: float, degrees: int) -> float | None:
    """Return Student's two-sided p of a value of mean 0; None without a degree of freedom, or if it is not finite."""
    from scipy.special import stdtr
    if degrees < 1 or not np.isfinite([value, variance]).all():
        return None
    if variance == 0:
        return float(value == 0)
    return float(2 * stdtr(degrees, -abs(value) / np.sqrt(variance)))
