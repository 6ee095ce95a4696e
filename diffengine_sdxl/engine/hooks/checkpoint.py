"""Checkpoints and exports at an interval; the best step is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from diffengine_sdxl import atomic_files
from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.engine import measured_steps, model_card
from diffengine_sdxl.engine.export import export
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.measured_steps import Metric
from diffengine_sdxl.engine.run_summary import every
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import whole_number
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.registry import HOOKS

#: In the work_dir: metric, better (1: higher is, -1: lower is), step, value, low, high.
BEST = 'best.json'


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Write `step<N>.pth` to resume from and `step<N>/<adapter name>/` to use, every `interval` steps and at the end.

    New files are written whole before an old one is removed. Which step is the best is read from the files of the
    validations, so a resumed run goes on with it.

    Args:
        interval: optimizer steps between checkpoints; None saves at the end only.
        max_keep_ckpts: number of steps to keep, the newest, beside the best one; None keeps all.
        export: also export what trains in its ecosystem's format, with a card.
        metadata: what the files of an export say of themselves, which UIs show: `title`, `description`, `author`,
            `license`, `tags`, `usage_hint`, `trigger_words` and `thumbnail`, the path of an image.
        keep_best: a metric of the validations, 'clip_i' or 'base/clip_i', or a loss of ValidationLoss, 'val/loss'; or
            dict(metric=..., better='higher' or 'lower'). Of the steps with a checkpoint, the one with its best value,
            of equal ones the earliest, is never removed, and `best.json` names it: 'W/best' stands for it.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int | None = 500, max_keep_ckpts: int | None = None, export: bool = True,
                 metadata: Mapping[str, Any] | None = None, keep_best: str | Mapping[str, str] | None = None) -> None:
        for key, value in (('interval', interval), ('max_keep_ckpts', max_keep_ckpts)):
            if value is not None:
                whole_number(f'default_hooks.checkpoint.{key}', value, 1)
        self.interval, self.max_keep_ckpts, self.export = interval, max_keep_ckpts, export
        self.metadata = modelspec.from_user(metadata, 'default_hooks.checkpoint.metadata')
        self.keep_best = keep_best
        self.metric: Metric | None = None
        #: The last step that has a checkpoint.
        self.saved = 0

    def before_train(self, runner: ExperimentRunner) -> None:
        """Look up the metric of `keep_best`; say where validations and checkpoints don't meet.

        Raises:
            UserError: no validation measures it.
        """
        self.saved = runner.iter
        if self.keep_best is None:
            on_main_process(lambda: (Path(runner.work_dir) / BEST).unlink(missing_ok=True))
            return
        self.metric = measured_steps.find_metric(runner, self.keep_best, 'default_hooks.checkpoint.keep_best')
        measured, saved = self.metric.interval, self.interval
        both = math.lcm(measured or runner.max_iters, saved or runner.max_iters)
        if both != saved:
            times = f'every {both:,} steps and at the end' if both < runner.max_iters else 'at the end only'
            runner.logger.warning(
                f"keep_best: '{self.metric}' is measured {every(measured, at_end=True)}, and checkpoints are written "
                f'{every(saved, at_end=True)}. They meet {times}, and only such steps can be the best. Let the '
                'interval of checkpoints be that of the validations, or a multiple of it.')

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Save at the interval and at the end."""
        step = runner.iter + 1
        if step == runner.max_iters or self.interval and step % self.interval == 0:
            self.save(runner, step)

    def at_stop(self, runner: ExperimentRunner, step: int) -> None:
        """Save at the end of a training that ends early."""
        if self.saved != step:
            self.save(runner, step)

    def save(self, runner: ExperimentRunner, step: int) -> None:
        """Write the checkpoint and the export of `step`, which is done; remove old ones."""
        path = Path(runner.work_dir) / f'step{step}.pth'
        # The export first: where there is a checkpoint, its step's other files are complete.
        if self.export:
            with runner.exported_weights():
                export(runner, path.with_suffix(''), step, self.metadata)
        runner.save_checkpoint(path)
        self.saved = step
        runner.logger.info(f"Saved '{path}'" + (f" and '{path.with_suffix('')}/'." if self.export else '.'))
        on_main_process(lambda: self._prune(path.parent))

    def after_step(self, runner: ExperimentRunner, step: int) -> None:
        """Find the best step again when a step with a checkpoint has been validated; write its card.

        So a card has the step's samples and numbers, whichever of them there are.
        """
        if step == self.saved:
            on_main_process(lambda: self._prune(Path(runner.work_dir), step))
            if self.export:
                model_card.update(runner, step)

    def _prune(self, work_dir: Path, validated: int | None = None) -> None:
        """Write BEST, then remove checkpoints and exports that are neither among the newest nor the best."""
        checkpoints = {int(path.stem[4:]): path for path in checkpoint.list_checkpoints(work_dir)}
        kept = {self._write_best(work_dir, set(checkpoints), validated)}
        for step, old in list(checkpoints.items())[:-(self.max_keep_ckpts or len(checkpoints))]:
            if step not in kept:
                old.unlink()
                shutil.rmtree(old.with_suffix(''), ignore_errors=True)

    def _write_best(self, work_dir: Path, steps: set[int], validated: int | None) -> int | None:
        if self.metric is None:
            return None
        if validated is not None:
            measured_steps.check_written(work_dir, self.metric, validated)
        step, path = measured_steps.best_step(work_dir, self.metric, steps), work_dir / BEST
        if step is None:
            path.unlink(missing_ok=True)
            return None
        value = measured_steps.measured(work_dir, self.metric)[step]
        text = json.dumps({'metric': str(self.metric), 'better': self.metric.better, 'step': step,
                           **value._asdict()}, indent=1) + '\n'
        if not path.is_file() or path.read_text() != text:
            with atomic_files.replacing(path) as temporary:
                temporary.write_text(text)
        return step

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        files = 'step<N>.pth' + (' and step<N>/' if self.export else '')
        kept = [] if self.max_keep_ckpts is None else [f'the newest {self.max_keep_ckpts}']
        if self.keep_best is not None:
            setting = self.keep_best
            kept += [f'the best by {setting if isinstance(setting, str) else dict(setting).get("metric")}']
        also = f'; {" and ".join(kept)} are kept' if self.max_keep_ckpts is not None else ''.join(
            f'; {one} is named in {BEST}' for one in kept)
        return {'checkpoints': f'{files} {every(self.interval, at_end=True)}{also}'}
