"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import HOOKS

#: Tensors whose changes are in memory at the same time.
AT_ONCE = 64


@HOOKS.register_module()
class EMAHook(Hook):
    """average <- average + (1 - d) (weight - average) after every optimizer step, for the weights that train.

    d = min(decay, (1 + step) / (10 + step)) with `warmup`, else `decay` (diffusers' EMAModel without its power
    schedule; Polyak & Juditsky 1992). Exports and sample images take the averages. Steps that the optimizer leaves out
    (fp16's overflows) change and count nothing.

    Args:
        decay: fraction of the average that a step keeps.
        warmup: give the first steps more weight.
    """

    priority = 'NORMAL'

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UserError(f'EMAHook: decay={decay!r} must be a number in [0, 1).')
        self.decay, self.warmup = decay, warmup
        #: Updates, with those that the device left out: 0, or fp32 on the device.
        self.step, self.num_left_out = 0, torch.zeros(())
        self.weights: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def before_run(self, runner: ExperimentRunner) -> None:
        """Allocate the averages, unless this runner has trained already and now tests."""
        if runner.ema is self:
            return
        runner.ema = self
        # Cached: `trainables` walks all modules of the model.
        self.parameters = {n: p for owned in runner.bare_model.trainables().values() for n, p in owned}
        self.weights = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def before_train(self, runner: ExperimentRunner) -> None:
        """Start from the current weights: `load_from` may have replaced those of `before_run`."""
        for name, parameter in self.parameters.items() if self.step == 0 else ():
            self.weights[name].copy_(parameter)

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Update the averages."""
        skipped = runner.optim_wrapper.skipped
        if skipped is True:
            return
        self.step += 1
        averages, current = list(self.weights.values()), [p.detach() for p in self.parameters.values()]
        if isinstance(skipped, torch.Tensor):
            self._update_on_device(averages, current, skipped)
            return
        with torch.no_grad():
            torch._foreach_lerp_(averages, current, 1 - self._decay(self.step))

    @torch.no_grad()
    def _update_on_device(self, averages: list[torch.Tensor], current: list[torch.Tensor],
                          skipped: torch.Tensor) -> None:
        """Update where `skipped` is 0, without asking whether it is."""
        self.num_left_out = self.num_left_out.to(skipped.device, non_blocking=True) + skipped
        fraction = (1 - self._decay(self.step - self.num_left_out)) * (1 - skipped)
        for i in range(0, len(averages), AT_ONCE):
            some = averages[i:i + AT_ONCE]
            changes = torch._foreach_sub(current[i:i + AT_ONCE], some)
            torch._foreach_mul_(changes, fraction.to(some[0].dtype))
            torch._foreach_add_(some, changes)

    def _decay(self, step: Any) -> Any:
        """Return d of a step: of a number, or of one on the device."""
        if not self.warmup:
            return self.decay
        warm = (1 + step) / (10 + step)
        return warm.clamp(max=self.decay) if isinstance(warm, torch.Tensor) else min(self.decay, warm)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in place, bitwise; a second call undoes it."""
        for name, parameter in self.parameters.items():
            weight = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(weight)

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        warmup = ' after a warmup' if self.warmup else ''
        return {'ema': f'decay {self.decay:g}{warmup}; exported, sampled and validated'}

    def before_save_checkpoint(self, runner: ExperimentRunner, checkpoint: dict) -> None:
        """Add the averages to the checkpoint."""
        checkpoint['ema'] = {'step': self.step - int(self.num_left_out), 'weights': self.weights}

    def after_load_checkpoint(self, runner: ExperimentRunner, checkpoint: dict) -> None:
        """Restore the averages.

        Raises:
            UserError: the checkpoint holds none.
        """
        if 'ema' not in checkpoint:
            raise UserError('The checkpoint holds no EMA, but the config has an EMAHook; remove the hook, or start a '
                            'new run from these weights (load_from).')
        self.step, self.num_left_out = checkpoint['ema']['step'], torch.zeros(())
        for name, stored in checkpoint['ema']['weights'].items():
            self.weights[name].copy_(stored)
