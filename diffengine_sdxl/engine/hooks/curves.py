"""Curves of loss, learning rate and validation results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.images import Curve, save_curves
from diffengine_sdxl.registry import HOOKS

#: What ValidationLoss writes: a line of JSON for each validation, step and losses by name.
VAL_LOSS = 'val_loss.jsonl'
#: Begin of a curve's name -> the panel that such curves share.
SHARED_PANELS = {'loss/': 'loss of each data set', 'val/loss_ema/': 'val/loss of each data set',
                 'val/loss/': 'val/loss of each data set', 'val/loss': 'val/loss'}


@HOOKS.register_module()
class CurvesHook(Hook):
    """Write every step's loss and learning rate to `curves.jsonl`, and `curves.png` at the end.

    The image also has a panel for each metric of the validations, with its 95 % intervals, and for validation losses; a
    ring marks the best step of each. A resumed run appends to the same file, after the step of its checkpoint.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self.lines: list[str] = []
        #: Of the steps whose losses are not known yet.
        self.rates: dict[int, dict[str, float]] = {}

    @master_only
    def before_train(self, runner: ExperimentRunner) -> None:
        """Remove what an interrupted run logged after its last checkpoint."""
        self.path = Path(runner.work_dir) / 'curves.jsonl'
        rows = [row for row in read_rows(self.path) if row['step'] <= runner.iter]
        with atomic_files.replacing(self.path) as temporary:
            temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))

    @master_only
    def before_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Record this step's learning rates, before the schedule sets the next step's."""
        self.rates[runner.iter + 1] = {name: values[0] for name, values in runner.optim_wrapper.get_lr().items()}

    @master_only
    def after_step_values(self, runner: ExperimentRunner, step: int, losses: dict[str, float]) -> None:
        """Log one step."""
        self.lines.append(json.dumps({'step': step, **losses, **self.rates.pop(step)}) + '\n')
        if len(self.lines) >= 50:
            self._flush()

    @master_only
    def before_save_checkpoint(self, runner: ExperimentRunner, checkpoint: dict) -> None:
        """Write all steps up to this checkpoint, for a run that resumes from it."""
        self._flush()

    @master_only
    def after_train(self, runner: ExperimentRunner) -> None:
        """Draw."""
        self._flush()
        rows = read_rows(self.path)
        if not rows:
            return
        folder = Path(runner.work_dir)
        path = folder / 'curves.png'
        save_curves(path, _panels(folder, rows), f'{folder.name}, {rows[-1]["step"]} steps')
        runner.logger.info(f"Curves: '{path}'")

    def _flush(self) -> None:
        with open(self.path, 'a') as file:
            file.writelines(self.lines)
        self.lines = []


def _panels(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return panel -> name -> curve of a work_dir: of its curves' `rows`, validation losses and metrics."""
    points: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for row in [*rows, *read_rows(folder / VAL_LOSS)]:
        for name, value in row.items():
            if name != 'step':
                panel = next((panel for start, panel in SHARED_PANELS.items() if name.startswith(start)), name)
                points.setdefault((panel, name), []).append((row['step'], value))
    better = {(panel, name): -1 for panel, name in points if name in ('val/loss', 'val/loss_ema')}
    for step, file in report.step_files(folder / 'val').items():
        for image_set, metrics in report.read(file).items():
            for name, result in metrics.items():
                curve = (f'{name}, {image_set}',) * 2
                numbers = [math.nan if (number := result[key]) is None else number for key in ('value', 'low', 'high')]
                if result['value'] is not None:
                    points.setdefault(curve, []).append((step, *numbers))
                    better[curve] = int(result.get('better') or 0)
    panels: dict[str, dict[str, Curve]] = {}
    for (panel, name), found in points.items():
        steps, values, *band = (list(column) for column in zip(*found, strict=True))
        low, high = band or ((), ())
        panels.setdefault(panel, {})[name] = Curve(steps, values, low, high, better.get((panel, name), 0))
    return panels


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file up to the first damaged line, such as one that a killed process cut off."""
    rows = []
    for line in path.read_text(errors='replace').splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
