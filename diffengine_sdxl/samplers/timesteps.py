"""Set the timesteps of a diffusers scheduler, and select those to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.samplers.schedulers import SCHEDULER_ERRORS


class SelectedTimesteps(NamedTuple):
    """The part of a scheduler's timesteps to run.

    Attributes:
        timesteps: those at which the UNet is called, [N].
        first: how many are skipped before them; total: how many the scheduler has.
    """

    timesteps: Tensor
    first: int
    total: int


def set_timesteps(scheduler: Any, num_inference_steps: int, timesteps: Sequence[int] | None,
                  sigmas: Sequence[float] | None) -> int:
    """Set all timesteps of a scheduler, on the CPU; return the number of solver steps.

    Raises:
        UserError: the scheduler refuses them.
    """
    custom: dict[str, Any] = {}
    num_trained = scheduler.config.num_train_timesteps
    if timesteps is not None:
        if timesteps[0] >= num_trained:
            raise UserError(f'timesteps[0]={timesteps[0]} must be below {num_trained}, the number of timesteps that '
                            'the model was trained on.')
        custom['timesteps'] = [int(t) for t in timesteps]
    if sigmas is not None:
        custom['sigmas'] = [float(sigma) for sigma in sigmas]
    steps = ', '.join(f'{name}={values}' for name, values in custom.items()) or f'{num_inference_steps} steps'
    try:
        scheduler.set_timesteps(**(custom or {'num_inference_steps': num_inference_steps}))
    except SCHEDULER_ERRORS as error:
        raise UserError(f'{type(scheduler).__name__} cannot do {steps}: {error}') from error
    first, last = float(scheduler.timesteps[0]), float(scheduler.timesteps[-1])
    # Heun lists all but the first twice. diffusers' pipelines count these as steps, so their strength is off.
    num = -(-len(scheduler.timesteps) // scheduler.order) if custom else num_inference_steps
    if num > 1 and first <= last or first >= num_trained:
        raise UserError(f'{type(scheduler).__name__} cannot do {steps}: they would go from timestep {first:g} to '
                        f'{last:g}, and the model was trained on {num_trained - 1} to 0; use fewer steps.')
    return num


def select_timesteps(scheduler: Any, num_steps: int, strength: float | None = None,
                     denoising_start: float | None = None, denoising_end: float | None = None) -> SelectedTimesteps:
    """Select the timesteps to run, after `set_timesteps`, and set the scheduler's begin index.

    As in diffusers' SDXL pipelines: `strength` skips the first steps, and `denoising_start` overrides it. Start and end
    are fractions of the timesteps that the model was trained on, not of the solver steps.

    Args:
        num_steps: all solver steps. strength: None for all of them.

    Raises:
        UserError: no step is left.
    """
    timesteps, num_trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    first = 0
    if denoising_start is not None:
        num_left = int((timesteps < round(num_trained - denoising_start * num_trained)).sum())
        # A second-order solver visits each timestep but the first twice; it must begin with a whole step.
        num_left += scheduler.order == 2 and num_left % 2 == 0 and denoising_start < 1
        first = max(0, len(timesteps) - num_left)
    elif strength is not None:
        first = max(num_steps - min(int(num_steps * strength), num_steps), 0) * scheduler.order
    last = len(timesteps)
    if denoising_end is not None and denoising_end < 1:
        last = first + int((timesteps[first:] >= round(num_trained - denoising_end * num_trained)).sum())
    if last <= first:
        settings = {'strength': strength if denoising_start is None else None, 'denoising_start': denoising_start,
                    'denoising_end': denoising_end}
        raise UserError(f'{", ".join(f"{name}={value:g}" for name, value in settings.items() if value is not None)} '
                        f'leaves none of {num_steps} steps to do; use more steps or another value.')
    if hasattr(scheduler, 'set_begin_index'):
        # Otherwise a scheduler finds its index by the timestep, and skips a step where two round to the same.
        scheduler.set_begin_index(first)
    return SelectedTimesteps(timesteps[first:last], first, len(timesteps))
