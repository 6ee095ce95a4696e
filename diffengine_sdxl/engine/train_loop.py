"""The training loop: one iteration is one optimizer step."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size, is_main_process
from mmengine.runner import BaseLoop

from diffengine_sdxl import rng
from diffengine_sdxl.engine.data_report import log_data_report
from diffengine_sdxl.engine.deferred import DeferredValues
from diffengine_sdxl.engine.eval_loop import ValLoop, shut_down_workers
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.prefetch import ahead, draw_in_workers
from diffengine_sdxl.engine.run_summary import run_summary
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.objectives.denoise import losses_by_set
from diffengine_sdxl.registry import LOOPS


@LOOPS.register_module()
class StepLoop(BaseLoop):
    """Run `max_iters` optimizer steps, each of `optim_wrapper.accumulative_counts` micro-batches.

    `max_iters`, learning rate schedules, checkpoints, hook intervals and `step<N>` all count optimizer steps. The
    global random state of a micro-batch depends on (seed, iteration, micro-batch, rank) only, so no checkpoint
    stores it.

    Where the optimizer leaves out bad steps on the device (`StepOptimWrapper.on_device`), losses and the norm of step
    n are read, checked and logged in step n + 1, or by `flush`. Else in step n.

    Args:
        max_iters: optimizer steps.
        max_epochs: passes over the data, used if `max_iters` is None.
        val_interval: optimizer steps between validations; None validates at the end only. Without a val_dataloader
            there is no validation.

    Raises:
        UserError: a length is missing or not positive, or `max_epochs` is set for a stream, whose length is unknown.
    """

    runner: ExperimentRunner

    def __init__(self, runner: ExperimentRunner, dataloader: Any, max_iters: int | None = None,
                 max_epochs: int | None = None, val_interval: int | None = None) -> None:
        super().__init__(runner, dataloader)
        draw_in_workers(self.dataloader, runner.bare_model)
        self.val_interval = _count('val_interval', val_interval)
        self._iter, self._position, self.num_skipped, self._num_scalars = 0, 0, 0, 0
        self.num_done, self._stops, self._validated = 0, False, -1
        self._values = DeferredValues()
        self._data_sets: tuple[str, ...] = ()
        self._max_iters = self._length(_count('max_iters', max_iters), _count('max_epochs', max_epochs))

    def _length(self, max_iters: int | None, max_epochs: int | None) -> int:
        if max_iters is not None:
            return max_iters
        if max_epochs is None:
            raise UserError('train_cfg needs max_iters (optimizer steps) or max_epochs.')
        if not hasattr(self.dataloader.dataset, '__len__'):
            raise UserError('train_cfg.max_epochs needs a data set of known length; a stream takes max_iters.')
        return max_epochs * math.ceil(len(self.dataloader.dataset) / self.samples_per_iter)

    @property
    def samples_per_iter(self) -> int:
        """Samples of all processes in one optimizer step."""
        return self.dataloader.batch_size * get_world_size() * self.runner.accumulative_counts

    @property
    def iter(self) -> int:
        """Optimizer steps done."""
        return self._iter

    @property
    def max_iters(self) -> int:
        """Optimizer steps in all."""
        return self._max_iters

    #: mmengine reads both; an iteration-based loop has one epoch.
    epoch, max_epochs = 0, 1

    def start_at(self, iteration: int, position: int) -> None:
        """Continue after `iteration` steps, at sample `position` of the endless stream of data."""
        streams = isinstance(self.dataloader.dataset, torch.utils.data.IterableDataset)
        source = self.dataloader.dataset if streams else self.dataloader.sampler
        self._iter, self._position, source.start = iteration, position, position
        self.num_done = iteration

    @property
    def position(self) -> int:
        """Samples that all processes have trained on."""
        return self._position

    def run(self) -> SDXL:
        """Train to the end; return the model."""
        runner = self.runner
        sampler = self.dataloader.sampler
        if hasattr(sampler, 'prepare'):  # BucketSampler: all samples of a step have one shape
            sampler.prepare(self.samples_per_iter, runner.bare_model.size_divisor)
        objective: Any = runner.bare_model.objective
        if hasattr(objective, 'data_sets'):
            self._data_sets = objective.data_sets = tuple(getattr(self.dataloader.dataset, 'sets', ()))
        if is_main_process():
            runner.log_lines(run_summary(runner))
        if self._iter == 0:
            on_main_process(lambda: log_data_report(runner))
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        self._begin_validation()
        if self._iter > 0:
            self._after_step()  # what a kill right after the checkpoint left undone
        # Once, not before every iteration as in mmengine: it walks all modules.
        runner.model.train()
        loaded = iter(self.dataloader) if self._iter < self._max_iters else iter(())
        batches = ahead(loaded, runner.bare_model.device, runner.keep_samples)
        try:
            while self._iter < self._max_iters:
                self.run_iter(batches)
                self._after_step()
            self.flush()
        finally:
            shut_down_workers(loaded)
        if self.num_skipped:
            runner.logger.warning(f'{self.num_skipped} unreadable images were skipped.')
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def _begin_validation(self) -> None:
        """Check that a validation can run; remove what an interrupted run measured after its last checkpoint."""
        validation = self.runner.val_loop
        if not isinstance(validation, ValLoop):  # None, or a custom loop
            return
        validation.check()
        validation.remove_results_after(self._iter)
        if self._iter > 0 and on_main_process(lambda: validation.path().is_file()):
            self._validated = self._iter

    def stop(self) -> None:
        """End the training after the step just done, as if it were the last; for a hook's `after_step`."""
        self._stops = True

    def _after_step(self) -> None:
        """Validate where it is due, then call the hooks' `after_step(runner, step)`, which finds the results' files.

        If one of them called `stop`, `at_stop(runner, step)` is called, in which hooks do what they do at the end.
        """
        self._validate()
        self.runner.call_hook('after_step', step=self._iter)
        if not self._stops or self._iter == self._max_iters:
            return
        self._max_iters = self._iter
        self.flush()
        self.runner.call_hook('at_stop', step=self._iter)
        self._validate()
        self.runner.call_hook('after_step', step=self._iter)

    def _validate(self) -> None:
        """Run the validation of the step just done, if it is due and its results are not there."""
        if self._validates() and self._validated != self._iter:
            self.flush()
            self.runner.val_loop.run()
            self._validated = self._iter

    def _validates(self) -> bool:
        """Return whether the step just done is followed by a validation."""
        due = self._iter == self._max_iters or (self.val_interval and self._iter % self.val_interval == 0)
        return self.runner.val_loop is not None and bool(due)

    def run_iter(self, batches: Iterator[Any]) -> None:
        """Do one optimizer step.

        Raises:
            UserError: a gradient is not finite; no weight has changed. Or a loss without a gradient is not finite;
                no file of this step is written.
        """
        runner, wrapper, logs, batch = self.runner, self.runner.optim_wrapper, [], None
        for micro in range(runner.accumulative_counts):
            batch = next(batches)
            if micro == 0:
                runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batch)
            self.num_skipped += int(batch.get('num_skipped', 0))
            rng.seed_all(runner.seed, 'iteration', self._iter, micro, get_rank())
            try:
                logs.append(runner.model.train_step(batch, optim_wrapper=wrapper))
            except FloatingPointError as error:
                losses = self._mean([*logs, runner.bare_model.last_losses])
                values = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
                raise self._not_finite(self._iter + 1, losses_by_set(values, self._data_sets), str(error)) from error
        losses = self._mean(logs)
        if wrapper.on_device:
            # All processes have the same means, so they stop in the same step.
            wrapper.stop_if(~torch.isfinite(torch.stack([*losses.values()])).all())
        self._values.push(self._iter + 1, losses, wrapper.reports, wrapper.group_norms)
        outputs: Mapping[str, Any] = losses
        for step, (values, *reports) in self._values.pop(keep=int(wrapper.on_device)):
            self._arrived(step, values, *reports)
            outputs = losses if wrapper.on_device else values
        self._position += self.samples_per_iter
        self.num_done = self._iter + 1
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=batch, outputs=outputs)
        self._bound_scalars()
        self._iter += 1

    def flush(self) -> None:
        """Wait for the values of the steps done; check and log them. Call it in all processes.

        Raises:
            UserError: see `run_iter`.
        """
        for step, values in self._values.pop():
            self._arrived(step, *values)

    def _arrived(self, step: int, losses: dict[str, float], reports: dict[str, float],
                 group_norms: dict[str, float]) -> None:
        """Check what is known of `step` now; log it by calling the hooks' `after_step_values(runner, step, losses)`.

        Where there are several data sets, `losses` has 'loss/<name>' for each one with samples in the step.

        Raises:
            UserError: see `run_iter`.
        """
        losses = losses_by_set(losses, self._data_sets)
        try:
            self.runner.optim_wrapper.arrived(reports, group_norms)
        except FloatingPointError as error:
            raise self._not_finite(step, losses, str(error)) from error
        if not all(math.isfinite(v) for v in losses.values()):
            raise self._not_finite(step, losses, 'the loss is not finite')
        self.runner.call_hook('after_step_values', step=step, losses=losses)

    def _mean(self, logs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Average over micro-batches and processes; fp64, on the device."""
        names = list(logs[0])
        values = torch.stack([torch.stack([log[n].detach().double() for n in names]) for log in logs]).mean(dim=0)
        all_reduce(values, op='mean')
        return dict(zip(names, values.unbind(), strict=True))

    def _not_finite(self, step: int, losses: dict[str, float], reason: str) -> UserError:
        runner, last = self.runner, checkpoint.latest(self.runner.work_dir)
        rate = runner.resolved.optim_wrapper.optimizer.get('lr')
        options = [f'load_from={last}'] if last else []
        # The run's own work_dir is bound to its settings once it holds a checkpoint, and to resume would repeat them.
        options += ['optim_wrapper.clip_grad=dict(max_norm=0.1)' if rate is None else
                    f'optim_wrapper.optimizer.lr={rate / 10:g}']
        command = f'--work-dir {shlex.quote(f"{runner.work_dir}_again")} --cfg-options {shlex.join(options)}'
        return UserError(
            f'Training stopped at step {step}: {reason.rstrip(".")}. Loss parts: '
            f'{", ".join(f"{name}={value:.6g}" for name, value in losses.items())}. '
            + (f"The last good checkpoint is '{last}'; start a new run from it." if last else
               'No checkpoint was saved yet; start again.')
            + f' Try a smaller learning rate, clip_grad, or bf16 instead of fp16: without --resume, with {command}')

    def _bound_scalars(self) -> None:
        """Replace new histories of mmengine's by ones of bounded length."""
        scalars = self.runner.message_hub.log_scalars
        if len(scalars) != self._num_scalars:
            for name, unbounded in scalars.items():
                history, counts = (list(values) for values in unbounded.data)
                scalars[name] = checkpoint.bounded_buffer(history, counts)
            self._num_scalars = len(scalars)


def _count(key: str, value: Any) -> int | None:
    return None if value is None else whole_number(f'train_cfg.{key}', value, 1)
