"""End a training when more steps bring less than validations can tell from noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mmengine.hooks import Hook

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import measured_steps, report
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.measured_steps import Metric, Value
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, listed, whole_number
from diffengine_sdxl.registry import HOOKS

#: What a stopped run leaves: metric, step, max_iters, and the sentence that was logged.
FILE = 'early_stop.json'
#: By default a gain is looked for over this part of the run.
FRACTION = 5


@HOOKS.register_module()
class EarlyStop(Hook):
    """End the training after a validation when `steps` more steps bring less than the metric's 95 % interval.

    The gain is the paired difference of a validation and the last one at least `steps` steps before it, of the same
    samples from the same noise (`measured_steps.gain`). It counts if it is above `min_gain`, and its own 95 % interval
    above 0. The training ends when no gain counts in `patience` validations in a row, but not before all of these
    differ from the first validation, by more than half the width of the metric's interval: adapters may learn nothing
    visible for a long time, and then suddenly. All is read from the files in the work_dir, so a resumed run decides as
    one that was not stopped, and a stopped run stays stopped.

    Args:
        metric: as of CheckpointHook's `keep_best`.
        steps: optimizer steps over which a gain is looked for; None for a fifth of the run.
        patience: validations in a row without a gain.
        min_steps: the training goes on until this step at least.
        min_gain: a gain that is worth `steps` steps, in units of the metric; None for half the width of the 95 %
            interval that the validation gives the metric itself (0 where it gives none).

    Raises:
        UserError: a setting is invalid; no validation measures the metric, or only one at the end does.
    """

    priority = 'HIGH'

    def __init__(self, metric: str | Mapping[str, str], steps: int | None = None, patience: int = 3,
                 min_steps: int = 0, min_gain: float | None = None) -> None:
        self.setting = metric
        self.steps = None if steps is None else whole_number('EarlyStop: steps', steps, 1)
        self.patience = whole_number('EarlyStop: patience', patience, 1)
        self.min_steps = whole_number('EarlyStop: min_steps', min_steps, 0)
        if min_gain is not None and (isinstance(min_gain, bool) or not isinstance(min_gain, int | float)
                                     or not 0 <= min_gain < float('inf')):
            raise UserError(f'EarlyStop: min_gain={min_gain!r} must be a number, at least 0, or None.')
        self.min_gain = min_gain

    def before_train(self, runner: ExperimentRunner) -> None:
        """Look the metric up; warn if the run is too short to be stopped."""
        self.metric = metric = measured_steps.find_metric(runner, self.setting, 'EarlyStop: metric')
        if metric.interval is None:
            key = 'train_cfg.val_interval' if metric.group is not None else 'the interval of ValidationLoss'
            raise UserError(f"EarlyStop: '{metric}' is measured at the end only; set {key}.")
        self.last, self.over = runner.max_iters, self.steps or max(1, runner.max_iters // FRACTION)
        # The first validation, then the first one at least `over` steps later, then `patience` - 1 more.
        first = metric.interval * (1 + -(-self.over // metric.interval) + self.patience - 1)
        if first >= runner.max_iters:
            runner.logger.warning(
                f'EarlyStop cannot end this training before its last step: with a validation every {metric.interval:,} '
                f'steps, steps={self.over:,} and patience={self.patience}, step {first:,} would be the first.')

    def after_step(self, runner: ExperimentRunner, step: int) -> None:
        """Decide after a validation; also at the start of a resumed run, for the step that it goes on from."""
        if step >= runner.max_iters or step % (self.metric.interval or 1):
            return
        reason = on_main_process(lambda: self._decide(Path(runner.work_dir), step))
        if reason is not None:
            runner.logger.info(reason)
            runner.train_loop.stop()

    def _decide(self, work_dir: Path, step: int) -> str | None:
        """Return why the training ends at `step`, and write it to FILE; None if it goes on."""
        measured_steps.check_written(work_dir, self.metric, step)
        gains = None if step < self.min_steps else without_gain(
            work_dir, self.metric, step, self.over, self.patience, self.min_gain)
        if gains is None:
            (work_dir / FILE).unlink(missing_ok=True)
            return None
        shown = [f'{value.value:+.4g}' + ('' if value.low is None or value.high is None else
                                          f' ({value.low:.4g} to {value.high:.4g})') for value in gains.values()]
        reason = (f"EarlyStop ends the training at step {step:,} of {self.last:,}: in {self.patience} validations in a "
                  f"row (steps {listed(gains)}), the gain of '{self.metric}' over {self.over:,} steps was "
                  f'{", ".join(shown)} (95 % interval): {self._limit()}. It saves step{step}. '
                  f'The learning rate followed the schedule of {self.last:,} steps. To go on from here, '
                  '--resume with a larger patience or min_steps, or without the hook.')
        with atomic_files.replacing(work_dir / FILE) as temporary:
            temporary.write_text(json.dumps({'metric': str(self.metric), 'step': step, 'max_iters': self.last,
                                             'reason': reason}, indent=1) + '\n')
        return reason

    def _limit(self) -> str:
        return ('less than half the width of the 95 % interval of the metric itself, or not above 0 for certain'
                if self.min_gain is None else f'at most {self.min_gain:g}, or not above 0 for certain')

    def first_stop(self, work_dir: Path) -> int | None:
        """Return the step at which the training in `work_dir`, which went on to its end, would have ended; or None.

        The metric is one of its `val/step<N>.json`, of the adapted images unless the setting names a group.
        """
        files = report.step_files(work_dir / 'val')
        results = report.read(next(iter(files.values())))
        group, name = next(((group, str(self.setting).removeprefix(f'{group}/')) for group in results
                            if str(self.setting).startswith(f'{group}/')), ('adapted', str(self.setting)))
        metric, last = Metric(group, name, int(results[group][name].get('better') or 1), None), max(files)
        return next((step for step in files if self.min_steps <= step < last and without_gain(
            work_dir, metric, step, self.steps or max(1, last // FRACTION), self.patience, self.min_gain)), None)

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        over = f'{self.steps:,} steps' if self.steps else f'{max(1, runner.max_iters // FRACTION):,} steps'
        return {'early stop': f'after {self.patience} validations in a row without a gain of {self.setting} over '
                              f'{over}{f", not before step {self.min_steps:,}" if self.min_steps else ""}'}


def without_gain(work_dir: Path, metric: Metric, step: int, over: int, patience: int,
                 min_gain: float | None) -> dict[int, Value] | None:
    """Return the gains of the last `patience` validations up to `step` if none counts, by step; None to go on.

    Args:
        over, min_gain: see EarlyStop.
    """
    values = measured_steps.measured(work_dir, metric)
    steps = [one for one in values if one <= step]
    if not steps or steps[-1] != step or steps[-patience:][0] - over < steps[0]:
        return None
    gains: dict[int, Value] = {}
    for later in steps[-patience:]:
        found = measured_steps.gain(work_dir, metric, later, max(one for one in steps if one <= later - over))
        begun = measured_steps.gain(work_dir, metric, later, steps[0])
        if found is None or begun is None:
            return None
        half = (_upper(values[later]) - _lower(values[later])) / 2
        if _lower(begun) <= 0 <= _upper(begun) or abs(begun.value) <= half:
            return None
        if _lower(found) > 0 and found.value > (half if min_gain is None else min_gain):
            return None
        gains[later] = found
    return gains


def _lower(value: Value) -> float:
    return value.value if value.low is None else value.low


def _upper(value: Value) -> float:
    return value.value if value.high is None else value.high
