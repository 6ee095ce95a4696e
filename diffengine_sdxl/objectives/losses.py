"""The distance of prediction and target, for each element.

A loss is called as `(prediction, target, t, schedule)` and returns [B, C, h, w], not reduced, in fp32 or, if an input
is fp64, in fp64.
"""

import math

import torch
from torch import Tensor

from diffengine_sdxl.registry import LOSSES, nearest
from diffengine_sdxl.schedule import NoiseSchedule


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    """prediction - target, in fp32 at least: a difference of two bf16 numbers would keep 8 bits."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


@LOSSES.register_module()
class L2Loss:
    """(prediction - target)^2 (Ho et al. 2020)."""

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """[B, C, h, w]."""
        return _difference(prediction, target).square()


@LOSSES.register_module()
class L1Loss:
    """|prediction - target|."""

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """[B, C, h, w]."""
        return _difference(prediction, target).abs()


@LOSSES.register_module()
class HuberLoss:
    """Pseudo-Huber loss 2 c (sqrt(d^2 + c^2) - c): d^2 for differences below c, 2 c |d| for those above.

    Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
    (arXiv 2403.16728); `--loss_type huber | smooth_l1`, `--huber_c`, `--huber_schedule` of sd-scripts.

    Args:
        delta: c at its smallest: at the last timestep for 'exponential', at infinite noise for 'snr'.
        schedule: how c depends on the timestep: 'constant' c = delta; 'exponential' c = delta^(t / T);
            'snr' c = (1 - delta) / (1 + sigma)^2 + delta with sigma = sqrt((1 - ab) / ab).
        smooth_l1: without the factor c: d^2 / c for differences below c, 2 |d| for those above.

    Raises:
        ValueError: an unknown schedule, or delta out of range.
    """

    SCHEDULES = ('constant', 'exponential', 'snr')

    def __init__(self, delta: float = 0.1, schedule: str = 'constant', smooth_l1: bool = False) -> None:
        if schedule not in self.SCHEDULES:
            raise ValueError(f'schedule={schedule!r} of HuberLoss must be one of {", ".join(self.SCHEDULES)}.'
                             f'{nearest(str(schedule), list(self.SCHEDULES))}')
        if not delta > 0 or (schedule != 'constant' and delta > 1):
            raise ValueError(f'delta={delta} of HuberLoss must be above 0'
                             f'{"" if schedule == "constant" else f" and at most 1 with schedule={schedule!r}"}.')
        self.delta, self.schedule, self.smooth_l1 = delta, schedule, smooth_l1

    def width(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """c of each sample, fp32 [B] on t's device."""
        if self.schedule == 'exponential':
            return torch.exp(math.log(self.delta) / schedule.num_train_timesteps * t.float())
        if self.schedule == 'snr':
            alpha_bar = schedule.alpha_bar(t)
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()  # infinite at zero terminal SNR, where c is delta
            return (1 - self.delta) / (1 + sigma) ** 2 + self.delta
        return torch.full(t.shape, self.delta, dtype=torch.float32, device=t.device)

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """[B, C, h, w]."""
        d = _difference(prediction, target)
        c = self.width(t.to(d.device), schedule).to(d.dtype).view(-1, *[1] * (d.dim() - 1))
        # d^2 / (sqrt(d^2 + c^2) + c) is sqrt(d^2 + c^2) - c without the cancellation that loses small d in fp32
        square = d.square()
        loss = 2 * square / ((square + c.square()).sqrt() + c)
        return loss if self.smooth_l1 else c * loss
