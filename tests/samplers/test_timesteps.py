"""Custom timesteps, settings of distilled models, zero terminal SNR, denoising_start and denoising_end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PROMPTS, SOLVERS, generators, images, picture_batch, stock_like
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.samplers.schedulers import scheduler_class
from diffengine_sdxl.samplers.timesteps import select_timesteps, set_timesteps
from diffengine_sdxl.structures import Start

TEXTS, SEEDS, SIZE = PROMPTS[:2], [3, 1], (40, 56)
TEXT_TO_IMAGE, TO_IMAGE = 'StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline'
#: Every other step of Sabour et al. 2024 (Align Your Steps) for SDXL.
ALIGNED = [999, 730, 443, 193, 53]
ALIGNED_SIGMAS = [14.615, 3.771, 1.342, 0.555, 0.234, 0.029]


def ours(model: SDXL, scheduler: dict[str, Any], steps: int = 4, scale: float = 5.0, start: Start | None = None,
         rescale: float = 0.0, **settings: Any) -> Tensor:
    guidances = [dict(type='CFG', scale=scale), dict(type='Rescale', scale=rescale)]
    return Sampler(scheduler, steps, guidances, **settings)(model, picture_batch(TEXTS, SEEDS, SIZE, start=start))


def theirs(pipeline: Any, scheduler: dict[str, Any], steps: int = 4, scale: float = 5.0, rescale: float = 0.0,
           cls: str = TEXT_TO_IMAGE, **call: Any) -> Tensor:
    if cls == TEXT_TO_IMAGE:
        call.update(height=SIZE[0], width=SIZE[1])
    pipe = stock_like(pipeline, cls, scheduler)
    return pipe(TEXTS, num_inference_steps=steps, guidance_scale=scale, guidance_rescale=rescale,
                output_type='latent', generator=generators(SEEDS), **call).images


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all() and torch.equal(got, expected), float((got - expected).abs().max())


@pytest.mark.parametrize(('name', 'own'), [
    ('euler', dict(timesteps=ALIGNED)), ('euler', dict(sigmas=ALIGNED_SIGMAS)), ('heun', dict(timesteps=[951, 500, 3])),
    ('dpm++ 2m', dict(timesteps=ALIGNED)), ('lcm', dict(timesteps=[999, 749, 499, 249]))])
def test_custom_timesteps_and_sigmas(model: SDXL, pipeline: Any, name: str, own: dict[str, Any]) -> None:
    """Text-to-image; and image-to-image, where strength counts in them. Given steps make the number of steps moot."""
    assert_same(ours(model, SOLVERS[name], 50, **own), theirs(pipeline, SOLVERS[name], 50, **own))
    picture = images(2, SIZE)
    got = ours(model, SOLVERS[name], 50, start=Start(image=picture * 2 - 1), strength=0.5, **own)
    if name != 'heun':  # there stock leaves no step, see below
        assert_same(got, theirs(pipeline, SOLVERS[name], 50, cls=TO_IMAGE, image=picture, strength=0.5, **own))


@pytest.mark.parametrize('name', ['euler', 'heun'])
def test_the_schedulers_timesteps_as_custom_ones(model: SDXL, name: str) -> None:
    """They are the same as so many steps, from a picture too, also where a solver visits them twice."""
    start = Start(image=images(2, SIZE) * 2 - 1)
    for strength in (0.3, 0.5, 0.8, 1.0):
        own = ours(model, SOLVERS[name], 50, start=start, strength=strength, timesteps=[751, 501, 251, 1])
        assert torch.equal(own, ours(model, SOLVERS[name], 4, start=start, strength=strength))


def test_the_begin_index_where_timesteps_repeat(model: SDXL, pipeline: Any) -> None:
    """Ten steps over four timesteps: a scheduler that looks its place up by the timestep would skip some."""
    scheduler = dict(SOLVERS['dpm++ 2m'], use_karras_sigmas=True, num_train_timesteps=4)
    picture = images(2, SIZE)
    got = ours(model, scheduler, 10, start=Start(image=picture * 2 - 1), strength=0.4)
    assert_same(got, theirs(pipeline, scheduler, 10, cls=TO_IMAGE, image=picture, strength=0.4))


@pytest.mark.parametrize(('scheduler', 'steps', 'scale'), [
    (dict(type='EulerDiscreteScheduler', timestep_spacing='trailing'), 4, 0.0),
    (dict(type='EulerAncestralDiscreteScheduler', timestep_spacing='trailing'), 1, 0.0),
    (dict(type='LCMScheduler', original_inference_steps=40), 4, 1.0),
    (dict(type='TCDScheduler'), 4, 0.0)], ids=['Lightning', 'Turbo', 'LCM', 'TCD'])
def test_settings_of_distilled_models(model: SDXL, pipeline: Any, scheduler: dict[str, Any], steps: int,
                                      scale: float) -> None:
    """Few steps, no guidance; one step from a picture, too."""
    assert_same(ours(model, scheduler, steps, scale), theirs(pipeline, scheduler, steps, scale))
    picture, num = images(2, SIZE), max(steps, 2)
    got = ours(model, scheduler, num, scale, Start(image=picture * 2 - 1), strength=0.5)
    assert_same(got, theirs(pipeline, scheduler, num, scale, cls=TO_IMAGE, image=picture, strength=0.5))


@pytest.mark.parametrize('name', ['euler', 'ddim', 'dpm++ 2m', 'dpm++ sde', 'unipc', 'ancestral'])
def test_velocity_and_zero_terminal_snr(tiny_base: Path, pipeline: Any, name: str) -> None:
    """A base that predicts velocity at zero terminal SNR, rescaled as Lin et al. 2023 do."""
    own = dict(prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')
    model = SDXL(pretrained=str(tiny_base), prediction_type='v_prediction', zero_terminal_snr=True)
    got = ours(model, dict(SOLVERS[name], timestep_spacing='trailing'), scale=7.5, rescale=0.7)
    assert_same(got, theirs(pipeline, dict(SOLVERS[name], **own), scale=7.5, rescale=0.7))
    assert not torch.equal(got, ours(model, dict(SOLVERS[name], timestep_spacing='trailing'), scale=7.5))


@pytest.mark.parametrize('name', ['heun', 'lcm'])
def test_zero_terminal_snr_needs_a_scheduler_that_knows_it(tiny_base: Path, name: str) -> None:
    model = SDXL(pretrained=str(tiny_base), prediction_type='v_prediction', zero_terminal_snr=True)
    if name == 'lcm':  # it does
        assert torch.isfinite(ours(model, SOLVERS[name])).all()
        return
    with pytest.raises(ValueError, match='HeunDiscreteScheduler cannot sample a model with zero terminal SNR'):
        ours(model, SOLVERS[name])


@pytest.mark.parametrize('name', SOLVERS)
def test_denoising_end(model: SDXL, pipeline: Any, name: str) -> None:
    """As a fraction of the trained timesteps; noise is left; 1.0 runs all steps."""
    got = ours(model, SOLVERS[name], denoising_end=0.55)
    assert_same(got, theirs(pipeline, SOLVERS[name], denoising_end=0.55))
    if name == 'euler':
        assert torch.equal(ours(model, SOLVERS[name], denoising_end=1.0), ours(model, SOLVERS[name]))
    picture = images(2, SIZE)
    got = ours(model, SOLVERS[name], start=Start(image=picture * 2 - 1), strength=0.9, denoising_end=0.75)
    assert_same(got, theirs(pipeline, SOLVERS[name], cls=TO_IMAGE, image=picture, strength=0.9, denoising_end=0.75))


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize('steps', [5, 6, 9])
def test_both_halves_run_all_timesteps(name: str, steps: int) -> None:
    """What one leaves the other does, wherever it is cut. Heun's second part begins with a whole step (of two
    evaluations, the first at an even place), so as in diffusers it does one again."""
    config = dict(beta_schedule='scaled_linear', timestep_spacing='leading', steps_offset=1)
    for cut in (0.2, 0.3, 0.5, 0.8):
        schedulers = [scheduler_class(SOLVERS[name]['type']).from_config(config) for _ in range(2)]
        for scheduler in schedulers:
            set_timesteps(scheduler, steps, None, None)
        first = select_timesteps(schedulers[0], steps, denoising_end=cut)
        second = select_timesteps(schedulers[1], steps, denoising_start=cut)
        assert first.first == 0 and first.total == second.total == len(schedulers[0].timesteps)
        both = [*first.timesteps.tolist(), *second.timesteps.tolist()]
        if name != 'heun':
            assert both == schedulers[0].timesteps.tolist()
        else:
            assert second.first % 2 == 0 and second.first == len(first.timesteps) - 1
            assert second.timesteps.tolist() == schedulers[0].timesteps[second.first:].tolist()


def test_progress_counts_skipped_steps(model: SDXL) -> None:
    """From an image progress starts where strength says; callbacks count the steps to run."""
    seen: list[tuple[float, float]] = []
    done: list[tuple[int, int]] = []
    predict = model.predict
    model.predict = lambda x, t, c, progress, probes=None: (  # type: ignore[method-assign]
        seen.append(tuple(progress[0].tolist())), predict(x, t, c, progress, probes))[1]
    try:
        batch = picture_batch(TEXTS, SEEDS, SIZE, start=Start(image=images(2, SIZE) * 2 - 1))
        for name, steps, begins in (('euler', 5, (0.4, 0.6, 0.8)), ('heun', 3, (2 / 5, 3 / 5, 4 / 5))):
            seen.clear()
            done.clear()
            Sampler(SOLVERS[name], steps, strength=0.67)(model, batch, lambda i, total: done.append((i, total)))
            assert [begin for begin, _ in seen] == pytest.approx(begins)
            assert [end for _, end in seen] == pytest.approx([*begins[1:], 1.0])
            assert done == [(1, 3), (2, 3), (3, 3)]
    finally:
        del model.predict


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (dict(scheduler=dict(type='DDIMScheduler'), timesteps=[900, 1]), 'DDIMScheduler does not take custom timesteps'),
    (dict(scheduler=dict(type='LCMScheduler'), sigmas=[14.0, 0.5]), 'LCMScheduler does not take custom sigmas'),
    (dict(timesteps=[900], sigmas=[14.0]), 'timesteps or sigmas, not both'),
    (dict(denoising_start=0.8, denoising_end=0.8), 'denoising_start=0.8 must be below denoising_end=0.8')])
def test_settings_that_contradict_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(**arguments)


@pytest.mark.parametrize(('scheduler', 'settings', 'sentence'), [
    (SOLVERS['euler'], dict(denoising_end=0.1), 'denoising_end=0.1 leaves none of 4 steps to do'),
    (dict(SOLVERS['euler'], use_karras_sigmas=True), dict(timesteps=[900, 1]),
     r'EulerDiscreteScheduler cannot do timesteps=\[900, 1\]: .*karras'),
    (SOLVERS['lcm'], dict(steps=100), 'LCMScheduler cannot do 100 steps: .*')])
def test_steps_that_a_scheduler_refuses(model: SDXL, scheduler: dict[str, Any], settings: dict[str, Any],
                                            sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ours(model, scheduler, **settings)


def test_a_changed_copy() -> None:
    """Other settings are kept, and the sampler itself does not change."""
    active_range = (0.1, 0.9)
    sampler = Sampler(None, 7, [dict(type='Rescale', scale=0.2), dict(type='CFG', scale=4.0, active_range=active_range),
                                dict(type='SAG')], timesteps=[900, 3])
    new = sampler.changed(guidance_scale=6.0, guidance_rescale=0.0, num_inference_steps=3, strength=0.4, eta=None)
    kinds = {type(g).__name__: (g.scale, g.active_range) for g in new.guidances}
    assert kinds == {'CFG': (6.0, active_range), 'SAG': (0.75, (0.0, 1.0)), 'Rescale': (0.0, (0.0, 1.0))}
    assert (new.num_inference_steps, new.timesteps, new.strength, new.eta) == (3, None, 0.4, 0.0)
    assert (sampler.num_inference_steps, sampler.timesteps, sampler.strength) == (7, [900, 3], None)
    assert [type(g).__name__ for g in sampler.guidances] == ['Rescale', 'CFG', 'SAG']
    assert [g.scale for g in sampler.guidances] == [0.2, 4.0, 0.75]
    assert sampler.changed(sigmas=[14.0, 1.0]).timesteps is None
    assert [g.scale for g in Sampler(None, 2, []).changed(guidance_scale=3.0).guidances] == [3.0]
    with pytest.raises(ValueError, match='strength=2 must be above 0'):
        sampler.changed(strength=2)
    with pytest.raises(ValueError, match='DDIMScheduler does not take custom sigmas'):
        Sampler(SOLVERS['ddim']).changed(sigmas=[3.0, 1.0])
