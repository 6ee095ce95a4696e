"""The noise of each training sample.

A noise is called as `(draws, shape, dtype, device)` with shape (C, h, w) and returns two tensors [B, C, h, w]: the
noise that the target is made from, and the noise that is mixed into the input. They are one and the same tensor but
for `InputPerturbation`. All is drawn in fp32 on the CPU from the sample's key, so that neither the device nor the
rest of the batch changes it; the stream 'noise' is the base draw of every kind.

Kinds nest by `base`: dict(type='InputPerturbation', base=dict(type='OffsetNoise', strength=0.05)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffengine_sdxl.registry import NOISES
from diffengine_sdxl.rng import Draws, generator

Shape = tuple[int, int, int]


class Noise:
    """A noise made from another: `change` gets what `base` drew.

    Args:
        base: config of the noise to start from; None for standard normal numbers.

    Raises:
        ValueError: the same kind stands twice in one nest; both would draw the very same numbers.
    """

    def __init__(self, base: dict[str, Any] | Noise | None = None) -> None:
        self.base: Noise | None = NOISES.build(base) if isinstance(base, dict) else base
        inner = self.base
        while inner is not None:
            if type(inner) is type(self):
                raise ValueError(f'{type(self).__name__} stands twice in `noise` and its `base`; each kind may stand '
                                 'once, since both would draw the same numbers.')
            inner = inner.base

    def draw(self, draws: Draws, shape: Shape) -> tuple[Tensor, Tensor]:
        """The two noises in fp32 on the CPU, [B, C, h, w]."""
        if self.base is not None:
            noise, for_input = self.base.draw(draws, shape)
        else:
            noise = for_input = draws.normal('noise', shape)
        return self.change(noise, for_input, draws)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What this kind makes of its base's two noises."""
        return noise, for_input

    def __call__(self, draws: Draws, shape: Shape, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = 'cpu') -> tuple[Tensor, Tensor]:
        """The noise of the target and the noise of the input, [B, C, h, w] in `dtype` on `device`."""
        noise, for_input = self.draw(draws, shape)
        moved = noise.to(device=device, dtype=dtype)
        return moved, moved if for_input is noise else for_input.to(device=device, dtype=dtype)


def _both(change: Any, noise: Tensor, for_input: Tensor) -> tuple[Tensor, Tensor]:
    """`change` on both noises, which stay one tensor if they were."""
    changed = change(noise)
    return changed, changed if for_input is noise else change(for_input)


def _not_negative(kind: str, strength: float) -> float:
    if not strength >= 0:
        raise ValueError(f'strength={strength} of {kind} must be 0 or more.')
    return strength


@NOISES.register_module()
class PlainNoise(Noise):
    """Standard normal numbers (Ho et al. 2020, arXiv 2006.11239)."""

    def __init__(self) -> None:
        super().__init__()


@NOISES.register_module()
class OffsetNoise(Noise):
    """noise + strength * one normal number per sample and channel: lets the mean colour drift.

    Nicholas Guttenberg, "Diffusion with Offset Noise" (crosslabs.org, 2023); `--noise_offset` of diffusers' scripts.

    Raises:
        ValueError: a negative strength.
    """

    def __init__(self, strength: float = 0.05, base: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(base)
        self.strength = _not_negative('OffsetNoise', strength)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Add the same offset to both."""
        offset = self.strength * draws.normal('noise_offset', (noise.shape[1], 1, 1))
        return _both(lambda n: n + offset, noise, for_input)


@NOISES.register_module()
class PyramidNoise(Noise):
    """noise + sum over levels i of discount^i * noise of 1 / r^i the size, divided by its standard deviation.

    r is drawn once a sample and level, from 2 to 4; levels are enlarged bilinearly, and one with a side of 1 is
    the last. Jonathan Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (wandb.ai, 2023); sizes are
    taken from the full size at each level, as sd-scripts (`--multires_noise_*`) has it. Unlike both, r and the
    standard deviation belong to the sample and not to the batch, so that the batch size changes nothing.

    Args:
        discount: weight of a level against the one before, in (0, 1].
        num_levels: how many levels at most; 1 or more.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, discount: float = 0.9, num_levels: int = 6, base: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(base)
        if not 0 < discount <= 1:
            raise ValueError(f'discount={discount} of PyramidNoise must be above 0 and at most 1.')
        if num_levels < 1:
            raise ValueError(f'num_levels={num_levels} of PyramidNoise must be 1 or more.')
        self.discount = discount
        self.num_levels = num_levels

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Add the pyramid to both and divide both by the standard deviation of the target's."""
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
    """The input is made with noise + strength * fresh noise, the target with the noise alone.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706);
    `--input_perturbation` of diffusers' scripts, 0.1 there.

    Raises:
        ValueError: a negative strength.
    """

    def __init__(self, strength: float = 0.1, base: dict[str, Any] | Noise | None = None) -> None:
        super().__init__(base)
        self.strength = _not_negative('InputPerturbation', strength)

    def change(self, noise: Tensor, for_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Perturb the input's noise only."""
        return noise, for_input + self.strength * draws.normal('noise_perturbation', noise.shape[1:])
