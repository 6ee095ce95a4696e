"""Charts: ticks, the place of points, peaks that stay, numbers of any size."""

import math

import numpy as np
import pytest

from diffengine_sdxl.pages.charts import MAX_POINTS, Series, line_chart, thinned, ticks
from diffengine_sdxl.pages.numbers import finite, format_number, format_p


@pytest.mark.parametrize(('low', 'high', 'expected'), [
    (0, 60, [0, 20, 40, 60]), (0.05, 0.37, [0.1, 0.2, 0.3]), (-1.2, 1.1, [-1, 0, 1]),
    (0, 1e-5, [0, 5e-6, 1e-5]), (1500, 60000, [20000, 40000, 60000])])
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert np.allclose(ticks(low, high, 4), expected, rtol=1e-9, atol=0)


def test_points_lie_on_their_ticks() -> None:
    """A point at a tick's value has the tick's place, in both directions; higher is further up."""
    chart = line_chart('iou', [Series('adapted', [(0, 0.25), (20, 0.5), (40, 0.75)],
                                      [(0, 0.2, 0.3), (20, 0.4, 0.6), (40, 0.7, 0.8)])], (0, 40), (20, 'best, step 20'))
    assert chart is not None
    xs, ys = ({text: place for place, text in ticks} for ticks in (chart.x_ticks, chart.y_ticks))
    line = chart.lines[0]
    assert [x for x, _ in line.dots] == [xs['0'], xs['20'], xs['40']] and chart.mark == (xs['20'], 'best, step 20')
    (_, first), (_, second), (_, third) = line.dots
    assert first > second > third and first - second == pytest.approx(second - third, abs=0.11)
    band = [tuple(map(float, point.split(','))) for point in line.band.split()]
    assert len(band) == 6 and band[1][1] == ys['0.4'] and band[4][1] == ys['0.6'] and line.last == '0.7500'


def test_no_peak_is_lost_and_an_outlier_does_not_flatten_the_rest() -> None:
    values = [(float(x), 0.1 + 0.001 * (x % 7)) for x in range(10_000)]
    values[5003] = (5003.0, 40.0)
    kept = thinned(values)
    assert len(kept) <= MAX_POINTS and (5003.0, 40.0) in kept and kept == sorted(kept)
    chart = line_chart('loss', [Series('', values, faint=True)], (0, 10_000))
    assert chart is not None and all(float(text) < 0.2 for _, text in chart.y_ticks)
    box = chart.box
    assert all(box[1] <= float(point.split(',')[1]) <= box[3] for point in chart.lines[0].line.split())


@pytest.mark.parametrize('values', [[0.0], [3.5, 3.5], [1e-300, 2e-300], [-9e99, 9e99], [1.0, math.nextafter(1, 2)]])
def test_numbers_of_any_size(values: list[float]) -> None:
    chart = line_chart('x', [Series('', list(enumerate(values)))], (0, 0))
    assert chart is not None and 'nan' not in repr(chart) and 'inf' not in repr(chart)
    assert line_chart('x', [Series('', [])], (0, 1)) is None


def test_numbers() -> None:
    assert [format_p(p) for p in (1.0, 0.0312, 1e-60)] == ['= 1.0000', '= 0.0312', '< 0.0001']
    assert [format_number(value) for value in (None, 0, 0.5, 1e-5, 123456.0)] == [
        'none', '0.0000', '0.5000', '1e-05', '1.235e+05']
    odd = (True, 'x', None, [], math.nan, -math.inf, 10 ** 400, 1e101)
    assert [finite(value) for value in odd] == [None] * 8 and finite(3) == 3.0
