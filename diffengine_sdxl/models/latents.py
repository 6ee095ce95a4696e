"""Pictures to latents and back, through the model's VAE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.structures import Batch


class Latents:
    """The half of SDXL that owns the VAE; mixed into it."""

    def latents(self: Any, batch: Batch) -> Tensor:
        """The images' latents, scaled, [B, 4, h, w] in the VAE's dtype; the VAE's sample is a keyed draw.

        Raises:
            ValueError: there is neither image nor latents, or a side cannot be divided.
        """
        if batch.latents is not None:
            # As they leave the VAE's attention in memory: the UNet's kernels depend on it, and with them the last bits.
            layout = torch.channels_last if len(batch) > 1 else torch.contiguous_format
            return batch.latents.contiguous(memory_format=layout)
        dist = self.posterior(batch)
        noise = rng.Draws(batch.seed, batch.key, batch.epoch).normal('vae', dist.mean.shape[1:])
        return self._scaled(dist.mean + dist.std * noise.to(dist.mean))

    def posterior(self: Any, batch: Batch) -> Any:
        """The VAE's distribution of the images' latents, unscaled: `mean`, `std` [B, 4, h, w], `kl()` [B].

        Raises:
            ValueError: there is no image, or a side cannot be divided.
        """
        if batch.img is None:
            raise ValueError("The samples hold neither 'img' nor 'latents'; name the column (image_column).")
        height, width = batch.img.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            needs = {'the VAE': self.vae_factor, **{f"adapter '{n}'": a.size_divisor for n, a in self.adapters.items()}}
            said = ', '.join(f'{who} {divisor}' for who, divisor in needs.items() if divisor > 1)
            raise ValueError(f"'img' is {height} x {width}; its sides must be divisible by {self.size_divisor} "
                             f'({said}). Change `resolution`.')
        trains = 'vae' in self.trainable_parts
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), self._safe_vae() as vae:
            return vae.encode(batch.img.to(vae.dtype)).latent_dist

    @torch.no_grad()
    def encode_images(self: Any, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, 4, h, w], scaled; each one's draw is from its own generator.

        One by one, as in diffusers' pipelines with a generator for each picture, bitwise.
        """
        with self._safe_vae() as vae:
            drawn = [vae.encode(image.to(vae.dtype)).latent_dist.sample(generator)
                     for image, generator in zip(images.split(1), generators, strict=True)]
        return self._scaled(torch.cat(drawn))

    @torch.no_grad()
    def decode(self: Any, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] in [0, 1], fp32; as stock, bitwise.

        A VAE in half precision that gives what is not finite is asked again in fp32.

        Raises:
            ValueError: the pictures are not finite.
        """
        factor, statistics = self.vae.config.scaling_factor, self._statistics(latents)
        unscaled = latents / factor if statistics is None else latents * statistics[1] / factor + statistics[0]
        with self.frozen(), self._safe_vae() as vae:
            images = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        if not torch.isfinite(images).all():
            if self.vae.dtype not in (torch.float16, torch.bfloat16):
                raise ValueError('The VAE made pictures that are not finite; its weights are damaged, or the latents '
                                 'are no picture.')
            dtype = self.vae.dtype
            warnings.warn(f'The VAE overflows in {str(dtype).removeprefix("torch.")}, so these pictures are decoded '
                          'in fp32. Take a VAE that does not (madebyollin/sdxl-vae-fp16-fix), or '
                          "dtype=dict(vae='float32').")
            try:
                self.vae.float()
                return self.decode(latents)
            finally:
                self.vae.to(dtype)
        return (images * 0.5 + 0.5).clamp(0, 1).float()

    def _scaled(self: Any, latents: Tensor) -> Tensor:
        """What the VAE gives, [B, 4, h, w], as the UNet takes it."""
        statistics = self._statistics(latents)
        if statistics is None:
            return latents * self.vae.config.scaling_factor
        return (latents - statistics[0]) * self.vae.config.scaling_factor / statistics[1]

    def _statistics(self: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the VAE's latents, [1, 4, 1, 1], if its config has them (Playground 2.5)."""
        values = [self.vae.config.get(name) for name in ('latents_mean', 'latents_std')]
        if None in values:
            return None
        mean, std = (torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for v in values)
        return mean, std

    @contextmanager
    def _safe_vae(self: Any) -> Iterator[Any]:
        """The VAE; while in use in fp32 if it overflows in fp16 (`force_upcast`), as in stock's pipelines."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        try:
            yield self.vae.float() if upcast else self.vae
        finally:
            if upcast:
                self.vae.half()
