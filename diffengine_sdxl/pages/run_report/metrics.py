"""The results of an evaluation: numbers with intervals, differences, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffengine_sdxl.pages.numbers import finite, format_number

#: Between the image sets of a difference.
MINUS = ' - '
#: The group of what adapters keep of themselves beside the others.
RETENTION = 'retention'
BETTER, WORSE, HIGHER, LOWER, SAME = 'better', 'worse', 'higher', 'lower', 'no difference seen'
#: `better` of a metric -> what the reader is told.
DIRECTIONS = {1: 'higher is better', -1: 'lower is better', 0: ''}


class Number(NamedTuple):
    """A result, as `metrics.json` has it; None where it gives none."""

    value: float | None
    low: float | None
    high: float | None
    num_samples: int | None
    p: float | None
    better: int

    @property
    def interval(self) -> str:
        """Its 95 % interval in words, '' if there is none."""
        return '' if self.low is None or self.high is None else (
            f'{format_number(self.low)} to {format_number(self.high)}')

    @property
    def verdict(self) -> str:
        """What a difference says: by its interval and by the metric's direction; '' without an interval."""
        if self.low is None or self.high is None:
            return ''
        if self.low <= 0 <= self.high:
            return SAME
        up = self.low > 0
        if self.better == 0:
            return HIGHER if up else LOWER
        return BETTER if up == (self.better > 0) else WORSE


Results = dict[str, dict[str, Number]]


class Bar(NamedTuple):
    """Where a number and its interval lie on an axis, in percent; `zero`: where 0 lies, if the axis has it."""

    left: float
    width: float
    at: float
    zero: float | None


class Row(NamedTuple):
    """A number of one image set, or of a difference."""

    label: str
    number: Number
    bar: Bar | None
    verdict: str


class Metric(NamedTuple):
    """All numbers of one metric."""

    name: str
    direction: str
    rows: list[Row]


def read_results(data: Mapping[str, Any]) -> Results:
    """Return the numbers of a metrics.json or val/step<N>.json, of whatever a damaged file holds."""
    results: Results = {}
    for image_set, metrics in data.items():
        for name, result in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(result, dict):
                value, low, high, count, p, better = (finite(result.get(key)) for key in (
                    'value', 'low', 'high', 'num_samples', 'p', 'better'))
                results.setdefault(image_set, {})[name] = Number(
                    value, low, high, None if count is None else int(count), p,
                    0 if not better else 1 if better > 0 else -1)
    return results


def is_difference(image_set: str) -> bool:
    """Return whether a group of results is the difference of two image sets."""
    return MINUS in image_set


def by_metric(results: Results) -> list[Metric]:
    """Return the results metric by metric, the sets on one axis and the differences on another, around 0.

    The retentions, each of a metric of its own, follow together, on one axis from 0.
    """
    compared = {image_set: metrics for image_set, metrics in results.items() if image_set != RETENTION}
    found = []
    for name in dict.fromkeys(name for metrics in compared.values() for name in metrics):
        numbers = {image_set: metrics[name] for image_set, metrics in compared.items() if name in metrics}
        better = next((number.better for number in numbers.values() if number.better), 0)
        sets, differences = ({label: n for label, n in numbers.items() if is_difference(label) == is_one}
                             for is_one in (False, True))
        found.append(Metric(name, DIRECTIONS[better], [
            *_rows(sets, from_zero=False),
            *(row._replace(verdict=row.number.verdict) for row in _rows(differences, from_zero=True))]))
    if RETENTION in results:
        found.append(Metric(RETENTION, DIRECTIONS[1], _rows(results[RETENTION], from_zero=True)))
    return found


def _rows(numbers: Mapping[str, Number], from_zero: bool) -> list[Row]:
    """Return numbers on one axis."""
    ends = [e for n in numbers.values() for e in (n.value, n.low, n.high) if e is not None]
    ends += [0.0] if from_zero else []
    low, high = min(ends, default=0), max(ends, default=0)
    return [Row(label.replace(MINUS, ' − '), n, _bar(n, low, high, from_zero), '') for label, n in numbers.items()]


def _bar(number: Number, low: float, high: float, with_zero: bool) -> Bar | None:
    if number.value is None or high <= low:
        return None

    def place(value: float) -> float:
        return round(3 + 94 * (value - low) / (high - low), 2)
    left = place(number.value if number.low is None else number.low)
    right = place(number.value if number.high is None else number.high)
    return Bar(left, round(right - left, 2), place(number.value), place(0) if with_zero else None)


def summary(results: Results) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Return, for each difference, its metrics by verdict: [('adapted − base', [('better', ['iou']), ...])]."""
    found = []
    for image_set, metrics in results.items():
        if is_difference(image_set):
            verdicts = [(verdict, [name for name, n in metrics.items() if n.verdict == verdict])
                        for verdict in (BETTER, WORSE, HIGHER, LOWER, SAME, '')]
            found.append((image_set.replace(MINUS, ' − '), [(verdict or 'no interval', names)
                                                            for verdict, names in verdicts if names]))
    return found
