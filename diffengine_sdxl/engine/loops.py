"""The training loop: one iteration is one optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast_object_list, get_rank, get_world_size
from mmengine.runner import BaseLoop

from diffengine_sdxl import rng
from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.evaluation import ValLoop
from diffengine_sdxl.registry import LOOPS


@LOOPS.register_module()
class StepLoop(BaseLoop):
    """Runs `max_iters` optimizer steps, each of `optim_wrapper.accumulative_counts` micro-batches.

    `max_iters`, schedules, checkpoints, intervals of hooks and `step<N>` all count the same thing. All global
    randomness of a micro-batch depends on (seed, iteration, micro-batch, rank), so there is none to save.

    Args:
        max_iters: optimizer steps. max_epochs: passes over the data, used when `max_iters` is None.
        val_interval: optimizer steps between validations; there is one at the end too. None: only that one. Without
            a val_dataloader there is none.

    Raises:
        ValueError: neither or a non-positive length is given, or epochs of a stream without a length.
    """

    def __init__(self, runner: Any, dataloader: Any, max_iters: int | None = None, max_epochs: int | None = None,
                 val_interval: int | None = None) -> None:
        super().__init__(runner, dataloader)
        _check_count('val_interval', val_interval)
        self.val_interval = val_interval
        self._iter, self.num_skipped, self._num_scalars = 0, 0, 0
        self._max_iters = self._length(max_iters, max_epochs)

    def _length(self, max_iters: int | None, max_epochs: int | None) -> int:
        for key, value in (('max_iters', max_iters), ('max_epochs', max_epochs)):
            _check_count(key, value)
        if max_iters is not None:
            return max_iters
        if max_epochs is None:
            raise ValueError('train_cfg needs max_iters (optimizer steps) or max_epochs.')
        if not hasattr(self.dataloader.dataset, '__len__'):
            raise ValueError('train_cfg.max_epochs needs a data set of known length; a stream takes max_iters.')
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

    @property
    def epoch(self) -> int:
        """mmengine asks for it; an iteration loop has one epoch."""
        return 0

    @property
    def max_epochs(self) -> int:
        """As `epoch`."""
        return 1

    def start_at(self, iteration: int, position: int) -> None:
        """Go on after `iteration` steps, at sample `position` of the endless stream over the data."""
        self._iter = iteration
        source = self.dataloader.dataset if self._streams else self.dataloader.sampler
        source.start = position
        self._position = position

    _position = 0

    @property
    def position(self) -> int:
        """Samples of all processes that have been trained on."""
        return self._position

    @property
    def _streams(self) -> bool:
        return isinstance(self.dataloader.dataset, torch.utils.data.IterableDataset)

    def run(self) -> torch.nn.Module:
        """Train to the end; the model."""
        runner = self.runner
        if hasattr(self.dataloader.dataset, 'check_model'):
            self.dataloader.dataset.check_model(runner.bare_model)
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        self._begin_validation()
        # On a change of mode only: mmengine walks all modules before every iteration.
        runner.model.train()
        iterator: Any = iter(self.dataloader) if self._iter < self._max_iters else None
        try:
            while self._iter < self._max_iters:
                self.run_iter(iterator)
                if self._validates():
                    runner.val_loop.run()
        finally:
            # Left to the garbage collector, each worker of a loader that failed takes 5 s to go.
            if hasattr(iterator, '_shutdown_workers'):
                iterator._shutdown_workers()
        if self.num_skipped:
            runner.logger.warning(f'{self.num_skipped} unreadable images were passed over.')
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def _begin_validation(self) -> None:
        """See that it can be done; make up for one that was interrupted right after its step's checkpoint."""
        validation = self.runner.val_loop
        if not isinstance(validation, ValLoop):  # none, or a loop of the user's
            return
        validation.check()
        validation.forget_after(self._iter)
        missing = [self._iter > 0 and self._validates() and not validation.path().is_file()]
        broadcast_object_list(missing)
        if missing[0]:
            validation.run()

    def _validates(self) -> bool:
        """Whether there is a validation after the last step."""
        due = self._iter == self._max_iters or (self.val_interval and self._iter % self.val_interval == 0)
        return self.runner.val_loop is not None and bool(due)

    def run_iter(self, iterator: Any) -> None:
        """One optimizer step.

        Raises:
            ValueError: the gradient is not finite, and the weights are untouched; or the loss alone is not (a part
                of it that has no gradient), and nothing of this step is saved.
        """
        runner, logs, batch = self.runner, [], None
        for micro in range(runner.accumulative_counts):
            batch = next(iterator)
            if micro == 0:
                runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batch)
            self.num_skipped += int(batch.get('num_skipped', 0))
            rng.seed_all(runner.seed, 'iteration', self._iter, micro, get_rank())
            try:
                logs.append(runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper))
            except FloatingPointError as error:
                raise self._not_finite(self._mean([*logs, runner.bare_model.last_losses]), str(error)) from error
        outputs = self._mean(logs)
        if not all(math.isfinite(v) for v in outputs.values()):
            raise self._not_finite(outputs, 'the loss is not finite')
        self._position += self.samples_per_iter
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=batch, outputs=outputs)
        self._bound_scalars()
        self._iter += 1

    def _mean(self, logs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over micro-batches and processes, with one transfer from the device."""
        if not logs:
            return {}
        names = list(logs[0])
        values = torch.stack([torch.stack([log[n].detach().double() for n in names]) for log in logs]).mean(dim=0)
        all_reduce(values, op='mean')
        return dict(zip(names, values.tolist(), strict=True))

    def _not_finite(self, outputs: dict[str, float], reason: str) -> ValueError:
        last = checkpoint.latest(self.runner.work_dir)
        parts = ', '.join(f'{k}={v:.6g}' for k, v in outputs.items()) or 'not known'
        return ValueError(
            f'Training stopped at step {self._iter + 1}: {reason.rstrip(".")}. Loss parts: {parts}. '
            + (f"The last good checkpoint is '{last}'." if last else 'No checkpoint was saved yet.')
            + ' A smaller learning rate, clip_grad, or bf16 instead of fp16 may help.')

    def _bound_scalars(self) -> None:
        scalars = self.runner.message_hub.log_scalars
        if len(scalars) != self._num_scalars:
            for name, old in scalars.items():
                history, counts = (list(values) for values in old.data)
                scalars[name] = checkpoint.bounded_buffer(history, counts)
            self._num_scalars = len(scalars)


def _check_count(key: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f'train_cfg.{key}={value!r} must be a whole number of at least 1.')
