"""Resize, crop and flip: the image and every picture that belongs to it, by the same geometry.

All PIL pictures of a sample are taken along. A picture that must not follow (as the image prompt of an
IP-Adapter) is turned into a tensor by a transform before these.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.registry import TRANSFORMS

Size = int | Sequence[int]
FILTERS = {name: Image.Resampling[name.upper()] for name in ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box')}
HELPERS = ('original_size', 'crop_top_left', 'canvas_size')
"""Entries that the geometry leaves for ComputeTimeIds: (height, width) of the image as read; (top, left) of the
present image inside the resized one, and that one's (height, width)."""


def pair(size: Size, name: str = 'size') -> tuple[int, int]:
    """(height, width) of an int or of two.

    Raises:
        ValueError: it is anything else, or not positive.
    """
    values = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    if len(values) != 2 or not all(isinstance(v, int) and v > 0 for v in values):
        raise ValueError(f'{name}={size!r} is neither a positive whole number nor two of them (height, width).')
    return values[0], values[1]


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the same proportions that covers `size`; the longer edge is rounded down.

    For a square `size` this is the rule of torchvision's `Resize(int)`, hence of the diffusers scripts.
    """
    if size[0] * width >= size[1] * height:
        return size[0], size[0] * width // height
    return size[1] * height // width, size[1]


def pictures(sample: dict[str, Any]) -> dict[str, Image.Image]:
    """The pictures of a sample that share the image's geometry."""
    return {key: value for key, value in sample.items() if isinstance(value, Image.Image)}


def image_of(sample: dict[str, Any]) -> Image.Image:
    """The image of a sample, whose size as read is noted before anything changes it."""
    image = sample.get('img')
    if not isinstance(image, Image.Image):
        raise ValueError(f"Sample '{sample.get('key')}' has no picture 'img' (has PackInputs run already?).")
    sample.setdefault('original_size', (image.height, image.width))
    return image


def draws(sample: dict[str, Any], stream: str) -> torch.Generator:
    """The sample's own generator for one purpose."""
    return rng.generator(sample['seed'], sample['key'], sample['epoch'], stream)


def _check_same(sample: dict[str, Any], image: Image.Image) -> None:
    for key, picture in pictures(sample).items():
        if picture.size != image.size:
            raise ValueError(f"'{key}' of sample '{sample.get('key')}' is {picture.height} x {picture.width} and the "
                             f'image {image.height} x {image.width} (height x width): put Resize before Crop.')


def _same_aspect(a: Image.Image, b: Image.Image) -> bool:
    """Proportions equal to 1 % and 1 pixel of the smaller picture, along either edge."""
    small, large = sorted((a, b), key=lambda p: p.width * p.height)
    width, height = large.width * small.height / large.height, large.height * small.width / large.width
    return abs(small.width - width) <= 0.01 * width + 1 or abs(small.height - height) <= 0.01 * height + 1


@TRANSFORMS.register_module()
class Resize:
    """Scale the image so that it just covers `size`, and every condition to the image's new size.

    Args:
        size: pixels; an int is the short edge, (height, width) what the image must cover. Proportions stay.
        interpolation: 'nearest', 'bilinear', 'bicubic', 'lanczos' or 'box', by PIL, so antialiased.

    Raises:
        ValueError: a condition has other proportions than the image.
    """

    def __init__(self, size: Size, interpolation: str = 'bilinear') -> None:
        self.size = pair(size)
        if interpolation not in FILTERS:
            raise ValueError(f"interpolation='{interpolation}' is not known; there are {', '.join(FILTERS)}.")
        self.filter = FILTERS[interpolation]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = image_of(sample)
        if 'canvas_size' in sample:
            raise ValueError('Resize must stand before Crop: SDXL is told the crop inside the resized image.')
        height, width = covering(image.height, image.width, self.size)
        for key, picture in pictures(sample).items():
            if not _same_aspect(picture, image):
                raise ValueError(f"'{key}' of sample '{sample.get('key')}' is {picture.height} x {picture.width} and "
                                 f'its image {image.height} x {image.width} (height x width): another aspect ratio, '
                                 'so they cannot be laid over each other. Make the condition from this image.')
            # A condition of another size goes to the final size in one step, which loses less than two.
            if picture.size != (width, height):
                sample[key] = picture.resize((width, height), self.filter)
        return sample


@TRANSFORMS.register_module()
class Crop:
    """Cut the same window out of the image and all conditions, and note where it lay.

    Args:
        size: pixels; an int or (height, width).
        mode: 'center', rounded as torchvision does, or 'random', keyed.

    Raises:
        ValueError: the image is smaller than the window, or a condition is of another size than the image.
    """

    def __init__(self, size: Size, mode: Literal['center', 'random'] = 'center') -> None:
        self.size = pair(size)
        if mode not in ('center', 'random'):
            raise ValueError(f"mode='{mode}' is neither 'center' nor 'random'.")
        self.mode = mode

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = image_of(sample)
        _check_same(sample, image)
        height, width = self.size
        spare = image.height - height, image.width - width
        if min(spare) < 0:
            raise ValueError(f"Sample '{sample.get('key')}' is {image.height} x {image.width} (height x width), "
                             f'smaller than the crop of {height} x {width}: put Resize before Crop.')
        if self.mode == 'center':
            top, left = (round(s / 2) for s in spare)
        else:
            generator = draws(sample, 'crop')
            top, left = (int(torch.randint(s + 1, (), generator=generator)) for s in spare)
        for key, picture in pictures(sample).items():
            sample[key] = picture.crop((left, top, left + width, top + height))
        sample.setdefault('canvas_size', (image.height, image.width))
        before = sample.get('crop_top_left', (0, 0))
        sample['crop_top_left'] = before[0] + top, before[1] + left
        return sample


@TRANSFORMS.register_module()
class Flip:
    """Mirror the image and all conditions left to right, with a probability, keyed.

    The crop's place is counted in the mirrored image: after a flip the window's left edge is as far from the left
    as its right edge was from the right. That is what the present diffusers scripts get by flipping before they
    crop; here a flip after the crop gives the same numbers. (Their older `x1 = image.width - x1`, taken after the
    crop, named a place outside of the image.)

    Args:
        prob: probability of a flip, 0 to 1.
    """

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = probability(prob)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = image_of(sample)
        if float(torch.rand((), generator=draws(sample, 'flip'))) >= self.prob:
            return sample
        for key, picture in pictures(sample).items():
            sample[key] = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if 'canvas_size' in sample:
            top, left = sample['crop_top_left']
            sample['crop_top_left'] = top, sample['canvas_size'][1] - left - image.width
        return sample


def probability(prob: float) -> float:
    """`prob`, checked to lie in [0, 1]."""
    if not 0 <= prob <= 1:
        raise ValueError(f'prob={prob} is not a probability between 0 and 1.')
    return prob
