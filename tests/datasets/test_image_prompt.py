"""Image prompts in the data: bitwise what transformers' image processors on PIL make, whatever comes after."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from diffengine_sdxl.adapters.image_encoder import MEAN, STD
from diffengine_sdxl.datasets.transforms import Crop, ImagePrompt, PackInputs, Resize
from diffengine_sdxl.pictures import clip_pixels


def picture(width: int, height: int, seed: int = 0, mode: str = 'RGB') -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize('size', [(64, 64), (50, 91), (91, 50), (33, 32), (200, 31), (7, 500), (224, 301)])
@pytest.mark.parametrize('side', [32, 37])
def test_pixels_are_clips_bitwise(size: tuple[int, int], side: int) -> None:
    """Enlarged and made smaller, of odd sides and all modes; normalised as the IP-Adapter does it."""
    processor = CLIPImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for mode in ('RGB', 'L', 'RGBA', 'P'):
        image = picture(*size, mode=mode)
        found = clip_pixels(image, side)
        assert found.shape == (3, side, side) and found.dtype == torch.float32 and found.is_contiguous()
        assert found.min() >= 0 and found.max() <= 1
        assert torch.equal((found - mean) / std, processor(image, return_tensors='pt').pixel_values[0])


@pytest.mark.parametrize('size', [(50, 91), (300, 64)])
def test_pixels_of_other_encoders(size: tuple[int, int]) -> None:
    """SigLIP stretches; DINOv2 cuts out of a larger picture; other filters."""
    square, plain = {'height': 32, 'width': 32}, dict(do_normalize=False, return_tensors='pt')
    image = picture(*size)
    for processor, options in (
            (SiglipImageProcessorPil(size=square, resample=2), dict(stretch=True, resample='bilinear')),
            (SiglipImageProcessorPil(size=square, resample=3), dict(stretch=True)),
            (BitImageProcessorPil(size={'shortest_edge': 40}, crop_size=square, resample=1),
             dict(short_edge=40, resample='lanczos'))):
        assert torch.equal(clip_pixels(image, 32, **options), processor(image, **plain).pixel_values[0])


@pytest.mark.parametrize('size', [(64, 64), (50, 91), (91, 50), (33, 32), (200, 31), (640, 480)])
@pytest.mark.parametrize('side', [37, 224])
def test_torchvisions_pixels_are_two_gray_levels_away_at_most(size: tuple[int, int], side: int) -> None:
    """Stock resizes by torchvision where that is installed: torch's filter on bytes, which rounds otherwise."""
    image = picture(*size)
    if is_torchvision_available():
        processor = CLIPImageProcessor(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})
        theirs = processor(image, do_normalize=False, return_tensors='pt').pixel_values[0]
    else:  # the same arithmetic, by torch alone
        scaled = [int(side * edge / min(size)) for edge in reversed(size)]
        top, left = ((edge - side) // 2 for edge in scaled)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
        pixels = torch.nn.functional.interpolate(pixels, scaled, mode='bicubic', antialias=True)
        theirs = pixels[0, :, top:top + side, left:left + side] / 255
    levels = (theirs - clip_pixels(image, side)).abs() * 255
    assert levels.max() < 2.5 and levels.mean() < 0.05


def test_a_prompt_stays_whole_while_the_picture_is_cropped() -> None:
    """Another picture or the image itself; PackInputs leaves it alone, to the bit; what was read is gone."""
    reference, image = picture(90, 40, 1), picture(80, 60, 2)
    for source, expected in ((None, reference), ('img', image)):
        sample: dict[str, Any] = {'img': image, 'key': 'k', 'seed': 0, 'epoch': 0, 'text': ''}
        if source is None:
            sample['reference'] = reference
        for transform in (ImagePrompt(source=source, size=32), Resize(48), Crop(48, 'center'), PackInputs()):
            sample = transform(sample)
        assert torch.equal(sample['reference'], clip_pixels(expected, 32))
        assert sample['img'].shape == (3, 48, 48)
        assert set(sample) == {'img', 'key', 'seed', 'epoch', 'text', 'reference'}


def test_several_pictures_are_one_prompt() -> None:
    """A list in one entry, or several entries."""
    shown = [picture(40, 50, 1), picture(64, 30, 2), picture(30, 30, 3)]
    expected = torch.stack([clip_pixels(p, 16) for p in shown])
    transform = ImagePrompt(size=16)
    assert torch.equal(transform({'reference': list(shown)})['reference'], expected)
    sample = ImagePrompt(key='prompt', source=['a', 'b'], size=16)({'a': shown[0], 'b': shown[1:]})
    assert torch.equal(sample['prompt'], expected) and set(sample) == {'prompt'}
    kept = ImagePrompt(key='prompt', source=['a'], size=16, keep=True)({'a': shown[0]})
    assert torch.equal(kept['prompt'], expected[:1]) and kept['a'] is shown[0]


@pytest.mark.parametrize('sample', [{}, {'reference': 'a.png'}, {'reference': []}, {'reference': torch.zeros(3, 8, 8)},
                                    {'reference': [picture(8, 8), None]}])
def test_a_missing_picture_is_named(sample: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ImagePrompt reads 'reference'.*sample 'row 3'"):
        ImagePrompt()({'key': 'row 3', **sample})


@pytest.mark.parametrize(('options', 'said'), [
    (dict(size=0), 'size=0'), (dict(size=(224, 224)), 'size='), (dict(resample='cubic'), "'cubic'.*bicubic"),
    (dict(size=224, short_edge=200), 'short_edge=200')])
def test_options_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImagePrompt(**options)
