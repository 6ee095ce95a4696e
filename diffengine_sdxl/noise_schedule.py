"""The noise schedule: alpha-bar, and the conversions between x0, noise, velocity and x_t.

With ab = alpha-bar at timestep t:

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

from diffengine_sdxl.errors import UserError, first_line, one_of
from diffengine_sdxl.structures import send

PREDICTION_TYPES = ('epsilon', 'v_prediction', 'sample')
#: Those of diffusers' DDPMScheduler.
BETA_SCHEDULES = ('linear', 'scaled_linear', 'squaredcos_cap_v2', 'laplace', 'sigmoid')


class NoiseSchedule:
    """Alpha-bar of a base and the conversions that use it; not a module, so it appears in no state dict.

    Args:
        alphas_cumprod: alpha-bar, fp32 [T], falling with t.
        prediction_type: what the UNet predicts: 'epsilon', 'v_prediction' or 'sample' (x0).
        config: the scheduler config that `alphas_cumprod` comes from, for samplers and exports.

    Attributes:
        num_train_timesteps: T. Timesteps are integers 0 (nearly clean) to T - 1 (nearly noise).
        zero_terminal_snr: alpha-bar is 0 at the last timestep.

    Raises:
        UserError: an unknown prediction type, or 'epsilon' at zero terminal SNR.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = 'epsilon',
                 config: Mapping[str, Any] | None = None) -> None:
        one_of('prediction_type', prediction_type, PREDICTION_TYPES)
        self.zero_terminal_snr = float(alphas_cumprod[-1]) == 0
        if prediction_type == 'epsilon' and self.zero_terminal_snr:
            raise UserError(
                "prediction_type='epsilon' does not work with zero terminal SNR (zero_terminal_snr=True, or "
                "rescale_betas_zero_snr in the base's scheduler), as the last timestep's input is pure noise. Use "
                "prediction_type='v_prediction', or zero_terminal_snr=False.")
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(alphas_cumprod)
        self.config = dict(config or {})
        self._moved: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_moved': {}}  # a worker of the data loader takes no tensors of a GPU

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction_type: str | None = None,
                    zero_terminal_snr: bool = False) -> NoiseSchedule:
        """Build the schedule of a diffusers scheduler config (of any class: keys unknown to DDPM are ignored).

        Args:
            config: the base's `scheduler/scheduler_config.json`: `beta_schedule`, `beta_start`, `beta_end`,
                `trained_betas`, `num_train_timesteps`, `rescale_betas_zero_snr`, `prediction_type`.
            prediction_type: overrides the config's.
            zero_terminal_snr: rescale the betas so that the last timestep is pure noise, if the config doesn't.

        Raises:
            UserError: see the class; or the config is invalid.
        """
        config = dict(config)
        if config.get('trained_betas') is None and 'beta_schedule' in config:
            one_of('beta_schedule', config['beta_schedule'], BETA_SCHEDULES)
        config['rescale_betas_zero_snr'] = bool(config.get('rescale_betas_zero_snr')) or zero_terminal_snr
        config['prediction_type'] = prediction_type or config.get('prediction_type') or 'epsilon'
        try:
            alphas_cumprod = DDPMScheduler.from_config(config).alphas_cumprod
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"The base's scheduler config is invalid: {first_line(error)}") from error
        return cls(alphas_cumprod, config['prediction_type'], config)

    def alpha_bar(self, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Return alpha-bar at t, fp32 [B] on t's device.

        Args:
            t: timesteps, [B] or []; for fractional ones, log(sigma) is interpolated, the inverse of how diffusers'
                solvers turn sigmas (Karras) into timesteps.
            like: a tensor to multiply: return [B, 1, 1, ...] on its device, in its dtype but at least fp32.
        """
        device = t.device if like is None else like.device
        if device not in self._moved:
            self._moved[device] = send(self.alphas_cumprod, device)
        values = self._between(t.to(device), self._moved[device])
        if like is None:
            return values
        return values.to(torch.promote_types(like.dtype, torch.float32)).reshape(-1, *[1] * (like.dim() - 1))

    @staticmethod
    def _between(t: Tensor, table: Tensor) -> Tensor:
        """Look up `table` at t, which may be fractional."""
        if not t.is_floating_point():
            return table[t]
        t = t.clamp(0, len(table) - 1)
        low, part = t.floor().long(), (t - t.floor()).to(table.dtype)
        # Zero terminal SNR has no finite sigma at the end; diffusers' solvers use alpha-bar = 2 ** -24 instead.
        near = (table[i].clamp(min=2 ** -24) for i in (low, t.ceil().long()))
        below, above = (torch.log((1 - ab) / ab) for ab in near)
        return torch.where(part == 0, table[low], torch.sigmoid(-(below + part * (above - below))))

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(ab) and sqrt(1 - ab), shaped to multiply `like`."""
        alpha_bar = self.alpha_bar(t, like)
        return alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = sqrt(ab) x0 + sqrt(1 - ab) noise, [B, C, h, w] in x0's dtype (Ho et al. 2020, eq. 4).

        In fp32 and fp64 bitwise as `DDPMScheduler.add_noise`; lower precisions are computed in fp32 and rounded once.
        """
        signal, sigma = self._coefficients(t, x0)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the UNet should predict, [B, C, h, w]: the noise, v or x0, by `prediction_type`."""
        if self.prediction_type == 'epsilon':
            return noise
        if self.prediction_type == 'sample':
            return x0
        signal, sigma = self._coefficients(t, x0)
        return (signal * noise - sigma * x0).to(x0.dtype)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the UNet's prediction at x_t to clean latents, [B, C, h, w]."""
        if self.prediction_type == 'sample':
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.prediction_type == 'epsilon':
            return ((x_t - sigma * prediction) / signal).to(x_t.dtype)
        return (signal * x_t - sigma * prediction).to(x_t.dtype)

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the UNet's prediction at x_t to the noise in it, [B, C, h, w]; no NaN at zero terminal SNR."""
        if self.prediction_type == 'epsilon':
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.prediction_type == 'v_prediction':
            return (signal * prediction + sigma * x_t).to(x_t.dtype)
        return ((x_t - signal * prediction) / sigma).to(x_t.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ab / (1 - ab), fp32 [B] on t's device; 0 at zero terminal SNR.

        Rounded as in `diffusers.training_utils.compute_snr`.
        """
        alpha_bar = self.alpha_bar(t)
        return (alpha_bar ** 0.5 / (1 - alpha_bar) ** 0.5) ** 2
