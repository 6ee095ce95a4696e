"""Every scheduler of diffusers: a picture that depends on its seed and inputs alone, or a refusal in words."""

from typing import Any

import diffusers
import pytest
import torch
from parity import PROMPTS, SOLVERS, images, picture_batch, set_scheduler
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers import schedulers
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch, Start

TEXTS, SEEDS, SIZE = PROMPTS[:2], [3, 1], (40, 56)
NAMES = sorted(name for name in dir(diffusers) if name.endswith('Scheduler'))
USABLE = """DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep
    EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver
    TCD UniPCMultistep"""
#: Reason -> whose it is.
REFUSED = {
    "its noise schedule is not SDXL's": """Amused BlockRefinement CMStochasticIterative CogVideoXDDIM CogVideoXDPM
        CosineDPMSolverMultistep DDPMWuerstchen DiscreteDDIM EDMDPMSolverMultistep EDMEuler EntropyBound
        FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM HeliosDMD Helios IPNDM KarrasVe
        LTXEulerAncestralRF MiniMaxH3 Piflow RFD4Proteina SCM ScoreSdeVe UnCLIP VQDiffusion""",
    'it goes from the image to noise': 'DDIMInverse DPMSolverMultistepInverse',
    'its steps need original_image and mask besides': 'RePaint'}


def expected(name: str) -> str | None:
    """Why it is refused; None: it is not."""
    for reason, short in REFUSED.items():
        if name.removesuffix('Scheduler') in short.split():
            return reason
    assert name.removesuffix('Scheduler') in USABLE.split(), (
        f'{name} is new in this diffusers: see whether it can be used, and enter it above')
    return None


def batch(task: str, rows: list[int]) -> Batch:
    """Some of the two pictures."""
    picture, mask = images(2, SIZE), (images(2, SIZE, channels=1, seed=9) > 0.5).float()
    start = None
    if task != 'text-to-image':
        start = Start(image=picture[rows] * 2 - 1, mask=mask[rows] if task == 'inpainting' else None)
    return picture_batch([TEXTS[i] for i in rows], [SEEDS[i] for i in rows], SIZE, start=start)


@pytest.mark.parametrize('name', NAMES)
def test_a_picture_of_its_own_seed_or_a_refusal(model: SDXL, name: str) -> None:
    """Finite, bitwise the same whatever the global generators; alone as in a batch to 1e-5 (kernels go by its size)."""
    if (reason := expected(name)) is not None:
        with pytest.raises(ValueError, match=rf'{name} cannot be used here: {reason}.*Take EulerDiscreteScheduler'):
            Sampler(dict(type=name))
        return
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


class OfGlobalNoise(diffusers.DDPMScheduler):
    """Draws what it adds from torch's own generator, as some do that take none."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return super().step(model_output, timestep, sample, None, return_dict)


class OfTheBatch(diffusers.DDPMScheduler):
    """Draws for all pictures from the first one's generator."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
             ) -> Any:
        return super().step(model_output, timestep, sample, generator[0], return_dict)


class Unfinished(diffusers.DDIMScheduler):
    """Fails in its steps."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        raise AttributeError('no such thing')


def test_rules_hold_for_schedulers_yet_to_come() -> None:
    """And trying one leaves the global generators as they were."""
    before = torch.get_rng_state()
    for cls in (OfGlobalNoise, OfTheBatch):
        assert schedulers.why_not(cls) == "its noise is not drawn from each picture's own seed"
    assert schedulers.why_not(Unfinished) == 'it fails when tried (no such thing)'
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(('scheduler', 'sentence'), [
    (dict(type='DPMSolverMultistepScheduler', algorithm_type='ddim'),
     "DPMSolverMultistepScheduler cannot be made with algorithm_type='ddim': "),
    (dict(type='DDIMScheduler', beta_schedule='cosine'), "DDIMScheduler cannot be made with beta_schedule='cosine'"),
    (dict(type='EulerDiscreteScheduler', use_karras_sigmas=True, use_exponential_sigmas=True), 'cannot be made with '),
    (dict(type='UniPCMultistepScheduler', use_flow_sigmas=True), 'use_flow_sigmas.*SDXL was not'),
    (dict(type='DEISMultistepScheduler', prediction_type='flow_prediction'), 'flow_prediction.*SDXL was not'),
    (dict(type='EulerDiscreteScheduler', prediction_type='x'), "prediction_type='x' is not known; choose of 'epsilon'"),
    (dict(type='EulerDiscreteScheduler', timestep_spacing='foo'), "cannot sample with timestep_spacing='foo': foo is"),
    (dict(type='Euler'), "'Euler' is not a scheduler of diffusers. Did you mean 'EulerAncestralDiscr"),
    (dict(type='DDIMSchedular'), "Did you mean 'DDIMScheduler'"), ('DDIMScheduler', 'scheduler.type=DDIMScheduler')])
def test_settings_with_which_none_can_be_made(scheduler: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(scheduler)


def test_the_prediction_is_the_models(model: SDXL, pipeline: Any) -> None:
    """A scheduler that took it for another one would sample what was not trained; 'sample' is for distilled UNets, and
    bitwise stock's."""
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
    """Where a scheduler's packages are missing diffusers has a dummy in its place, which knows their names."""
    dummy = type('LMSDiscreteScheduler', (), {'_backends': ['torch', 'no_such_package']})
    monkeypatch.setattr(diffusers, 'LMSDiscreteScheduler', dummy)
    with pytest.raises(ValueError, match=r'LMSDiscrete.* needs no_such_package, .*\(pip install no_such_package\)'):
        Sampler(dict(type='LMSDiscreteScheduler'))


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (dict(eta=0.3), r'eta=0.3: EulerDiscreteScheduler reads no eta; DDIMScheduler and TCDScheduler do'),
    (dict(scheduler=SOLVERS['ddim'], eta=1.5), r'eta=1.5 must be from 0 \(no noise\) to 1'),
    (dict(scheduler=SOLVERS['ddim'], eta=-0.1), 'eta=-0.1 must be from 0'),
    (dict(scheduler=SOLVERS['ddim'], eta=float('nan')), 'eta=nan must be from 0'),
    (dict(scheduler=SOLVERS['ddim'], eta='a'), "eta='a' must be from 0"),
    (dict(scheduler=SOLVERS['unipc'], sigmas=[3.0, 0.0]), 'UniPCMultistepScheduler takes no sigmas of your own'),
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
    (dict(sigmas=[3.0]), r'sigmas=\[3.0\]: the last one is where the way ends')])
def test_steps_and_noise_that_are_none(arguments: dict[str, Any], sentence: str) -> None:
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
def test_steps_beyond_what_the_model_knows(model: SDXL, name: str, steps: int, settings: dict[str, Any],
                                           sentence: str) -> None:
    start = Start(image=images(2, SIZE) * 2 - 1) if 'denoising_start' in settings else None
    with pytest.raises(ValueError, match=sentence):
        Sampler(SOLVERS[name], steps, **settings)(model, picture_batch(TEXTS, SEEDS, SIZE, start=start))


@pytest.mark.parametrize(('name', 'own'), [
    (name, own) for name in ('euler', 'heun', 'dpm++ 2m', 'lcm') for own in (dict(timesteps=[999]), dict(timesteps=[0]))
] + [('euler', dict(sigmas=(3.0, 0.0))), ('heun', dict(timesteps=(999.0, 1)))])
def test_the_shortest_ways_of_ones_own(model: SDXL, name: str, own: dict[str, Any]) -> None:
    """One step, from noise and from a picture; whole numbers may be written as floats."""
    for start in (None, Start(image=images(2, SIZE) * 2 - 1)):
        sampler = Sampler(SOLVERS[name], **own, strength=None if start is None else 1.0)
        assert torch.isfinite(sampler(model, picture_batch(TEXTS, SEEDS, SIZE, start=start))).all()
