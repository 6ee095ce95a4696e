"""Guidances that use the UNet's self-attention: PAG and SAG."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import GUIDANCES
from diffengine_sdxl.samplers.guidance import Guidance, Step
from diffengine_sdxl.structures import AttentionProbes

#: The first self-attention of the middle block.
MIDDLE = 'mid_block.attentions.0.transformer_blocks.0.attn1'


@GUIDANCES.register_module()
class PAG(Guidance):
    """Perturbed-attention guidance: + s (c - p), p with identity attention maps. Ahn et al. 2024, arXiv:2403.17377.

    Args:
        scale, active_range: see Guidance.
        layers: regular expressions of self-attention names, as diffusers' `pag_applied_layers`: 'mid', 'down_blocks.2'.
        adaptive_scale: the scale falls by this times (1000 - t), not below 0; diffusers' `pag_adaptive_scale`.
    """

    order = 1

    def __init__(self, scale: float = 3.0, active_range: Sequence[float] = (0.0, 1.0), layers: Sequence[str] = ('mid',),
                 adaptive_scale: float = 0.0) -> None:
        super().__init__(scale, active_range)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.adaptive_scale = float(adaptive_scale)
        if not self.layers:
            raise UserError("PAG: layers=() names no self-attention; 'mid' is the usual choice.")
        for pattern in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"PAG: layers: '{pattern}' is not a regular expression: {error}") from error

    def active(self, start: float, end: float) -> bool:
        """Whether the step is in its active range and the scale is above 0."""
        return self.scale > 0 and super().active(start, end)

    def branches(self) -> tuple[str, ...]:
        """Return the conditional branch and its perturbed copy."""
        return ('cond', 'perturbed')

    def add_probes(self, probes: AttentionProbes) -> None:
        """Perturb its layers."""
        probes.identity += self.layers

    def delta(self, step: Step) -> Tensor:
        """Return s (c - p)."""
        scale: Tensor | float = self.scale
        if self.adaptive_scale > 0:
            scale = (self.scale - self.adaptive_scale * (1000 - step.t)).clamp(min=0)
        return scale * (step.predictions['cond'] - step.predictions['perturbed'])


@GUIDANCES.register_module()
class SAG(Guidance):
    """Self-attention guidance: + s (u - d), d at an input blurred where attention is high. Hong et al. 2022,
    arXiv:2210.00939; as in Refiners' guide, the sum is that of the UNet's raw outputs.

    Costs another pass of the anchor's rows: 50 % more with classifier-free guidance. u is the anchor's prediction.

    Args:
        scale, active_range: see Guidance.
        kernel_size, sigma: of the Gaussian blur, in latent pixels.
        threshold: blur where attention is above this many times its mean.
    """

    order = 2

    def __init__(self, scale: float = 0.75, active_range: Sequence[float] = (0.0, 1.0), kernel_size: int = 9,
                 sigma: float = 1.0, threshold: float = 1.0) -> None:
        super().__init__(scale, active_range)
        if whole_number('SAG: kernel_size', kernel_size, 1) % 2 == 0:
            raise UserError(f'SAG: kernel_size={kernel_size} must be an odd number.')
        if sigma <= 0:
            raise UserError(f'SAG: sigma={sigma} must be above 0.')
        self.kernel_size, self.sigma, self.threshold = int(kernel_size), float(sigma), float(threshold)

    def active(self, start: float, end: float) -> bool:
        """Whether the step is in its active range and the scale is not 0."""
        return self.scale != 0 and super().active(start, end)

    def add_probes(self, probes: AttentionProbes) -> None:
        """Record the attention map of the middle block."""
        probes.recorded += (MIDDLE,)

    def delta(self, step: Step) -> Tensor:
        """Return s (u - d)."""
        return self.scale * (step.anchor - step.denoise_again(self.degraded(step)).to(step.anchor.dtype))

    def degraded(self, step: Step) -> Tensor:
        """Return the UNet's input, [B, 4, h, w], with the predicted x0 blurred where attention is high.

        x0 = (x - sigma eps) / alpha is blurred within the mask and noised again with eps at the same t.
        """
        schedule, x = step.schedule, step.x
        eps, x0 = schedule.to_eps(step.anchor, x, step.t), schedule.to_x0(step.anchor, x, step.t)
        mask = resize_mask(step.maps[MIDDLE] > self.threshold, x.shape[-2:]).to(x0.dtype)
        return schedule.add_noise(gaussian_blur(x0, self.kernel_size, self.sigma) * mask + x0 * (1 - mask), eps, step.t)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask of the middle block's positions, [B, N], to the latents' size (h, w): [B, 1, h, w], nearest."""
    height, width = size
    while height * width > mask.shape[1]:  # each downsampler halves and rounds up
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == mask.shape[1], 'the map must have the size of a UNet block'
    return functional.interpolate(mask.float().view(-1, 1, height, width), size=tuple(size))


def gaussian_blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Blur [B, C, h, w] with reflected borders.

    Raises:
        UserError: a side is too short for reflection: not longer than half the kernel.
    """
    half = kernel_size // 2
    if min(x.shape[-2:]) <= half:
        raise UserError(f'SAG: latents of {x.shape[-2]} x {x.shape[-1]} are too small for kernel_size={kernel_size}; '
                        'make larger images, or set a smaller kernel_size.')
    positions = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
    kernel_1d = torch.exp(-0.5 * (positions / sigma) ** 2)
    kernel_1d = (kernel_1d / kernel_1d.sum()).to(x.dtype)
    kernel = (kernel_1d[:, None] * kernel_1d[None, :]).expand(x.shape[1], 1, kernel_size, kernel_size)
    return functional.conv2d(functional.pad(x, (half,) * 4, mode='reflect'), kernel, groups=x.shape[1])
