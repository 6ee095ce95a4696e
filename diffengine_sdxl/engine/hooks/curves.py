"""Loss, learning rate and the results of validations as a picture at the end of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine import checkpoint, report
from diffengine_sdxl.pictures import save_curves
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class CurvesHook(Hook):
    """Writes every step's loss and learning rate to `curves.jsonl`, and `curves.png` at the end.

    The picture also has a panel for each metric of a validation. A resumed run goes on in the same file, from the
    step that it was resumed at.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rates: dict[str, float] = {}

    @master_only
    def before_train(self, runner: Any) -> None:
        """Drop what an interrupted run logged after its last checkpoint."""
        self.path = Path(runner.work_dir) / 'curves.jsonl'
        kept = [line for line in read_lines(self.path) if line['step'] <= runner.iter]
        with checkpoint.replacing(self.path) as temporary:
            temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))

    @master_only
    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Note the learning rates of this step: afterwards the schedule has set the next one's."""
        self.rates = {name: values[0] for name, values in runner.optim_wrapper.get_lr().items()}

    @master_only
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, float] | None = None) -> None:
        """Log one step."""
        self.lines.append(json.dumps({'step': runner.iter + 1, **(outputs or {}), **self.rates}) + '\n')
        if len(self.lines) >= 50:
            self._flush()

    @master_only
    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """A run that goes on from this checkpoint finds every step up to it."""
        self._flush()

    @master_only
    def after_train(self, runner: Any) -> None:
        """Draw."""
        self._flush()
        rows = read_lines(self.path)
        if not rows:
            return
        curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for row in rows:
            for name, value in row.items():
                if name != 'step':
                    curves[name][0].append(row['step'])
                    curves[name][1].append(value)
        for step, file in report.step_files(Path(runner.work_dir) / 'val').items():
            for variant, metrics in report.read(file).items():
                for name, found in metrics.items():
                    if found['value'] is not None:
                        curves[f'{name}, {variant}'][0].append(step)
                        curves[f'{name}, {variant}'][1].append(found['value'])
        path = Path(runner.work_dir) / 'curves.png'
        save_curves(path, curves, f'{Path(runner.work_dir).name}, {rows[-1]["step"]} steps')
        runner.logger.info(f"Curves: '{path}'")

    def _flush(self) -> None:
        with open(self.path, 'a') as file:
            file.writelines(self.lines)
        self.lines = []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; a last line that a killed process cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
