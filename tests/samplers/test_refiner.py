"""A base and its refiner, as experts or in sequence: bitwise stock's pipelines that share a generator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from parity import PROMPTS, SOLVERS, ByHand, generators, images, picture_batch, stock, stock_like
from torch import Tensor

from diffengine_sdxl.inference.stages import Stage, run
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Batch, Start
from diffengine_sdxl.testing import write_tiny_refiner, write_tiny_sdxl

TEXTS, SEEDS, SIZE = PROMPTS[:2], [3, 1], (40, 56)
PICTURES = images(2, SIZE)
MASK = (images(2, SIZE, channels=1, seed=9) > 0.5).float()
STARTS = {'text-to-image': None, 'image-to-image': Start(image=PICTURES * 2 - 1),
          'inpainting': Start(image=PICTURES * 2 - 1, mask=MASK)}
#: The pipelines of the first and the second stage, and their arguments.
TASKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    'text-to-image': ('StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline',
                      dict(height=SIZE[0], width=SIZE[1]), {}),
    'image-to-image': ('StableDiffusionXLImg2ImgPipeline', 'StableDiffusionXLImg2ImgPipeline',
                       dict(image=PICTURES, strength=0.9), {}),
    'inpainting': ('StableDiffusionXLInpaintPipeline', 'StableDiffusionXLInpaintPipeline', dict(
        image=PICTURES, strength=0.9, mask_image=MASK, height=SIZE[0], width=SIZE[1]), dict(
        mask_image=MASK, height=SIZE[0], width=SIZE[1]))}
#: Steps and fractions of denoising: of the base, of the refiner.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'experts': (dict(num_inference_steps=5, denoising_end=0.55), dict(num_inference_steps=5, denoising_start=0.55)),
    'afterwards': (dict(num_inference_steps=4), dict(num_inference_steps=5, strength=0.5))}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_refiner(tmp_path_factory.mktemp('tiny') / 'refiner')


@pytest.fixture(scope='module')
def pair(tiny_base: Path, folder: Path) -> tuple[SDXL, SDXL]:
    """Our models, which share the second text encoder and the VAE."""
    base = SDXL(pretrained=str(tiny_base))
    refiner = SDXL(pretrained=str(folder), shared_components=['text_encoder_2', 'vae'], base_model=base)
    assert refiner.vae is base.vae and refiner.text_encoder_2 is base.text_encoder_2 and refiner.text_encoder is None
    return base, refiner


@pytest.fixture(scope='module')
def stocks(tiny_base: Path, folder: Path) -> tuple[Any, Any]:
    """Stock pipelines that share them too."""
    base = stock(tiny_base)
    return base, stock(folder, 'StableDiffusionXLImg2ImgPipeline', vae=base.vae, text_encoder_2=base.text_encoder_2)


def refined(**changes: Any) -> Batch:
    """The refiner's batch: the same, with aesthetic scores in place of the target size."""
    ids = [torch.tensor([[*SIZE, 0, 0, score]] * 2) for score in (6.0, 2.5)]
    return picture_batch(TEXTS, SEEDS, SIZE, time_ids=ids[0], negative_time_ids=ids[1], **changes)


def sampler(solver: str, scale: float = 5.0, **settings: Any) -> Sampler:
    return Sampler(SOLVERS[solver], guidances=[dict(type='CFG', scale=scale)], **settings)


def both(stocks: tuple[Any, Any], task: str, mode: str, solver: str) -> Tensor:
    """Latents of stock's two pipelines, to which the same generators are given."""
    pipes = [stock_like(one, cls, SOLVERS[solver]) for one, cls in zip(stocks, TASKS[task], strict=False)]
    shared, (first, second) = generators(SEEDS), MODES[mode]
    call: dict[str, Any] = dict(guidance_scale=5.0, output_type='latent', generator=shared)
    latents = pipes[0](TEXTS, **TASKS[task][2], **first, **call).images
    if 'denoising_start' in second and 'Inpaint' in TASKS[task][1]:
        second = {**second, 'strength': 0.9}  # which it ignores
    return pipes[1](TEXTS, image=latents, **TASKS[task][3], **second, **call).images


CASES_OF = [('text-to-image', solver) for solver in SOLVERS] + [
    (task, solver) for task in list(TASKS)[1:] for solver in ('euler', 'ancestral', 'dpm++ 2m', 'heun')]


@pytest.mark.parametrize(('task', 'solver'), CASES_OF)
def test_both_modes_are_stocks(pair: tuple[SDXL, SDXL], stocks: tuple[Any, Any], task: str, solver: str) -> None:
    """As experts, where strength is ignored, and one after the other."""
    made = []
    for mode, (first, second) in MODES.items():
        expected = both(stocks, task, mode, solver)
        before = {} if STARTS[task] is None else dict(strength=0.9)
        done: list[tuple[int, int]] = []
        ignored = dict(strength=0.2) if mode == 'experts' else {}
        asked = picture_batch(TEXTS, SEEDS, SIZE, start=STARTS[task])
        stages = (Stage(pair[0], asked, sampler(solver, **first, **before)),
                  Stage(pair[1], refined(), sampler(solver, **second, **ignored)))
        made.append(run(*stages, lambda i, n, done=done: done.append((i, n))))
        assert torch.isfinite(expected).all() and torch.equal(made[-1], expected)
        assert done[-1][0] == done[-1][1] and [i for i, _ in done].count(1) == 2
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_a_refiner_without_a_base(folder: Path) -> None:
    """On an image, with its own text encoder and VAE, with and without guidance, negative prompts, custom scores.

    Its encoder is the second one, and reads the first prompt whatever there is for the second, as stock's.
    """
    refiner, pipeline = SDXL(pretrained=str(folder)), stock(folder, 'StableDiffusionXLImg2ImgPipeline')
    two, negative_two = ['x', 'y'], ['p', 'q']
    for scale, score in ((5.0, 6.0), (1.0, 6.0), (5.0, 1.0)):
        expected = pipeline(two, 'unread', image=PICTURES, strength=0.8, num_inference_steps=4, guidance_scale=scale,
                            negative_prompt=negative_two, aesthetic_score=score, output_type='latent',
                            generator=generators(SEEDS)).images
        batch = refined(start=Start(image=PICTURES * 2 - 1), negative_text=['ugly'] * 2)
        batch = replace(batch, time_ids=torch.tensor([[*SIZE, 0, 0, score]] * 2))
        one = sampler('euler', scale, num_inference_steps=4, strength=0.8)
        got = one(refiner, replace(batch, text=two, text_2=['unread'] * 2, negative_text=negative_two))
        assert torch.equal(got, expected) and not torch.equal(got, one(refiner, batch))


def test_guidances_on_a_refiner(pair: tuple[SDXL, SDXL], stocks: tuple[Any, Any]) -> None:
    """SAG's map is that of its own middle, an eighth of the latents; PAG beside it. Against a loop by hand, 1e-5."""
    size = (80, 96)
    latents = torch.randn((2, 4, 10, 12), generator=torch.Generator().manual_seed(4))
    pipe = stock_like(stocks[1], 'StableDiffusionXLImg2ImgPipeline', SOLVERS['euler'])
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.set_begin_index(2)
    batch = replace(refined(start=Start(latents=latents)), size=size)
    reference = ByHand(pipe, TEXTS, (batch.time_ids, batch.negative_time_ids))
    always = (0.0, 1.0)
    expected = reference(latents, first=2, cfg=(5.0, always), sag=(0.75, always), pag=(2.0, always))
    guidances = [dict(type='CFG', scale=5.0), dict(type='SAG'), dict(type='PAG', scale=2.0)]
    got = Sampler(SOLVERS['euler'], 4, guidances, denoising_start=0.5)(pair[1], batch)
    assert reference.margin > 1e-5 and float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_bases_adapters_do_not_act_in_the_refiner(tiny_base: Path, folder: Path, stocks: Any) -> None:
    """A LoRA in the shared text encoder is the base's; it is back afterwards, also after an error."""
    case = CASES['lora_everywhere']
    base = shaken(build(tiny_base, dict(a=case.config)), case)
    refiner = SDXL(pretrained=str(folder), shared_components=['text_encoder_2', 'vae'], base_model=base)
    first = Stage(base, picture_batch(TEXTS, SEEDS, SIZE), sampler('euler', num_inference_steps=3))
    second = Stage(refiner, refined(), sampler('euler', num_inference_steps=4, strength=0.5))
    shared = generators(SEEDS)
    latents = first.sampler(base, first.batch, None, shared)
    expected = stock_like(stocks[1], 'StableDiffusionXLImg2ImgPipeline', SOLVERS['euler'])(
        TEXTS, image=latents, strength=0.5, num_inference_steps=4, guidance_scale=5.0, output_type='latent',
        generator=shared).images
    assert torch.equal(run(first, second), expected)
    # Alone it would be: the encoder is the base's, LoRA and all.
    noisy, drawn = replace(second.batch, start=Start(latents=latents)), generators(SEEDS)
    first.sampler(base, first.batch, None, drawn)
    assert not torch.equal(second.sampler(refiner, noisy, None, drawn), expected)
    assert not base.adapters_disabled and torch.equal(first.sampler(base, first.batch), latents)
    hook = refiner.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(first, second)
    hook.remove()
    assert not base.adapters_disabled and torch.equal(first.sampler(base, first.batch), latents)


def test_another_base_as_the_second_stage(tiny_base: Path, tmp_path: Path) -> None:
    """Another base with its own parts, two text encoders and six time ids."""
    other = write_tiny_sdxl(tmp_path / 'other', seed=5)
    base, second = SDXL(pretrained=str(tiny_base)), SDXL(pretrained=str(other))
    shared = generators(SEEDS)
    call: dict[str, Any] = dict(guidance_scale=5.0, output_type='latent', generator=shared, num_inference_steps=4)
    latents = stock(tiny_base)(TEXTS, height=SIZE[0], width=SIZE[1], **call).images
    expected = stock(other, 'StableDiffusionXLImg2ImgPipeline')(TEXTS, image=latents, **call).images
    batch = picture_batch(TEXTS, SEEDS, SIZE)
    got = run(Stage(base, batch, sampler('euler', num_inference_steps=4)),
              Stage(second, batch, sampler('euler', num_inference_steps=4)))
    assert torch.equal(got, expected)


def test_latents_of_another_kind_are_refused(pair: tuple[SDXL, SDXL], tmp_path: Path) -> None:
    other = SDXL(pretrained=str(write_tiny_sdxl(tmp_path / 'other', vae_blocks=3)))
    batch = picture_batch(TEXTS, SEEDS, SIZE)
    with pytest.raises(ValueError, match='of 4 channels, 4 times smaller than images; the base on 4, 8 times'):
        run(Stage(pair[0], batch, sampler('euler', num_inference_steps=1)), Stage(other, batch, sampler('euler')))


@pytest.mark.parametrize(('settings', 'sentence'), [
    (dict(shared_components=['vae']), "no other model to take 'vae' from"),
    (dict(shared_components=['text_encoder'], base_model='refiner'), "the other model has no 'text_encoder'"),
    (dict(shared_components=['vae'], base_model='refiner', trainable=['vae']), "'vae' cannot be shared and train"),
    (dict(shared_components=['text_encoder_3'], base_model='refiner'), "shared_components='text_encoder_3'")])
def test_what_cannot_be_shared(pair: Any, tiny_base: Path, settings: dict[str, Any], sentence: str) -> None:
    if 'base_model' in settings:
        settings = {**settings, 'base_model': pair[1]}
    with pytest.raises(ValueError, match=sentence):
        SDXL(pretrained=str(tiny_base), **settings)
