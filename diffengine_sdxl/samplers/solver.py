"""diffusers' schedulers as solvers: which one, with which steps, and which part of the way is gone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffengine_sdxl.registry import nearest


class Span(NamedTuple):
    """The part of a solver's way that is gone.

    Attributes:
        timesteps: those at which the UNet is called, [N].
        first: how many lie before them; total: how many the whole way has.
    """

    timesteps: Tensor
    first: int
    total: int


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers that is called `name`.

    Raises:
        ValueError: there is none; the nearest names.
    """
    import diffusers
    known = [n for n in dir(diffusers) if n.endswith('Scheduler')]
    if name not in known:
        raise ValueError(f"scheduler type='{name}' is not a scheduler of diffusers.{nearest(name, known)}")
    return getattr(diffusers, name)


def check_settings(cls: Any, settings: Mapping[str, Any], timesteps: Any, sigmas: Any) -> None:
    """Refuse what a scheduler's class does not know.

    Raises:
        ValueError: a setting, own timesteps or own sigmas.
    """
    known = list(inspect.signature(cls.__init__).parameters)
    for key in settings:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting '{key}'.{nearest(key, known)}")
    if timesteps is not None and sigmas is not None:
        raise ValueError('Give timesteps or sigmas, not both.')
    taken = inspect.signature(cls.set_timesteps).parameters
    for name, values in (('timesteps', timesteps), ('sigmas', sigmas)):
        if values is not None and name not in taken:
            raise ValueError(f'{cls.__name__} takes no {name} of your own; '
                             + ('EulerDiscreteScheduler and DPMSolverMultistepScheduler do.'))


def set_steps(scheduler: Any, num_inference_steps: int, timesteps: Sequence[int] | None,
              sigmas: Sequence[float] | None, device: torch.device) -> int:
    """Lay out the whole way; the number of solver steps.

    Raises:
        ValueError: the scheduler refuses the steps.
    """
    own = {name: list(values) for name, values in (('timesteps', timesteps), ('sigmas', sigmas)) if values is not None}
    try:
        if own:
            scheduler.set_timesteps(**own, device=device)
            # Heun lists all but the first twice. diffusers' pipelines count that as steps, and strength goes astray.
            return -(-len(scheduler.timesteps) // scheduler.order)
        scheduler.set_timesteps(num_inference_steps, device=device)
    except (ValueError, AssertionError, IndexError) as error:
        what = ', '.join(f'{name}={values}' for name, values in own.items()) or f'{num_inference_steps} steps'
        raise ValueError(f'{type(scheduler).__name__} cannot do {what}: {error}') from error
    return num_inference_steps


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
    if denoising_start is not None and denoising_start < 1:
        left = int((timesteps < round(trained - denoising_start * trained)).sum())
        # A solver of second order visits each timestep but the first twice; it must begin with a whole step.
        left += scheduler.order == 2 and left % 2 == 0
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


def step_options(scheduler: Any, eta: float, generators: list[torch.Generator]) -> dict[str, Any]:
    """What `scheduler.step` takes besides."""
    known = inspect.signature(scheduler.step).parameters
    options = {'eta': eta, 'generator': generators}
    return {k: v for k, v in options.items() if k in known}
