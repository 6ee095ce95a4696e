"""Guidance: what is added to the anchor prediction, and which rows of the UNet's batch it needs for that.

The guided prediction is anchor + sum of deltas, each guidance's `finish` after; the anchor is the unconditional
prediction if there is one, else the conditional. A sum on the conditional would never be bitwise stock's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diffengine_sdxl.registry import GUIDANCES
from diffengine_sdxl.structures import checked_window

#: The order of rows in one UNet call.
BRANCHES = ('uncond', 'cond')


@dataclass
class Step:
    """One evaluation of the UNet: its predictions by branch, [B, 4, h, w] each, at latents `x` and timestep `t`."""

    x: Tensor
    t: Tensor
    predictions: dict[str, Tensor] = field(default_factory=dict)

    @property
    def anchor(self) -> Tensor:
        """What guidance adds to."""
        return self.predictions['uncond' if 'uncond' in self.predictions else 'cond']


class Guidance:
    """Base of guidances.

    Args:
        scale: how strongly it acts.
        window: part of the way from noise (0) to image (1) in which it acts; outside, its rows are not computed.
    """

    def __init__(self, scale: float, window: Sequence[float] = (0.0, 1.0)) -> None:
        self.scale, self.window = float(scale), checked_window(window)

    def active(self, begin: float, end: float) -> bool:
        """Whether it acts in a step from `begin` to `end`."""
        return begin >= self.window[0] and end <= self.window[1]

    def branches(self) -> tuple[str, ...]:
        """The rows it needs, of BRANCHES."""
        raise NotImplementedError(f'{type(self).__name__} does not say which rows it needs')

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


def guide(guidances: Sequence[Guidance], step: Step) -> Tensor:
    """The guided prediction of `step`, [B, 4, h, w]."""
    prediction = step.anchor
    for guidance in guidances:
        delta = guidance.delta(step)
        prediction = prediction if delta is None else prediction + delta
    for guidance in guidances:
        prediction = guidance.finish(prediction, step)
    return prediction
