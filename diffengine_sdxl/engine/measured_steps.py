"""What the validations of a run measured, step by step, read from the files of its work_dir: nothing else is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.hooks.curves import VAL_LOSS, read_rows
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, listed, one_of
from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.base import ImageMetric, difference_names

BETTER = {'higher': 1, 'lower': -1}


@dataclass(frozen=True)
class Metric:
    """A number that validations write.

    Attributes:
        group: the image set or the difference of two; None for a loss of ValidationLoss.
        name: as in `val/step<N>.json`, or as in `val_loss.jsonl`.
        better: 1 if higher is better, -1 if lower is.
        interval: optimizer steps between its validations; None: at the end only.
    """

    group: str | None
    name: str
    better: int
    interval: int | None

    def __str__(self) -> str:
        return self.name if self.group is None else f'{self.group}/{self.name}'


class Value(NamedTuple):
    """A number with its 95 % interval; without one where nothing gives it."""

    value: float
    low: float | None = None
    high: float | None = None


def find_metric(runner: ExperimentRunner, setting: Any, key: str) -> Metric:
    """Return the metric that a setting names: 'iou', 'adapted/iou', 'val/loss', or dict(metric=..., better=...).

    Args:
        runner: whose validations are built.
        setting: without an image set, 'adapted' is meant where it is made. `better`, 'higher' or 'lower', is for a
            metric that does not say so itself.
        key: of the setting, for errors.

    Raises:
        UserError: no validation measures it, or nothing says which values are better.
    """
    fields = dict(setting) if isinstance(setting, Mapping) else {'metric': setting}
    name, better = fields.pop('metric', None), fields.pop('better', None)
    if fields or not isinstance(name, str):
        raise UserError(f"{key}={setting!r} must be a metric's name, or dict(metric=..., better='higher' or 'lower').")
    if better is not None:
        one_of(f'{key}.better', better, BETTER)
    loop, losses = runner.val_loop, next((hook for hook in runner.hooks if hasattr(hook, 'loss_names')), None)
    if loop is None and losses is None:
        raise UserError(f'{key}={name!r} needs validations, and the config has neither a `val_dataloader` nor a '
                        'ValidationLoss (docs/stopping.md).')
    known = {} if losses is None else {
        loss: Metric(None, loss, -1, losses.interval) for loss in losses.loss_names(runner)}
    others = False
    if loop is not None:
        sets = tuple(getattr(loop, 'image_sets', ()))
        usual = 'adapted' if 'adapted' in sets or not sets else sets[0]
        metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', ())
        others = any(not isinstance(metric, ImageMetric) for metric in metrics) or not metrics
        for group in dict.fromkeys((usual, *sets, *difference_names(sets))):
            for metric in (metric for metric in metrics if isinstance(metric, ImageMetric)):
                one = Metric(group, '/'.join(filter(None, (metric.prefix, metric.name))), metric.better,
                             runner.val_interval)
                known[one.name if group == usual else str(one)] = known[str(one)] = one
        if others and better is not None and name not in known:
            head, _, tail = name.partition('/')
            group, tail = (head, tail) if head in (*sets, report.UNNAMED) else (usual, name)
            known[name] = Metric(group, tail, BETTER[better], runner.val_interval)
    try:
        one_of(key, name, known)
    except UserError as error:
        hint = (" A metric of your own needs its direction: dict(metric=..., better='higher')." if others and
                better is None else '')
        raise UserError(f'{error}{hint}') from error
    found = known[name]
    if better is not None:
        return Metric(found.group, found.name, BETTER[better], found.interval)
    if not found.better:
        raise UserError(f"{key}={name!r}: neither high nor low values of it are better in themselves. Say which you "
                        f"want: dict(metric={name!r}, better='higher') or 'lower'.")
    return found


def measured(work_dir: Path, metric: Metric) -> dict[int, Value]:
    """Return step -> value for all validations in `work_dir` that have the metric, in order of steps."""
    if metric.group is None:
        rows = {row['step']: row.get(metric.name) for row in read_rows(work_dir / VAL_LOSS)}
        return {step: Value(value) for step, value in sorted(rows.items()) if value is not None}
    values = {}
    for step, path in report.step_files(work_dir / 'val').items():
        result = report.read(path).get(metric.group, {}).get(metric.name, {})
        if (value := result.get('value')) is not None:
            values[step] = Value(value, result['low'], result['high'])
    return values


def check_written(work_dir: Path, metric: Metric, step: int) -> None:
    """Check that the validation of `step`, if there was one, has the metric: names of a user's metrics come last.

    Raises:
        UserError: it has not.
    """
    path = work_dir / 'val' / f'step{step}.json'
    if metric.group is None or not path.is_file():
        return
    results = report.read(path)
    if metric.name not in results.get(metric.group, {}):
        names = [f'{group}/{name}' for group, metrics in results.items() for name in metrics]
        raise UserError(f"'{path}' has no '{metric}'; it has {listed(names, 20)}.")


def best_step(work_dir: Path, metric: Metric, steps: set[int]) -> int | None:
    """Return the step of `steps` with the best value, of equal ones the earliest; None if none was measured."""
    values = {step: value.value * metric.better for step, value in measured(work_dir, metric).items() if step in steps}
    return max(values, key=lambda step: values[step]) if values else None


def gain(work_dir: Path, metric: Metric, later: int, earlier: int) -> Value | None:
    """Return by how much the metric is better at step `later` than at `earlier`, with its 95 % interval.

    Of a metric with a number for each image it is the mean of the paired differences of the same samples and noise. Of
    one that only sets have, the sets are taken as independent, which is never too narrow where they correlate. A loss
    on fixed noise, and a metric without an interval, has none here.

    Returns:
        None if the two validations had other samples, seeds or noise.
    """
    files = [work_dir / 'val' / f'step{step}.samples.csv' for step in (later, earlier)]
    if metric.group is not None and all(path.is_file() for path in files):
        one, other = ({(row['key'], row['seed'], row['noise_seed']): row.get(metric.name, '')
                       for row in report.read_samples(path) if row['image_set'] == metric.group} for path in files)
        if one.keys() != other.keys():
            return None
        pairs = [(sample[0], float(one[sample]) - float(other[sample]))
                 for sample in one if one[sample] and other[sample]]
        if pairs:
            found = interval.mean([metric.better * gap for _, gap in pairs], [key for key, _ in pairs],
                                  (-np.inf, np.inf))
            return Value(found.value, found.low, found.high)
    values = measured(work_dir, metric)
    new, old = values[later], values[earlier]
    gap = metric.better * (new.value - old.value)
    if new.low is None or new.high is None or old.low is None or old.high is None:
        return Value(gap)
    below, above = hypot(new.value - new.low, old.high - old.value), hypot(new.high - new.value, old.value - old.low)
    return Value(gap, *((gap - below, gap + above) if metric.better > 0 else (gap - above, gap + below)))
