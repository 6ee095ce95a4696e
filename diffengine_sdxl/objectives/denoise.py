"""Denoising: the objective of every adapter and of a full fine-tune."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import LOSSES, NOISES, OBJECTIVES, TIMESTEPS, WEIGHTINGS
from diffengine_sdxl.structures import Batch, send


@OBJECTIVES.register_module()
class Denoise:
    """mean over the batch of w(t) * loss(model(x_t, t), target), Ho et al. 2020.

    A sample's noise and timestep depend on (seed, sample key, epoch) only.

    Args:
        noise, timesteps, weighting, loss: configs of its parts.
    """

    def __init__(self, noise: Any = None, timesteps: Any = None, weighting: Any = None, loss: Any = None) -> None:
        self.noise = NOISES.build(noise or {'type': 'PlainNoise'})
        self.timesteps = TIMESTEPS.build(timesteps or {'type': 'UniformTimesteps'})
        self.weighting = WEIGHTINGS.build(weighting or {'type': 'NoWeighting'})
        self.loss = LOSSES.build(loss or {'type': 'L2Loss'})

    def draw(self, draws: rng.Draws, shape: Sequence[int], schedule: NoiseSchedule,
             encodes: bool = False) -> dict[str, Tensor]:
        """Return what a step draws for B samples with latents of `shape` (C, h, w), on the CPU.

        Returns:
            'noise' of the target and, if it is another, 'noise_in' of the input, fp32 [B, C, h, w]; 'timestep', int64
            [B]; if the model `encodes` the images, the VAE's noise, 'vae', fp32 [B, C, h, w].
        """
        noise, noise_in = self.noise(draws, shape, torch.float32, 'cpu')
        drawn = {'noise': noise, 'timestep': self.timesteps(draws, schedule)}
        if noise_in is not noise:
            drawn['noise_in'] = noise_in
        return {**drawn, 'vae': draws.normal('vae', shape)} if encodes else drawn

    def __call__(self, model: Denoiser, batch: Batch) -> dict[str, Tensor]:
        """Return {'loss': []}, fp32, or fp64 if the model is.

        Raises:
            UserError: the VAE trains, or the batch has no image.
        """
        schedule = model.schedule
        if 'vae' in model.trainable_parts:
            raise UserError("Denoise cannot train the VAE, whose latents are its target; remove 'vae' from "
                            'model.trainable.')
        latents = model.latents(batch)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        drawn = batch.drawn or self.draw(rng.Draws(batch.seed, batch.key, batch.epoch), tuple(latents.shape[1:]),
                                         schedule)
        noise = send(drawn['noise'], latents.device).to(latents.dtype)
        noise_in = send(drawn['noise_in'], latents.device).to(latents.dtype) if 'noise_in' in drawn else noise
        t = drawn['timestep']
        # Start and end are equal, as a training step has no length. On the CPU, where active ranges are compared.
        progress = (1 - t / schedule.num_train_timesteps).unsqueeze(1).expand(-1, 2)
        t = send(t, latents.device)
        prediction = model.predict(schedule.add_noise(latents, noise_in, t), t, model.encode(batch), progress)
        target = schedule.target(latents, noise, t)
        loss = self.loss(prediction.to(latents.dtype), target, t, schedule)
        if batch.mask is not None:
            loss = loss * _mask_of_latents(batch.mask, loss)
        loss = loss.mean(dim=(1, 2, 3)) * self.weighting(t, schedule)
        if batch.weight is not None:
            loss = loss * batch.weight
        return {'loss': loss.mean()}


def _mask_of_latents(mask: Tensor, loss: Tensor) -> Tensor:
    """Average a mask of pixels, [B, 1, H, W], over each latent: [B, 1, h, w]; a mask of latents is unchanged.

    Raises:
        UserError: it has another size than the images.
    """
    sides = list(zip(mask.shape[-2:], loss.shape[-2:], strict=True))
    if any(large % small for large, small in sides) or len({large // small for large, small in sides}) > 1:
        raise UserError(f"The mask of the loss is {' x '.join(map(str, mask.shape[-2:]))} and the latents "
                        f"{' x '.join(map(str, loss.shape[-2:]))}; it must have the size of the image or the latents.")
    return functional.avg_pool2d(mask.to(loss.dtype), sides[0][0] // sides[0][1])
