"""Guidance: the terms added to the anchor prediction, and the UNet rows and attention probes that they need.

The guided prediction is anchor + sum of deltas (CFG, PAG, SAG), followed by each guidance's `finish` (Rescale). The
anchor is the unconditional prediction if there is one, else the conditional. Added to the conditional one, the sum
would not be bitwise that of diffusers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.errors import UserError, checked_range
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import GUIDANCES
from diffengine_sdxl.structures import AttentionProbes

#: The order of rows in one UNet call. 'perturbed' has the conditioning of 'cond'.
BRANCHES = ('uncond', 'cond', 'perturbed')


@dataclass
class Step:
    """One evaluation of the UNet.

    Attributes:
        x: the anchor's input of the UNet, [B, 4, h, w], of variance 1 for any scheduler.
        t: timestep, [].
        predictions: branch -> the UNet's raw output, [B, 4, h, w].
        maps: the attention maps of the anchor's rows that guidances record; see AttentionProbes.
        schedule: the model's NoiseSchedule.
        denoise_again: calls the denoiser at this timestep with another x for the anchor's rows.
    """

    x: Tensor
    t: Tensor
    predictions: dict[str, Tensor]
    maps: dict[str, Tensor]
    schedule: NoiseSchedule
    denoise_again: Callable[[Tensor], Tensor]

    @property
    def anchor(self) -> Tensor:
        """The prediction that guidance adds to."""
        return self.predictions[anchor_of(self.predictions)]


def anchor_of(branches: Container[str]) -> str:
    """Return the branch that guidance adds to."""
    return 'uncond' if 'uncond' in branches else 'cond'


class Guidance:
    """Base of guidances.

    Args:
        scale: its strength.
        active_range: the part of denoising, from noise (0) to image (1), in which it acts; outside, its UNet rows are
            not computed.
    """

    #: Deltas are added and predictions finished in this order, whatever the config's.
    order = 0

    scale: float

    def __init__(self, scale: float, active_range: Sequence[float] = (0.0, 1.0)) -> None:
        self.active_range = checked_range(active_range)
        self._set_scale(scale)

    def _set_scale(self, scale: float) -> None:
        """Take a scale.

        Raises:
            UserError: it is out of range.
        """
        self.scale = float(scale)

    def with_scale(self, scale: float) -> Guidance:
        """Return a copy with another scale.

        Raises:
            UserError: it is out of range.
        """
        new = copy.copy(self)
        new._set_scale(scale)
        return new

    def __repr__(self) -> str:
        return f'{type(self).__name__}(scale={self.scale:g})'

    def active(self, start: float, end: float) -> bool:
        """Whether it acts in a step from `start` to `end`."""
        return start >= self.active_range[0] and end <= self.active_range[1]

    def branches(self) -> tuple[str, ...]:
        """Return the branches, of BRANCHES, that it needs besides 'cond'."""
        return ()

    def add_probes(self, probes: AttentionProbes) -> None:
        """Add the self-attentions that it perturbs or records to `probes`."""

    def delta(self, step: Step) -> Tensor | None:
        """Return the term added to the anchor, [B, 4, h, w], or None."""
        return None

    def finish(self, prediction: Tensor, step: Step) -> Tensor:
        """Return the guided prediction after a last change."""
        return prediction


@GUIDANCES.register_module()
class CFG(Guidance):
    """Classifier-free guidance: u + g (c - u). Ho & Salimans 2022, arXiv:2207.12598.

    With g <= 1 there is no unconditional row, as in diffusers' pipelines.
    """

    def __init__(self, scale: float = 5.0, active_range: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__(scale, active_range)

    def active(self, start: float, end: float) -> bool:
        """Whether the step is in its active range and the scale is above 1."""
        return self.scale > 1 and super().active(start, end)

    def branches(self) -> tuple[str, ...]:
        """Return the unconditional and the conditional branch."""
        return ('uncond', 'cond')

    def delta(self, step: Step) -> Tensor:
        """Return g (c - u)."""
        return self.scale * (step.predictions['cond'] - step.predictions['uncond'])


@GUIDANCES.register_module()
class Rescale(Guidance):
    """diffusers' guidance_rescale: move the standard deviation of the guided prediction towards the conditional one's.

    Lin et al. 2023, arXiv:2305.08891, section 3.4: r = g std(c) / std(g); s r + (1 - s) g. It does nothing without
    classifier-free guidance, as in diffusers.
    """

    order = 3

    def __init__(self, scale: float = 0.7, active_range: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__(scale, active_range)

    def _set_scale(self, scale: float) -> None:
        super()._set_scale(scale)
        if not 0 <= self.scale <= 1:
            raise UserError(f'Rescale: scale={scale} must be from 0 (off) to 1.')

    def active(self, start: float, end: float) -> bool:
        """Whether the step is in its active range and the scale is above 0."""
        return self.scale > 0 and super().active(start, end)

    def finish(self, prediction: Tensor, step: Step) -> Tensor:
        """Return [B, 4, h, w]; each row has its own standard deviation."""
        if 'uncond' not in step.predictions:
            return prediction
        dims = list(range(1, prediction.dim()))
        std_cond, std = (p.std(dim=dims, keepdim=True) for p in (step.predictions['cond'], prediction))
        return self.scale * (prediction * (std_cond / std)) + (1 - self.scale) * prediction


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """Return the guidance scale's embedding, [1, dim], for a UNet that was distilled with it (an LCM).

    Sines and cosines of 1000 (scale - 1), as for timesteps: Luo et al. 2023, arXiv:2310.04378, section 4.1.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor(scale - 1) * 1000.0 * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, dim % 2))[None]


def guide(guidances: Sequence[Guidance], step: Step, record: Callable[[object, Tensor], None] | None = None) -> Tensor:
    """Return the guided prediction, [B, 4, h, w]; `record` is called with each guidance and its delta."""
    prediction = step.anchor
    for guidance in guidances:
        delta = guidance.delta(step)
        if delta is not None:
            if record is not None:
                record(guidance, delta)
            prediction = prediction + delta
    for guidance in guidances:
        prediction = guidance.finish(prediction, step)
    return prediction
