"""Where sampling begins: noise, a noised picture, or a picture that is repainted in part. As diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.structures import Start

#: How far back an image is taken by default, alone and with a mask: diffusers'.
STRENGTH, STRENGTH_INPAINT = 0.3, 0.9999


@dataclass
class Repaint:
    """What inpainting keeps.

    Attributes:
        mask: [B, 1, h, w], 1 where the picture is repainted.
        kept: the picture's latents, [B, 4, h, w]; noise: with which it is taken to each timestep. None for a UNet that
            sees what it keeps as `channels`, [B, 5, h, w]: mask, and latents of the picture without what is repainted.
    """

    mask: Tensor
    kept: Tensor | None = None
    noise: Tensor | None = None
    channels: Tensor | None = None

    def blend(self, scheduler: Any, x: Tensor, t_next: Tensor | None) -> Tensor:
        """Latents with what is kept put back, noised as at `t_next`; None at the end."""
        if self.kept is None:
            return x
        kept = self.kept if t_next is None else scheduler.add_noise(self.kept, self.noise, t_next.reshape(1))
        return (1 - self.mask) * kept + self.mask * x


def strength_of(strength: float | None, start: Start | None) -> float | None:
    """The strength that holds: None where sampling begins with noise."""
    if start is None or not start.given:
        return None
    return strength if strength is not None else STRENGTH if start.mask is None else STRENGTH_INPAINT


def begin(model: Any, start: Start | None, size: tuple[int, int], scheduler: Any, timesteps: Tensor,
          generators: Sequence[torch.Generator], strength: float | None, noised: bool = True
          ) -> tuple[Tensor, Repaint | None]:
    """The latents to begin with, [B, 4, h, w], and what is kept of a picture.

    Each image's numbers are drawn from its own generator, in diffusers' order: the VAE's sample, the noise, the VAE's
    sample of what is not repainted.

    Args:
        model: an SDXL. size: of the pictures, in pixels. timesteps: those to come, of a prepared scheduler.
        strength: as `strength_of` says.
        noised: add noise to a picture; else it comes with noise already (denoising_start).

    Raises:
        ValueError: latents or mask are of another size, or the UNet wants a mask and there is none, or the reverse.
    """
    start = start or Start()
    wide = model.unet.config.in_channels > model.unet.config.out_channels
    if wide and start.mask is None:
        raise ValueError('The UNet was made to inpaint: besides latents it takes a mask. Give an image and a '
                         'mask_image.')
    shape = (len(generators), model.unet.config.out_channels, *(side // model.vae_factor for side in size))
    _check(start, shape, size)
    pure = not start.given or start.mask is not None and strength == 1
    kept = None
    if start.given and not (wide and pure and noised):
        kept = start.latents if start.image is None else model.encode_images(start.image, generators)
    # What a picture that comes with its noise is blended with needs some too.
    noise = start.noise
    if noise is None and (noised or start.mask is not None):
        noise = draw(model, shape, generators)
    if not start.given:
        return noise * scheduler.init_noise_sigma, None
    if kept is not None:
        kept = kept.to(dtype=_dtype(model))
        # In memory as diffusers leaves them: the kernels depend on it, and with them the last bits.
        kept = kept if start.mask is None else kept.contiguous()
    if not noised:
        assert kept is not None
        x = kept
    elif pure:
        x = noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(kept, noise, timesteps[:1].repeat(len(generators)))
    if start.mask is None:
        return x, None
    # diffusers interpolates the mask to the latents' size, nearest.
    mask = functional.interpolate(start.mask, size=shape[-2:]).to(x)
    masked = None
    if start.image is not None:
        hidden = start.image * (start.mask < 0.5)
        # A UNet of 4 channels does not look at it, but diffusers draws its sample, and solvers' noise comes after.
        masked = model.encode_images(hidden, generators) if wide else draw(model, shape, generators)
    if not wide:
        return x, Repaint(mask, kept, noise)
    if masked is None:
        raise ValueError('The UNet was made to inpaint and must see the picture without what is repainted; give the '
                         'picture itself as `image`, not latents.')
    return x, Repaint(mask, channels=torch.cat([mask, masked.to(x)], dim=1))


def draw(model: Any, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal numbers, each row from its generator, on the model's device."""
    rows = [torch.randn((1, *shape[1:]), generator=g, dtype=_dtype(model)) for g in generators]
    return torch.cat(rows).to(model.device)


def _dtype(model: Any) -> torch.dtype:
    """Of latents: fp32 at least."""
    return torch.promote_types(model.unet_weight.dtype, torch.float32)


def _check(start: Start, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    num = shape[0]
    for what, tensor, wanted in (('starting noise (latents)', start.noise, shape),
                                 ('starting latents', start.latents, shape), ('image', start.image, (num, 3, *size)),
                                 ('mask_image', start.mask, (num, 1, *size))):
        if tensor is not None and tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f'The {what} must be {list(wanted)} for pictures of {size[0]} x {size[1]}; '
                             f'it is {list(tensor.shape)}.')
    if start.mask is not None and not start.given:
        raise ValueError('There is a mask_image that says what to repaint, but no image.')
