"""The sampler against diffusers' SDXL pipelines: bitwise in fp32 on the CPU, latents and images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from parity import (
    PROMPTS,
    generators,
    images,
    picture_batch,
    sampler,
    set_scheduler,
    stock,
)

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.guidance import guidance_embedding, guide
from diffengine_sdxl.samplers.sampler import Sampler, evaluate
from diffengine_sdxl.structures import Batch, Start
from diffengine_sdxl.testing import write_tiny_sdxl

SEEDS = [3, 1, 4]
NEGATIVES = ['blurry', '', 'ugly, low quality']
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ('EulerDiscreteScheduler', {}), ('EulerDiscreteScheduler', dict(timestep_spacing='trailing')),
    ('EulerDiscreteScheduler', dict(use_karras_sigmas=True)), ('DDIMScheduler', {}),
    ('DDIMScheduler', dict(clip_sample=False, set_alpha_to_one=False)), ('DPMSolverMultistepScheduler', {}),
    ('DPMSolverMultistepScheduler', dict(use_karras_sigmas=True, algorithm_type='sde-dpmsolver++')),
    ('DPMSolverSinglestepScheduler', {}), ('EulerAncestralDiscreteScheduler', {}), ('UniPCMultistepScheduler', {}),
    ('HeunDiscreteScheduler', {}), ('KDPM2AncestralDiscreteScheduler', {}), ('LCMScheduler', {}), ('PNDMScheduler', {}),
    ('DDPMScheduler', {}), ('DEISMultistepScheduler', {}), ('TCDScheduler', {})]
IDS = ['-'.join([name.removesuffix('Scheduler'), *settings]) for name, settings in SCHEDULERS]


@pytest.fixture(autouse=True)
def fresh_scheduler(pipeline: Any) -> Any:
    before = pipeline.scheduler
    yield
    pipeline.scheduler = before


@pytest.mark.parametrize('scale', [5.0, 1.0])
@pytest.mark.parametrize(('name', 'settings'), SCHEDULERS, ids=IDS)
def test_latents_are_bitwise_stocks(model: SDXL, pipeline: Any, name: str, settings: dict[str, Any],
                                    scale: float) -> None:
    """Three prompts, each with its generator, at a size whose latents have odd sides."""
    set_scheduler(pipeline, name, **settings)
    expected = pipeline(PROMPTS, height=40, width=56, num_inference_steps=4, guidance_scale=scale,
                        generator=generators(SEEDS), output_type='latent').images
    got = sampler(name, 4, scale, **settings)(model, picture_batch(PROMPTS, SEEDS, (40, 56)))
    assert torch.isfinite(expected).all() and expected.shape == (3, 4, 5, 7)
    assert torch.equal(got, expected)


@pytest.mark.parametrize('scale', [5.0, 1.0])
@pytest.mark.parametrize('negative', [None, NEGATIVES])
def test_images_are_bitwise_stocks(model: SDXL, pipeline: Any, negative: list[str] | None, scale: float) -> None:
    """With and without negative prompts, decoded."""
    expected = pipeline(PROMPTS, negative_prompt=negative, height=64, width=64, num_inference_steps=3,
                        guidance_scale=scale, generator=generators(SEEDS), output_type='pt').images
    batch = picture_batch(PROMPTS, SEEDS, negative_text=negative)
    got = model.decode(sampler(steps=3, scale=scale)(model, batch))
    assert got.shape == (3, 3, 64, 64) and got.dtype == torch.float32
    assert torch.equal(got, expected)
    if negative and scale > 1:
        assert not torch.equal(got, model.decode(sampler(steps=3)(model, replace(batch, negative_text=None))))


@pytest.mark.parametrize('size', [(32, 48), (48, 32), (24, 88)])
def test_other_sizes(model: SDXL, pipeline: Any, size: tuple[int, int]) -> None:
    """Bitwise beside frozen stock weights; 1e-5 beside weights that require gradients, for which torch's matmul takes
    another kernel (see parity.stock)."""
    kwargs: dict[str, Any] = dict(height=size[0], width=size[1], num_inference_steps=2, output_type='latent')
    got = sampler(steps=2)(model, picture_batch(PROMPTS, SEEDS, size))
    assert torch.equal(got, pipeline(PROMPTS, generator=generators(SEEDS), **kwargs).images)
    pipeline.unet.requires_grad_(True)
    unfrozen = pipeline(PROMPTS, generator=generators(SEEDS), **kwargs).images
    pipeline.unet.requires_grad_(False)
    torch.testing.assert_close(got, unfrozen, rtol=1e-5, atol=1e-5)


def test_the_second_encoder_may_get_other_prompts(model: SDXL, pipeline: Any) -> None:
    """text_2 and negative_text_2 are prompt_2 and negative_prompt_2."""
    two, negative_two = ['x', 'y', 'z'], ['p', 'q', 'r']
    expected = pipeline(PROMPTS, two, negative_prompt=NEGATIVES, negative_prompt_2=negative_two, height=64, width=64,
                        num_inference_steps=2, generator=generators(SEEDS), output_type='latent').images
    batch = picture_batch(PROMPTS, SEEDS, text_2=two, negative_text=NEGATIVES, negative_text_2=negative_two)
    got = sampler(steps=2)(model, batch)
    assert torch.equal(got, expected)
    for field in ('text_2', 'negative_text_2'):
        assert not torch.equal(got, sampler(steps=2)(model, replace(batch, **{field: None})))


def test_sizes_and_crops_are_stocks(model: SDXL, pipeline: Any) -> None:
    """original_size, crops_coords_top_left and target_size are the time ids, in this order."""
    expected = pipeline(PROMPTS, original_size=(96, 72), crops_coords_top_left=(3, 5), target_size=(48, 40), height=64,
                        width=64, num_inference_steps=2, generator=generators(SEEDS), output_type='latent').images
    ids = torch.tensor([[96.0, 72.0, 3.0, 5.0, 48.0, 40.0]] * 3)
    assert torch.equal(sampler(steps=2)(model, picture_batch(PROMPTS, SEEDS, time_ids=ids)), expected)


def test_negative_sizes_are_stocks(model: SDXL, pipeline: Any) -> None:
    """For one picture: with more, stock orders time ids [n, p, n, p] beside embeddings [n, n, p, p]."""
    expected = pipeline('a cat', height=64, width=64, num_inference_steps=2, generator=generators([7]),
                        negative_original_size=(32, 40), negative_crops_coords_top_left=(1, 2),
                        negative_target_size=(56, 64), output_type='latent').images
    ids = torch.tensor([[32.0, 40.0, 1.0, 2.0, 56.0, 64.0]])
    batch = picture_batch(['a cat'], [7], negative_time_ids=ids)
    got = sampler(steps=2)(model, batch)
    assert torch.equal(got, expected)
    assert not torch.equal(got, sampler(steps=2)(model, replace(batch, negative_time_ids=None)))
    # Two pictures with negative sizes: each is what it is alone (up to what the batch size changes in fp32 sums).
    both = sampler(steps=2)(model, picture_batch(['a cat', 'b'], [7, 8], negative_time_ids=ids.repeat(2, 1)))
    torch.testing.assert_close(both[:1], got, rtol=1e-5, atol=1e-5)


def test_several_images_of_a_prompt(model: SDXL, pipeline: Any) -> None:
    """num_images_per_prompt is a prompt given several times."""
    expected = pipeline(PROMPTS[:2], num_images_per_prompt=2, height=64, width=64, num_inference_steps=2,
                        generator=generators([1, 2, 3, 4]), output_type='latent').images
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    batch = picture_batch(repeated, [1, 2, 3, 4])
    # Not bitwise from prompts: stock runs the text encoders on two rows and repeats them, we on four.
    torch.testing.assert_close(sampler(steps=2)(model, batch), expected, rtol=1e-5, atol=1e-5)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], num_images_per_prompt=2)
    embedded = replace(batch, text_embeds=text, pooled=pooled)
    assert torch.equal(sampler(steps=2)(model, embedded), expected)


def test_eta_of_ddim(model: SDXL, pipeline: Any) -> None:
    """DDIM's noise comes from each picture's generator, after its starting noise."""
    set_scheduler(pipeline, 'DDIMScheduler')
    expected = pipeline(PROMPTS, height=64, width=64, num_inference_steps=3, eta=0.6, generator=generators(SEEDS),
                        output_type='latent').images
    batch = picture_batch(PROMPTS, SEEDS)
    got = sampler('DDIMScheduler', 3, eta=0.6)(model, batch)
    assert torch.equal(got, expected)
    assert not torch.equal(got, sampler('DDIMScheduler', 3)(model, batch))


def test_precomputed_embeddings(model: SDXL, pipeline: Any) -> None:
    """text_embeds and pooled stand for the prompts."""
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    expected = pipeline(PROMPTS, height=64, width=64, num_inference_steps=2, generator=generators(SEEDS),
                        output_type='latent').images
    batch = picture_batch(['wrong'] * 3, SEEDS, text_embeds=text, pooled=pooled)
    assert torch.equal(sampler(steps=2)(model, batch), expected)


@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('name', ['EulerDiscreteScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler'])
def test_v_prediction(tiny_base: Path, pipeline: Any, name: str, zero: bool) -> None:
    """The option of the model reaches the scheduler; zero terminal SNR from pure noise on."""
    settings = dict(timestep_spacing='trailing')
    set_scheduler(pipeline, name, prediction_type='v_prediction', rescale_betas_zero_snr=zero, **settings)
    expected = pipeline(PROMPTS, height=64, width=64, num_inference_steps=3, generator=generators(SEEDS),
                        output_type='latent').images
    model = SDXL(pretrained=str(tiny_base), prediction_type='v_prediction', zero_terminal_snr=zero)
    got = sampler(name, 3, **settings)(model, picture_batch(PROMPTS, SEEDS))
    assert torch.isfinite(got).all() and torch.equal(got, expected)


def test_a_scheduler_that_cannot_sample_the_models_schedule_is_refused(tiny_base: Path) -> None:
    """Heun's has no zero terminal SNR: it would sample another noise schedule than the one that was trained."""
    model = SDXL(pretrained=str(tiny_base), prediction_type='v_prediction', zero_terminal_snr=True)
    for name in ('EulerDiscreteScheduler', 'DDIMScheduler', 'UniPCMultistepScheduler'):
        built = sampler(name).build_scheduler(model).alphas_cumprod
        torch.testing.assert_close(built, model.schedule.alphas_cumprod, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r'HeunDiscreteScheduler.*zero terminal SNR'):
        sampler('HeunDiscreteScheduler')(model, picture_batch(['a'], [1]))


def test_active_range_against_a_loop(model: SDXL, tiny_base: Path) -> None:
    """Outside its active range guidance is off: the loop written out with diffusers' classes, bitwise."""
    steps, pipeline = 5, stock(tiny_base)
    text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
    ids, scheduler = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3), pipeline.scheduler
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn((1, 4, 8, 8), generator=g) for g in generators(SEEDS)]) * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            row, added = scheduler.scale_model_input(x, t), {'text_embeds': pooled, 'time_ids': ids}
            if 1 <= i < 4:
                added = {'text_embeds': torch.cat([null_pooled, pooled]), 'time_ids': torch.cat([ids, ids])}
                u, c = pipeline.unet(torch.cat([row, row]), t, torch.cat([null, text]),
                                     added_cond_kwargs=added).sample.chunk(2)
                out = u + 5.0 * (c - u)
            else:
                out = pipeline.unet(row, t, text, added_cond_kwargs=added).sample
            x = scheduler.step(out, t, x).prev_sample
    assert torch.equal(sampler(steps=steps, active_range=(0.2, 0.8))(model, picture_batch(PROMPTS, SEEDS)), x)


#: Rows of the UNet's calls in six steps of `ranged`, and those without classifier-free guidance.
ROWS = [('cond', 'perturbed'), ('uncond', 'cond', 'perturbed'), ('uncond', 'cond', 'perturbed'), ('uncond', 'cond'),
        ('cond',), ('cond',)]


def ranged() -> Sampler:
    """PAG in the first half of six steps, classifier-free guidance from the second to the fourth."""
    return Sampler(None, 6, [dict(type='CFG', scale=4.0, active_range=(0.16, 0.67)),
                             dict(type='PAG', scale=2.0, active_range=(0.0, 0.5))], strength=1.0)


def calls(model: SDXL) -> tuple[list[str], list[Any]]:
    """A list that notes each call of what encodes, and the hooks to be taken off again."""
    seen: list[str] = []
    adapters = model.adapters
    parts = {'text_encoder': model.text_encoder, 'text_encoder_2': model.text_encoder_2,
             'T2I-Adapter': adapters['t2i_adapter'].net, 'image encoder': adapters['ip_adapter_plus'].encoder.net,
             'image projector': adapters['ip_adapter_plus'].projector,
             'ControlNet': adapters['controlnet'].net.controlnet_cond_embedding}
    return seen, [part.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, part in parts.items()]


def encoded_apart(model: SDXL, batch: Batch, channels: Any = None, embedding: Any = None) -> Any:
    """`ranged`, with an encoding of its own for each step and the rows that it needs."""
    loop, scheduler = ranged(), ranged().build_scheduler(model)
    scheduler.set_timesteps(6)
    x = torch.cat([torch.randn((1, 4, 8, 8), generator=g) for g in generators(batch.seed.tolist())])
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, (t, rows) in enumerate(zip(scheduler.timesteps, ROWS, strict=True)):
            if embedding is not None:
                rows = tuple(row for row in rows if row != 'uncond')
            conditioning = model.encode(batch, rows, project=True)
            conditioning.channels = None if channels is None else torch.cat([channels] * len(rows))
            conditioning.timestep_cond = None if embedding is None else embedding.expand(len(rows) * len(batch), -1)
            active = [g for g in loop.guidances if set(g.branches()) <= set(rows) and g.active(i / 6, (i + 1) / 6)]
            step = evaluate(model, scheduler.scale_model_input(torch.cat([x] * len(rows)), t), t, conditioning,
                                   torch.tensor([[i / 6, (i + 1) / 6]]), rows, active, x.dtype)
            x = scheduler.step(guide(active, step), t, x).prev_sample
    return x


def test_active_ranges_do_not_encode_again(tiny_base: Path) -> None:
    """Each encoder works as often as without active ranges, and the images are those of an encoding for each step."""
    kinds = ('controlnet', 'ip_adapter_plus', 'lora_everywhere', 't2i_adapter')
    model = shaken(build(tiny_base, {kind: CASES[kind].config for kind in kinds}), *(CASES[kind] for kind in kinds))
    batch = picture_batch(PROMPTS[:2], SEEDS[:2], negative_text=NEGATIVES[:2], conditions={
        key: images(2, seed=7 + i)
        for i, key in enumerate(sorted({CASES[kind].condition_key for kind in kinds} - {None}))})
    expected = encoded_apart(model, batch)
    seen, hooks = calls(model)
    got, counted = ranged()(model, batch), sorted(seen)
    seen.clear()
    always = Sampler(None, 6, [dict(type='CFG', scale=4.0), dict(type='PAG', scale=2.0)])(model, batch)
    for hook in hooks:
        hook.remove()
    assert counted == sorted(seen) and len(set(seen)) == 6 and seen.count('text_encoder') == 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - always).abs().max() > 1e-2


@pytest.mark.parametrize('kind', ['inpainting', 'distilled'])
def test_active_ranges_of_unets_with_more_inputs(tmp_path: Path, kind: str) -> None:
    """The mask and the masked image (9 channels), and the guidance scale, go with the rows."""
    wide = kind == 'inpainting'
    folder = write_tiny_sdxl(tmp_path / 'base', **(dict(in_channels=9) if wide else dict(time_cond_proj_dim=16)))
    model, batch = SDXL(pretrained=str(folder)), picture_batch(PROMPTS[:2], SEEDS[:2], negative_text=NEGATIVES[:2])
    if not wide:
        expected = encoded_apart(model, batch, embedding=guidance_embedding(4.0, 16))
        torch.testing.assert_close(ranged()(model, batch), expected, rtol=1e-5, atol=1e-5)
        return
    start = Start(image=images(2) * 2 - 1, mask=(images(2, channels=1, seed=9) > 0.5).float())
    mask = torch.nn.functional.interpolate(start.mask, size=(8, 8))
    shared = generators(SEEDS[:2])
    for g in shared:  # at full strength the noise comes first, then the sample of what is not repainted
        torch.randn((1, 4, 8, 8), generator=g)
    hidden = model.encode_images(start.image * (start.mask < 0.5), shared)
    expected = encoded_apart(model, batch, channels=torch.cat([mask, hidden], dim=1))
    torch.testing.assert_close(ranged()(model, replace(batch, start=start)), expected, rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_place(tiny_base: Path) -> None:
    """In any order of the batch, also with noise in every step, and alone; fp64, as kernels go by batch size."""
    model, order = SDXL(pretrained=str(tiny_base), dtype='float64'), [2, 0, 1]
    for name in ('EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler'):
        straight = sampler(name, 3)(model, picture_batch(PROMPTS, SEEDS))
        turned = sampler(name, 3)(model, picture_batch([PROMPTS[i] for i in order], [SEEDS[i] for i in order]))
        torch.testing.assert_close(turned, straight[order], rtol=1e-10, atol=1e-10)
        alone = sampler(name, 3)(model, picture_batch(PROMPTS[1:2], SEEDS[1:2]))
        torch.testing.assert_close(alone, straight[1:2], rtol=1e-10, atol=1e-10)
        assert (straight[0] - straight[1]).abs().max() > 0.1


def test_predict_mode(tiny_base: Path) -> None:
    """A dict per sample: key, seed, prompt, images in [0, 1]; the number of steps is reported."""
    model = SDXL(pretrained=str(tiny_base), sampler=dict(type='Sampler', num_inference_steps=2))
    batch = picture_batch(PROMPTS, SEEDS)
    out, done = model(batch, mode='predict'), []
    latents = model.sampler(model, batch, on_step=lambda i, total: done.append((i, total)))
    expected = model.decode(latents)
    assert done == [(1, 2), (2, 2)]
    for i, item in enumerate(out):
        assert (item['key'], item['seed'], item['prompt']) == (f'prompt {i}', SEEDS[i], PROMPTS[i])
        assert list(item['images']) == ['base'] and torch.equal(item['images']['base'], expected[i])
    assert 0 <= expected.min() and expected.max() <= 1 and len(out) == 3
    with pytest.raises(ValueError, match="mode='los' is unknown"):
        model(batch, mode='los')


def test_the_size_is_that_of_the_images(model: SDXL) -> None:
    """Without `size`, that of the images or the conditions."""
    batch = picture_batch(['a'], [1], size=(48, 72))
    expected = sampler(steps=1)(model, batch)
    assert expected.shape == (1, 4, 6, 9)
    assert torch.equal(sampler(steps=1)(model, replace(batch, size=None, img=images(1, (48, 72)))), expected)
    without = replace(batch, size=None, conditions={'depth': images(1, (48, 72))})
    assert torch.equal(sampler(steps=1)(model, without), expected)
    with pytest.raises(ValueError, match="give the samples 'size'"):
        sampler(steps=1)(model, replace(batch, size=None))
    for size in ((60, 64), (64, 4), (0, 64)):
        with pytest.raises(ValueError, match=rf'{size[0]} x {size[1]}.*8 must divide'):
            sampler(steps=1)(model, replace(batch, size=size))


@pytest.mark.parametrize(('scheduler', 'steps', 'sentence'), [
    (dict(type='EulerDiscretScheduler'), 4, "'EulerDiscretScheduler'.*Did you mean 'EulerDiscreteScheduler'"),
    (dict(type='AutoencoderKL'), 4, "'AutoencoderKL' is not a supported scheduler"),
    (dict(type='DDIMScheduler', clip_sampel=True), 4, "no setting 'clip_sampel'.*'clip_sample'"),
    (None, 0, 'num_inference_steps=0 must be at least 1')])
def test_a_wrong_setting_is_refused(scheduler: Any, steps: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(scheduler, steps)


def test_latents_that_are_not_finite_are_refused(model: SDXL) -> None:
    with pytest.raises(ValueError, match='not finite from step 2 of 2'):
        sampler(steps=2, scale=1e38)(model, picture_batch(['a'], [1]))


@pytest.mark.parametrize('name', ['DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'])
def test_the_first_step_is_the_first_where_timesteps_repeat(model: SDXL, pipeline: Any, name: str) -> None:
    """Many steps over few timesteps round to the same ones; a scheduler that looks its place up would skip one."""
    settings = dict(use_karras_sigmas=True, num_train_timesteps=4)
    set_scheduler(pipeline, name, **settings)
    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
    expected = pipeline(PROMPTS, height=64, width=64, num_inference_steps=10, generator=generators(SEEDS),
                        output_type='latent').images
    got = sampler(name, 10, **settings)(model, picture_batch(PROMPTS, SEEDS))
    assert torch.isfinite(expected).all() and torch.equal(got, expected)
