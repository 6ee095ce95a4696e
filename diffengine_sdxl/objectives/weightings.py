"""The factor of each sample's loss, by its timestep.

A weighting is called as `(t, schedule)` and returns fp32 [B] on t's device. The loss of the three prediction types is
one loss on x0 seen with different factors, |eps|^2 = snr |x0|^2 and |v|^2 = (snr + 1) |x0|^2, so each weighting
depends on `schedule.prediction_type`.
"""

import torch
from torch import Tensor

from diffengine_sdxl.registry import WEIGHTINGS
from diffengine_sdxl.schedule import NoiseSchedule


@WEIGHTINGS.register_module()
class NoWeighting:
    """1 everywhere: the plain loss on what the UNet predicts."""

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """fp32 [B]."""
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)


@WEIGHTINGS.register_module()
class MinSNR:
    """min(snr, gamma), over snr for epsilon, over snr + 1 for v, as it is for x0.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), section 3.4;
    `--snr_gamma` of diffusers' scripts, `--min_snr_gamma` of sd-scripts.

    Args:
        gamma: above 0; 5 in the paper.

    Raises:
        ValueError: gamma is not above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f'gamma={gamma} of MinSNR must be above 0.')
        self.gamma = gamma

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """fp32 [B]."""
        snr = schedule.snr(t)
        if schedule.prediction_type == 'epsilon':
            return (self.gamma / snr).clamp(max=1)  # this form has the right limit, 1, where snr is 0
        weight = snr.clamp(max=self.gamma)
        return weight / (snr + 1) if schedule.prediction_type == 'v_prediction' else weight


@WEIGHTINGS.register_module()
class Debiased:
    """1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v, sqrt(snr) for x0; snr is taken as 1000 at most.

    Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442), which treats epsilon; v as in
    sd-scripts (`--debiased_estimation_loss`); x0 is the same loss as epsilon's, whose factor is snr times as large.
    """

    MAX_SNR = 1000.0  # of sd-scripts: at t = 0 of a schedule that starts clean, snr is infinite

    def __call__(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """fp32 [B]."""
        snr = schedule.snr(t).clamp(max=self.MAX_SNR)
        if schedule.prediction_type == 'v_prediction':
            return 1 / (snr + 1)
        return 1 / snr.sqrt() if schedule.prediction_type == 'epsilon' else snr.sqrt()
