"""Image prompts equal transformers' image processors on PIL bitwise, whatever transforms follow."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from diffengine_sdxl.adapters.image_encoder import MEAN, STD
from diffengine_sdxl.datasets.transforms import Crop, ImagePrompt, PackInputs, Resize
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import clip_pixels


def noise(width: int, height: int, seed: int = 0, mode: str = 'RGB') -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize('size', [(64, 64), (50, 91), (91, 50), (33, 32), (200, 31), (7, 500), (224, 301)])
@pytest.mark.parametrize('side', [32, 37])
def test_pixels_are_clips_bitwise(size: tuple[int, int], side: int) -> None:
    """Enlarged and reduced, of odd sides and all modes; normalised as by the IP-Adapter."""
    processor = CLIPImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for mode in ('RGB', 'L', 'RGBA', 'P'):
        image = noise(*size, mode=mode)
        pixels = clip_pixels(image, side)
        assert pixels.shape == (3, side, side) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert pixels.min() >= 0 and pixels.max() <= 1
        assert torch.equal((pixels - mean) / std, processor(image, return_tensors='pt').pixel_values[0])


@pytest.mark.parametrize('size', [(50, 91), (300, 64)])
def test_pixels_of_other_encoders(size: tuple[int, int]) -> None:
    """SigLIP stretches; DINOv2 crops a larger image; other filters."""
    square, plain = {'height': 32, 'width': 32}, dict(do_normalize=False, return_tensors='pt')
    image = noise(*size)
    for processor, options in (
            (SiglipImageProcessorPil(size=square, resample=2), dict(stretch=True, resample='bilinear')),
            (SiglipImageProcessorPil(size=square, resample=3), dict(stretch=True)),
            (BitImageProcessorPil(size={'shortest_edge': 40}, crop_size=square, resample=1),
             dict(short_edge=40, resample='lanczos'))):
        assert torch.equal(clip_pixels(image, 32, **options), processor(image, **plain).pixel_values[0])


@pytest.mark.parametrize('size', [(64, 64), (50, 91), (91, 50), (33, 32), (200, 31), (640, 480)])
@pytest.mark.parametrize('side', [37, 224])
def test_torchvision_differs_by_two_gray_levels_at_most(size: tuple[int, int], side: int) -> None:
    """transformers resizes by torchvision where it is installed: torch's filter on bytes, which rounds otherwise."""
    image = noise(*size)
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


def test_a_prompt_is_not_cropped_with_the_image() -> None:
    """From another image or the image itself; PackInputs leaves it unchanged; the image that was read is removed."""
    reference, image = noise(90, 40, 1), noise(80, 60, 2)
    for source, expected in ((None, reference), ('img', image)):
        sample: dict[str, Any] = {'img': image, 'key': 'k', 'seed': 0, 'epoch': 0, 'text': ''}
        if source is None:
            sample['reference'] = reference
        for transform in (ImagePrompt(source=source, size=32), Resize(48), Crop(48, 'center'), PackInputs()):
            sample = transform(sample)
        assert torch.equal(sample['reference'], clip_pixels(expected, 32))
        assert sample['img'].shape == (3, 48, 48)
        assert set(sample) == {'img', 'key', 'seed', 'epoch', 'text', 'reference'}


def test_several_images_are_one_prompt() -> None:
    """A list under one key, or several keys."""
    images = [noise(40, 50, 1), noise(64, 30, 2), noise(30, 30, 3)]
    expected = torch.stack([clip_pixels(p, 16) for p in images])
    transform = ImagePrompt(size=16)
    assert torch.equal(transform({'reference': list(images)})['reference'], expected)
    sample = ImagePrompt(key='prompt', source=['a', 'b'], size=16)({'a': images[0], 'b': images[1:]})
    assert torch.equal(sample['prompt'], expected) and set(sample) == {'prompt'}
    sample = ImagePrompt(key='prompt', source=['a'], size=16, keep=True)({'a': images[0]})
    assert torch.equal(sample['prompt'], expected[:1]) and sample['a'] is images[0]


@pytest.mark.parametrize('sample', [{}, {'reference': 'a.png'}, {'reference': []}, {'reference': torch.zeros(3, 8, 8)},
                                    {'reference': [noise(8, 8), None]}])
def test_a_missing_image_is_named(sample: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ImagePrompt reads 'reference'.*sample 'row 3' lacks"):
        ImagePrompt()({'key': 'row 3', **sample})


@pytest.mark.parametrize(('options', 'message'), [
    (dict(size=0), 'size=0'), (dict(size=(224, 224)), 'size='), (dict(resample='cubic'), "'cubic'.*bicubic"),
    (dict(size=224, short_edge=200), 'short_edge=200')])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImagePrompt(**options)
