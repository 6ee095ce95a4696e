"""Requests: settings merged, converted to their types, and refused with a message that names the key."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffengine_sdxl import config as configs
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.image_inputs import as_image_input, read_latents
from diffengine_sdxl.models.request_batch import request_batch, size_of
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.request import OPTIONS, REFINER, SETTINGS, Request


def test_later_settings_win() -> None:
    """None counts as not set; dicts are merged, all else is replaced; the inputs stay unchanged."""
    first = dict(prompt='a', seed=3, scales=dict(x=0.5, y=1), sigmas=[2, 1], negative_prompt='no')
    second = dict(prompt='b', seed=None, scales=dict(y=2), crops_coords_top_left=[1.0, 2], negative_prompt='')
    request = Request.of(first, {}, second)
    assert (request.prompt, request.seed, request.negative_prompt) == ('b', 3, '')
    assert request.scales == dict(x=0.5, y=2.0) and request.sigmas == (2.0, 1.0)
    assert request.crops_coords_top_left == (1, 2) and type(request.crops_coords_top_left[0]) is int
    assert first['scales'] == dict(x=0.5, y=1) and Request.of() == Request()
    assert Request.of(dict(original_size=512)).original_size == (512, 512)
    from_numpy = Request.of(dict(seed=np.int64(3), strength=np.float32(0.5), image='i', timesteps=[np.int32(9)]))
    assert from_numpy == Request.of(dict(seed=3, strength=0.5, image='i', timesteps=[9]))
    assert json.loads(json.dumps(vars(from_numpy)))['seed'] == 3


def test_another_image_brings_its_size() -> None:
    """`height` and `width` beside an image are that image's, unless they are given again."""
    first = dict(prompt='a', image='i.png', height=64, width=96, seed=3)
    assert Request.of(first, dict(image='j.png')) == Request.of(dict(prompt='a', image='j.png', seed=3))
    assert Request.of(first, dict(height=32, image='j.png')) == Request.of(dict(prompt='a', image='j.png', seed=3,
                                                                                height=32))
    assert Request.of(dict(height=64), dict(image='j.png')).height == 64
    assert Request.of(first, dict(seed=4)).height == 64
    # Asked apart from the image, as by a flag beside a file of prompts.
    asked = Request.of(first, dict(height=48), dict(image='j.png'))
    assert (asked.height, asked.width) == (48, None)


def test_each_image_of_a_request() -> None:
    request = Request.of(dict(prompt='a', seed=7, num_images_per_prompt=3))
    assert [request.with_seed(k).seed for k in range(3)] == [7, 8, 9]
    assert request.with_seed(2) == Request.of(dict(prompt='a', seed=9))
    several = Request.of(dict(image=['i', 'j'], mask_image=['m'], latents='n.safetensors', num_images_per_prompt=2))
    parts = [dict(image=i, mask_image='m', latents='n.safetensors', latents_row=k, seed=k) for k, i in enumerate('ij')]
    # The settings recorded for image k make image k again.
    assert [several.with_seed(k) for k in range(2)] == [Request.of(one).with_seed(0) for one in parts]
    from_row = Request.of(dict(latents=Path('n'), latents_row=3, num_images_per_prompt=2))
    assert [from_row.with_seed(k).latents_row for k in range(2)] == [3, 4]
    noise = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 4, 3, 3)
    each = Request.of(dict(latents=noise, image=list(noise), num_images_per_prompt=2)).with_seed(1)
    assert torch.equal(each.latents, noise[1]) and torch.equal(each.image, noise[1]) and each.latents_row is None


def test_the_refiners_request() -> None:
    """The base's texts, sizes, scores and seed; its own steps, strength and guidance; none of the base's images."""
    base = dict(prompt='a', prompt_2='b', seed=4, image='i.png', mask_image='m.png', strength=0.9, guidance_scale=3.0,
                num_inference_steps=9, conditions=dict(x='c.png'), crops_coords_top_left=(1, 2), aesthetic_score=7,
                latents='n.safetensors', height=64, num_images_per_prompt=2)
    request = Request.of(base, dict(refiner=dict(prompt='c', strength=0.2, num_inference_steps=5))).for_refiner()
    assert request == Request.of(dict(prompt='c', prompt_2='b', seed=4, crops_coords_top_left=(1, 2), aesthetic_score=7,
                                      height=64, strength=0.2, num_inference_steps=5), whole=False)


def test_every_setting_is_declared() -> None:
    """A check and a help text each; the refiner may have its own texts, sizes, scores, steps and guidance."""
    assert [*SETTINGS] == [f.name for f in fields(Request)] and all(SETTINGS[f.name] is f.metadata['setting']
                                                                    for f in fields(Request))
    assert [name for name, one in SETTINGS.items() if not callable(one.kind.check) or not one.help] == []
    assert set(SETTINGS) - set(REFINER) == {
        'image', 'mask_image', 'padding_mask_crop', 'conditions', 'scales', 'active_ranges', 'height', 'width',
        'num_images_per_prompt', 'seed', 'latents', 'latents_row', 'prompt_syntax', 'refiner', 'name'}


#: Settings, and the sentence that refuses them.
BAD: list[tuple[dict[str, Any], str]] = [
    (dict(promt='a'), "Unknown setting 'promt'. Did you mean 'prompt'"),
    (dict(vae_tilin=True), "Unknown setting 'vae_tilin'. Did you mean 'vae_tiling'"),
    (dict(offload=True), "Unknown setting 'offload'.*infer_cfg"),
    (dict(prompt=3), 'prompt=3 must be a text'),
    (dict(negative_prompt=['a']), r"negative_prompt=\['a'\] must be a text"),
    (dict(original_size=(1, 2, 3)), r'original_size=\(1, 2, 3\) must be two whole numbers of pixels, vertical first'),
    (dict(crops_coords_top_left='1,2'), "crops_coords_top_left='1,2' must be two whole"),
    (dict(target_size=(1.5, 2)), r'target_size\[0\]=1.5 must be a whole number'),
    (dict(seed=-1), 'seed=-1 must be at least 0'), (dict(seed=1.5), 'seed=1.5 must be a whole number'),
    (dict(seed=True), 'seed=True must be a whole number'),
    (dict(seed=2 ** 64), 'seed=18446744073709551616 is too large'),
    (dict(num_images_per_prompt=0), 'num_images_per_prompt=0 must be at least 1'),
    (dict(num_inference_steps=0), 'num_inference_steps=0 must be at least 1'),
    (dict(height=0), 'height=0 must be at least 1'), (dict(width='x'), "width='x' must be a whole number"),
    (dict(image='a', strength=0), 'strength=0.0 must be above 0 and at most 1'),
    (dict(image='a', strength=1.01), 'strength=1.01 must be above 0'),
    (dict(denoising_end=float('nan')), 'denoising_end=nan must be a number'),
    (dict(guidance_scale='5'), "guidance_scale='5' must be a number"),
    (dict(guidance_scale=float('inf')), 'guidance_scale=inf must be a number'),
    (dict(strength=0.5), 'strength=0.5 needs an `image`'),
    (dict(mask_image='m.png'), "mask_image='m.png' needs an `image`"),
    (dict(mask_image=Image.new('L', (8, 8))), 'mask_image=Image needs an `image`'),
    (dict(denoising_start=0.5), 'denoising_start=0.5 needs an `image`'),
    (dict(timesteps=[3, 2], sigmas=[1.0, 0.0]), 'Give timesteps or sigmas, not both'),
    (dict(sigmas=[]), r'sigmas=\[\] must be a list of numbers'), (dict(timesteps=5), 'timesteps=5 must be a list'),
    (dict(timesteps=[9, 'a']), r"timesteps\[1\]='a' must be a whole number"),
    (dict(eta=10 ** 400), 'eta=1000.* must be a number'), (dict(seed=10 ** 400), 'seed=1000.* is too large'),
    (dict(seed=2 ** 63 - 1, num_images_per_prompt=2), 'seed=9223372036854775807 is too large'),
    (dict(seed=float('inf')), 'seed=inf must be a whole number'),
    (dict(timesteps=[9.5]), r'timesteps\[0\]=9.5 must be a whole number'),
    (dict(timesteps=[9, 99]), r'timesteps\[1\]=99 must be below the one before it, 9'),
    (dict(scales=0.5), 'scales=0.5 must be a dict: adapter name -> value'),
    (dict(scales=dict(a='b')), "scales.a='b' must be a number"),
    (dict(conditions=['x']), 'conditions=.*must be a dict'),
    (dict(active_ranges=dict(a=(1, 0))), r"active_ranges.a=\(1, 0\) must be \(start, end\)"),
    (dict(active_ranges=dict(a=(0, 10 ** 400))), 'active_ranges.a=.*must be'),
    (dict(sigmas=[10 ** 400, 1.0]), r'sigmas\[0\]=1000.* must be a number'),
    (dict(sigmas=[3.0, -1.0]), r'sigmas\[1\]=-1.0 must not be below 0'),
    (dict(sigmas=[3.0]), r'sigmas=\[3.0\] needs at least two'),
    (dict(active_ranges=dict(a='x')), "active_ranges.a='x' must be"),
    (dict(num_images_per_prompt=2, latents=torch.zeros(4, 8, 8)), r'latents is the noise of one image.* Give \[2, 4'),
    (dict(latents=torch.zeros(1, 4, 8, 8), num_images_per_prompt=2), 'latents holds 1, and num_images_per_prompt=2'),
    (dict(latents=[torch.zeros(4, 8, 8)] * 3, num_images_per_prompt=2), 'latents holds 3, and num_images_per_prompt=2'),
    (dict(image=torch.zeros(3, 3, 8, 8), num_images_per_prompt=2), 'image holds 3, .*=2; .*or one for all'),
    (dict(image=['a', 'b']), 'image holds 2, and num_images_per_prompt=1; give each'),
    (dict(image='a', mask_image=[]), 'mask_image holds 0'), (dict(latents_row=1), 'latents_row=1 is a row of a file'),
    (dict(latents='a', latents_row=-1), 'latents_row=-1 must be at least 0'),
    (dict(clip_skip=-1), 'clip_skip=-1 must be at least 0'), (dict(clip_skip=1.5), 'clip_skip=1.5 must be a whole'),
    (dict(padding_mask_crop=3, image='a'), 'padding_mask_crop=3 needs a `mask_image`'),
    (dict(image='a', mask_image='b', padding_mask_crop=-3), 'padding_mask_crop=-3 must be at least 0'),
    (dict(refiner=dict(clip_skip=-1)), 'refiner: clip_skip=-1 must'),
    (dict(refiner=0.3), 'refiner=0.3 must be a dict of the settings'),
    (dict(refiner=dict(strenth=0.3)), "Unknown refiner setting 'strenth'. Did you mean 'strength'"),
    (dict(refiner=dict(image='a')), "Unknown refiner setting 'image'"),
    (dict(refiner=dict(strength=2)), 'refiner: strength=2.0 must be above 0'),
    (dict(prompt_syntax='compell'), "prompt_syntax='compell' is unknown; .*Did you mean 'compel'")]


#: Without addresses of objects, so that two workers of pytest-xdist collect the same names.
IDS = [re.sub(r'<.*>', 'image', str(list(settings.items())[-1])) for settings, _ in BAD]


@pytest.mark.parametrize(('settings', 'message'), BAD, ids=IDS)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request.of(settings)


@pytest.mark.parametrize(('infer_cfg', 'message'), [
    (dict(promt='a'), "infer_cfg: Unknown setting 'promt'.*'prompt'"),
    (dict(offload=1), 'infer_cfg.offload=1 must be True'), (dict(seed=-1), 'infer_cfg: seed=-1'),
    ('text', "infer_cfg='text' must be a dict"),
    (dict(refiner=dict(strenth=1)), "infer_cfg: Unknown refiner setting 'strenth'.*'strength'")])
def test_defaults_are_checked_with_the_config(infer_cfg: Any, message: str) -> None:
    """Settings that need an image may come without one; all else is refused before anything loads."""
    with pytest.raises(UserError, match=message):
        configs.load('sdxl_text_to_image', {'infer_cfg': infer_cfg})
    waiting = dict(strength=0.5, mask_image='m.png', **dict.fromkeys(OPTIONS, True))
    configs.load('sdxl_text_to_image', {'infer_cfg': waiting})


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    return SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='T2IAdapter', condition_key='map')))


def test_the_size_of_the_output(model: SDXL, tmp_path: Path) -> None:
    """As set, also one side only; else that of the image, rounded down, of the condition, the latents, or the base."""
    image, wide = Image.new('RGB', (75, 61)), Image.new('RGB', (99, 40))
    image.save(tmp_path / 'i.png')
    noise = torch.zeros(4, 5, 7)
    save_file({'x': noise}, tmp_path / 'n.safetensors')
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({}, (64, 64)), (dict(height=40), (40, 64)), (dict(height=40, width=56), (40, 56)),
        (dict(image=image), (48, 64)), (dict(image=str(tmp_path / 'i.png'), width=80), (48, 80)),
        (dict(conditions=dict(a=wide)), (32, 96)), (dict(conditions=dict(a=wide), image=image), (48, 64)),
        (dict(image=torch.zeros(3, 48, 80)), (48, 80)), (dict(image=np.zeros((61, 75, 3), np.uint8)), (48, 64)),
        (dict(image=np.zeros((61, 75, 3))), (48, 64)), (dict(image=torch.zeros(3, 61, 75)), (48, 64)),
        (dict(image=noise), (40, 56)), (dict(latents=noise), (40, 56)),
        (dict(latents=tmp_path / 'n.safetensors'), (40, 56)), (dict(image=Image.new('RGB', (3, 5))), (16, 16))]
    for settings, size in cases:
        assert size_of(model, Request.of(settings)) == size, settings


def test_time_ids(model: SDXL) -> None:
    """diffusers' defaults: the unconditional half has its own only with an image, and then shares the crop."""
    crop = dict(crops_coords_top_left=(3, 5))

    def ids(**settings: Any) -> tuple[list[float], list[float] | None]:
        batch = request_batch(model, [Request.of(settings)], (48, 64))
        assert batch.time_ids is not None
        negative = batch.negative_time_ids
        return batch.time_ids[0].tolist(), None if negative is None else negative[0].tolist()
    assert ids() == ([48, 64, 0, 0, 48, 64], None)
    assert ids(**crop, original_size=(9, 8)) == ([9, 8, 3, 5, 48, 64], None)
    assert ids(**crop, negative_crops_coords_top_left=(1, 1))[1] == [48, 64, 1, 1, 48, 64]
    assert ids(**crop, negative_original_size=(7, 6), negative_target_size=(5, 4))[1] == [7, 6, 0, 0, 5, 4]
    assert ids(**crop, image=Image.new('RGB', (8, 8)))[1] == [48, 64, 3, 5, 48, 64]
    assert ids(**crop, image=Image.new('RGB', (8, 8)), negative_original_size=(7, 6))[1] == [7, 6, 3, 5, 48, 64]


def test_latents(tmp_path: Path) -> None:
    """A tensor of one image, or a file of one tensor; never unpickled."""
    noise = torch.randn(4, 5, 7)
    for tensor in (noise, noise[None], noise.half()):
        assert read_latents(tensor).shape == (4, 5, 7) and read_latents(tensor).dtype == torch.float32
    assert read_latents(noise.double()).dtype == torch.float64
    save_file({'x': torch.stack([noise, noise + 1])}, tmp_path / 'rows.safetensors')
    save_file({'x': noise}, tmp_path / 'one.safetensors')
    assert torch.equal(read_latents(tmp_path / 'rows.safetensors', row=1), noise + 1)
    for name, row, sentence in (('rows', 2, "rows.safetensors' holds 2; row 2, counted from 0, does not exist"),
                                ('rows', None, 'holds 2; set num_images_per_prompt=2, or latents_row'),
                                ('one', 0, r"one.safetensors' must be \[n, 4, h, w\], a row for each image; it is")):
        with pytest.raises(ValueError, match=sentence):
            read_latents(tmp_path / f'{name}.safetensors', row=row)
    save_file({'a': noise, 'b': noise + 1}, tmp_path / 'two.safetensors')
    torch.save(noise, tmp_path / 'noise.pt')
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'two.safetensors').read_bytes()[:99])
    for bad, sentence in ((noise[0], r'\[4, h, w\], for one image; it is \[5, 7\]'),
                          (torch.stack([noise] * 2), r'it is \[2, 4, 5, 7\]'), (3, 'it is int'),
                          (noise * torch.inf, 'latents has NaN or Inf'),
                          (tmp_path / 'two.safetensors', "two.safetensors' holds 2 tensors"),
                          (tmp_path / 'noise.pt', "noise.pt' cannot be read as a .safetensors file"),
                          (tmp_path / 'cut.safetensors', "cut.safetensors' cannot be read as"),
                          (str(tmp_path / 'none'), "none' cannot be read.*No such file")):
        with pytest.raises(ValueError, match=sentence):
            read_latents(bad)


def test_images_in_memory() -> None:
    """Arrays of uint8 are as PIL's; others must be in [0, 1] with an image's channels, or the VAE would clip them."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(np.asarray(as_image_input(pixels, 'image')), pixels)
    assert np.array_equal(np.asarray(as_image_input(pixels[..., 0], 'mask_image')), pixels[..., 0])
    floats, of_bool = pixels / 255, torch.tensor([[True, False]])
    for array in (floats, floats[None]):
        assert np.array_equal(as_image_input(array, 'image'), floats[None])
    for mask in (of_bool, of_bool[None], of_bool[None, None].float()):
        assert torch.equal(as_image_input(mask, 'mask_image'), of_bool[None, None].float())
    assert np.array_equal(as_image_input(of_bool.numpy(), 'mask_image'), [[[[1.0], [0.0]]]])
    ones = torch.ones(3, 4, 4)
    for bad, what, sentence in (
            (ones * 255, 'image', r'image is a tensor with numbers from 255 to 255; they must be in \[0, 1\]: divide'),
            (torch.cat([-ones, ones], 1), 'image', r'numbers from -1 to 1; .*: \(x \+ 1\) / 2 converts'),
            (ones * torch.nan, 'image', r'numbers from nan to nan; they must be in \[0, 1\]\.'),
            (ones.byte(), 'image', 'image is a tensor of torch.uint8; it must be of floats .* by 255'),
            (pixels.astype(int), 'image', 'image is an array of int64; it must be of floats .* or of uint8'),
            (floats * 300, 'image', 'image is an array with numbers from 0 to'),
            (floats[..., 0], 'image', r'image is an array of \[4, 4\]; it must be \[H, W, 3\]'),
            (floats.transpose(2, 0, 1), 'image', r'image is an array of \[3, 4, 4\]; it must be \[H, W, 3\]'),
            (ones[0], 'image', r'a tensor of \[4, 4\]; it must be \[3, H, W\], for one image, or \[n, 3, H, W\], or'),
            (ones[:, :0], 'image', r'a tensor of \[3, 0, 4\]'), (ones, 'mask_image', r'it must be \[1, H, W\]'),
            (ones[:1] * 1.5, 'mask_image', 'mask_image is a tensor with numbers from 1.5 to 1.5'),
            (ones[:1] * -1, 'mask_image', 'mask_image is a tensor with numbers from -1 to -1')):
        with pytest.raises(ValueError, match=sentence):
            as_image_input(bad, what)
