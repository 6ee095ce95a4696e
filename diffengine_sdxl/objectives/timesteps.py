"""The timestep of each training sample.

A timestep distribution is called as `(draws, schedule)` and returns int64 [B] on the CPU, 0 <= t < T, where
T = schedule.num_train_timesteps (1000 for SDXL) and T - 1 is nearly pure noise. Each is a function of one keyed number
per sample, stream 'timestep'.
"""

import torch
from torch import Tensor

from diffengine_sdxl.registry import TIMESTEPS, nearest
from diffengine_sdxl.rng import Draws
from diffengine_sdxl.schedule import NoiseSchedule

STREAM = 'timestep'


@TIMESTEPS.register_module()
class UniformTimesteps:
    """Every timestep of low <= t < high alike (Ho et al. 2020).

    Args:
        low, high: bounds in timesteps; high=None means T. The refiner was trained on 0 <= t < 200.

    Raises:
        ValueError: bounds that hold no timestep of the schedule.
    """

    def __init__(self, low: int = 0, high: int | None = None) -> None:
        if low < 0 or (high is not None and high <= low):
            raise ValueError(f'low={low} and high={high} of UniformTimesteps must satisfy 0 <= low < high.')
        self.low, self.high = low, high

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """int64 [B]."""
        num = schedule.num_train_timesteps
        high = num if self.high is None else self.high
        if not self.low < high <= num:
            raise ValueError(f'low={self.low} and high={self.high} of UniformTimesteps must satisfy '
                             f'low < high <= {num}, the number of timesteps of the base.')
        # fp64, where u * n < n holds after rounding: the bound itself is never drawn
        return self.low + (draws.uniform(STREAM).double() * (high - self.low)).long()


@TIMESTEPS.register_module()
class CubicTimesteps:
    """t = floor((1 - u^3) T), at most T - 1: more of the noisy timesteps, where a control image decides the layout.

    Mou et al. 2023, T2I-Adapter (arXiv 2302.08453), section 3.4; bitwise the formula of diffusers'
    `train_t2i_adapter_sdxl.py`.
    """

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """int64 [B]."""
        num = schedule.num_train_timesteps
        return ((1 - draws.uniform(STREAM) ** 3) * num).long().clamp(0, num - 1)


@TIMESTEPS.register_module()
class BiasedTimesteps:
    """A part of the timesteps is `multiplier` times as likely as each of the others.

    `--timestep_bias_*` of diffusers' `train_text_to_image_sdxl.py`.

    Args:
        strategy: which part: 'earlier' the smallest t (nearly clean), 'later' the largest, 'range' begin <= t < end.
        multiplier: above 0; 1 is no bias.
        portion: size of the part as a share of T, for 'earlier' and 'later'; 0 to 1.
        begin, end: in timesteps, for 'range'; end=None means T.

    Raises:
        ValueError: a value out of range.
    """

    STRATEGIES = ('earlier', 'later', 'range')

    def __init__(self, strategy: str = 'later', multiplier: float = 1.0, portion: float = 0.25, begin: int = 0,
                 end: int | None = None) -> None:
        if strategy not in self.STRATEGIES:
            raise ValueError(f'strategy={strategy!r} of BiasedTimesteps must be one of {", ".join(self.STRATEGIES)}.'
                             f'{nearest(str(strategy), list(self.STRATEGIES))}')
        if not multiplier > 0:
            raise ValueError(f'multiplier={multiplier} of BiasedTimesteps must be above 0; to leave timesteps out '
                             'altogether use UniformTimesteps with low and high.')
        if not 0 <= portion <= 1:
            raise ValueError(f'portion={portion} of BiasedTimesteps must be 0 to 1.')
        if begin < 0 or (end is not None and end <= begin):
            raise ValueError(f'begin={begin} and end={end} of BiasedTimesteps must satisfy 0 <= begin < end.')
        self.strategy, self.multiplier, self.portion = strategy, multiplier, portion
        self.begin, self.end = begin, end

    def weights(self, num: int) -> Tensor:
        """Probability of each of `num` timesteps, fp64 [num]."""
        size = int(self.portion * num)
        if self.strategy == 'range':
            begin, end = self.begin, num if self.end is None else self.end
            if not begin < end <= num:
                raise ValueError(f'begin={begin} and end={end} of BiasedTimesteps must satisfy begin < end <= {num}, '
                                 'the number of timesteps of the base.')
        else:
            begin, end = (0, size) if self.strategy == 'earlier' else (num - size, num)
        weights = torch.ones(num, dtype=torch.float64)
        weights[begin:end] *= self.multiplier
        return weights / weights.sum()

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """int64 [B], by the inverse of the cumulative distribution."""
        num = schedule.num_train_timesteps
        cumulative = self.weights(num).cumsum(0)
        return torch.searchsorted(cumulative, draws.uniform(STREAM).double(), right=True).clamp(max=num - 1)


@TIMESTEPS.register_module()
class LogitNormalTimesteps:
    """t = floor(sigmoid(n) T) with n normal: more of the middle; a positive mean leans to the noisy side.

    Esser et al. 2024, Stable Diffusion 3 (arXiv 2403.03206), eq. 19, whose t also grows with the noise.

    Args:
        mean, std: of n; std above 0.

    Raises:
        ValueError: std is not above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise ValueError(f'std={std} of LogitNormalTimesteps must be above 0.')
        self.mean, self.std = mean, std

    def __call__(self, draws: Draws, schedule: NoiseSchedule) -> Tensor:
        """int64 [B]."""
        num = schedule.num_train_timesteps
        normal = self.mean + self.std * draws.normal(STREAM, ()).double()
        return (torch.sigmoid(normal) * num).long().clamp(max=num - 1)
