"""SDXLInferencer against the stock pipelines with the same arguments: bitwise equal images in fp32 on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import (
    BASE,
    INPAINT,
    NOISE,
    PROMPT,
    SIZE,
    TO_IMAGE,
    Refined,
    asked,
    conditioned,
    config,
    mask,
    picture,
)
from parity import SOLVERS, generators, stock, stock_like
from PIL import Image
from torch import Tensor

from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.testing import draw_circle, write_tiny_sdxl

#: Of a size that nothing can make: stock cuts it down to 72 x 56 (width x height).
ODD = (75, 61)


def assert_all_same(pairs: list[tuple[Any, Any]]) -> None:
    """Each of ours is bitwise stock's, and no two settings make the same picture."""
    for number, (got, expected) in enumerate(pairs):
        assert torch.isfinite(expected).all()
        assert torch.equal(got, expected), (number, got.shape, expected.shape, float((got - expected).abs().max()))
    for i, (got, _) in enumerate(pairs):
        assert all(got.shape != other.shape or (got - other).abs().max() > 1e-4 for other, _ in pairs[:i]), i


#: What both are asked, in the same words.
CALLS: list[dict[str, Any]] = [
    {}, dict(negative_prompt='blurry'), dict(prompt_2='a drawing', negative_prompt='blurry', negative_prompt_2='ugly'),
    dict(negative_prompt_2='ugly', negative_prompt=''), dict(prompt_2='a drawing'),
    dict(original_size=(96, 80), target_size=(40, 56)), dict(crops_coords_top_left=(3, 5)),
    dict(negative_original_size=(32, 40), negative_target_size=(56, 64), negative_crops_coords_top_left=(1, 2)),
    dict(negative_original_size=(32, 40), negative_target_size=(56, 64), crops_coords_top_left=(3, 5)),
    dict(guidance_scale=2.0), dict(guidance_scale=1.0), dict(guidance_rescale=0.6), dict(denoising_end=0.5),
    dict(latents=NOISE), dict(height=64, width=40)]


def test_text_to_image(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """Prompts, negatives, sizes, crops, guidance, given noise."""
    pipeline = pipelines[BASE]
    assert_all_same([(inferencer(**{**dict(prompt=PROMPT, seed=5, output_type='pt'), **SIZE, **call}),
                      asked(pipeline, **{**dict(prompt=PROMPT), **SIZE, **call})) for call in CALLS])


def test_own_steps(tiny_base: Path, pipelines: dict[str, Any]) -> None:
    """num_inference_steps, timesteps and sigmas; the last given takes the place of the config's."""
    ours = SDXLInferencer(config(tiny_base, solver='euler'), device='cpu')
    pipeline = stock_like(pipelines[BASE], BASE, SOLVERS['euler'])
    calls: list[dict[str, Any]] = [dict(num_inference_steps=5), dict(sigmas=[10.0, 4.0, 1.0, 0.2]),
                                   dict(timesteps=[900, 500, 200])]
    pairs = [(ours(PROMPT, seed=5, output_type='pt', **SIZE, **call),
              pipeline(PROMPT, generator=generators([5])[0], output_type='pt', **SIZE, **call).images)
             for call in calls]
    assert_all_same(pairs)


def test_several_prompts_and_pictures_of_each(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """Seeds count up from a prompt's own; lists are one for each prompt, all else is for all; in order."""
    got = inferencer(['a cat', 'a dog'], negative_prompt=['blurry', 'ugly'], seed=[7, 1], num_images_per_prompt=2,
                     crops_coords_top_left=(2, 4), guidance_scale=[5.0, 2.0], **SIZE)
    expected = [asked(pipelines[BASE], seed + k, output_type='pil', prompt=prompt,
                      negative_prompt=negative, guidance_scale=scale, crops_coords_top_left=(2, 4), **SIZE)[0]
                for prompt, negative, scale, seed in (('a cat', 'blurry', 5.0, 7), ('a dog', 'ugly', 2.0, 1))
                for k in range(2)]
    assert [type(i) for i in got] == [Image.Image] * 4 and len({i.tobytes() for i in got}) == 4
    assert [i.tobytes() for i in got] == [i.tobytes() for i in expected]
    noise = torch.cat([NOISE, -NOISE])
    for given in (noise, [NOISE[0], -NOISE[0]]):
        pair = inferencer(['a cat', 'a dog'], latents=given, output_type='pt', **SIZE)
        assert torch.equal(pair, torch.cat([inferencer(p, latents=n, output_type='pt', **SIZE)
                                            for p, n in zip(('a cat', 'a dog'), noise, strict=True)]))


def test_image_to_image(inferencer: SDXLInferencer, pipelines: dict[str, Any], tmp_path: Path) -> None:
    """From PIL of any size, at its own size cut down or at another; a file; a tensor; latents; strengths; crops, which
    stock takes for the unconditional half too; ours has another one where it is asked for."""
    image = picture(0, ODD)
    calls: list[dict[str, Any]] = [{}, dict(strength=0.8), dict(strength=1.0), dict(crops_coords_top_left=(3, 5)),
                                   dict(original_size=(99, 88), negative_prompt='blurry', strength=0.7),
                                   dict(negative_original_size=(32, 40), strength=0.7), dict(image=NOISE, strength=0.7)]
    steps = dict(num_inference_steps=4)
    pairs = [(inferencer(**{**dict(prompt=PROMPT, seed=5, output_type='pt', image=image), **steps, **call}),
              asked(pipelines[TO_IMAGE], steps=4, **{**dict(prompt=PROMPT, image=image), **call})) for call in calls]
    assert_all_same(pairs)
    assert pairs[0][0].shape[-2:] == (56, 72)
    other = inferencer(PROMPT, image=image, seed=5, output_type='pt', negative_crops_coords_top_left=(9, 9), **steps)
    assert not torch.equal(other, pairs[0][0])
    image.save(tmp_path / 'odd.png')
    pixels = torch.from_numpy(np.array(image.resize((72, 56), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 255
    of_pixels = asked(pipelines[TO_IMAGE], steps=4, prompt=PROMPT, image=pixels[None])
    for same, expected in ((str(tmp_path / 'odd.png'), pairs[0][0]), (tmp_path / 'odd.png', pairs[0][0]),
                           (pixels, of_pixels), (pixels[None], of_pixels)):
        assert torch.equal(inferencer(PROMPT, image=same, seed=5, output_type='pt', **steps), expected)
    smaller = inferencer(PROMPT, image=image, seed=5, output_type='pt', **steps, **SIZE)
    assert torch.equal(smaller, asked(pipelines[TO_IMAGE], steps=4, prompt=PROMPT,
                                      image=image.resize((64, 48), Image.Resampling.LANCZOS)))


def test_inpainting(inferencer: SDXLInferencer, pipelines: dict[str, Any], tmp_path: Path) -> None:
    """PIL of other sizes than the picture; files; gray counts as black."""
    image, where = picture(0, ODD), mask((90, 70))
    calls: list[dict[str, Any]] = [{}, dict(strength=0.6), dict(strength=1.0), dict(crops_coords_top_left=(3, 5))]
    pairs = [(inferencer(PROMPT, image=image, mask_image=where, seed=5, output_type='pt', **SIZE, **call),
              asked(pipelines[INPAINT], prompt=PROMPT, image=image, mask_image=where, **SIZE, **call))
             for call in calls]
    assert_all_same(pairs)
    image.save(tmp_path / 'i.png')
    where.save(tmp_path / 'm.png')
    assert torch.equal(pairs[0][0], inferencer(PROMPT, image=tmp_path / 'i.png', mask_image=str(tmp_path / 'm.png'),
                                               seed=5, output_type='pt', **SIZE))


@pytest.mark.parametrize('kind', ['t2i_adapter', 'controlnet'])
def test_control_images(kind: str, tiny_base: Path, tmp_path: Path, pipelines: dict[str, Any]) -> None:
    """PIL or a file, of any size; without height and width its own, cut down, is the picture's."""
    pair, outline = conditioned(kind, tiny_base, tmp_path, pipelines), draw_circle(3)[1].resize((99, 77))
    outline.save(tmp_path / 'o.png')
    scale = 'adapter_conditioning_scale' if kind == 't2i_adapter' else 'controlnet_conditioning_scale'
    pairs = []
    for strength in (1.0, 0.4):
        for size in (SIZE, {}):
            got = pair.ours(PROMPT, conditions=dict(a=tmp_path / 'o.png' if size else outline), seed=5,
                            scales=dict(a=strength), output_type='pt', **size)
            pairs.append((got, asked(pair.stocks, prompt=PROMPT, image=outline, **{scale: strength}, **size)))
    assert_all_same(pairs)
    assert {tuple(got.shape[-2:]) for got, _ in pairs} == {(48, 64), (64, 96) if kind == 't2i_adapter' else (72, 96)}
    assert pair.ours.model.adapters['a'].scale == 1


@pytest.mark.parametrize('kind', ['ip_adapter', 'ip_adapter_plus'])
def test_image_prompts(kind: str, tiny_base: Path, tmp_path: Path, pipelines: dict[str, Any]) -> None:
    """One picture, several of one prompt, and each in its part of the picture."""
    from diffusers.image_processor import IPAdapterMaskProcessor
    pair = conditioned(kind, tiny_base, tmp_path, pipelines)
    first, second, where = picture(1, (80, 50)), picture(2, (40, 90)), [mask((50, 50)), mask((50, 50)).rotate(180)]
    read = IPAdapterMaskProcessor().preprocess(where, height=64, width=128)
    masks = dict(cross_attention_kwargs=dict(ip_adapter_masks=[read.reshape(1, 2, 64, 128)]))
    single = dict(cross_attention_kwargs=dict(ip_adapter_masks=[read[:1]]))
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (first, first, {}), ([first, second], [[first, second]], {}),
        (dict(image=[first, second], mask=where), [[first, second]], masks),
        (dict(image=first, mask=where[0]), first, single)]
    # Of sizes whose levels stock can guess from the number of places (see `attention._at`).
    size = dict(height=64, width=128)
    assert_all_same([(pair.ours(PROMPT, conditions=dict(a=ours), seed=5, output_type='pt', **size),
                      asked(pair.stocks, prompt=PROMPT, ip_adapter_image=stocks, **size, **more))
                     for ours, stocks, more in cases])


@pytest.mark.parametrize('task', ['text', 'image', 'inpaint'])
def test_the_refiner(refined: Refined, pipelines: dict[str, Any], task: str) -> None:
    """Both ways, with aesthetic scores, texts, sizes and steps of its own; a generator goes on through both stages."""
    given: dict[str, Any] = {'text': SIZE, 'image': dict(image=picture(0, (64, 48)), strength=0.9),
                             'inpaint': dict(image=picture(0), mask_image=mask(), **SIZE)}[task]
    first = {'text': BASE, 'image': TO_IMAGE, 'inpaint': INPAINT}[task]
    second = refined.refiners[INPAINT if task == 'inpaint' else TO_IMAGE]
    part = {k: v for k, v in given.items() if k in ('mask_image', 'height', 'width')} if task == 'inpaint' else {}
    text = dict(prompt=PROMPT, negative_prompt='blurry')

    def stocks(base: dict[str, Any], own: dict[str, Any], steps: int = 4) -> Tensor:
        g = generators([5])[0]
        latents = pipelines[first](**text, **given, **base, num_inference_steps=4, generator=g, output_type='latent',
                                   guidance_scale=5.0)
        more = {**text, **part, 'guidance_scale': 5.0, **own}
        made: Tensor = second(image=latents.images, num_inference_steps=steps, generator=g, output_type='pt',
                              **more).images
        return made

    def ours(**call: Any) -> Tensor:
        made: Tensor = refined.ours(**text, **given, num_inference_steps=4, seed=5, output_type='pt', **call)
        return made
    scores = dict(aesthetic_score=7.0, negative_aesthetic_score=1.0)
    own = dict(prompt='a blue square', negative_prompt='ugly', strength=0.6, original_size=(99, 88))
    steps = dict(num_inference_steps=4)
    assert_all_same([
        (ours(denoising_end=0.5), stocks(dict(denoising_end=0.5), dict(denoising_start=0.5))),
        (ours(denoising_end=0.5, **scores), stocks(dict(denoising_end=0.5), dict(denoising_start=0.5, **scores))),
        (ours(refiner=dict(strength=0.5, **steps)), stocks({}, dict(strength=0.5))),
        (ours(refiner=dict(**own, **scores, num_inference_steps=6)), stocks({}, {**own, **scores}, steps=6))])


def test_another_base_as_the_second_stage(tiny_base: Path, pipelines: dict[str, Any], tmp_path: Path) -> None:
    """It is told what stock's image-to-image tells it, also of negative sizes."""
    folder = write_tiny_sdxl(tmp_path / 'other', seed=7)
    ours = SDXLInferencer(config(tiny_base, refiner=dict(type='SDXL', pretrained=str(folder))), device='cpu')
    second = stock_like(stock(folder, TO_IMAGE), TO_IMAGE, SOLVERS['ancestral'])
    call: dict[str, Any] = dict(prompt=PROMPT, crops_coords_top_left=(3, 5))
    own = dict(negative_original_size=(20, 30), strength=0.7, num_inference_steps=3)
    g = generators([5])[0]
    latents = pipelines[BASE](**call, **SIZE, num_inference_steps=3, generator=g,
                                                     output_type='latent').images
    expected = second(**call, **own, image=latents, generator=g, output_type='pt').images
    got = ours(**call, **SIZE, seed=5, output_type='pt', refiner=own)
    assert torch.equal(got, expected)


def test_sides_that_4_divides_on_a_vae_of_factor_4() -> None:
    """Of the shapes base: images of 36 x 60 pixels, as stock reads them; its inpainting refuses that size, ours not."""
    from diffengine_sdxl.loading.strict import shipped
    base = Path(shipped('diffengine_sdxl::shapes/base'))
    ours = SDXLInferencer(config(base, steps=2), device='cpu')
    theirs = stock_like(stock(base), TO_IMAGE, SOLVERS['ancestral'])
    for image in (picture(size=(60, 36)), torch.rand(3, 36, 60, generator=torch.Generator().manual_seed(0))):
        call: dict[str, Any] = dict(prompt=PROMPT, strength=0.9)
        got = ours(image=image, seed=5, output_type='pt', **call)
        assert got.shape == (1, 3, 36, 60)
        assert torch.equal(got, asked(theirs, steps=2, image=image if isinstance(image, Image.Image) else image[None],
                                      **call))
        assert ours(image=image, mask_image=mask((60, 36)), seed=5, output_type='pt', **call).shape == got.shape
    crop = ours(image=picture(), mask_image=mask(), padding_mask_crop=2, height=36, width=60, **call)
    assert crop[0].size == (64, 64)
