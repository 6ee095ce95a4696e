"""The charts of a run: losses, learning rates, and every metric of its validations with its interval."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from diffengine_sdxl.pages.charts import Chart, Series, line_chart
from diffengine_sdxl.pages.numbers import finite
from diffengine_sdxl.pages.run_report.files import WorkDir
from diffengine_sdxl.pages.run_report.metrics import Results, is_difference

#: Losses are smoothed from so many values on, over a share of them.
MIN_SMOOTHED, SHARE = 20, 20

Points = list[tuple[float, float]]


def draw_curves(work_dir: WorkDir, validations: Mapping[int, Results], best: Mapping[str, Any]
                ) -> tuple[list[Chart], str]:
    """Return the charts and a sentence on what was left out of them.

    Args:
        validations: step -> results.
        best: what best.json holds.
    """
    rows, stride = work_dir.rows('curves.jsonl')
    held_out, _ = work_dir.rows('val_loss.jsonl')
    last = max([1.0, *(row['step'] for row in [*rows, *held_out]), *validations])
    curves = _by_name(rows)
    mark = (step, f'best, step {step:g}') if (step := finite(best.get('step'))) is not None else None
    best_metric = str(best.get('metric', ''))
    charts = [_loss_chart(name, curves[name], last) for name in curves if 'loss' in name]
    if losses := _by_name(held_out):
        charts.append(line_chart('loss on held-out data', [Series(name, points) for name, points in losses.items()],
                                 (0, last), mark if best_metric in losses else None))
    for name in dict.fromkeys(n for results in validations.values() for metrics in results.values() for n in metrics):
        series = _metric_series(name, validations)
        is_best = best_metric.rpartition('/')[2] == name or best_metric == name
        charts.append(line_chart(name, series, (0, last), mark if is_best else None))
    charts += [line_chart(name, [Series('', points)], (0, last)) for name, points in curves.items()
               if 'loss' not in name]
    note = '' if stride == 1 else f'Of {stride} steps one is drawn.'
    return [chart for chart in charts if chart is not None], note


def _by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, Points]:
    curves: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if name != 'step':
                curves.setdefault(name, []).append((row['step'], value))
    return curves


def _loss_chart(name: str, points: Points, last: float) -> Chart | None:
    """Draw a loss pale and its running mean over it."""
    if len(points) < MIN_SMOOTHED:
        return line_chart(name, [Series('', points)], (0, last))
    window = max(5, len(points) // SHARE)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smooth = [(points[i][0], (sums[i + 1] - sums[i + 1 - window]) / window) for i in range(window - 1, len(points))]
    return line_chart(name, [Series('', points, faint=True), Series(f'mean of {window} steps', smooth)], (0, last))


def _metric_series(name: str, validations: Mapping[int, Results]) -> list[Series]:
    """Return a line with its band for each image set."""
    series = []
    for image_set in dict.fromkeys(s for results in validations.values() for s in results if not is_difference(s)):
        numbers = [(step, number) for step, results in sorted(validations.items())
                   if (number := results.get(image_set, {}).get(name)) is not None and number.value is not None]
        band = [(step, n.low, n.high) for step, n in numbers if n.low is not None and n.high is not None]
        if numbers:
            series.append(Series(image_set, [(step, n.value) for step, n in numbers if n.value is not None], band))
    return series
