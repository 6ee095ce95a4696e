"""The diffusers schedulers that sample SDXL, and a scheduler with checked settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from numbers import Real
from typing import Any

import torch

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError, did_you_mean, listed, one_of
from diffengine_sdxl.noise_schedule import PREDICTION_TYPES

#: Usable scheduler -> what its `step` takes besides: 'generator', one per image; 'eta'; or `noise_sampler_seed`, an
#: attribute with one seed per image, for Brownian noise. Tests try every scheduler of diffusers with SDXL's noise
#: schedule: the usable ones go from noise to image, and draw each image's noise from its own seed.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(('DDIMScheduler', 'DDIMParallelScheduler', 'TCDScheduler'), ('eta', 'generator')),
    **dict.fromkeys(('DDPMScheduler', 'DDPMParallelScheduler', 'DPMSolverMultistepScheduler',
                     'DPMSolverSinglestepScheduler', 'EulerAncestralDiscreteScheduler', 'EulerDiscreteScheduler',
                     'KDPM2AncestralDiscreteScheduler', 'LCMScheduler', 'SASolverScheduler'), ('generator',)),
    **dict.fromkeys(('DEISMultistepScheduler', 'HeunDiscreteScheduler', 'KDPM2DiscreteScheduler',
                     'LMSDiscreteScheduler', 'PNDMScheduler', 'UniPCMultistepScheduler'), ()),
    'DPMSolverSDEScheduler': ('noise_sampler_seed',)}
#: SDXL's noise schedule and timestep spacing, to check settings before a base is loaded.
SDXL_CONFIG = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', num_train_timesteps=1000,
                   prediction_type='epsilon', timestep_spacing='leading', steps_offset=1)
#: What diffusers raises for settings or steps that a scheduler does not support; few of them are meant as a refusal.
SCHEDULER_ERRORS = (ValueError, AssertionError, LookupError, TypeError, AttributeError, NotImplementedError,
                    ArithmeticError, RuntimeError, ImportError)


def scheduler_class(name: str) -> Any:
    """Return the diffusers scheduler class called `name`.

    Raises:
        UserError: it is unknown, cannot sample SDXL, or needs a package that is not installed.
    """
    import diffusers
    if not isinstance(name, str):
        raise UserError(f'scheduler type={name!r} must be the name of a scheduler of diffusers.')
    if name not in SCHEDULERS:
        if str(name).endswith('Scheduler') and hasattr(diffusers, str(name)):
            raise UserError(f"scheduler type='{name}' cannot sample SDXL: it is made for other models, runs from image "
                            f'to noise, or draws noise without a seed per image. Choose one of '
                            f'{", ".join(SCHEDULERS)}.')
        # 'Euler' is closer to every short name than to its own.
        prefixed = [known for known in SCHEDULERS if known.lower().startswith(str(name).lower())]
        hint = did_you_mean(str(name), SCHEDULERS)
        if prefixed:
            hint = f" Did you mean {' or '.join(map(repr, prefixed[:3]))}?"
        raise UserError(f"scheduler type='{name}' is not a supported scheduler of diffusers; your own classes cannot "
                        f'be used.{hint or f" Choose one of {listed(SCHEDULERS, len(SCHEDULERS))}."}')
    cls = getattr(diffusers, name)
    # Where a scheduler's packages are missing, diffusers has a dummy class that names them.
    if missing := [package for package in getattr(cls, '_backends', ()) if find_spec(package) is None]:
        raise UserError(f'{name} needs {" and ".join(missing)}, which is not installed '
                        f'(pip install {" ".join(missing)}).')
    return cls


def step_options(scheduler: Any, eta: float, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the keyword arguments of `scheduler.step`; give a scheduler with Brownian noise a seed per image."""
    options = SCHEDULERS[type(scheduler).__name__]
    if 'noise_sampler_seed' in options:
        scheduler.noise_sampler_seed = [int(torch.randint(2 ** 63 - 1, (), generator=g)) for g in generators]
    return {k: v for k, v in (('eta', eta), ('generator', list(generators))) if k in options}


def make_scheduler(cls: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Return a fresh scheduler from a base's config, with `settings` replacing some of it.

    Raises:
        UserError: diffusers refuses the settings.
    """
    try:
        return cls.from_config(config, **settings)
    except SCHEDULER_ERRORS as error:
        raise UserError(f'{cls.__name__} cannot be made with {_format(settings)}: {error}') from error


def _format(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in settings.items()) or 'the settings of the base'


def check_settings(cls: Any, settings: Mapping[str, Any]) -> None:
    """Check a scheduler's settings by making one for SDXL.

    Raises:
        UserError: a setting is unknown, or the scheduler cannot be made or sample with it.
    """
    known = list(inspect.signature(cls.__init__).parameters)
    for key in settings:
        if key not in known:
            raise UserError(f"{cls.__name__} has no setting '{key}'.{did_you_mean(key, known)}")
        if isinstance(settings[key], int | float) and abs(settings[key]) > (most := limits.CURRENT.solver_steps):
            raise UserError(f'{cls.__name__}: {key}={settings[key]} must be at most {most} (limits.solver_steps).')
    if settings.get('noise_sampler_seed') is not None:
        raise UserError(f"{cls.__name__}: leave noise_sampler_seed out; it is set from each image's seed.")
    if settings.get('use_flow_sigmas') or settings.get('prediction_type') == 'flow_prediction':
        raise UserError(f'{cls.__name__}: use_flow_sigmas and flow_prediction are for models trained by flow '
                        'matching; SDXL was not.')
    one_of(f'{cls.__name__}: prediction_type', settings.get('prediction_type', 'epsilon'), PREDICTION_TYPES)
    betas, num = settings.get('trained_betas'), settings.get('num_train_timesteps', SDXL_CONFIG['num_train_timesteps'])
    if betas is not None and (not isinstance(betas, Sequence) or len(betas) != num):
        raise UserError(f'{cls.__name__}: trained_betas must be a list of {num} numbers, one for each timestep.')
    scheduler = make_scheduler(cls, {k: v for k, v in SDXL_CONFIG.items() if k in known}, settings)
    try:
        scheduler.set_timesteps(4)
    except SCHEDULER_ERRORS as error:
        raise UserError(f'{cls.__name__} cannot sample with {_format(settings)}: {error}') from error


def check_steps(cls: Any, timesteps: Any, sigmas: Any, eta: float) -> None:
    """Check that a scheduler supports custom timesteps, custom sigmas and `eta`.

    Raises:
        UserError: it does not support one of them, or eta is out of range.
    """
    if timesteps is not None and sigmas is not None:
        raise UserError('Give timesteps or sigmas, not both.')
    supported = set(inspect.signature(cls.set_timesteps).parameters)
    if 'use_flow_sigmas' in inspect.signature(cls.__init__).parameters:
        supported -= {'sigmas'}  # read for flow matching only
    for name, values, others in (('timesteps', timesteps, 'EulerDiscreteScheduler and DPMSolverMultistepScheduler do'),
                                 ('sigmas', sigmas, 'EulerDiscreteScheduler does')):
        if values is not None and name not in supported:
            raise UserError(f'{cls.__name__} does not take custom {name}; {others}.')
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise UserError(f'eta={eta!r} must be from 0 (no noise) to 1.')
    if eta and 'eta' not in SCHEDULERS[cls.__name__]:
        raise UserError(f'eta={eta}: {cls.__name__} ignores eta; use DDIMScheduler or TCDScheduler.')
