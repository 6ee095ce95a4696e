"""The report of a run, written while it trains."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.pages.run_report import NAME, write_report
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class ReportHook(Hook):
    """Write `report.html` after each checkpoint and each validation, and at the end.

    A report that cannot be written is a warning: the training goes on.
    """

    priority = 'LOWEST'  # when the files that it shows are written

    @master_only
    def after_step(self, runner: ExperimentRunner, step: int) -> None:
        """Write it if this step left a checkpoint or a validation and is not the last."""
        files = (f'step{step}.pth', f'val/step{step}.json')
        if step < runner.max_iters and any((Path(runner.work_dir) / name).is_file() for name in files):
            self._write(runner)

    @master_only
    def after_train(self, runner: ExperimentRunner) -> None:
        """Write it with the images and curves of the end."""
        if (path := self._write(runner)) is not None:
            runner.logger.info(f"Report: '{path}'")

    def _write(self, runner: ExperimentRunner) -> Path | None:
        try:
            return write_report(Path(runner.work_dir))
        except Exception as error:  # hours of training must not end for a page
            runner.logger.warning(f"'{NAME}' was not written ({error or type(error).__name__}); the training goes on. "
                                  f"'diffengine-sdxl report {runner.work_dir}' writes it.")
            return None

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        return {'report': f'{NAME} at each checkpoint and validation, and at the end'}
