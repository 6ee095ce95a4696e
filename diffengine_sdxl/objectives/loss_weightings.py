"""Weights of each sample's loss, by its timestep.

A weighting is called as `(t, schedule)` and returns fp32 [B] on t's device. It depends on `schedule.prediction_type`,
as the losses of the prediction types are those of x0 with other factors: |eps|^2 = snr |x0|^2 and
|v|^2 = (snr + 1) |x0|^2.
"""

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import WEIGHTINGS


@WEIGHTINGS.register_module()
class NoWeighting:
    """Weight 1: the plain loss of the prediction."""

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return fp32 [B]."""
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)


@WEIGHTINGS.register_module()
class MinSNR:
    """min(snr, gamma), over snr for epsilon, over snr + 1 for v, as it is for x0.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), section 3.4;
    `--snr_gamma` of diffusers' scripts, `--min_snr_gamma` of sd-scripts.

    Args:
        gamma: above 0; 5 in the paper.

    Raises:
        UserError: gamma is not above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise UserError(f'MinSNR: gamma={gamma} must be above 0.')
        self.gamma = gamma

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return fp32 [B]."""
        snr = schedule.snr(t)
        if schedule.prediction_type == 'epsilon':
            return (self.gamma / snr).clamp(max=1)  # this form has the right limit, 1, at snr 0
        weight = snr.clamp(max=self.gamma)
        return weight / (snr + 1) if schedule.prediction_type == 'v_prediction' else weight


@WEIGHTINGS.register_module()
class Debiased:
    """1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v, sqrt(snr) for x0, with snr clamped to 1000.

    Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442), which treats epsilon; v as in
    sd-scripts (`--debiased_estimation_loss`); x0 is equivalent to epsilon, with a factor snr times as large.
    """

    MAX_SNR = 1000.0  # from sd-scripts; snr is infinite at t = 0 of a schedule that starts clean

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return fp32 [B]."""
        snr = schedule.snr(t).clamp(max=self.MAX_SNR)
        if schedule.prediction_type == 'v_prediction':
            return 1 / (snr + 1)
        return 1 / snr.sqrt() if schedule.prediction_type == 'epsilon' else snr.sqrt()
