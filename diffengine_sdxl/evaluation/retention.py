"""Retention: how much of what an adapter does alone is left where others act, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.base import NONE, MeanMetric, Measured
from diffengine_sdxl.evaluation.interval import Estimate

#: Name of the harmonic mean over all adapters and metrics.
HARMONIC_MEAN = 'harmonic_mean'


class _Scores(NamedTuple):
    """Scores of N images together, alone and by the base, [N, 3], and the sample of each."""

    values: np.ndarray
    keys: list[str]
    is_defined: bool

    def retention(self, kept: np.ndarray) -> float:
        """Return (together - base) / (alone - base) of the images that a mask keeps; NaN where nothing is."""
        together, alone, base = self.values[kept].mean(axis=0) if kept.any() else (np.nan,) * 3
        return float((together - base) / (alone - base)) if alone != base else float('nan')


def retention(metrics: Mapping[str, MeanMetric], measured: Mapping[str, Sequence[str]], together: str, base: str,
              only: str) -> dict[str, Estimate]:
    """Return the retention of each adapter by each of its metrics, and their harmonic mean.

    (score together - base) / (score alone - base), of the same samples and noise, with a jackknife over samples. It is
    undefined (NaN) where the 95 % interval of (alone - base) holds 0 or what is worse: there is nothing to retain. In
    the harmonic mean, which one low value pulls down, negative ones count as 0; it is undefined if one of them is. Its
    interval is a jackknife too; where that of a retention reaches 0, it is 0 to the harmonic mean of all upper ends.

    Args:
        metrics: name -> a metric that has been evaluated.
        measured: adapter -> names of its metrics.
        together, base: names of image sets.
        only: beginning of the names of image sets of one adapter.

    Returns:
        '<adapter>/<metric>' -> its retention; 'harmonic_mean'.
    """
    scores = {f'{adapter}/{name}': _scores(metrics[name], together, f'{only}{adapter}', base)
              for adapter, names in measured.items() for name in names}
    found = {name: interval.jackknife(one.retention, one.keys)._replace(p=None) if one.is_defined else
             NONE._replace(num_samples=len(one.keys)) for name, one in scores.items()}
    if not all(one.is_defined for one in scores.values()):
        return {**found, HARMONIC_MEAN: NONE}
    keys = sorted({key for one in scores.values() for key in one.keys})

    def harmonic(kept: np.ndarray) -> float:
        some = {key for key, keep in zip(keys, kept, strict=True) if keep}
        values = [max(one.retention(np.array([key in some for key in one.keys])), 0.0) for one in scores.values()]
        return 0.0 if 0.0 in values else float(len(values) / sum(1 / value for value in values))
    mean = interval.jackknife(harmonic, keys, (0.0, np.inf))._replace(
        p=None, num_samples=max(len(one.keys) for one in scores.values()))
    if min(one.low for one in found.values()) <= 0:
        # A jackknife does not see past the kink at 0: take the mean of all upper ends.
        mean = mean._replace(low=0.0, high=len(found) / sum(1 / max(one.high, 1e-12) for one in found.values()))
    return {**found, HARMONIC_MEAN: mean}


def _scores(metric: MeanMetric, *image_sets: str) -> _Scores:
    """Return the scores of the images that all sets have."""
    rows: list[Measured] = [row for row in metric.rows if all(row.values.get(name) is not None for name in image_sets)]
    values = np.array([[row.values[name] for name in image_sets] for row in rows], dtype=np.float64).reshape(-1, 3)
    if not rows:
        return _Scores(values, [], False)
    gain = metric.difference(rows, image_sets[1], image_sets[2])
    better = metric.better >= 0 and gain.low > 0 or metric.better <= 0 and gain.high < 0
    return _Scores(values, [row.key for row in rows], better)
