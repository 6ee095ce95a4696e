"""Images to latents and back, through the model's VAE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.deferred import loaded
from diffengine_sdxl.objectives.noises import vae_noise
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.structures import Batch, send


class VAEMixin:
    """The methods of SDXL that call its VAE."""

    def latents(self: Denoiser, batch: Batch) -> Tensor:
        """Return the images' scaled latents, [B, 4, h, w] in the VAE's dtype, at least fp32; its noise is a keyed draw.

        Raises:
            UserError: see `posterior`.
        """
        # That of a VAE's output for the whole batch: it selects the UNet's kernels, and with them the last bits.
        layout = torch.channels_last if len(batch) > 1 else torch.contiguous_format
        if batch.latents is not None:
            return batch.latents.contiguous(memory_format=layout)
        if 'vae' in self.trainable_parts:
            dist = self.posterior(batch)
            mean, std = dist.mean, dist.std
        else:
            mean, std = (t.contiguous(memory_format=layout) for t in self.moments(batch))
        mean, std = (t if t.dtype.itemsize >= 4 else t.float() for t in (mean, std))
        return _scale(self.vae, mean + std * vae_noise(batch, mean))

    @torch.no_grad()
    def moments(self: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and std of the images' unscaled latents, [B, 4, h, w] in the VAE's dtype; it must be frozen.

        Images are encoded one by one; those that `batch.lookups` holds are not.

        Raises:
            UserError: see `posterior`.
        """
        lookups = batch.lookups.get('moments')
        missing = len(batch) if lookups is None else sum(value is None for value in lookups.values)

        def compute(i: int) -> dict[str, Tensor]:
            loaded(self.vae, f'{missing} of {len(batch)} images of this batch are to be encoded')
            dist = self.posterior(replace(batch, img=None if batch.img is None else batch.img[i:i + 1]))
            return {'mean': dist.mean[0], 'std': dist.std[0]}

        rows = by_row(len(batch), compute, 'moments', lookups, self.store, batch.time_ids.device)
        return rows['mean'], rows['std']

    def posterior(self: Denoiser, batch: Batch) -> Any:
        """Return the distribution of the images' unscaled latents: `mean`, `std` [B, 4, h, w], `kl()` [B].

        Raises:
            UserError: there is no image, or a side is not divisible.
        """
        if batch.img is None:
            raise UserError("The samples hold neither 'img' nor 'latents'; name the column (image_column).")
        height, width = batch.img.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            divisors = {'the VAE': self.vae_factor,
                        **{f"adapter '{name}'": a.size_divisor for name, a in self.adapters.items()}}
            reasons = ', '.join(f'{name} {divisor}' for name, divisor in divisors.items() if divisor > 1)
            raise UserError(f"'img' is {height} x {width}; its sides must be divisible by {self.size_divisor} "
                            f'({reasons}). Change `resolution`.')
        trains = 'vae' in self.trainable_parts
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), _upcast(self.vae) as vae:
            return vae.encode(batch.img.to(vae.dtype)).latent_dist

    @torch.no_grad()
    def encode_images(self: Denoiser, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the scaled latents [B, 4, h, w] of images [B, 3, H, W] in [-1, 1], each with its own generator.

        One by one, as in diffusers' pipelines with a list of generators, bitwise.
        """
        with _upcast(self.vae) as vae:
            samples = [vae.encode(image.to(vae.dtype)).latent_dist.sample(generator)
                       for image, generator in zip(images.split(1), generators, strict=True)]
        return _scale(self.vae, torch.cat(samples))

    @torch.no_grad()
    def decode(self: Denoiser, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, 4, h, w] to images [B, 3, H, W] in [0, 1], fp32; bitwise as in diffusers.

        If a VAE in half precision overflows, decode again in fp32.

        Raises:
            UserError: the images are not finite.
        """
        factor, statistics = self.vae.config.scaling_factor, _statistics(self.vae, latents)
        unscaled = latents / factor if statistics is None else latents * statistics[1] / factor + statistics[0]
        with self.frozen(), _upcast(self.vae) as vae:
            images = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        if not torch.isfinite(images).all():
            dtype = self.vae.dtype
            if dtype not in (torch.float16, torch.bfloat16):
                raise UserError('The VAE decoded NaN or Inf: its weights or the latents are damaged.')
            warnings.warn(f'The VAE overflows in {str(dtype).removeprefix("torch.")}, so these images are decoded in '
                          "fp32. Use madebyollin/sdxl-vae-fp16-fix, or dtype=dict(vae='float32').")
            try:
                self.vae.float()
                return self.decode(latents)
            finally:
                self.vae.to(dtype)
        return (images * 0.5 + 0.5).clamp(0, 1).float()


def _scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale the VAE's output for the UNet."""
    statistics = _statistics(vae, latents)
    if statistics is None:
        return latents * vae.config.scaling_factor
    return (latents - statistics[0]) * vae.config.scaling_factor / statistics[1]


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the latents' mean and standard deviation, [1, 4, 1, 1], if the config has them (Playground 2.5)."""
    values = [vae.config.get(name) for name in ('latents_mean', 'latents_std')]
    if None in values:
        return None
    mean, std = (send(torch.tensor(v, dtype=like.dtype), like.device).view(1, -1, 1, 1) for v in values)
    return mean, std


@contextmanager
def _upcast(vae: Any) -> Iterator[Any]:
    """Yield the VAE, in fp32 inside if it overflows in fp16 (`force_upcast`), as in diffusers' pipelines."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        yield vae.float() if upcast else vae
    finally:
        if upcast:
            vae.half()
