"""Losses against torch.nn.functional and the formulas of sd-scripts, written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import LOSSES

CONFIG = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
SCHEDULE = NoiseSchedule.from_config(CONFIG)
T = torch.tensor([0, 500, 999])
RNG = torch.Generator().manual_seed(0)
PREDICTION, TARGET = (torch.randn(3, 4, 5, 6, generator=RNG, dtype=torch.float64) for _ in range(2))


def loss(cfg, dtype=torch.float64, schedule=SCHEDULE):
    return LOSSES.build(cfg)(PREDICTION.to(dtype), TARGET.to(dtype), T, schedule)


def test_l2_and_l1():
    assert torch.equal(loss(dict(type='L2Loss')), F.mse_loss(PREDICTION, TARGET, reduction='none'))
    assert torch.equal(loss(dict(type='L1Loss')), F.l1_loss(PREDICTION, TARGET, reduction='none'))


def width(delta, schedule, t):
    if schedule == 'exponential':
        return math.exp(-(-math.log(delta) / 1000) * t)
    if schedule == 'snr':
        alpha_bar = float(SCHEDULE.alphas_cumprod[t])
        return (1 - delta) / (1 + ((1 - alpha_bar) / alpha_bar) ** 0.5) ** 2 + delta
    return delta


@pytest.mark.parametrize('schedule', ['constant', 'exponential', 'snr'])
@pytest.mark.parametrize('smooth_l1', [False, True])
@pytest.mark.parametrize('delta', [0.1, 0.7])
def test_huber(schedule, smooth_l1, delta):
    result = loss(dict(type='HuberLoss', delta=delta, schedule=schedule, smooth_l1=smooth_l1))
    for row, t in enumerate(T.tolist()):
        c = width(delta, schedule, t)
        expected = 2 * (torch.sqrt((PREDICTION[row] - TARGET[row]) ** 2 + c**2) - c) * (1 if smooth_l1 else c)
        torch.testing.assert_close(result[row], expected, rtol=1e-6, atol=1e-12)  # c is fp32


def test_huber_limits():
    near = LOSSES.build(dict(type='HuberLoss', delta=100.0))(PREDICTION, TARGET, T, SCHEDULE)
    torch.testing.assert_close(near, (PREDICTION - TARGET) ** 2, rtol=1e-3, atol=0)
    far = LOSSES.build(dict(type='HuberLoss', delta=1e-4, smooth_l1=True))(PREDICTION, TARGET, T, SCHEDULE)
    torch.testing.assert_close(far, 2 * (PREDICTION - TARGET).abs(), rtol=0, atol=1e-3)
    tiny = torch.full((1, 1, 1, 1), 1e-5)  # where sqrt(d^2 + c^2) - c is 0 in fp32
    small = LOSSES.build(dict(type='HuberLoss'))(tiny, torch.zeros_like(tiny), T[:1], SCHEDULE)
    torch.testing.assert_close(small, tiny**2, rtol=1e-5, atol=0)


def test_huber_at_zero_terminal_snr():
    schedule = NoiseSchedule.from_config(CONFIG, 'v_prediction', zero_terminal_snr=True)
    result = loss(dict(type='HuberLoss', schedule='snr', delta=0.2), schedule=schedule)
    torch.testing.assert_close(result[2], loss(dict(type='HuberLoss', delta=0.2))[2], rtol=1e-7, atol=0)
    assert result.isfinite().all()


@pytest.mark.parametrize('cfg', [dict(type='L2Loss'), dict(type='L1Loss'), dict(type='HuberLoss')])
def test_low_precision_is_computed_in_fp32(cfg):
    low = loss(cfg, torch.bfloat16)
    exact = LOSSES.build(cfg)(PREDICTION.bfloat16().double(), TARGET.bfloat16().double(), T, SCHEDULE)
    assert low.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(('cfg', 'word'), [
    (dict(schedule='exponentiel'), "Did you mean 'exponential'"), (dict(delta=0), 'delta=0'),
    (dict(delta=2, schedule='exponential'), 'at most 1'), (dict(delta=2, schedule='snr'), 'at most 1')])
def test_what_is_refused(cfg, word):
    with pytest.raises(ValueError, match=word):
        LOSSES.build(dict(type='HuberLoss', **cfg))
