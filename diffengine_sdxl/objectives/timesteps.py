"""Timesteps of training samples.

A timestep distribution is called as `(draws, schedule)` and returns int64 [B] on the CPU, 0 <= t < T, where
T = schedule.num_train_timesteps (1000 for SDXL) and T - 1 is nearly pure noise. It is a function of one keyed number
per sample, of the stream 'timestep'.
"""

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import TIMESTEPS
from diffengine_sdxl.rng import Draws

STREAM = 'timestep'


@TIMESTEPS.register_module()
class UniformTimesteps:
    """Uniform over low <= t < high (Ho et al. 2020).

    Args:
        low, high: bounds in timesteps; high=None means T. The refiner was trained on 0 <= t < 200.

    Raises:
        UserError: no timestep of the schedule lies between the bounds.
    """

    def __init__(self, low: int = 0, high: int | None = None) -> None:
        if low < 0 or (high is not None and high <= low):
            raise UserError(f'UniformTimesteps: low={low} and high={high} must satisfy 0 <= low < high.')
        self.low, self.high = low, high

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """Return int64 [B]."""
        num = schedule.num_train_timesteps
        high = num if self.high is None else self.high
        if not self.low < high <= num:
            raise UserError(f'UniformTimesteps: low={self.low} and high={self.high} must satisfy low < high <= {num}, '
                            'the number of timesteps of the base.')
        # in fp64 u * n < n holds after rounding, so that the bound itself is never drawn
        return self.low + (draws.uniform(STREAM).double() * (high - self.low)).long()


@TIMESTEPS.register_module()
class CubicTimesteps:
    """t = floor((1 - u^3) T), at most T - 1: favours noisy timesteps, where the condition decides the layout.

    Mou et al. 2023, T2I-Adapter (arXiv 2302.08453), section 3.4; bitwise the formula of diffusers'
    `train_t2i_adapter_sdxl.py`.
    """

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """Return int64 [B]."""
        num = schedule.num_train_timesteps
        return ((1 - draws.uniform(STREAM) ** 3) * num).long().clamp(0, num - 1)


@TIMESTEPS.register_module()
class BiasedTimesteps:
    """Some timesteps are `multiplier` times as likely as the others.

    `--timestep_bias_*` of diffusers' `train_text_to_image_sdxl.py`.

    Args:
        strategy: which ones: 'earlier' the smallest t (nearly clean), 'later' the largest, 'range' begin <= t < end.
        multiplier: above 0; 1 is no bias.
        portion: their share of T, for 'earlier' and 'later'; 0 to 1.
        begin, end: in timesteps, for 'range'; end=None means T.

    Raises:
        UserError: a value out of range.
    """

    STRATEGIES = ('earlier', 'later', 'range')

    def __init__(self, strategy: str = 'later', multiplier: float = 1.0, portion: float = 0.25, begin: int = 0,
                 end: int | None = None) -> None:
        one_of('BiasedTimesteps: strategy', strategy, self.STRATEGIES)
        if not multiplier > 0:
            raise UserError(f'BiasedTimesteps: multiplier={multiplier} must be above 0; to exclude timesteps, use '
                            'UniformTimesteps with low and high.')
        if not 0 <= portion <= 1:
            raise UserError(f'BiasedTimesteps: portion={portion} must be 0 to 1.')
        if begin < 0 or (end is not None and end <= begin):
            raise UserError(f'BiasedTimesteps: begin={begin} and end={end} must satisfy 0 <= begin < end.')
        self.strategy, self.multiplier, self.portion = strategy, multiplier, portion
        self.begin, self.end = begin, end

    def weights(self, num: int) -> Tensor:
        """Return the probability of each of `num` timesteps, fp64 [num]."""
        size = int(self.portion * num)
        if self.strategy == 'range':
            begin, end = self.begin, num if self.end is None else self.end
            if not begin < end <= num:
                raise UserError(f'BiasedTimesteps: begin={begin} and end={end} must satisfy begin < end <= {num}, the '
                                'number of timesteps of the base.')
        else:
            begin, end = (0, size) if self.strategy == 'earlier' else (num - size, num)
        weights = torch.ones(num, dtype=torch.float64)
        weights[begin:end] *= self.multiplier
        return weights / weights.sum()

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """Return int64 [B], by the inverse of the cumulative distribution."""
        num = schedule.num_train_timesteps
        cumulative = self.weights(num).cumsum(0)
        return torch.searchsorted(cumulative, draws.uniform(STREAM).double(), right=True).clamp(max=num - 1)


@TIMESTEPS.register_module()
class LogitNormalTimesteps:
    """t = floor(sigmoid(n) T) with n normal: favours the middle, with a positive mean the noisy side.

    Esser et al. 2024, Stable Diffusion 3 (arXiv 2403.03206), eq. 19, whose t also grows with the noise.

    Args:
        mean, std: of n; std above 0.

    Raises:
        UserError: std is not above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise UserError(f'LogitNormalTimesteps: std={std} must be above 0.')
        self.mean, self.std = mean, std

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """Return int64 [B]."""
        num = schedule.num_train_timesteps
        normal = self.mean + self.std * draws.normal(STREAM, ()).double()
        return (torch.sigmoid(normal) * num).long().clamp(max=num - 1)
