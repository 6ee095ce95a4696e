"""Which of diffusers' schedulers can sample an SDXL, each picture from its own seed; and one made of settings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.schedule import NoiseSchedule

#: What schedulers raise at settings or steps that they cannot do: of many kinds, and few of them meant as a refusal.
FAULTS = (ValueError, AssertionError, LookupError, TypeError, AttributeError, NotImplementedError, ArithmeticError,
          RuntimeError, ImportError)
#: SDXL's noise schedule and spacing, with which a scheduler is tried.
TRIAL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', num_train_timesteps=1000,
             prediction_type='epsilon', timestep_spacing='leading', steps_offset=1)
PREDICTIONS = ('epsilon', 'v_prediction', 'sample')
#: What the rules below cannot tell where a package is missing: it would be asked for in vain.
REFUSED = {'CosineDPMSolverMultistepScheduler': "its noise schedule is not SDXL's (EDM, for sound)"}


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers that is called `name`.

    Raises:
        ValueError: there is none, the nearest names; or it cannot sample an SDXL, and why.
    """
    import diffusers
    known = [n for n in dir(diffusers) if n.endswith('Scheduler')]
    if name not in known:
        # 'Euler' is nearer to all short names than to its own.
        begun = [n for n in known if n.lower().startswith(str(name).lower())]
        hint = f" Did you mean {' or '.join(map(repr, begun[:3]))}?" if begun else nearest(name, known)
        raise ValueError(f"scheduler type='{name}' is not a scheduler of diffusers.{hint}")
    cls = getattr(diffusers, name)
    if (reason := why_not(cls)) is not None:
        raise ValueError(f'{name} cannot be used here: {reason}. Take EulerDiscreteScheduler, '
                         'EulerAncestralDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler.')
    return cls


@cache
def why_not(cls: Any) -> str | None:
    """Why a scheduler's class cannot be used; None: it can.

    Found by trying it, so that it holds for the schedulers of a later diffusers too: with SDXL's noise schedule, from
    noise to image, taking no more than it is given, its noise drawn from each picture's generator alone.
    """
    if cls.__name__ in REFUSED:
        return REFUSED[cls.__name__]
    # In place of a class whose packages are missing diffusers has a dummy that knows their names.
    if missing := [package for package in getattr(cls, '_backends', ()) if find_spec(package) is None]:
        return f'it needs {" and ".join(missing)}, which is not installed (pip install {" ".join(missing)})'
    try:
        scheduler = made(cls, _known(cls, TRIAL), {})
        scheduler.set_timesteps(4)
        known, trained = scheduler.alphas_cumprod, NoiseSchedule.from_config(TRIAL).alphas_cumprod
        fits = known.shape == trained.shape and torch.allclose(known, trained, rtol=1e-4)
    except FAULTS:
        fits = False
    if not fits:
        return "its noise schedule is not SDXL's: it was made for models of another kind"
    needed = [name for name, p in inspect.signature(cls.step).parameters.items()
              if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if more := [name for name in needed if name not in ('self', 'model_output', 'timestep', 'sample')]:
        return f'its steps need {" and ".join(more)} besides, which only its own pipeline has'
    if float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
        return 'it goes from the image to noise'
    if not hasattr(cls, 'add_noise'):
        return 'it cannot add noise to a picture'
    try:
        one, other, alone = (_steps(scheduler, *how) for how in (('one',), ('other',), ('one', True)))
    except FAULTS as error:
        return f'it fails when tried ({error})'
    if not torch.equal(one, other) or not torch.allclose(one, alone, rtol=1e-4, atol=1e-4):
        return "its noise is not drawn from each picture's own seed"
    return None


def _known(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in config.items() if name in known}


def _steps(prepared: Any, key: str, alone: bool = False) -> Tensor:
    """A small way of two pictures, together or one alone after the other, with the global generators at `key`."""
    both = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    ends = []
    with rng.fork(key, 'scheduler'):
        for seeds in ([0], [1]) if alone else ([0, 1],):
            scheduler = copy.deepcopy(prepared)  # some take a fifth of a second to be made
            options = step_options(scheduler, 0.0, [torch.Generator().manual_seed(seed) for seed in seeds])
            x = scheduler.add_noise(both[seeds], both[seeds], scheduler.timesteps[:1].repeat(len(seeds)))
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t) * 0.5, t, x, **options, return_dict=False)[0]
            ends.append(x)
    return torch.cat(ends)


def step_options(scheduler: Any, eta: float, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What `scheduler.step` takes besides. One that has its noise from Brownian paths gets a seed for each picture."""
    if hasattr(scheduler, 'noise_sampler_seed'):
        scheduler.noise_sampler_seed = [int(torch.randint(2 ** 63 - 1, (), generator=g)) for g in generators]
    known = inspect.signature(scheduler.step).parameters
    options = {'eta': eta, 'generator': list(generators)}
    return {k: v for k, v in options.items() if k in known}


def made(cls: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A fresh scheduler of a base's config, with `settings` in place of some.

    Raises:
        ValueError: the scheduler cannot be made so.
    """
    try:
        return cls.from_config(config, **settings)
    except FAULTS as error:
        raise ValueError(f'{cls.__name__} cannot be made with {_said(settings)}: {error}') from error


def _said(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in settings.items()) or 'the settings of the base'


def check_settings(cls: Any, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a scheduler's class does not know, or cannot be made with.

    Raises:
        ValueError: which one, and why.
    """
    known = list(inspect.signature(cls.__init__).parameters)
    for key in settings:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting '{key}'.{nearest(key, known)}")
    if settings.get('noise_sampler_seed') is not None:
        raise ValueError(f"{cls.__name__}: noise_sampler_seed comes of each picture's own seed; leave it out.")
    if settings.get('use_flow_sigmas') or settings.get('prediction_type') == 'flow_prediction':
        raise ValueError(f'{cls.__name__}: use_flow_sigmas and flow_prediction are for models trained by flow '
                         'matching; SDXL was not.')
    scheduler = made(cls, _known(cls, TRIAL), settings)
    if (told := settings.get('prediction_type', 'epsilon')) not in PREDICTIONS:
        raise ValueError(f"{cls.__name__}: prediction_type='{told}' is not known; choose of "
                         f'{", ".join(map(repr, PREDICTIONS))}.')
    try:
        scheduler.set_timesteps(4)
    except FAULTS as error:
        raise ValueError(f'{cls.__name__} cannot sample with {_said(settings)}: {error}') from error


def check_steps(cls: Any, timesteps: Any, sigmas: Any, eta: float) -> None:
    """Refuse steps and noise that a scheduler's class cannot be told.

    Raises:
        ValueError: own timesteps or own sigmas, or eta.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError('Give timesteps or sigmas, not both.')
    taken = set(inspect.signature(cls.set_timesteps).parameters)
    if 'use_flow_sigmas' in inspect.signature(cls.__init__).parameters:
        taken -= {'sigmas'}  # read with flow matching only
    for name, values, others in (('timesteps', timesteps, 'EulerDiscreteScheduler and DPMSolverMultistepScheduler do'),
                                 ('sigmas', sigmas, 'EulerDiscreteScheduler does')):
        if values is not None and name not in taken:
            raise ValueError(f'{cls.__name__} takes no {name} of your own; {others}.')
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise ValueError(f'eta={eta!r} must be from 0 (no noise) to 1.')
    if eta and 'eta' not in inspect.signature(cls.step).parameters:
        raise ValueError(f'eta={eta}: {cls.__name__} reads no eta; DDIMScheduler and TCDScheduler do.')
