"""diffusers' schedulers as solvers: with which steps, and which part of the way is gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffengine_sdxl.samplers.schedulers import FAULTS


class Span(NamedTuple):
    """The part of a solver's way that is gone.

    Attributes:
        timesteps: those at which the UNet is called, [N].
        first: how many lie before them; total: how many the whole way has.
    """

    timesteps: Tensor
    first: int
    total: int


def check_own(name: str, values: Any) -> None:
    """Refuse timesteps or sigmas of one's own that are no way from noise to image; what the model knows comes later.

    Raises:
        ValueError: they are none, or which of them is at fault.
    """
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f'{name}={values!r} must be a list of numbers.')
    what = 'whole number' if name == 'timesteps' else 'number'
    for i, value in enumerate(values):
        said = f'{name}[{i}]={value!r}'
        # Compared, as `isfinite` takes no whole number of 400 digits.
        if not isinstance(value, Real) or isinstance(value, bool) or not (
                -math.inf < value < math.inf) or name == 'timesteps' and value % 1:  # type: ignore[operator]
            raise ValueError(f'{said} must be a {what}.')
        if value < 0:
            raise ValueError(f'{said} must not be below 0.')
        if i and value >= values[i - 1]:
            raise ValueError(f'{said} must be below the one before it, {values[i - 1]}: {name} fall from noise to '
                             'image.')
    if name == 'sigmas' and len(values) < 2:
        raise ValueError(f'{name}={values!r}: the last one is where the way ends, so give two at least.')


def set_steps(scheduler: Any, num_inference_steps: int, timesteps: Sequence[int] | None,
              sigmas: Sequence[float] | None, device: torch.device) -> int:
    """Lay out the whole way; the number of solver steps.

    Raises:
        ValueError: the scheduler refuses the steps.
    """
    own: dict[str, Any] = {}
    trained = scheduler.config.num_train_timesteps
    if timesteps is not None:
        if timesteps[0] >= trained:
            raise ValueError(f'timesteps[0]={timesteps[0]} must be below {trained}, the number of timesteps that the '
                             'model was trained on.')
        own['timesteps'] = [int(t) for t in timesteps]
    if sigmas is not None:
        own['sigmas'] = [float(sigma) for sigma in sigmas]
    said = ', '.join(f'{name}={values}' for name, values in own.items()) or f'{num_inference_steps} steps'
    try:
        scheduler.set_timesteps(**(own or {'num_inference_steps': num_inference_steps}), device=device)
    except FAULTS as error:
        raise ValueError(f'{type(scheduler).__name__} cannot do {said}: {error}') from error
    way = scheduler.timesteps
    # Heun lists all but the first twice. diffusers' pipelines count that as steps, and strength goes astray.
    num = -(-len(way) // scheduler.order) if own else num_inference_steps
    if num > 1 and float(way[0]) <= float(way[-1]) or float(way[0]) >= trained:
        raise ValueError(f'{type(scheduler).__name__} cannot do {said}: they would go from timestep {float(way[0]):g} '
                         f'to {float(way[-1]):g}, and the model was trained on {trained - 1} to 0; take fewer.')
    return num


def span(scheduler: Any, num_steps: int, strength: float | None = None, denoising_start: float | None = None,
         denoising_end: float | None = None) -> Span:
    """The timesteps that are gone, after `set_steps`; the scheduler is told where it begins.

    As in diffusers' SDXL pipelines: `strength` skips the first steps, `denoising_start` takes its place, and both ends
    are parts of the timesteps that the model was trained on, not of the solver's steps.

    Args:
        num_steps: solver steps of the whole way. strength: None for all.

    Raises:
        ValueError: no step is left.
    """
    timesteps, trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    first = 0
    if denoising_start is not None:
        left = int((timesteps < round(trained - denoising_start * trained)).sum())
        # A solver of second order visits each timestep but the first twice; it must begin with a whole step.
        left += scheduler.order == 2 and left % 2 == 0 and denoising_start < 1
        first = max(0, len(timesteps) - left)
    elif strength is not None:
        first = max(num_steps - min(int(num_steps * strength), num_steps), 0) * scheduler.order
    last = len(timesteps)
    if denoising_end is not None and denoising_end < 1:
        last = first + int((timesteps[first:] >= round(trained - denoising_end * trained)).sum())
    if last <= first:
        said = {'strength': strength if denoising_start is None else None, 'denoising_start': denoising_start,
                'denoising_end': denoising_end}
        said = {name: value for name, value in said.items() if value is not None}
        raise ValueError(f'{", ".join(f"{name}={value:g}" for name, value in said.items())} leaves none of '
                         f'{num_steps} steps to do; take more steps or another value.')
    if hasattr(scheduler, 'set_begin_index'):
        # Else a scheduler looks its place up by the timestep, and skips a step where two round to the same.
        scheduler.set_begin_index(first)
    return Span(timesteps[first:last], first, len(timesteps))
