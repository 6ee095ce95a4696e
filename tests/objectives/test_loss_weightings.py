"""Weightings against diffusers' script and sd-scripts, written out, at zero terminal SNR, and against each other."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import WEIGHTINGS

CONFIG = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
T = torch.arange(1000)
SNR = compute_snr(DDPMScheduler.from_config(CONFIG), T)


def weight(cfg, kind, zero=False):
    return WEIGHTINGS.build(cfg)(T, NoiseSchedule.from_config(CONFIG, kind, zero_terminal_snr=zero))


def min_snr(kind, gamma):
    weights = torch.stack([SNR, gamma * torch.ones(1000)], dim=1).min(dim=1)[0]
    return {'epsilon': weights / SNR, 'v_prediction': weights / (SNR + 1), 'sample': weights}[kind]


def debiased(kind):
    snr = torch.minimum(SNR, torch.full_like(SNR, 1000))
    return {'epsilon': 1 / torch.sqrt(snr), 'v_prediction': 1 / (snr + 1), 'sample': torch.sqrt(snr)}[kind]


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_formulas(kind):
    assert float(SNR.max()) > 1000 > float(SNR.min())
    torch.testing.assert_close(weight(dict(type='NoWeighting'), kind), torch.ones(1000), rtol=0, atol=0)
    for gamma in (5.0, 1.0):
        torch.testing.assert_close(weight(dict(type='MinSNR', gamma=gamma), kind), min_snr(kind, gamma), rtol=1e-6,
                                   atol=0)
    torch.testing.assert_close(weight(dict(type='MinSNR'), kind), min_snr(kind, 5.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight(dict(type='Debiased'), kind), debiased(kind), rtol=1e-6, atol=0)
    assert weight(dict(type='MinSNR'), kind).dtype == torch.float32


@pytest.mark.parametrize('cfg', [dict(type='NoWeighting'), dict(type='MinSNR'), dict(type='Debiased')])
@pytest.mark.parametrize('kind', ['v_prediction', 'sample'])
def test_zero_terminal_snr_gives_no_nan(cfg, kind):
    weights = weight(cfg, kind, zero=True)
    assert weights.isfinite().all()
    limit = {'NoWeighting': 1.0, 'MinSNR': 0.0, 'Debiased': 1.0 if kind == 'v_prediction' else 0.0}[cfg['type']]
    assert float(weights[-1]) == limit


def test_min_snr_of_epsilon_tends_to_one():
    class Noisy(NoiseSchedule):
        def snr(self, t):
            return torch.zeros(t.shape)
    assert WEIGHTINGS.build(dict(type='MinSNR'))(T[:2], Noisy(torch.tensor([0.9, 0.1]))).tolist() == [1.0, 1.0]


def test_min_snr_is_the_same_loss_for_all_prediction_types():
    """|eps error|^2 = snr |x0 error|^2 and |v error|^2 = (snr + 1) |x0 error|^2."""
    x0 = weight(dict(type='MinSNR'), 'sample')
    torch.testing.assert_close(weight(dict(type='MinSNR'), 'epsilon') * SNR, x0, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight(dict(type='MinSNR'), 'v_prediction') * (SNR + 1), x0, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight(dict(type='Debiased'), 'epsilon') * SNR.clamp(max=1000),
                               weight(dict(type='Debiased'), 'sample'), rtol=1e-5, atol=0)


def test_gamma_out_of_range():
    with pytest.raises(ValueError, match='gamma=0'):
        WEIGHTINGS.build(dict(type='MinSNR', gamma=0))
