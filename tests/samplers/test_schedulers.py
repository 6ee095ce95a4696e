"""The list of schedulers against a trial of every scheduler of diffusers; settings and steps that are refused."""

import copy
import inspect
from importlib.util import find_spec
from typing import Any

import diffusers
import pytest
import torch
from parity import PROMPTS, SOLVERS, images, picture_batch, set_scheduler
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.samplers.schedulers import SCHEDULER_ERRORS, SCHEDULERS, SDXL_CONFIG
from diffengine_sdxl.structures import Batch, Start

TEXTS, SEEDS, SIZE = PROMPTS[:2], [3, 1], (40, 56)
NAMES = sorted(name for name in dir(diffusers) if name.endswith('Scheduler'))


def batch(task: str, rows: list[int]) -> Batch:
    """Some of the two images."""
    image, mask = images(2, SIZE), (images(2, SIZE, channels=1, seed=9) > 0.5).float()
    start = None
    if task != 'text-to-image':
        start = Start(image=image[rows] * 2 - 1, mask=mask[rows] if task == 'inpainting' else None)
    return picture_batch([TEXTS[i] for i in rows], [SEEDS[i] for i in rows], SIZE, start=start)


def options_of(cls: Any) -> set[str]:
    """What a scheduler's steps take besides, by their signatures."""
    return ({'generator', 'eta'} & {*inspect.signature(cls.step).parameters}
            | {'noise_sampler_seed'} & {*inspect.signature(cls.__init__).parameters})


def final_latents(prepared: Any, key: str, batches: tuple[list[int], ...]) -> Tensor:
    """Four steps of two images, in these batches, with the global generators at `key`."""
    x_all, ends = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0)), []
    with rng.fork(key, 'scheduler'):
        for seeds in batches:
            scheduler = copy.deepcopy(prepared)  # some take a fifth of a second to make
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            if hasattr(scheduler, 'noise_sampler_seed'):
                scheduler.noise_sampler_seed = seeds
            options = {'generator': generators} if 'generator' in options_of(type(scheduler)) else {}
            x = scheduler.add_noise(x_all[seeds], x_all[seeds], scheduler.timesteps[:1].repeat(len(seeds)))
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t) * 0.5, t, x, **options, return_dict=False)[0]
            ends.append(x)
    return torch.cat(ends)


def samples_sdxl(cls: Any) -> bool:
    """Try a scheduler: SDXL's noise schedule, from noise to image, with noise from each image's own seed alone."""
    known = inspect.signature(cls.__init__).parameters
    try:
        scheduler = cls.from_config({k: v for k, v in SDXL_CONFIG.items() if k in known})
        scheduler.set_timesteps(4)
        expected = NoiseSchedule.from_config(SDXL_CONFIG).alphas_cumprod
        if not torch.allclose(scheduler.alphas_cumprod, expected, rtol=1e-4):
            return False
        if float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
            return False
        one, other, alone = (final_latents(scheduler, *how) for how in (
            ('one', ([0, 1],)), ('other', ([0, 1],)), ('one', ([0], [1]))))
    except SCHEDULER_ERRORS:
        return False
    return torch.equal(one, other) and torch.allclose(one, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_the_list_agrees_with_a_trial(name: str) -> None:
    cls = getattr(diffusers, name)
    if any(find_spec(package) is None for package in getattr(cls, '_backends', ())):
        pytest.skip(f'{name} needs {cls._backends}')
    assert samples_sdxl(cls) == (name in SCHEDULERS), f'change SCHEDULERS: diffusers has changed {name}'
    if name in SCHEDULERS:
        assert options_of(cls) == set(SCHEDULERS[name])
    else:
        with pytest.raises(ValueError, match=rf"type='{name}' cannot sample SDXL: it is made for other models.*LCMSch"):
            Sampler(dict(type=name))


@pytest.mark.parametrize('name', SCHEDULERS)
def test_an_image_depends_on_its_own_seed(model: SDXL, name: str) -> None:
    """Finite, bitwise the same whatever the global generators; alone as in a batch to 1e-5 (kernels go by its size)."""
    for task in ('text-to-image', 'image-to-image', 'inpainting'):
        sampler = Sampler(dict(type=name), 4, strength=None if task == 'text-to-image' else 0.6)

        def made(key: str, *rows: int, task: str = task, sampler: Sampler = sampler) -> Tensor:
            with rng.fork(key, 'test'):
                return sampler(model, batch(task, list(rows)))
        both, alone = made('a', 0, 1), made('b', 1)
        assert torch.isfinite(both).all() and float((both[1:] - alone).norm() / alone.norm()) < 1e-5, task
        assert float((both[0] - both[1]).norm() / both[0].norm()) > 0.1, task
        if task == 'image-to-image':
            assert torch.equal(made('c', 1), alone)


class GlobalNoise(diffusers.DDPMScheduler):
    """Draws its noise from torch's global generator."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return super().step(model_output, timestep, sample, None, return_dict)


class BatchNoise(diffusers.DDPMScheduler):
    """Draws the noise of all images from the first one's generator."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
             ) -> Any:
        return super().step(model_output, timestep, sample, generator[0], return_dict)


def test_the_trial_finds_noise_that_is_not_the_images_own() -> None:
    assert samples_sdxl(diffusers.DDPMScheduler)
    assert not samples_sdxl(GlobalNoise) and not samples_sdxl(BatchNoise)


def test_a_scheduler_class_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match="type='MySolver' is not a supported .*; your own classes cannot be used. "
                                         'Choose one of DDIMScheduler, .*UniPCMultistepScheduler'):
        Sampler(dict(type='MySolver'))


@pytest.mark.parametrize(('scheduler', 'sentence'), [
    (dict(type='DPMSolverMultistepScheduler', algorithm_type='ddim'),
     "DPMSolverMultistepScheduler cannot be made with algorithm_type='ddim': "),
    (dict(type='DDIMScheduler', beta_schedule='cosine'), "DDIMScheduler cannot be made with beta_schedule='cosine'"),
    (dict(type='EulerDiscreteScheduler', use_karras_sigmas=True, use_exponential_sigmas=True), 'cannot be made with '),
    (dict(type='UniPCMultistepScheduler', use_flow_sigmas=True), 'use_flow_sigmas.*SDXL was not'),
    (dict(type='DEISMultistepScheduler', prediction_type='flow_prediction'), 'flow_prediction.*SDXL was not'),
    (dict(type='EulerDiscreteScheduler', prediction_type='x'),
     "EulerDiscreteScheduler: prediction_type='x' is unknown; choose one of 'epsilon'"),
    (dict(type='EulerDiscreteScheduler', timestep_spacing='foo'), "cannot sample with timestep_spacing='foo': foo is"),
    (dict(type='Euler'), "'Euler' is not a supported scheduler of diffusers.* Did you mean 'EulerAncestralDiscr"),
    (dict(type='DDIMSchedular'), "Did you mean 'DDIMScheduler'"), ('DDIMScheduler', 'scheduler.type=DDIMScheduler')])
def test_settings_that_diffusers_refuses(scheduler: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(scheduler)


def test_the_prediction_is_the_models(model: SDXL, pipeline: Any) -> None:
    """Another prediction type than the trained one is refused, except 'sample' (distilled UNets), bitwise stock's."""
    euler = dict(type='EulerDiscreteScheduler')
    with pytest.raises(ValueError, match="prediction_type='v_prediction' contradicts the model's, 'epsilon'"):
        Sampler({**euler, 'prediction_type': 'v_prediction'}, 2)(model, batch('text-to-image', [0]))
    with pytest.raises(ValueError, match="prediction_type='sample' contradicts"):
        Sampler({**euler, 'prediction_type': 'sample'}, 2, [dict(type='SAG')])(model, batch('text-to-image', [0]))
    for kind in ('sample', 'epsilon'):
        ours = Sampler({**euler, 'prediction_type': kind}, 2)(model, batch('text-to-image', [1]))
        set_scheduler(pipeline, 'EulerDiscreteScheduler', prediction_type=kind)
        theirs = pipeline(TEXTS[1], height=SIZE[0], width=SIZE[1], num_inference_steps=2, output_type='latent',
                          generator=torch.Generator().manual_seed(SEEDS[1])).images
        assert torch.equal(ours, theirs)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a scheduler's packages are missing, diffusers has a dummy class that names them."""
    dummy = type('LMSDiscreteScheduler', (), {'_backends': ['torch', 'no_such_package']})
    monkeypatch.setattr(diffusers, 'LMSDiscreteScheduler', dummy)
    with pytest.raises(ValueError, match=r'LMSDiscrete.* needs no_such_package, .*\(pip install no_such_package\)'):
        Sampler(dict(type='LMSDiscreteScheduler'))


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (dict(eta=0.3), r'eta=0.3: EulerDiscreteScheduler ignores eta; use DDIMScheduler or TCDScheduler'),
    (dict(scheduler=SOLVERS['ddim'], eta=1.5), r'eta=1.5 must be from 0 \(no noise\) to 1'),
    (dict(scheduler=SOLVERS['ddim'], eta=-0.1), 'eta=-0.1 must be from 0'),
    (dict(scheduler=SOLVERS['ddim'], eta=float('nan')), 'eta=nan must be from 0'),
    (dict(scheduler=SOLVERS['ddim'], eta='a'), "eta='a' must be from 0"),
    (dict(scheduler=SOLVERS['unipc'], sigmas=[3.0, 0.0]), 'UniPCMultistepScheduler does not take custom sigmas'),
    (dict(num_inference_steps=2.5), 'num_inference_steps=2.5 must be'), (dict(strength='a'), "strength='a' must be"),
    (dict(timesteps=900), 'timesteps=900 must be a list'), (dict(timesteps=[]), r'timesteps=\[\] must be a list'),
    (dict(timesteps=[900, 3.5]), r'timesteps\[1\]=3.5 must be a whole number'),
    (dict(timesteps=[10 ** 400, 3.5]), r'timesteps\[1\]=3.5 must be'),
    (dict(timesteps=[900, 'x']), r"timesteps\[1\]='x' must be a whole number"),
    (dict(timesteps=[900, True]), r'timesteps\[1\]=True must be a whole number'),
    (dict(timesteps=[900, 901, 3]), r'timesteps\[1\]=901 must be below the one before it, 900'),
    (dict(timesteps=[900, 3, 3]), r'timesteps\[2\]=3 must be below the one before it, 3'),
    (dict(timesteps=[900, -1]), r'timesteps\[1\]=-1 must not be below 0'),
    (dict(sigmas=[3.0, float('nan')]), r'sigmas\[1\]=nan must be a number'),
    (dict(sigmas=[float('inf'), 1.0]), r'sigmas\[0\]=inf must be a number'),
    (dict(sigmas=[3.0, 5.0]), r'sigmas\[1\]=5.0 must be below the one before it, 3.0'),
    (dict(sigmas=[3.0, -1.0]), r'sigmas\[1\]=-1.0 must not be below 0'),
    (dict(sigmas=[3.0]), r'sigmas=\[3.0\] needs at least two numbers')])
def test_invalid_steps_and_eta(arguments: dict[str, Any], sentence: str) -> None:
    """In a config, and in a changed copy."""
    with pytest.raises(ValueError, match=sentence):
        Sampler(**arguments)
    with pytest.raises(ValueError, match=sentence):
        Sampler(arguments.pop('scheduler', None)).changed(**arguments)


@pytest.mark.parametrize(('name', 'steps', 'settings', 'sentence'), [
    ('euler', 4, dict(timesteps=[1000, 5]), r'timesteps\[0\]=1000 must be below 1000'),
    ('ddim', 1000, {}, 'DDIMScheduler cannot do 1000 steps: they would go from timestep 1000 to 1'),
    ('dpm++ 2m', 1000, {}, 'cannot do 1000 steps: they would go from timestep 1 to 1'),
    ('euler', 2000, {}, 'cannot do 2000 steps: they would go from timestep 1 to 1'),
    ('euler', 4, dict(denoising_start=1.0), 'denoising_start=1 leaves none of 4 steps'),
    ('heun', 4, dict(denoising_start=1.0), 'denoising_start=1 leaves none of 4 steps')])
def test_steps_beyond_the_trained_timesteps(model: SDXL, name: str, steps: int, settings: dict[str, Any],
                                           sentence: str) -> None:
    start = Start(image=images(2, SIZE) * 2 - 1) if 'denoising_start' in settings else None
    with pytest.raises(ValueError, match=sentence):
        Sampler(SOLVERS[name], steps, **settings)(model, picture_batch(TEXTS, SEEDS, SIZE, start=start))


@pytest.mark.parametrize(('name', 'steps'), [
    (name, dict(timesteps=[t])) for name in ('euler', 'heun', 'dpm++ 2m', 'lcm') for t in (999, 0)
] + [('euler', dict(sigmas=(3.0, 0.0))), ('heun', dict(timesteps=(999.0, 1)))])
def test_a_single_custom_step(model: SDXL, name: str, steps: dict[str, Any]) -> None:
    """From noise and from an image; whole numbers may be written as floats."""
    for start in (None, Start(image=images(2, SIZE) * 2 - 1)):
        sampler = Sampler(SOLVERS[name], **steps, strength=None if start is None else 1.0)
        assert torch.isfinite(sampler(model, picture_batch(TEXTS, SEEDS, SIZE, start=start))).all()
