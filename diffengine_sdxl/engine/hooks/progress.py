"""Log lines, and a progress bar with loss, speed and time left where there is a terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any

from mmengine import hooks
from mmengine.dist import master_only

from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class LoggerHook(hooks.LoggerHook):
    """mmengine's, every `interval` optimizer steps; without its extra line where a data loader's length divides."""

    def end_of_epoch(self, dataloader: Any, batch_idx: int) -> bool:
        """Never: data is endless, and a stream has no length to ask for."""
        return False

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Nothing: the loop itself reports, with intervals."""

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Nothing, likewise."""


@HOOKS.register_module()
class ProgressHook(hooks.Hook):
    """A bar at the terminal's foot, log lines above it. Without a terminal the log lines alone tell the progress."""

    priority = 'BELOW_NORMAL'

    def __init__(self) -> None:
        self.bar: Any = None
        self.streams: list[tuple[logging.StreamHandler, Any]] = []

    def _start(self, runner: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self.bar = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                            TextColumn('{task.fields[told]}'), TimeRemainingColumn(), console=Console(stderr=True),
                            refresh_per_second=4)
        self.bar.start()
        # rich swaps sys.stdout for a writer above the bar; handlers that hold the old one would write through it.
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                self.streams.append((handler, handler.stream))
                handler.setStream(sys.stdout)

    @master_only
    def before_train(self, runner: Any) -> None:
        """Draw the bar."""
        if sys.stderr.isatty():
            self._start(runner)
            self.task = self.bar.add_task('training', total=runner.max_iters, completed=runner.iter, told='')

    @master_only
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, float] | None = None) -> None:
        """Advance."""
        if self.bar is None:
            return
        hub = runner.message_hub.log_scalars
        seconds = hub['train/time'].mean(20) if 'train/time' in hub else 0.0
        speed = f'{1 / seconds:.2f} steps/s' if seconds else ''
        self.bar.update(self.task, advance=1, told=f'loss {(outputs or {}).get("loss", float("nan")):.4f}  {speed}')

    def after_train(self, runner: Any) -> None:
        """Take the bar away."""
        self.close()

    def before_val(self, runner: Any) -> None:
        """A second bar, of the pictures to make; the only one outside training."""
        self._before_evaluation(runner, runner.val_loop, 'validation')

    def before_test(self, runner: Any) -> None:
        """A bar of the pictures to make."""
        self._before_evaluation(runner, runner.test_loop, 'test')

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance."""
        self._after_batch(outputs)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance."""
        self._after_batch(outputs)

    def after_val(self, runner: Any) -> None:
        """Take the bar away; that of the training stays."""
        self._after_evaluation()

    def after_test(self, runner: Any) -> None:
        """Take the bar away."""
        self._after_evaluation()

    @master_only
    def _before_evaluation(self, runner: Any, loop: Any, name: str) -> None:
        self.alone = self.bar is None
        if self.alone and sys.stderr.isatty():
            self._start(runner)
        if self.bar is not None:
            self.pictures = self.bar.add_task(name, total=getattr(loop, 'num_pictures_here', None), told='pictures')

    @master_only
    def _after_batch(self, outputs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.pictures, advance=sum(len(sample['images']) for sample in outputs or ()))

    @master_only
    def _after_evaluation(self) -> None:
        if self.bar is not None:
            self.bar.refresh()  # a short one would not be seen at all
            self.bar.remove_task(self.pictures)
            if self.alone:
                self.close()

    def close(self) -> None:
        """Give the terminal back; also called when training fails."""
        if self.bar is not None:
            self.bar.stop()
            for handler, stream in self.streams:
                handler.setStream(stream)
            self.bar, self.streams = None, []
