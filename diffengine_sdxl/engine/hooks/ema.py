"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class EMAHook(Hook):
    """average <- average + (1 - d) (weight - average) after every optimizer step, for the weights that train.

    d = min(decay, (1 + step) / (10 + step)) with `warmup`, else `decay` (diffusers' EMAModel without its power
    schedule; Polyak & Juditsky 1992). Exports and sample images take the averages.

    Args:
        decay: fraction of the average that a step keeps.
        warmup: give the first steps more weight.
    """

    priority = 'NORMAL'

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UserError(f'EMAHook: decay={decay!r} must be a number in [0, 1).')
        self.decay, self.warmup = decay, warmup
        self.step = 0
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
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step)) if self.warmup else self.decay
        current = [p.detach() for p in self.parameters.values()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

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
        checkpoint['ema'] = {'step': self.step, 'weights': self.weights}

    def after_load_checkpoint(self, runner: ExperimentRunner, checkpoint: dict) -> None:
        """Restore the averages.

        Raises:
            UserError: the checkpoint holds none.
        """
        if 'ema' not in checkpoint:
            raise UserError('The checkpoint holds no EMA, but the config has an EMAHook; remove the hook, or start a '
                            'new run from these weights (load_from).')
        self.step = checkpoint['ema']['step']
        for name, stored in checkpoint['ema']['weights'].items():
            self.weights[name].copy_(stored)
