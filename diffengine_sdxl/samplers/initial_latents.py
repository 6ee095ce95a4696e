"""The latents that sampling starts from: noise, a noised image, or an image to inpaint. As in diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.structures import Start, send

#: diffusers' default strength, without and with a mask.
STRENGTH, STRENGTH_INPAINT = 0.3, 0.9999


@dataclass
class Inpainting:
    """What inpainting needs in each step.

    Attributes:
        mask: [B, 1, h, w], 1 where the image is repainted.
        latents: of the image, [B, 4, h, w]; noise: to noise them to each timestep. None for a UNet that takes the image
            as `channels`, [B, 5, h, w]: mask, and latents of the masked image.
    """

    mask: Tensor
    latents: Tensor | None = None
    noise: Tensor | None = None
    channels: Tensor | None = None

    def blend(self, scheduler: Any, x: Tensor, t_next: Tensor | None) -> Tensor:
        """Restore the latents outside the mask, noised to `t_next`; None at the end."""
        if self.latents is None:
            return x
        latents = self.latents
        if t_next is not None:
            latents = scheduler.add_noise(latents, self.noise, t_next.reshape(1))
        return (1 - self.mask) * latents + self.mask * x


def effective_strength(strength: float | None, start: Start | None) -> float | None:
    """Return the strength that applies; None where sampling starts from noise."""
    if start is None or not start.given:
        return None
    return strength if strength is not None else STRENGTH if start.mask is None else STRENGTH_INPAINT


def initial_latents(model: Denoiser, start: Start | None, size: tuple[int, int], scheduler: Any, timesteps: Tensor,
                    generators: Sequence[torch.Generator], strength: float | None, add_noise: bool = True
                    ) -> tuple[Tensor, Inpainting | None]:
    """Return the latents to start from, [B, 4, h, w], and what inpainting needs.

    Each image's numbers are drawn from its own generator, in diffusers' order: the VAE's sample, the noise, the VAE's
    sample of the masked image.

    Args:
        size: of the images, in pixels. timesteps: those to run, of a prepared scheduler.
        strength: see `effective_strength`.
        add_noise: noise the image; False for one that is noisy already (denoising_start).

    Raises:
        UserError: latents or mask have another size, or the mask and the UNet do not fit.
    """
    start = start or Start()
    reads_mask = model.unet.config.in_channels > model.unet.config.out_channels
    if reads_mask and start.mask is None:
        raise UserError('The UNet was made to inpaint and takes a mask besides latents; give an image and a '
                        'mask_image.')
    shape = (len(generators), model.unet.config.out_channels, *(side // model.vae_factor for side in size))
    _check(start, shape, size)
    from_noise = not start.given or start.mask is not None and strength == 1
    latents = None
    if start.given and not (reads_mask and from_noise and add_noise):
        latents = start.latents if start.image is None else model.encode_images(start.image, generators)
    # Blending needs noise, too, when the image is noisy already.
    noise = start.noise
    if noise is None and (add_noise or start.mask is not None):
        noise = draw_noise(model, shape, generators)
    if not start.given:
        assert noise is not None
        return noise * scheduler.init_noise_sigma, None
    if latents is not None:
        latents = latents.to(dtype=_dtype(model))
        # diffusers' memory layout: the kernels depend on it, and with them the last bits.
        latents = latents if start.mask is None else latents.contiguous()
    if not add_noise:
        assert latents is not None
        x = latents
    elif from_noise:
        assert noise is not None
        x = noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(generators)))
    if start.mask is None:
        return x, None
    # Nearest interpolation, as in diffusers.
    mask = functional.interpolate(start.mask, size=shape[-2:]).to(x)
    masked = None
    if start.image is not None:
        masked_image = start.image * (start.mask < 0.5)
        # A UNet of 4 channels ignores it, but diffusers draws its sample before the scheduler's noise.
        masked = model.encode_images(masked_image, generators) if reads_mask else draw_noise(model, shape, generators)
    if not reads_mask:
        return x, Inpainting(mask, latents, noise)
    if masked is None:
        raise UserError('The UNet was made to inpaint and takes the masked image; give the image itself as `image`, '
                        'not latents.')
    return x, Inpainting(mask, channels=torch.cat([mask, masked.to(x)], dim=1))


def draw_noise(model: Denoiser, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw normal numbers, each row from its generator, on the model's device."""
    rows = [torch.randn((1, *shape[1:]), generator=g, dtype=_dtype(model)) for g in generators]
    return send(torch.cat(rows), model.device)


def _dtype(model: Denoiser) -> torch.dtype:
    """Return the dtype of latents: fp32 at least."""
    return torch.promote_types(model.unet_weight.dtype, torch.float32)


def _check(start: Start, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    num = shape[0]
    for name, tensor, expected in (('starting noise (latents)', start.noise, shape),
                                   ('starting latents', start.latents, shape),
                                   ('image', start.image, (num, 3, *size)),
                                   ('mask_image', start.mask, (num, 1, *size))):
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise UserError(f'The {name} must be {list(expected)} for images of {size[0]} x {size[1]}; '
                            f'it is {list(tensor.shape)}.')
    if start.mask is not None and not start.given:
        raise UserError('There is a mask_image but no image to inpaint; give `image`.')
