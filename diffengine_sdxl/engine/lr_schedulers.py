"""Learning rate schedules of the diffusers scripts; they count optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from torch.optim.lr_scheduler import LambdaLR

from diffengine_sdxl.errors import UserError, first_line, one_of, whole_number
from diffengine_sdxl.registry import PARAM_SCHEDULERS

_COUNTS = ('num_warmup_steps', 'num_training_steps')
#: Name of a schedule -> its arguments.
_SCHEDULES = {'constant': (), 'constant_with_warmup': ('num_warmup_steps',), 'linear': _COUNTS,
              'cosine': (*_COUNTS, 'num_cycles'), 'cosine_with_restarts': (*_COUNTS, 'num_cycles'),
              'polynomial': (*_COUNTS, 'power', 'lr_end'), 'piecewise_constant': ('step_rules',)}


@PARAM_SCHEDULERS.register_module()
class DiffusersLR(LRSchedulerMixin, _ParamScheduler):
    """Multiply each group's learning rate by the factor of `diffusers.optimization`; equal to diffusers bitwise.

    Arguments that a schedule lacks are ignored, as by `--lr_scheduler` of the scripts. Counts are optimizer steps.

    Args:
        optimizer: optimizer or wrapper.
        name: 'constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial' or
            'piecewise_constant'.
        num_warmup_steps: steps from 0 to the full rate.
        num_training_steps: length of the schedule; None means `end`, which the runner sets to its `max_iters`.
        num_cycles: of the cosine; None means diffusers' default: 0.5 for 'cosine', 1 for 'cosine_with_restarts'. (The
            scripts pass theirs to the latter only.)
        power, lr_end: of 'polynomial'; lr_end is the final rate of a group that has the optimizer's default rate.
        step_rules: of 'piecewise_constant', as '1:10,0.1:20,0.01'.
        begin: first step that sets the rate; the schedule counts from there.
        end: first step that no longer sets it.

    Raises:
        UserError: the name is unknown, or an argument of the schedule is missing or invalid.
    """

    def __init__(self, optimizer: Any, name: str = 'constant', num_warmup_steps: int = 0,
                 num_training_steps: int | None = None, num_cycles: float | None = None, power: float = 1.0,
                 lr_end: float = 1e-7, step_rules: str | None = None, begin: int = 0, end: int = INF,
                 by_epoch: bool = False, last_step: int = -1, verbose: bool = False) -> None:
        one_of('DiffusersLR: name', name, _SCHEDULES)
        if by_epoch:
            raise UserError('DiffusersLR counts optimizer steps: by_epoch must be False.')
        if num_training_steps is None and end < INF:
            num_training_steps = end - begin
        values = {'num_warmup_steps': whole_number('DiffusersLR: num_warmup_steps', num_warmup_steps, 0),
                  'num_training_steps': num_training_steps, 'power': power, 'lr_end': lr_end, 'step_rules': step_rules}
        arguments = {key: values[key] for key in _SCHEDULES[name] if key != 'num_cycles'}
        missing = [key for key, value in arguments.items() if value is None]
        if missing:
            raise UserError(f'DiffusersLR with name={name!r} needs {" and ".join(missing)}.')
        if num_cycles is not None and 'num_cycles' in _SCHEDULES[name]:
            arguments['num_cycles'] = num_cycles
        # A stand-in, of which only 'polynomial' reads the default rate.
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=optimizer.defaults.get('lr') or 1.0)
        make: Callable[..., LambdaLR] = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]  # type: ignore[assignment]
        try:
            self._factor = make(stand_in, **arguments).lr_lambdas[0]
        except (AttributeError, TypeError, ValueError) as error:  # step_rules is parsed here
            raise UserError(f'DiffusersLR with name={name!r}: {first_line(error)}. Its arguments are {arguments}.'
                            ) from error
        super().__init__(optimizer, begin=begin, end=end, by_epoch=False, last_step=last_step, verbose=verbose)

    def _get_value(self) -> list[float | None]:
        """Return each group's rate at `last_step`; None stays None (Adafactor's relative steps)."""
        factor = self._factor(self.last_step)
        return [None if base is None else base * factor for base in self.base_values]

    def print_value(self, is_verbose: bool, group: int, value: float | None) -> None:
        """Log the rate of a group that has one."""
        if value is not None:
            super().print_value(is_verbose, group, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the base rates; the shape is the config's, so that a run can be made longer."""
        return {'_global_step': self._global_step, 'base_values': list(self.base_values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the step and its rates; load the optimizer's state first."""
        self._global_step = int(state_dict['_global_step'])
        self.base_values = list(state_dict['base_values'])
        # From the step, not from the saved schedule: a finished run that is made longer continues as a longer one.
        self.last_step = max(-1, min(self._global_step, self.end - 1) - self.begin)
        if self.begin <= self._global_step < self.end:
            for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
                group['lr'] = value
        self._last_value = [group['lr'] for group in self.optimizer.param_groups]
