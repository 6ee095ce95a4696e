"""Losses: the distance of prediction and target, elementwise.

A loss is called as `(prediction, target, t, schedule)` and returns unreduced [B, C, h, w] in fp32, or in fp64
if an input is fp64.
"""

import math

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import LOSSES


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Return prediction - target in fp32 at least; in bf16 the difference would keep 8 bits only."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


@LOSSES.register_module()
class L2Loss:
    """(prediction - target)^2 (Ho et al. 2020)."""

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return [B, C, h, w]."""
        return _difference(prediction, target).square()


@LOSSES.register_module()
class L1Loss:
    """|prediction - target|."""

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return [B, C, h, w]."""
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
        smooth_l1: drop the factor c: d^2 / c for differences below c, 2 |d| for those above.

    Raises:
        UserError: an unknown schedule, or delta out of range.
    """

    SCHEDULES = ('constant', 'exponential', 'snr')

    def __init__(self, delta: float = 0.1, schedule: str = 'constant', smooth_l1: bool = False) -> None:
        one_of('HuberLoss: schedule', schedule, self.SCHEDULES)
        if not delta > 0 or (schedule != 'constant' and delta > 1):
            raise UserError(f'HuberLoss: delta={delta} must be above 0'
                             f'{"" if schedule == "constant" else f" and at most 1 with schedule={schedule!r}"}.')
        self.delta, self.schedule, self.smooth_l1 = delta, schedule, smooth_l1

    def width(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return c of each sample, fp32 [B] on t's device."""
        if self.schedule == 'exponential':
            return torch.exp(math.log(self.delta) / schedule.num_train_timesteps * t.float())
        if self.schedule == 'snr':
            alpha_bar = schedule.alpha_bar(t)
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()  # infinite at zero terminal SNR, where c is delta
            return (1 - self.delta) / (1 + sigma) ** 2 + self.delta
        return torch.full(t.shape, self.delta, dtype=torch.float32, device=t.device)

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return [B, C, h, w]."""
        d = _difference(prediction, target)
        c = self.width(t.to(d.device), schedule).to(d.dtype).view(-1, *[1] * (d.dim() - 1))
        # d^2 / (sqrt(d^2 + c^2) + c) is sqrt(d^2 + c^2) - c without the cancellation that loses small d in fp32
        square = d.square()
        loss = 2 * square / ((square + c.square()).sqrt() + c)
        return loss if self.smooth_l1 else c * loss
