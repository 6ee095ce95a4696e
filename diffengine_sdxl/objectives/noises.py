"""Noises of training samples.

A noise is called as `(draws, shape, dtype, device)` with shape (C, h, w) and returns two tensors [B, C, h, w]: the
noise of the target, and the noise added to the input. They are the same tensor except with `InputPerturbation`. All
is drawn in fp32 on the CPU from the sample's key, so that it does not depend on the device or the rest of the batch;
every kind starts from the stream 'noise'.

Kinds nest by `inner`: dict(type='InputPerturbation', inner=dict(type='OffsetNoise', strength=0.05)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import NOISES
from diffengine_sdxl.rng import Draws, generator
from diffengine_sdxl.structures import Batch, send

Shape = tuple[int, int, int]


def vae_noise(batch: Batch, mean: Tensor) -> Tensor:
    """Return the noise of the VAE's sample, like `mean` [B, C, h, w]: what the loader's worker drew, or drawn here."""
    noise = batch.drawn.get('vae')
    if noise is None:
        noise = Draws(batch.seed, batch.key, batch.epoch).normal('vae', mean.shape[1:])
    return send(noise, mean.device).to(mean.dtype)


class Noise:
    """Base of noises: `change` modifies what `inner` draws.

    Args:
        inner: config of the noise to start from; None for standard normal numbers.

    Raises:
        UserError: a kind is nested in itself; both would draw the same numbers.
    """

    def __init__(self, inner: dict[str, Any] | Noise | None = None) -> None:
        self.inner: Noise | None = NOISES.build(inner) if isinstance(inner, dict) else inner
        inner = self.inner
        while inner is not None:
            if type(inner) is type(self):
                raise UserError(f'{type(self).__name__} occurs twice in `noise` and its `inner`; use each kind once, '
                                'as both would draw the same numbers.')
            inner = inner.inner

    def draw(self, draws: Draws, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return both noises in fp32 on the CPU, [B, C, h, w]."""
        if self.inner is not None:
            noise, for_input = self.inner.draw(draws, shape)
        else:
            noise = for_input = draws.normal('noise', shape)
        return self.change(noise, for_input, draws)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return both noises of `inner`, changed."""
        return noise, for_input

    def __call__(self, draws: Draws, shape: Shape, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = 'cpu') -> tuple[Tensor, Tensor]:
        """Return the noises of target and input, [B, C, h, w] in `dtype` on `device`."""
        noise, for_input = self.draw(draws, shape)
        moved = noise.to(device=device, dtype=dtype)
        return moved, moved if for_input is noise else for_input.to(device=device, dtype=dtype)


def _both(change: Callable[[Tensor], Tensor], noise: Tensor, for_input: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `change` to both noises, which stay one tensor if they are one."""
    changed = change(noise)
    return changed, changed if for_input is noise else change(for_input)


def _not_negative(kind: str, strength: float) -> float:
    if not strength >= 0:
        raise UserError(f'{kind}: strength={strength} must be 0 or more.')
    return strength


@NOISES.register_module()
class PlainNoise(Noise):
    """Standard normal numbers (Ho et al. 2020, arXiv 2006.11239)."""

    def __init__(self) -> None:
        super().__init__()


@NOISES.register_module()
class OffsetNoise(Noise):
    """noise + strength * one normal number per sample and channel, so that the mean colour is learned.

    Nicholas Guttenberg, "Diffusion with Offset Noise" (crosslabs.org, 2023); `--noise_offset` of diffusers' scripts.

    Raises:
        UserError: a negative strength.
    """

    def __init__(self, strength: float = 0.05, inner: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(inner)
        self.strength = _not_negative('OffsetNoise', strength)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Add the same offset to both noises."""
        offset = self.strength * draws.normal('noise_offset', (noise.shape[1], 1, 1))
        return _both(lambda n: n + offset, noise, for_input)


@NOISES.register_module()
class PyramidNoise(Noise):
    """noise + sum over levels i of discount^i * noise of 1 / r^i the size, divided by its standard deviation.

    r is drawn from 2 to 4 per sample and level; levels are upsampled bilinearly, up to the first with a side of 1.
    Jonathan Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (wandb.ai, 2023); sizes are computed from
    the full size at each level, as in sd-scripts (`--multires_noise_*`). Unlike in both, r and the standard deviation
    are per sample, so that the batch size changes nothing.

    Args:
        discount: weight of a level relative to the one before, in (0, 1].
        num_levels: at most; 1 or more.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, discount: float = 0.9, num_levels: int = 6, inner: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(inner)
        if not 0 < discount <= 1:
            raise UserError(f'PyramidNoise: discount={discount} must be above 0 and at most 1.')
        self.discount, self.num_levels = discount, whole_number('PyramidNoise: num_levels', num_levels, 1)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Add the pyramid to both noises and divide them by the standard deviation of the target's."""
        shape = (noise.shape[1], noise.shape[2], noise.shape[3])
        pyramid = torch.stack([self._pyramid(generator(*key, 'noise_pyramid'), shape) for key in draws.keys])
        std = (noise + pyramid).std(dim=(1, 2, 3), keepdim=True)
        return _both(lambda n: (n + pyramid) / std, noise, for_input)

    def _pyramid(self, rng: torch.Generator, shape: Shape) -> Tensor:
        channels, height, width = shape
        total = torch.zeros(shape)
        for level in range(self.num_levels):
            ratio = (2 + 2 * float(torch.rand((), generator=rng))) ** level
            h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
            small = torch.randn((1, channels, h, w), generator=rng)
            total += F.interpolate(small, size=(height, width), mode='bilinear')[0] * self.discount ** level
            if h == 1 or w == 1:
                break
        return total


@NOISES.register_module()
class InputPerturbation(Noise):
    """noise + strength * fresh noise for the input; the target keeps the noise alone.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706);
    `--input_perturbation` of diffusers' scripts, 0.1 there.

    Raises:
        UserError: a negative strength.
    """

    def __init__(self, strength: float = 0.1, inner: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(inner)
        self.strength = _not_negative('InputPerturbation', strength)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Perturb the noise of the input only."""
        return noise, for_input + self.strength * draws.normal('noise_perturbation', noise.shape[1:])
