"""Checkpoints and exports at an interval."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.engine.export import export
from diffengine_sdxl.engine.run_summary import every
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import whole_number
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Write `step<N>.pth` to resume from and `step<N>/<adapter name>/` to use, every `interval` steps and at the end.

    New files are written whole before an old one is removed.

    Args:
        interval: optimizer steps between checkpoints; None saves at the end only.
        max_keep_ckpts: number of steps to keep, the newest; None keeps all.
        export: also export what trains in its ecosystem's format.
        metadata: what the files of an export say of themselves, which UIs show: `title`, `description`, `author`,
            `license`, `tags`, `usage_hint`, `trigger_words` and `thumbnail`, the path of an image.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int | None = 500, max_keep_ckpts: int | None = None, export: bool = True,
                 metadata: Mapping[str, Any] | None = None) -> None:
        for key, value in (('interval', interval), ('max_keep_ckpts', max_keep_ckpts)):
            if value is not None:
                whole_number(f'default_hooks.checkpoint.{key}', value, 1)
        self.interval, self.max_keep_ckpts, self.export = interval, max_keep_ckpts, export
        self.metadata = modelspec.from_user(metadata, 'default_hooks.checkpoint.metadata')

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Save at the interval and at the end."""
        step = runner.iter + 1
        if step != runner.max_iters and not (self.interval and step % self.interval == 0):
            return
        path = Path(runner.work_dir) / f'step{step}.pth'
        # The export first: where there is a checkpoint, its step's other files are complete.
        if self.export:
            with runner.exported_weights():
                export(runner, path.with_suffix(''), step, self.metadata)
        runner.save_checkpoint(path)
        if is_main_process():
            runner.logger.info(f"Saved '{path}'" + (f" and '{path.with_suffix('')}/'." if self.export else '.'))
            if self.max_keep_ckpts is not None:
                for old in checkpoint.list_checkpoints(path.parent)[:-self.max_keep_ckpts]:
                    old.unlink()
                    shutil.rmtree(old.with_suffix(''), ignore_errors=True)
        barrier()

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        files = 'step<N>.pth' + (' and step<N>/' if self.export else '')
        kept = '' if self.max_keep_ckpts is None else f'; the newest {self.max_keep_ckpts} are kept'
        return {'checkpoints': f'{files} {every(self.interval, at_end=True)}{kept}'}
