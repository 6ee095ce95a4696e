"""Retention by hand, its intervals by simulation, and where it is undefined."""

import math

import numpy as np
import pytest

from diffengine_sdxl.evaluation.base import MeanMetric, Measured
from diffengine_sdxl.evaluation.retention import HARMONIC_MEAN, retention


class Score(MeanMetric):
    """Scores that are given."""

    name = 'score'

    def measure(self, images, batch):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def scored(together: list[float], alone: list[float], base: list[float], better: int = 1, seeds: int = 1) -> Score:
    """A metric that has measured these; `seeds` in turn belong to one sample."""
    metric = Score()
    metric.better = better
    metric.rows = [Measured(f'{i // seeds:04d}', i % seeds, {'adapted': t, 'only_a': a, 'only_b': a, 'base': b})
                   for i, (t, a, b) in enumerate(zip(together, alone, base, strict=True))]
    return metric


def measured(**metrics: Score) -> dict[str, tuple[float, float, float]]:
    """Retention of adapter `a` by all metrics: value, low, high."""
    return {name: one[:3] for name, one in retention(metrics, dict(a=[*metrics]), 'adapted', 'base', 'only_').items()}


def test_values_by_hand() -> None:
    """(0.7 - 0.2) / (1.0 - 0.2) and (0.4 - 0.2) / 0.8; their harmonic mean; lower may be better."""
    x = scored([0.6, 0.8] * 20, [1.0, 1.0] * 20, [0.1, 0.3] * 20)
    y = scored([0.3, 0.5] * 20, [0.9, 1.1] * 20, [0.2, 0.2] * 20)
    found = measured(x=x, y=y)
    assert found['a/x'][0] == pytest.approx(0.625) and found['a/y'][0] == pytest.approx(0.25)
    assert found[HARMONIC_MEAN][0] == pytest.approx(2 / (1 / 0.625 + 1 / 0.25))
    assert all(low < value < high for value, low, high in found.values())
    distances = scored([0.4, 0.2] * 20, [0.0, 0.0] * 20, [0.9, 0.7] * 20, better=-1)
    assert measured(d=distances)['a/d'][0] == pytest.approx(0.5 / 0.8)
    distances.better = 0
    assert measured(d=distances)['a/d'][0] == pytest.approx(0.5 / 0.8)
    distances.better = 1
    assert math.isnan(measured(d=distances)['a/d'][0])


def test_what_wins_on_one_side_only_does_not_win() -> None:
    """A negative retention counts as 0 in the harmonic mean, and is reported as it is."""
    x, y = scored([0.0, 0.2] * 20, [1.0] * 40, [0.3, 0.4] * 20), scored([1.0, 0.9] * 20, [1.0] * 40, [0.1, 0.2] * 20)
    found = measured(x=x, y=y)
    assert found['a/x'][0] == pytest.approx((0.1 - 0.35) / 0.65) and found[HARMONIC_MEAN][0] == 0


@pytest.mark.parametrize('alone', [[0.5, 0.3] * 10, [0.2, 0.1] * 10])
def test_nothing_to_retain_is_undefined(alone: list[float]) -> None:
    """The adapter alone is as good as the base, or worse."""
    found = measured(x=scored([0.9] * 20, alone, [0.3, 0.5] * 10), y=scored([0.9, 1.0] * 10, [1.0] * 20, [0.1] * 20))
    assert math.isnan(found['a/x'][0]) and math.isnan(found[HARMONIC_MEAN][0]) and found['a/y'][0] > 0.9


def test_images_that_do_not_count_are_left_out_of_all_sets() -> None:
    metric = scored([0.6, 0.8] * 20, [1.0, 1.0] * 20, [0.1, 0.3] * 20)
    lacking = Measured('x', 0, {'adapted': None, 'only_a': 1.0, 'base': 0.0})
    metric.rows.append(lacking)
    one = retention(dict(x=metric), dict(a=['x']), 'adapted', 'base', 'only_')['a/x']
    assert one.value == pytest.approx(0.625) and one.num_samples == 40


def test_intervals_hold_the_truth() -> None:
    """Of 200 tests with 60 samples of 2 seeds each, 88 to 99 % hold the true ratio of 0.75."""
    draws, held, together_held = np.random.default_rng(0), 0, 0
    for _ in range(200):
        hard = np.repeat(draws.normal(0, 0.1, 60), 2)
        together, alone, base = (level + hard + draws.normal(0, 0.2, 120) for level in (0.8, 1.0, 0.2))
        x = scored(together.tolist(), alone.tolist(), base.tolist(), seeds=2)
        found = measured(x=x)
        held += found['a/x'][1] <= 0.75 <= found['a/x'][2]
        together_held += found[HARMONIC_MEAN][1] <= 0.75 <= found[HARMONIC_MEAN][2]
    assert 176 <= held <= 198 and 176 <= together_held <= 198


@pytest.mark.parametrize('truth', [0.0, 0.05, 0.1])
def test_the_interval_of_the_mean_holds_the_truth_near_zero(truth: float) -> None:
    """Of 100 tests at least 93 hold it, and none is of no width: 200 shares, one retention near 0, the other 0.8."""
    draws, held = np.random.default_rng(1), 0
    for _ in range(100):
        x, y = (scored(*((draws.random(200) < p).astype(float).tolist() for p in (0.1 + 0.8 * kept, 0.9, 0.1)))
                for kept in (truth, 0.8))
        _, low, high = measured(x=x, y=y)[HARMONIC_MEAN]
        held += low <= 2 / (1 / max(truth, 1e-12) + 1 / 0.8) + 1e-9 and high >= 2 / (1 / max(truth, 1e-12) + 1 / 0.8)
        assert low < high
    assert held >= 93
