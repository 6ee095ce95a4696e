"""One model, or two one after the other: SDXL's base and its refiner, which goes on with its latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffengine_sdxl.models.predictions import without_adapters
from diffengine_sdxl.structures import Batch, Start


class Stage(NamedTuple):
    """A model with what it is asked and how it is sampled.

    Attributes:
        model: an SDXL. batch: B samples. sampler: None takes the model's own.
    """

    model: Any
    batch: Batch
    sampler: Any = None

    @property
    def by(self) -> Any:
        """The sampler that makes it."""
        return self.sampler or self.model.sampler


def run(first: Stage, second: Stage | None = None, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Latents [B, 4, h, w] of the first stage, or of the second that goes on from them.

    As an ensemble of expert denoisers the first's sampler has a `denoising_end` and the second's a `denoising_start`;
    otherwise the second takes the finished latents back by its `strength`. A mask is the first's in both. Each row's
    random numbers go on where the first stage stopped, as with diffusers' pipelines that share a generator.

    Args:
        on_step: called with (steps done, steps in all) of each stage.

    Raises:
        ValueError: see Sampler; or the latents of one are none of the other.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in first.batch.seed]
    # What one's adapters change in a text encoder that both use is not the other's.
    shared = second is not None and second.model.shared_parts
    with without_adapters(second.model) if second is not None and shared else nullcontext():
        latents: Tensor = first.by(first.model, first.batch, on_step, generators)
    if second is None:
        return latents
    theirs, ours = (m.unet.config.out_channels for m in (second.model, first.model))
    if theirs != ours or second.model.vae_factor != first.model.vae_factor:
        raise ValueError(f'The refiner works on latents of {theirs} channels, {second.model.vae_factor} times smaller '
                         f'than pictures; the base on {ours}, {first.model.vae_factor} times smaller.')
    start = first.batch.start
    batch = replace(second.batch, start=Start(latents=latents, mask=None if start is None else start.mask),
                    size=tuple(side * first.model.vae_factor for side in latents.shape[-2:]))
    with without_adapters(first.model) if shared else nullcontext():
        return second.by(second.model, batch, on_step, generators)
