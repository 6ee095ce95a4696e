"""Image-to-image and inpainting against diffusers' SDXL pipelines: bitwise in fp32 on the CPU, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from parity import (
    PROMPTS,
    SOLVERS,
    first_copies,
    generators,
    image_embeds,
    images,
    load_adapters,
    picture_batch,
    stock,
    stock_like,
)
from torch import Tensor

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.structures import Start
from diffengine_sdxl.testing import write_tiny_sdxl

TEXTS, SEEDS = PROMPTS[:2], [3, 1]
#: Latents of odd sides, 5 x 7.
SIZE = (40, 56)
PICTURES = images(2, SIZE)
MASK = (images(2, SIZE, channels=1, seed=9) > 0.5).float()
LATENTS = torch.randn((2, 4, 5, 7), generator=torch.Generator().manual_seed(2))
PICTURE, PART = Start(image=PICTURES * 2 - 1), Start(image=PICTURES * 2 - 1, mask=MASK)
TO_IMAGE, INPAINT = 'StableDiffusionXLImg2ImgPipeline', 'StableDiffusionXLInpaintPipeline'


@pytest.fixture(scope='module')
def by_channels(model: SDXL, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[SDXL, Any]]:
    """Ours and stock's; a UNet of 9 channels sees the mask and what it leaves."""
    base = write_tiny_sdxl(tmp_path_factory.mktemp('nine') / 'base', in_channels=9)
    return {4: (model, pipeline), 9: (SDXL(pretrained=str(base)), stock(base))}


def ours(model: SDXL, start: Start | None, solver: str = 'euler', steps: int = 4, scale: float = 5.0,
         conditions: dict[str, Tensor] | None = None, size: tuple[int, int] = SIZE, **settings: Any) -> Tensor:
    """Latents of two pictures."""
    sampler = Sampler(SOLVERS[solver], steps, [dict(type='CFG', scale=scale)], **settings)
    return sampler(model, picture_batch(TEXTS, SEEDS, size, start=start, conditions=conditions or {}))


def theirs(pipeline: Any, steps: int = 4, scale: float = 5.0, strength: float | None = None,
           **call: Any) -> Tensor:
    """Latents of a stock pipeline; without `strength` it takes its own default."""
    if strength is not None:
        call['strength'] = strength
    return pipeline(TEXTS, num_inference_steps=steps, guidance_scale=scale, output_type='latent',
                    generator=generators(SEEDS), **call).images


def masked(image: Tensor = PICTURES, mask: Tensor = MASK, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """What stock's inpainting is asked besides."""
    return dict(image=image, mask_image=mask, height=size[0], width=size[1])


def assert_all_same(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Each of ours is bitwise stock's, finite, and no two settings make the same."""
    for got, expected in pairs:
        assert torch.isfinite(expected).all() and torch.equal(got, expected), float((got - expected).abs().max())
    for i, (got, _) in enumerate(pairs):
        assert all((got - other).abs().max() > 1e-3 for other, _ in pairs[:i])


@pytest.mark.parametrize('solver', SOLVERS)
def test_image_to_image_is_bitwise_stocks(model: SDXL, pipeline: Any, solver: str) -> None:
    """At the default strength, at more and at all; from latents too."""
    pipe = stock_like(pipeline, TO_IMAGE, SOLVERS[solver])
    strengths = (None, 0.8, 1.0)
    pairs = [(ours(model, PICTURE, solver, strength=s), theirs(pipe, image=PICTURES, strength=s)) for s in strengths]
    latents = ours(model, Start(latents=LATENTS), solver, strength=0.7), theirs(pipe, image=LATENTS, strength=0.7)
    assert_all_same([*pairs, latents])


@pytest.mark.parametrize('solver', SOLVERS)
@pytest.mark.parametrize('channels', [4, 9])
def test_inpainting_is_bitwise_stocks(by_channels: Any, solver: str, channels: int) -> None:
    """By blending and by channels, each sample with its mask; at the default strength (0.9999), at less and at all."""
    model, pipeline = by_channels[channels]
    pipe = stock_like(pipeline, INPAINT, SOLVERS[solver])
    strengths = (0.6,) if channels == 9 and solver not in ('euler', 'ancestral') else (None, 0.6, 1.0)
    pairs = [(ours(model, PART, solver, strength=s), theirs(pipe, strength=s, **masked())) for s in strengths]
    assert_all_same(pairs)
    kept = torch.nn.functional.interpolate(MASK, size=(5, 7)) == 0
    if channels == 4:  # from latents, and what is not repainted is what it was
        got = ours(model, Start(latents=LATENTS, mask=MASK), solver, strength=0.6)
        assert torch.equal(got, theirs(pipe, strength=0.6, **masked(LATENTS)))
        assert torch.equal(got[kept.expand_as(got)], LATENTS[kept.expand_as(got)])


@pytest.mark.parametrize('channels', [4, 9])
def test_without_guidance_and_with_noise_of_ddim(by_channels: Any, channels: int) -> None:
    """One row a picture; eta is DDIM's."""
    model, pipeline = by_channels[channels]
    more: dict[str, Any] = dict(scale=1.0, strength=0.8, eta=0.7)
    to_image, inpaint = (stock_like(pipeline, cls, SOLVERS['ddim']) for cls in (TO_IMAGE, INPAINT))
    pairs = [(ours(model, PART, 'ddim', **more), theirs(inpaint, **masked(), **more))]
    if channels == 4:
        pairs.append((ours(model, PICTURE, 'ddim', **more), theirs(to_image, image=PICTURES, **more)))
    assert_all_same(pairs)


def test_custom_starting_noise(model: SDXL, pipeline: Any) -> None:
    """Text-to-image: stock's `latents`. Beside a picture it takes the place of what the seeds would give."""
    pipe = stock_like(pipeline, 'StableDiffusionXLPipeline', SOLVERS['ancestral'])
    expected = theirs(pipe, latents=LATENTS, height=SIZE[0], width=SIZE[1])
    assert torch.equal(ours(model, Start(noise=LATENTS), 'ancestral'), expected)
    for start in (PICTURE, PART):
        drawn = generators(SEEDS)
        model.encode_images(PICTURES, drawn)
        noise = torch.cat([torch.randn((1, 4, 5, 7), generator=g) for g in drawn])
        same, other, expected = (ours(model, replace(start, noise=n), strength=0.6) for n in (noise, LATENTS, None))
        assert torch.equal(same, expected) and not torch.equal(other, expected)


@pytest.mark.parametrize('solver', ['ancestral', 'dpm++ 2m'])
def test_controlnets_are_bitwise_stocks(tiny_base: Path, pipeline: Any, tmp_path: Path, solver: str) -> None:
    """With both tasks; diffusers' controlnet pipelines."""
    from diffusers import ControlNetModel
    case = CASES['controlnet']
    model = shaken(build(tiny_base, dict(a=case.config)), case)
    model.adapters['a'].save(tmp_path)
    net = ControlNetModel.from_pretrained(tmp_path).requires_grad_(False)
    shown = images(2, SIZE, seed=6)
    more: dict[str, Any] = dict(strength=0.7, controlnet_conditioning_scale=1.0, control_image=shown)
    to_image, inpaint = (stock_like(pipeline, cls, SOLVERS[solver], controlnet=net) for cls in (
        'StableDiffusionXLControlNetImg2ImgPipeline', 'StableDiffusionXLControlNetInpaintPipeline'))
    got = [ours(model, s, solver, conditions={'conditioning_image': shown}, strength=0.7) for s in (PICTURE, PART)]
    expected = [theirs(to_image, image=PICTURES, **more), theirs(inpaint, **masked(), **more)]
    assert_all_same(list(zip(got, expected, strict=True)))


@pytest.mark.parametrize(('kind', 'in_part'), [('ip_adapter', False), ('ip_adapter_plus', True)])
def test_image_prompts_and_loras_are_bitwise_stocks(tiny_base: Path, tmp_path: Path, kind: str, in_part: bool) -> None:
    """An IP-Adapter, also within a mask, beside two LoRAs at two strengths, one of them in the text encoders too."""
    size = (64, 64)
    lora, everywhere = CASES['lora'], CASES['lora_everywhere']
    ip = {**CASES[kind].config, 'scale': 0.7, **({'mask': 'where'} if in_part else {})}
    model = shaken(build(tiny_base, dict(a={**lora.config, 'scale': 0.8}, b=everywhere.config, c=ip)),
                   lora, everywhere, CASES[kind])
    pipeline = stock(tiny_base)
    load_adapters(pipeline, model, tmp_path)
    references, pictures = images(2, seed=6), images(2, size)
    mask = (images(2, size, channels=1, seed=9) > 0.5).float()
    null, own = image_embeds(tiny_base.parent / 'image_encoder', references, plus=kind == 'ip_adapter_plus')
    call: dict[str, Any] = dict(ip_adapter_image_embeds=[torch.cat([null, own])], strength=0.8)
    conditions = {'reference': references}
    if in_part:
        half = torch.zeros(1, 1, *size)
        half[..., 24:] = 1
        call['cross_attention_kwargs'] = {'ip_adapter_masks': [half]}
        conditions['where'] = half.expand(2, -1, -1, -1)
    pairs = []
    for start, cls, given in ((Start(image=pictures * 2 - 1), TO_IMAGE, dict(image=pictures)),
                              (Start(image=pictures * 2 - 1, mask=mask), INPAINT, masked(pictures, mask, size))):
        pipe = stock_like(pipeline, cls, SOLVERS['ancestral'])
        hook = first_copies(pipe, 2)
        pairs.append((ours(model, start, 'ancestral', size=size, conditions=conditions, strength=0.8),
                      theirs(pipe, **given, **call)))
        hook.remove()
    assert_all_same(pairs)


@pytest.mark.parametrize('channels', [4, 9])
def test_an_image_does_not_depend_on_its_batch(by_channels: Any, channels: int) -> None:
    """Image k of a batch of 4 against itself alone, with noise in every step: 1e-5, as torch's kernels for one row and
    for several round differently."""
    model = by_channels[channels][0]
    seeds, prompts = [7, 3, 9, 5], [*PROMPTS, 'a frog']
    image, mask = images(4, SIZE) * 2 - 1, (images(4, SIZE, channels=1, seed=9) > 0.5).float()
    sampler = Sampler(SOLVERS['ancestral'], 3, strength=0.9)
    together = sampler(model, picture_batch(prompts, seeds, SIZE, start=Start(image=image, mask=mask)))
    for k in range(4):
        start = Start(image=image[k:k + 1], mask=mask[k:k + 1])
        alone = sampler(model, picture_batch(prompts[k:k + 1], seeds[k:k + 1], SIZE, start=start))
        torch.testing.assert_close(alone, together[k:k + 1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, together[k - 1:k or None], rtol=0.1)


@pytest.mark.parametrize(('start', 'settings', 'sentence'), [
    (PICTURE, dict(strength=0.01), 'strength=0.01 leaves none of 4 steps to do'),
    (Start(mask=MASK), {}, 'There is a mask_image but no image to inpaint'),
    (Start(image=PICTURES[:1]), {}, r'image must be \[2, 3, 40, 56\] for images of 40 x 56; it is \[1, 3, 40, 56\]'),
    (Start(latents=LATENTS[..., :5]), {}, r'starting latents must be \[2, 4, 5, 7\].*it is \[2, 4, 5, 5\]'),
    (Start(noise=LATENTS[:, :3]), {}, r'starting noise \(latents\) must be \[2, 4, 5, 7\].*\[2, 3, 5, 7\]'),
    (replace(PICTURE, mask=MASK[..., :32]), {}, r'mask_image must be \[2, 1, 40, 56\].*\[2, 1, 40, 32\]'),
    (None, dict(denoising_start=0.5), 'denoising_start=0.5 needs a noisy image to start from')])
def test_inputs_that_do_not_fit_are_refused(model: SDXL, start: Start | None, settings: dict[str, Any],
                                      sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ours(model, start, **settings)


@pytest.mark.parametrize(('start', 'sentence'), [
    (None, 'made to inpaint.*takes a mask.*mask_image'), (PICTURE, 'made to inpaint.*takes a mask'),
    (Start(latents=LATENTS, mask=MASK), 'give the image itself as `image`, not latents')])
def test_a_unet_of_nine_channels_needs_image_and_mask(by_channels: Any, start: Start | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ours(by_channels[9][0], start)


@pytest.mark.parametrize('settings', [dict(strength=0.0), dict(strength=1.2), dict(denoising_start=-0.1),
                                      dict(denoising_end=1.5)])
def test_fractions_are_above_0_and_at_most_1(settings: dict[str, float]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=rf'{name}={value} must be above 0 and at most 1'):
        Sampler(**settings)  # type: ignore[arg-type]


def test_one_generator_per_image(model: SDXL) -> None:
    for num in (1, 4):
        with pytest.raises(ValueError, match=rf'{num} generator\(s\) for 2 images'):
            Sampler(None, 2)(model, picture_batch(TEXTS, SEEDS, SIZE), generators=generators([1] * num))
