"""Guidances that look into the UNet's self-attention: PAG and SAG."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.registry import GUIDANCES
from diffengine_sdxl.samplers.guidance import Guidance, Step
from diffengine_sdxl.structures import Taps

#: The first self-attention of the middle block.
MIDDLE = 'mid_block.attentions.0.transformer_blocks.0.attn1'


@GUIDANCES.register_module()
class PAG(Guidance):
    """Perturbed-attention guidance: + s (c - p), p with the identity for some maps. Ahn et al. 2024, arXiv:2403.17377.

    Args:
        scale, window: see Guidance.
        layers: patterns of names of self-attentions, as diffusers' `pag_applied_layers`: 'mid', 'down_blocks.2', ...
        adaptive_scale: the scale falls by this times (1000 - t), not below 0; diffusers' `pag_adaptive_scale`.
    """

    order = 1

    def __init__(self, scale: float = 3.0, window: Sequence[float] = (0.0, 1.0), layers: Sequence[str] = ('mid',),
                 adaptive_scale: float = 0.0) -> None:
        super().__init__(scale, window)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.adaptive_scale = float(adaptive_scale)
        if not self.layers:
            raise ValueError("PAG: layers=() names no self-attention; 'mid' is the usual choice.")
        for pattern in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"PAG: layers: '{pattern}' is no pattern (regular expression): {error}") from error

    def active(self, begin: float, end: float) -> bool:
        """Inside its window and with a scale above 0."""
        return self.scale > 0 and super().active(begin, end)

    def branches(self) -> tuple[str, ...]:
        """The conditional rows, once as they are and once perturbed."""
        return ('cond', 'perturbed')

    def tap(self, taps: Taps) -> None:
        """The identity in its layers."""
        taps.identity += self.layers

    def delta(self, step: Step) -> Tensor:
        """s (c - p)."""
        scale: Tensor | float = self.scale
        if self.adaptive_scale > 0:
            scale = (self.scale - self.adaptive_scale * (1000 - step.t)).clamp(min=0)
        return scale * (step.predictions['cond'] - step.predictions['perturbed'])


@GUIDANCES.register_module()
class SAG(Guidance):
    """Self-attention guidance: + s (u - d), d at an input blurred where attention gathers. Hong et al. 2022,
    arXiv:2210.00939; as in Refiners' guide, the sum is that of the UNet's raw outputs.

    Costs a pass of the anchor's rows: half as much again with classifier-free guidance. The anchor is the unconditional
    branch, or without classifier-free guidance the conditional.

    Args:
        scale, window: see Guidance.
        kernel_size, sigma: of the Gaussian blur, in latents.
        threshold: what is blurred: where attention is above so many times its mean.
    """

    order = 2

    def __init__(self, scale: float = 0.75, window: Sequence[float] = (0.0, 1.0), kernel_size: int = 9,
                 sigma: float = 1.0, threshold: float = 1.0) -> None:
        super().__init__(scale, window)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'SAG: kernel_size={kernel_size} must be an odd number.')
        if sigma <= 0:
            raise ValueError(f'SAG: sigma={sigma} must be above 0.')
        self.kernel_size, self.sigma, self.threshold = int(kernel_size), float(sigma), float(threshold)

    def active(self, begin: float, end: float) -> bool:
        """Inside its window and with a scale other than 0."""
        return self.scale != 0 and super().active(begin, end)

    def tap(self, taps: Taps) -> None:
        """The middle block's map."""
        taps.recorded += (MIDDLE,)

    def delta(self, step: Step) -> Tensor:
        """s (u - d)."""
        assert step.again is not None
        return self.scale * (step.anchor - step.again(self.degraded(step)).to(step.anchor.dtype))

    def degraded(self, step: Step) -> Tensor:
        """The UNet's input, [B, 4, h, w], with the clean picture that it predicts blurred where attention gathers.

        x0 = (x - sigma eps) / alpha, blurred within the mask, and noised again with eps at the same t.
        """
        schedule, x = step.schedule, step.x
        eps, x0 = schedule.to_eps(step.anchor, x, step.t), schedule.to_x0(step.anchor, x, step.t)
        mask = at_latents(step.maps[MIDDLE] > self.threshold, x.shape[-2:]).to(x0.dtype)
        return schedule.add_noise(gaussian_blur(x0, self.kernel_size, self.sigma) * mask + x0 * (1 - mask), eps, step.t)


def at_latents(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask of the middle block's places, [B, places], at the latents' size (h, w): [B, 1, h, w], nearest.

    The UNet halves and rounds up.
    """
    height, width = size
    while height * width > mask.shape[1]:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == mask.shape[1], 'the map is one of the UNet at these latents'
    return functional.interpolate(mask.float().view(-1, 1, height, width), size=tuple(size))


def gaussian_blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """[B, C, h, w] blurred, with reflected borders.

    Raises:
        ValueError: a side is not longer than half the kernel, so that nothing can be reflected.
    """
    half = kernel_size // 2
    if min(x.shape[-2:]) <= half:
        raise ValueError(f'SAG blurs latents with a kernel of {kernel_size}; these are {x.shape[-2]} x {x.shape[-1]}, '
                         'too small for it. Make larger pictures, or take a smaller kernel_size.')
    places = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
    line = torch.exp(-0.5 * (places / sigma) ** 2)
    line = (line / line.sum()).to(x.dtype)
    kernel = (line[:, None] * line[None, :]).expand(x.shape[1], 1, kernel_size, kernel_size)
    return functional.conv2d(functional.pad(x, (half,) * 4, mode='reflect'), kernel, groups=x.shape[1])
