"""95 % intervals of a mean over clustered images: several seeds of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

#: The normal distribution's 0.975 quantile.
Z = 1.959963984540054


class Estimate(NamedTuple):
    """A mean with its 95 % interval and the number of values."""

    value: float
    low: float
    high: float
    num_samples: int


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % score interval of a share of n independent draws (any number above 0).

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    middle = (share + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n)
    half = Z / (1 + Z ** 2 / n) * np.sqrt(share * (1 - share) / n + Z ** 2 / (4 * n ** 2))
    # At 0 and 1 one bound is exact, which rounding would miss.
    return 0.0 if share == 0 else float(middle - half), 1.0 if share == 1 else float(middle + half)


def variance_of_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return the cluster-robust variance of the mean of N values in K clusters; infinite for one cluster.

    K / (K - 1) * sum over clusters of (sum over the cluster of (value - mean)) ** 2 / N ** 2.

    Source: Liang and Zeger, Longitudinal Data Analysis Using Generalized Linear Models, Biometrika 73 (1986), for a
    constant only; the factor as in Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference (2015).
    """
    index = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    if len(index) < 2:
        return float('inf')
    numbers = np.asarray(values, dtype=np.float64)
    sums = np.bincount([index[cluster] for cluster in clusters], weights=numbers - numbers.mean())
    return float(len(index) / (len(index) - 1) * (sums ** 2).sum() / len(numbers) ** 2)


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


def mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of values between 0 and 1, +- 1.96 cluster-robust standard errors within [0, 1].

    A single cluster has the interval [0, 1], as it tells nothing about others.
    """
    value, half = float(np.mean(values)), Z * float(np.sqrt(variance_of_mean(values, clusters)))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(values))
