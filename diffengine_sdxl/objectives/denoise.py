"""Denoising: the objective of every adapter and of a full fine-tune."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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

    #: It reads latents only, so a cache of the VAE's outputs does for it.
    reads_images: ClassVar[bool] = False
    #: Whether activations may be recomputed in the backward pass (`speed.checkpointing`).
    allows_checkpointing: ClassVar[bool] = True
    #: Names of the data sets whose losses are reported; the training loop sets them.
    data_sets: Sequence[str] = ()

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
        """Return {'loss': []}, fp32, or fp64 if the model is; with several data sets also what `sums_by_set` returns.

        Raises:
            UserError: the VAE trains, or the batch has no image.
        """
        return self.losses(model, batch, self.inputs(model, batch))

    def losses(self, model: Denoiser, batch: Batch, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Return what `__call__` does, from what `inputs` returned."""
        t, prediction, target = denoise(model, batch, *inputs)
        loss = self.loss(prediction, target, t, model.schedule)
        if batch.mask is not None:
            loss = loss * mask_of_latents(batch.mask, loss)
        loss = loss.mean(dim=(1, 2, 3)) * self.weighting(t, model.schedule)
        if batch.weight is not None:
            loss = loss * batch.weight
        return {'loss': loss.mean(), **sums_by_set(loss, batch.data_set, self.data_sets)}

    def inputs(self, model: Denoiser, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents, noise of the target and of the input, [B, C, h, w], and timesteps [B] on the CPU.

        Raises:
            UserError: see `__call__`.
        """
        if 'vae' in model.trainable_parts:
            raise UserError("Denoise cannot train the VAE, whose latents are its target; remove 'vae' from "
                            'model.trainable.')
        latents = model.latents(batch)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        drawn = batch.drawn or self.draw(rng.Draws(batch.seed, batch.key, batch.epoch), tuple(latents.shape[1:]),
                                         model.schedule)
        noise = send(drawn['noise'], latents.device).to(latents.dtype)
        noise_in = send(drawn['noise_in'], latents.device).to(latents.dtype) if 'noise_in' in drawn else noise
        return latents, noise, noise_in, drawn['timestep']


def denoise(model: Denoiser, batch: Batch, latents: Tensor, noise: Tensor, noise_in: Tensor,
            timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predict from latents that are noised by `noise_in`.

    Args:
        latents, noise, noise_in: [B, 4, h, w].
        timesteps: int64 [B] on the CPU.

    Returns:
        The timesteps on the latents' device; prediction and target, [B, 4, h, w] in the latents' dtype.
    """
    schedule = model.schedule
    # Start and end are equal, as a training step has no length. On the CPU, where active ranges are compared.
    progress = (1 - timesteps / schedule.num_train_timesteps).unsqueeze(1).expand(-1, 2)
    t = send(timesteps, latents.device)
    prediction = model.predict(schedule.add_noise(latents, noise_in, t), t, model.encode(batch), progress)
    return t, prediction.to(latents.dtype), schedule.target(latents, noise, t)


def sums_by_set(losses: Tensor, data_set: Sequence[str] | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the sum of the losses of each data set and the number of its samples, detached; {} without names.

    Args:
        losses: of each sample, [B].
        data_set: each sample's.
        names: of the data sets; 'sum_<i>' and 'num_<i>' are of names[i]. (mmengine would add what is named a loss.)
    """
    if data_set is None or not names:
        return {}
    is_in = send(torch.tensor([[of == name for of in data_set] for name in names], dtype=losses.dtype), losses.device)
    sums, nums = (is_in * losses.detach()).sum(dim=1), is_in.sum(dim=1)
    return {f'{what}_{i}': values[i] for i in range(len(names)) for what, values in (('sum', sums), ('num', nums))}


def losses_by_set(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return `values`, where the means of what `sums_by_set` returned become 'loss/<name>' of each set with samples."""
    parts = {f'{what}_{i}' for i in range(len(names)) for what in ('sum', 'num')}
    means = {f'loss/{name}': values[f'sum_{i}'] / values[f'num_{i}']
             for i, name in enumerate(names) if values.get(f'num_{i}')}
    return {key: value for key, value in values.items() if key not in parts} | means


def mask_of_latents(mask: Tensor, loss: Tensor) -> Tensor:
    """Average a mask of pixels, [B, 1, H, W], over each latent: [B, 1, h, w]; a mask of latents is unchanged.

    Raises:
        UserError: it has another size than the images.
    """
    sides = list(zip(mask.shape[-2:], loss.shape[-2:], strict=True))
    if any(large % small for large, small in sides) or len({large // small for large, small in sides}) > 1:
        raise UserError(f"The mask of the loss is {' x '.join(map(str, mask.shape[-2:]))} and the latents "
                        f"{' x '.join(map(str, loss.shape[-2:]))}; it must have the size of the image or the latents.")
    return functional.avg_pool2d(mask.to(loss.dtype), sides[0][0] // sides[0][1])
