"""When to save, what to keep, and export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.export import export
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Every `interval` optimizer steps and at the end: `step<N>.pth` to resume from, `step<N>/<adapter name>/` to use.

    The new files are whole on the disk before an old one is removed.

    Args:
        interval: optimizer steps between checkpoints; None saves at the end only.
        max_keep_ckpts: how many steps to keep, the newest; None keeps all.
        export: also write what trains in its ecosystem's format.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int | None = 500, max_keep_ckpts: int | None = None, export: bool = True) -> None:
        for key, value in (('interval', interval), ('max_keep_ckpts', max_keep_ckpts)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f'default_hooks.checkpoint.{key}={value!r} must be a whole number of at least 1.')
        self.interval, self.max_keep_ckpts, self.export = interval, max_keep_ckpts, export

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save where the interval or the end says so."""
        step = runner.iter + 1
        if step != runner.max_iters and not (self.interval and step % self.interval == 0):
            return
        work_dir = Path(runner.work_dir)
        path = work_dir / f'step{step}.pth'
        # The export first: a checkpoint says that all of its step is there.
        if self.export:
            with runner.exported_weights():
                export(runner, work_dir / f'step{step}', step)
        runner.save_checkpoint(path)
        if is_main_process():
            runner.logger.info(f"Saved '{path}'" + (f" and '{path.with_suffix('')}/'." if self.export else '.'))
            self._remove_old(work_dir)
        barrier()

    def _remove_old(self, work_dir: Path) -> None:
        if self.max_keep_ckpts is None:
            return
        for path in checkpoint.found(work_dir)[:-self.max_keep_ckpts]:
            path.unlink()
            shutil.rmtree(path.with_suffix(''), ignore_errors=True)
