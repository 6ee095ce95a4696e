"""Base and refiner in sequence: the refiner continues with the base's latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch, Start


class Stage(NamedTuple):
    """A model, its batch of B samples, and the sampler that makes them."""

    model: SDXL
    batch: Batch
    sampler: Sampler


def run(first: Stage, second: Stage, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Return the latents [B, 4, h, w] of the second stage, which continues from those of the first.

    As an ensemble of expert denoisers the first sampler has a `denoising_end` and the second a `denoising_start`;
    otherwise the second re-noises the finished latents by its `strength`. The first stage's mask is used in both. Each
    row's generator continues into the second stage, as with diffusers' pipelines that share one.

    Args:
        on_step: called with (steps done, total steps) of each stage.

    Raises:
        UserError: see Sampler; or the two models have different latents.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in first.batch.seed]
    # The adapters of one model must not act in a text encoder that both share while the other one runs.
    shared = bool(second.model.shared_components)
    with second.model.disable_adapters() if shared else nullcontext():
        latents = first.sampler(first.model, first.batch, on_step, generators)
    of_refiner, of_base = (stage.model.unet.config.out_channels for stage in (second, first))
    if of_refiner != of_base or second.model.vae_factor != first.model.vae_factor:
        raise UserError(f'The refiner works on latents of {of_refiner} channels, {second.model.vae_factor} times '
                        f'smaller than images; the base on {of_base}, {first.model.vae_factor} times smaller.')
    start = first.batch.start
    height, width = (side * first.model.vae_factor for side in latents.shape[-2:])
    batch = replace(second.batch, start=Start(latents=latents, mask=None if start is None else start.mask),
                    size=(height, width))
    with first.model.disable_adapters() if shared else nullcontext():
        return second.sampler(second.model, batch, on_step, generators)


def refiner_sampler(sampler: Sampler, base: Sampler, settings: dict[str, Any]) -> Sampler:
    """Return the refiner's sampler: it continues where the base's stops, or re-noises the result by its strength.

    Args:
        settings: of the refiner's request, changed in place.

    Raises:
        UserError: its `denoising_start` is not where the base stops.
    """
    if settings['denoising_start'] not in (None, base.denoising_end):
        raise UserError(f"refiner.denoising_start={settings['denoising_start']} must be where the base stops "
                        f'(denoising_end={base.denoising_end}); leave it out.')
    if base.denoising_end is not None and base.denoising_end < 1:
        settings['denoising_start'] = settings['denoising_start'] or base.denoising_end
        # Both stages run parts of the same steps.
        if settings['num_inference_steps'] is settings['timesteps'] is settings['sigmas'] is None:
            settings.update({name: getattr(base, name) for name in ('num_inference_steps', 'timesteps', 'sigmas')})
    return sampler.changed(**settings)
