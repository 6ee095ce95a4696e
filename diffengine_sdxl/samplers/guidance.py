"""Guidance: what is added to the anchor prediction, and which rows and taps of the UNet's call it needs for that.

The guided prediction is anchor + sum of deltas (CFG, PAG, SAG), each guidance's `finish` after (Rescale); the anchor is
the unconditional prediction if there is one, else the conditional. A sum on the conditional would never be bitwise
stock's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.registry import GUIDANCES
from diffengine_sdxl.structures import Taps, checked_window

#: The order of rows in one UNet call. 'perturbed' is told what 'cond' is.
BRANCHES = ('uncond', 'cond', 'perturbed')


@dataclass
class Step:
    """One evaluation of the UNet.

    Attributes:
        x: the UNet's input, [B, 4, h, w], of variance 1 as at timestep `t` of the noise schedule, whatever the solver.
        t: timestep, [].
        predictions: branch -> the UNet's raw output, [B, 4, h, w].
        maps: of the anchor's rows, what guidances asked to be recorded; see Taps.
        schedule: the model's NoiseSchedule.
        again: calls the denoiser again at this timestep with another input x of the anchor's rows.
    """

    x: Tensor
    t: Tensor
    predictions: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    schedule: Any = None
    again: Callable[[Tensor], Tensor] | None = None

    @property
    def anchor(self) -> Tensor:
        """What guidance adds to."""
        return self.predictions[anchor_of(self.predictions)]


def anchor_of(branches: Any) -> str:
    """Which of `branches` guidance adds to."""
    return 'uncond' if 'uncond' in branches else 'cond'


class Guidance:
    """Base of guidances.

    Args:
        scale: how strongly it acts.
        window: part of the way from noise (0) to image (1) in which it acts; outside, its passes are not computed.
    """

    #: Deltas are added and predictions finished in this order, whatever a config's.
    order = 0

    def __init__(self, scale: float, window: Sequence[float] = (0.0, 1.0)) -> None:
        self.scale, self.window = float(scale), checked_window(window)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(scale={self.scale:g})'

    def active(self, begin: float, end: float) -> bool:
        """Whether it acts in a step from `begin` to `end`."""
        return begin >= self.window[0] and end <= self.window[1]

    def branches(self) -> tuple[str, ...]:
        """The rows it needs, of BRANCHES, besides 'cond'."""
        return ()

    def tap(self, taps: Taps) -> None:
        """Add to `taps` what it asks of the self-attentions."""

    def delta(self, step: Step) -> Tensor | None:
        """What it adds to the anchor, [B, 4, h, w]; None for nothing."""
        return None

    def finish(self, prediction: Tensor, step: Step) -> Tensor:
        """A last change of the guided prediction."""
        return prediction


@GUIDANCES.register_module()
class CFG(Guidance):
    """Classifier-free guidance: u + g (c - u). Ho & Salimans 2022, arXiv:2207.12598.

    At g <= 1 there is no guidance and no unconditional row, as in diffusers' pipelines.
    """

    def __init__(self, scale: float = 5.0, window: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__(scale, window)

    def active(self, begin: float, end: float) -> bool:
        """Inside its window and with a scale above 1."""
        return self.scale > 1 and super().active(begin, end)

    def branches(self) -> tuple[str, ...]:
        """Unconditional and conditional."""
        return ('uncond', 'cond')

    def delta(self, step: Step) -> Tensor:
        """g (c - u)."""
        return self.scale * (step.predictions['cond'] - step.predictions['uncond'])


@GUIDANCES.register_module()
class Rescale(Guidance):
    """Guided predictions back to the conditional one's deviation, by a share of `scale`: diffusers' guidance_rescale.

    Lin et al. 2023, arXiv:2305.08891, section 3.4: r = g std(c) / std(g); s r + (1 - s) g. Without classifier-free
    guidance it does nothing, as in diffusers.
    """

    order = 3

    def __init__(self, scale: float = 0.7, window: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__(scale, window)
        if not 0 <= self.scale <= 1:
            raise ValueError(f'Rescale: scale={scale} must be from 0 (nothing) to 1.')

    def active(self, begin: float, end: float) -> bool:
        """Inside its window and with a scale above 0."""
        return self.scale > 0 and super().active(begin, end)

    def finish(self, prediction: Tensor, step: Step) -> Tensor:
        """[B, 4, h, w]; deviations are over all of a row."""
        if 'uncond' not in step.predictions:
            return prediction
        rows = list(range(1, prediction.dim()))
        wanted, found = (p.std(dim=rows, keepdim=True) for p in (step.predictions['cond'], prediction))
        return self.scale * (prediction * (wanted / found)) + (1 - self.scale) * prediction


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """The scale of classifier-free guidance as a UNet reads it that was distilled with it, [1, dim] (an LCM).

    Sines and cosines of 1000 (scale - 1), as of timesteps: Luo et al. 2023, arXiv:2310.04378, section 4.1.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor(scale - 1) * 1000.0 * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, dim % 2))[None]


def guide(guidances: Sequence[Guidance], step: Step, watch: Callable[[Any, Tensor], None] | None = None) -> Tensor:
    """The guided prediction of `step`, [B, 4, h, w]; `watch` is told each guidance's part of it."""
    prediction = step.anchor
    for guidance in guidances:
        delta = guidance.delta(step)
        if delta is not None:
            if watch is not None:
                watch(guidance, delta)
            prediction = prediction + delta
    for guidance in guidances:
        prediction = guidance.finish(prediction, step)
    return prediction
