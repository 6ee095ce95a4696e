"""Log lines, and at a terminal a progress bar with loss, speed and time left."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from mmengine import hooks
from mmengine.dist import master_only

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import whole_number
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class RuntimeInfoHook(hooks.RuntimeInfoHook):
    """mmengine's, but losses are logged when the host has them: on an accelerator a step later."""

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Do nothing: `outputs` may still lie on the device."""

    def after_step_values(self, runner: ExperimentRunner, step: int, losses: dict[str, float]) -> None:
        """Log the losses of one step."""
        for name, value in losses.items():
            runner.message_hub.update_scalar(f'train/{name}', value)


@HOOKS.register_module()
class LoggerHook(hooks.LoggerHook):
    """Log every `interval` optimizer steps, without mmengine's extra line at the end of a pass over the data.

    Args:
        interval: optimizer steps between lines.
        kwargs: of mmengine's LoggerHook.
    """

    def __init__(self, interval: int = 10, **kwargs: Any) -> None:
        super().__init__(interval=whole_number('default_hooks.logger.interval', interval, 1), **kwargs)

    def before_run(self, runner: ExperimentRunner) -> None:
        """Let the peak of memory be logged without a copy to the device and back, as mmengine makes one to wait for."""
        super().before_run(runner)
        runner.log_processor._get_max_memory = _peak_memory  # type: ignore[method-assign]

    def end_of_epoch(self, dataloader: Any, batch_idx: int) -> bool:
        """Return False: the data is endless, and a stream has no length."""
        return False

    def after_val_epoch(self, runner: ExperimentRunner, metrics: dict[str, float] | None = None) -> None:
        """Do nothing: the loop reports, with intervals."""

    after_test_epoch = after_val_epoch


def _peak_memory(runner: ExperimentRunner) -> int:
    """Return the peak of memory since the last call, on the present CUDA device in MiB."""
    peak = torch.cuda.max_memory_allocated() // 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


@HOOKS.register_module()
class ProgressHook(hooks.Hook):
    """Show a bar below the log lines. Without a terminal only the log lines show the progress."""

    priority = 'BELOW_NORMAL'

    def __init__(self) -> None:
        self.bar: Any = None
        #: The task of the bar that shows the images that are made for a test.
        self.making: Any = None
        self.streams: list[tuple[logging.StreamHandler, Any]] = []

    def _start(self, runner: ExperimentRunner) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self.bar = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                            TextColumn('{task.fields[info]}'), TimeRemainingColumn(), console=Console(stderr=True),
                            refresh_per_second=4)
        self.bar.start()
        # rich replaces sys.stdout by a writer above the bar; handlers with the old one would write through the bar.
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                self.streams.append((handler, handler.stream))
                handler.setStream(sys.stdout)

    @master_only
    def before_train(self, runner: ExperimentRunner) -> None:
        """Show the bar."""
        if sys.stderr.isatty():
            self._start(runner)
            self.task = self.bar.add_task('training', total=runner.max_iters, completed=runner.iter, info='')

    @master_only
    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Advance the bar; the loss is the last one that has arrived."""
        if self.bar is None:
            return
        scalars = runner.message_hub.log_scalars
        seconds = scalars['train/time'].mean(20) if 'train/time' in scalars else 0.0
        speed = f'{1 / seconds:.2f} steps/s' if seconds else ''
        loss = f'loss {scalars["train/loss"].current():.4f}  ' if 'train/loss' in scalars else ''
        share = f'  {scalars["train/utilization"].current():.0%} of the peak' if 'train/utilization' in scalars else ''
        self.bar.update(self.task, advance=1, info=f'{loss}{speed}{share}')

    def after_train(self, runner: ExperimentRunner) -> None:
        """Remove the bar."""
        self.close()

    def before_val(self, runner: ExperimentRunner) -> None:
        """Show a bar of the images to make, below that of the training."""
        self._before_evaluation(runner, runner.val_loop, 'validation')

    def before_test(self, runner: ExperimentRunner) -> None:
        """Show a bar of the images to make."""
        self._before_evaluation(runner, runner.test_loop, 'test')

    @master_only
    def after_val_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                       outputs: Any = None) -> None:
        """Advance the bar by the images of a batch."""
        if self.bar is not None:
            self.bar.update(self.images, advance=sum(len(sample['images']) for sample in outputs or ()))

    @master_only
    def after_test_images(self, runner: ExperimentRunner, done: int, total: int) -> None:
        """Show how many images of a test this process has made; when all are, remove that bar."""
        if self.bar is None:
            return
        if self.making is None:
            self.making = self.bar.add_task('making', info='images')
        self.bar.update(self.making, completed=done, total=total)
        if done == total:
            self.bar.remove_task(self.making)
            self.making = None

    @master_only
    def after_val(self, runner: ExperimentRunner) -> None:
        """Remove the bar of the images."""
        if self.bar is not None:
            self.bar.refresh()  # a short evaluation would never be drawn
            self.bar.remove_task(self.images)
            if self.evaluates_only:
                self.close()

    after_test_iter, after_test = after_val_iter, after_val

    @master_only
    def _before_evaluation(self, runner: ExperimentRunner, loop: Any, name: str) -> None:
        self.evaluates_only = self.bar is None
        if self.evaluates_only and sys.stderr.isatty():
            self._start(runner)
        if self.bar is not None:
            self.images = self.bar.add_task(name, total=getattr(loop, 'num_images_here', None), info='images')

    def close(self) -> None:
        """Restore the terminal; also called when training fails."""
        if self.bar is not None:
            self.bar.stop()
            for handler, stream in self.streams:
                handler.setStream(stream)
            self.bar, self.streams = None, []
