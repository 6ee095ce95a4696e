"""The noise schedule: alpha-bar, and the conversions between x0, noise, velocity and x_t.

Every conversion that training and sampling need stands here once. With ab = alpha-bar at timestep t:

    x_t = sqrt(ab) x0 + sqrt(1 - ab) eps                         Ho et al. 2020 (arXiv 2006.11239), eq. 4
    v   = sqrt(ab) eps - sqrt(1 - ab) x0                         Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    x0  = sqrt(ab) x_t - sqrt(1 - ab) v,   eps = sqrt(ab) v + sqrt(1 - ab) x_t
    snr = ab / (1 - ab)

With zero terminal SNR (Lin et al. 2023, arXiv 2305.08891) ab is exactly 0 at the last timestep: only formulas that
never divide by sqrt(ab) hold there, which is why eps is taken from v directly and not by way of x0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffengine_sdxl.registry import nearest

PREDICTION_TYPES = ('epsilon', 'v_prediction', 'sample')


class NoiseSchedule:
    """Alpha-bar of a base and what follows from it. Holds no parameters and appears in no state dict.

    Args:
        alphas_cumprod: alpha-bar, fp32 [T], falling with t.
        prediction_type: what the UNet predicts: 'epsilon', 'v_prediction' or 'sample' (x0).
        config: the scheduler config that `alphas_cumprod` was made from, for samplers and exports.

    Attributes:
        num_train_timesteps: T. Timesteps are integers 0 (nearly clean) to T - 1 (nearly noise).
        zero_terminal_snr: alpha-bar is 0 at the last timestep.

    Raises:
        ValueError: an unknown prediction type, or 'epsilon' at zero terminal SNR.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = 'epsilon',
                 config: Mapping[str, Any] | None = None) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f'prediction_type={prediction_type!r} is not known; it must be one of '
                             f'{", ".join(PREDICTION_TYPES)}.{nearest(str(prediction_type), list(PREDICTION_TYPES))}')
        self.zero_terminal_snr = float(alphas_cumprod[-1]) == 0
        if prediction_type == 'epsilon' and self.zero_terminal_snr:
            raise ValueError(
                "prediction_type='epsilon' does not go with zero terminal SNR (zero_terminal_snr=True, or "
                "rescale_betas_zero_snr in the base's scheduler): at the last timestep the input is the noise itself, "
                "so there is nothing to learn and no image to recover. Use prediction_type='v_prediction', or "
                'zero_terminal_snr=False.')
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(alphas_cumprod)
        self.config = dict(config or {})
        self._moved: dict[torch.device, Tensor] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction_type: str | None = None,
                    zero_terminal_snr: bool = False) -> NoiseSchedule:
        """The schedule of a diffusers scheduler config (of any class: what DDPM doesn't know is ignored).

        Args:
            config: the base's `scheduler/scheduler_config.json`: `beta_schedule`, `beta_start`, `beta_end`,
                `trained_betas`, `num_train_timesteps`, `rescale_betas_zero_snr`, `prediction_type`.
            prediction_type: overrides the config's.
            zero_terminal_snr: rescale the betas so that the last timestep is pure noise, if the config doesn't.

        Raises:
            ValueError: an unknown beta schedule, or what the constructor refuses.
        """
        config = dict(config)
        config['rescale_betas_zero_snr'] = bool(config.get('rescale_betas_zero_snr')) or zero_terminal_snr
        config['prediction_type'] = prediction_type or config.get('prediction_type') or 'epsilon'
        try:
            scheduler = DDPMScheduler.from_config(config)
        except NotImplementedError:
            known = ['linear', 'scaled_linear', 'squaredcos_cap_v2', 'laplace', 'sigmoid']
            name = str(config.get('beta_schedule'))
            raise ValueError(f"beta_schedule={name!r} of the scheduler is not known; it must be one of "
                             f'{", ".join(known)}.{nearest(name, known)}') from None
        return cls(scheduler.alphas_cumprod, config['prediction_type'], config)

    def alpha_bar(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Alpha-bar at t, fp32 [B] on t's device.

        Args:
            t: timesteps, [B] or []; between two whole ones log(sigma) is interpolated, as diffusers' solvers with their
                own sigmas (Karras) do it the other way round.
            like: shape, dtype and device to multiply this tensor instead: [B, 1, 1, ...], fp32 at least.
        """
        device = t.device if like is None else like.device
        if device not in self._moved:
            self._moved[device] = self.alphas_cumprod.to(device)
        values = self._between(t.to(device), self._moved[device])
        if like is None:
            return values
        return values.to(torch.promote_types(like.dtype, torch.float32)).reshape(-1, *[1] * (like.dim() - 1))

    @staticmethod
    def _between(t: Tensor, table: Tensor) -> Tensor:
        """`table` at t, which need not be whole."""
        if not t.is_floating_point():
            return table[t]
        t = t.clamp(0, len(table) - 1)
        low, part = t.floor().long(), (t - t.floor()).to(table.dtype)
        # Zero terminal SNR has no finite sigma at the end; diffusers' solvers take 2 ** -24 in its place.
        near = (table[i].clamp(min=2 ** -24) for i in (low, t.ceil().long()))
        below, above = (torch.log((1 - ab) / ab) for ab in near)
        return torch.where(part == 0, table[low], torch.sigmoid(-(below + part * (above - below))))

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(ab) and sqrt(1 - ab), shaped to multiply `like`."""
        alpha_bar = self.alpha_bar(t, like)
        return alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(ab) x0 + sqrt(1 - ab) noise, [B, C, h, w] in x0's dtype (Ho et al. 2020, eq. 4).

        In fp32 and fp64 bitwise what `DDPMScheduler.add_noise` gives; below, it is computed in fp32 and rounded once.
        """
        signal, sigma = self._coefficients(t, x0)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should predict, [B, C, h, w]: the noise, v (Salimans & Ho 2022) or x0, by `prediction_type`."""
        if self.prediction_type == 'epsilon':
            return noise
        if self.prediction_type == 'sample':
            return x0
        signal, sigma = self._coefficients(t, x0)
        return (signal * noise - sigma * x0).to(x0.dtype)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a raw prediction of the UNet at x_t stands for, [B, C, h, w]."""
        if self.prediction_type == 'sample':
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.prediction_type == 'epsilon':
            return ((x_t - sigma * prediction) / signal).to(x_t.dtype)
        return (signal * x_t - sigma * prediction).to(x_t.dtype)

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a raw prediction of the UNet at x_t stands for, [B, C, h, w]; no NaN at zero terminal SNR."""
        if self.prediction_type == 'epsilon':
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.prediction_type == 'v_prediction':
            return (signal * prediction + sigma * x_t).to(x_t.dtype)
        return ((x_t - signal * prediction) / sigma).to(x_t.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ab / (1 - ab), fp32 [B] on t's device; 0 at zero terminal SNR.

        Rounded as in `diffusers.training_utils.compute_snr`.
        """
        alpha_bar = self.alpha_bar(t)
        return (alpha_bar ** 0.5 / (1 - alpha_bar) ** 0.5) ** 2
