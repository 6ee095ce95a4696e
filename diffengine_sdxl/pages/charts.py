"""Line charts as geometry, which `templates/chart.html` draws as SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from diffengine_sdxl.pages.numbers import format_number

#: Size of a chart and its margins, about pixels on a phone, where its text of 12 units is still read.
WIDTH, HEIGHT = 360, 210
LEFT, TOP, RIGHT, BOTTOM = 60, 10, 12, 26
#: Lines have no more points than this; with fewer than FEW each has a dot.
MAX_POINTS, FEW = 400, 30


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
        name: in the legend, with the last value; '' for none.
        points: (x, y).
        band: (x, low, high) of an interval around it.
        faint: drawn thin and pale, and may reach out of the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False


class Line(NamedTuple):
    """A drawn series: number of its colour, SVG points of its line and of its band, dots, legend."""

    colour: int
    line: str
    band: str
    dots: list[tuple[float, float]]
    faint: bool
    name: str
    last: str


class Chart(NamedTuple):
    """What the template draws; ticks are (position, text), `mark` is (position, text) on the x axis."""

    title: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    mark: tuple[float, str] | None


def line_chart(title: str, series: Sequence[Series], x_range: tuple[float, float],
               mark: tuple[float, str] | None = None) -> Chart | None:
    """Return a chart of finite points, or None if there is none.

    Args:
        x_range: of all charts that stand side by side.
        mark: (x, text) of a vertical line.
    """
    strong = [y for one in series if not one.faint for y in _heights(one)]
    faint = sorted(y for one in series if one.faint for y in _heights(one))
    # A single high loss would flatten the rest.
    values = [*strong, *faint[len(faint) // 100:len(faint) - len(faint) // 100]]
    if not values:
        return None
    low, high = _padded(min(values), max(values))
    left, right = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (min(max(y, low), high) - low) / (high - low)
        return (round(LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT), 1),
                round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1))
    lines = []
    for number, one in enumerate(series):
        band = [*((x, y) for x, y, _ in one.band), *((x, y) for x, _, y in reversed(one.band))]
        lines.append(Line(
            number, _path(place(*p) for p in thinned(one.points)), _path(place(*p) for p in band),
            [place(*p) for p in one.points] if len(one.points) < FEW and not one.faint else [], one.faint, one.name,
            format_number(one.points[-1][1]) if one.points else ''))
    return Chart(title, WIDTH, HEIGHT, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
                 [(place(x, low)[0], _short(x)) for x in ticks(left, right, 4) if x == int(x)],
                 [(place(left, y)[1], _short(y)) for y in ticks(low, high, 4)], lines,
                 None if mark is None or not left <= mark[0] <= right else (place(mark[0], low)[0], mark[1]))


def _heights(series: Series) -> list[float]:
    return [*(y for _, y in series.points), *(y for _, *ends in series.band for y in ends)]


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _path(points: Iterable[tuple[float, float]]) -> str:
    return ' '.join(f'{x:g},{y:g}' for x, y in points)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS of a line, the lowest and the highest of each part, so that no peak is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    parts = MAX_POINTS // 2
    kept = []
    for i in range(parts):
        part = points[i * len(points) // parts:(i + 1) * len(points) // parts]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, num: int) -> list[float]:
    """Return round numbers in [low, high], about `num` of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """Format a tick in at most eight characters or so: 20k, 1.5M, 0.25, 1.05e-4."""
    for unit, letter in ((1e6, 'M'), (1e4, 'k')):
        if abs(value) >= unit:
            return f'{value / (1e3 if letter == "k" else unit):.4g}{letter}'
    text = f'{value:.4g}' if value == 0 or abs(value) >= 0.01 else f'{value:.3e}'
    digits, exponent, power = text.partition('e')
    return f'{digits.rstrip("0").rstrip(".")}e{int(power)}' if exponent else text
