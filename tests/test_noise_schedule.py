"""The noise schedule against diffusers' DDPMScheduler and compute_snr."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.noise_schedule import NoiseSchedule

SDXL = {'_class_name': 'EulerDiscreteScheduler', 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085,
        'beta_end': 0.012, 'num_train_timesteps': 1000, 'prediction_type': 'epsilon', 'interpolation_type': 'linear',
        'timestep_spacing': 'leading', 'steps_offset': 1, 'use_karras_sigmas': False}
CONFIGS = [SDXL, {**SDXL, 'beta_schedule': 'linear'}, {**SDXL, 'beta_schedule': 'squaredcos_cap_v2'},
           {**SDXL, 'num_train_timesteps': 20}, {'trained_betas': [0.001, 0.01, 0.1, 0.5], 'num_train_timesteps': 4}]
T = torch.tensor([0, 1, 400, 998, 999])


def tensors(dtype=torch.float32, num=5):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(num, 4, 6, 5, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('zero', [False, True])
def test_alpha_bar_is_bitwise_that_of_diffusers(config, zero):
    reference = DDPMScheduler.from_config({**config, 'rescale_betas_zero_snr': zero}).alphas_cumprod
    for schedule in (NoiseSchedule.from_config(config, 'v_prediction', zero_terminal_snr=zero),
                     NoiseSchedule.from_config({**config, 'rescale_betas_zero_snr': zero}, 'v_prediction')):
        assert torch.equal(schedule.alphas_cumprod, reference) and reference.dtype == torch.float32
        assert schedule.num_train_timesteps == len(reference)
        assert schedule.zero_terminal_snr is zero and (float(reference[-1]) == 0) is zero
        assert schedule.config['rescale_betas_zero_snr'] is zero


@pytest.mark.parametrize('zero', [False, True])
def test_alpha_bar_between_timesteps_is_that_of_the_solvers_sigma(zero):
    """Karras sigmas lie between those of training; a variance-preserving input of such a step has 1 / (1 + sigma^2)."""
    schedule = NoiseSchedule.from_config(SDXL, 'v_prediction', zero_terminal_snr=zero)
    solver = EulerDiscreteScheduler.from_config({**schedule.config, 'timestep_spacing': 'trailing',
                                                 'use_karras_sigmas': True})
    solver.set_timesteps(30)
    t, expected = solver.timesteps, 1 / (1 + solver.sigmas[:-1].double() ** 2)
    fractional = t != t.round()
    assert fractional.sum() > 20 and (not zero or t[fractional].max() > 998)
    # The scheduler's timesteps are fp32, to 6e-5 near 1000, where one step changes alpha-bar by a factor.
    torch.testing.assert_close(schedule.alpha_bar(t)[fractional].double(), expected[fractional], rtol=1e-4, atol=0)
    whole = torch.tensor([0.0, 1, 400, 998, 999])
    assert torch.equal(schedule.alpha_bar(whole), schedule.alpha_bar(T))
    assert schedule.alpha_bar(t[1]).shape == () and schedule.alpha_bar(t[:2], torch.zeros(2, 4, 1)).shape == (2, 1, 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('zero', [False, True])
def test_noise_and_velocity_are_bitwise_those_of_diffusers(dtype, zero):
    reference = DDPMScheduler.from_config({**SDXL, 'rescale_betas_zero_snr': zero})
    schedule = NoiseSchedule.from_config(SDXL, 'v_prediction', zero_terminal_snr=zero)
    x0, noise = tensors(dtype)
    assert torch.equal(schedule.add_noise(x0, noise, T), reference.add_noise(x0, noise, T))
    assert torch.equal(schedule.target(x0, noise, T), reference.get_velocity(x0, noise, T))
    assert schedule.add_noise(x0, noise, T).dtype == dtype


def test_low_precision_is_fp32_rounded_once():
    schedule = NoiseSchedule.from_config(SDXL, 'v_prediction')
    x0, noise = tensors(torch.bfloat16)
    for method in (schedule.add_noise, schedule.target):
        assert torch.equal(method(x0, noise, T), method(x0.float(), noise.float(), T).bfloat16())


def test_targets_of_epsilon_and_sample():
    x0, noise = tensors()
    assert NoiseSchedule.from_config(SDXL).target(x0, noise, T) is noise
    assert NoiseSchedule.from_config(SDXL, 'sample').target(x0, noise, T) is x0
    assert NoiseSchedule.from_config({**SDXL, 'prediction_type': 'sample'}).prediction_type == 'sample'


@pytest.mark.parametrize(('kind', 'zero'), [('epsilon', False), ('v_prediction', False), ('sample', False),
                                            ('v_prediction', True), ('sample', True)])
def test_the_true_target_leads_back_to_x0_and_noise(kind, zero):
    schedule = NoiseSchedule.from_config(SDXL, kind, zero_terminal_snr=zero)
    x0, noise = tensors(torch.float64)
    x_t, target = schedule.add_noise(x0, noise, T), schedule.target(x0, noise, T)
    torch.testing.assert_close(schedule.to_x0(target, x_t, T), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.to_eps(target, x_t, T), noise, rtol=0, atol=1e-11)
    assert torch.equal(schedule.to_x0(target[1:2], x_t[1:2], T[1]), schedule.to_x0(target, x_t, T)[1:2])


@pytest.mark.parametrize('zero', [False, True])
def test_snr_is_that_of_diffusers_and_zero_at_the_end(zero):
    reference = DDPMScheduler.from_config({**SDXL, 'rescale_betas_zero_snr': zero})
    schedule = NoiseSchedule.from_config(SDXL, 'v_prediction', zero_terminal_snr=zero)
    steps = torch.arange(1000)
    assert torch.equal(schedule.snr(steps), compute_snr(reference, steps))
    assert schedule.snr(steps).isfinite().all() and (float(schedule.snr(steps)[-1]) == 0) is zero


@pytest.mark.parametrize(('changed', 'arguments', 'words'), [
    ({}, {'zero_terminal_snr': True}, ['epsilon', 'zero_terminal_snr', 'v_prediction']),
    ({'rescale_betas_zero_snr': True}, {}, ['epsilon', 'rescale_betas_zero_snr']),
    ({}, {'prediction_type': 'v_predict'}, ["'v_predict'", "Did you mean 'v_prediction'"]),
    ({'beta_schedule': 'scaled_linaer'}, {}, ["'scaled_linaer'", "Did you mean 'scaled_linear'"]),
    ({'beta_start': 'low'}, {}, ['scheduler config is invalid'])])
def test_refused(changed, arguments, words):
    with pytest.raises(UserError) as error:
        NoiseSchedule.from_config({**SDXL, **changed}, **arguments)
    assert all(word in str(error.value) for word in words)
