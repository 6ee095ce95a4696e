"""Resize, crop and flip the image and its conditions together, and record it for SDXL's time ids.

All PIL images of a sample are transformed; ImagePrompt turns one that must not be into a tensor before.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.images import check_pixels
from diffengine_sdxl.registry import TRANSFORMS

Size = int | Sequence[int]
FILTERS = {name: Image.Resampling[name.upper()] for name in ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box')}
BucketOrSize = Size | Literal['bucket']
GEOMETRY_KEYS = ('original_size', 'crop_top_left', 'canvas_size')
"""For ComputeTimeIds: (height, width) of the image as read, (top, left) of the crop in the resized image, and that
image's (height, width)."""


def height_width(size: Size, key: str = 'size') -> tuple[int, int]:
    """Return (height, width) of one number or two.

    Raises:
        UserError: it is neither, or not positive.
    """
    values = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    if len(values) != 2 or not all(isinstance(v, int) and v > 0 for v in values):
        raise UserError(f'{key}={size!r} must be a positive whole number, or two (height, width).')
    return values[0], values[1]


def _target(size: BucketOrSize, key: str) -> tuple[int, int] | None:
    """Return (height, width) of an option of Resize or Crop; None for 'bucket'."""
    return None if size == 'bucket' else height_width(size, key)  # type: ignore[arg-type]  # errors name other words


def _size_in(sample: dict[str, Any], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return `size`, or the sample's bucket if it is None."""
    if size is not None:
        return size
    if 'bucket' not in sample:
        raise UserError(f"Sample '{sample.get('key')}' has no bucket for size='bucket': set train_dataloader.sampler="
                        "dict(type='BucketSampler', resolution=...), or give the transforms a size in pixels. Streams, "
                        'validations and tests have no buckets.')
    bucket: tuple[int, int] = sample['bucket']
    return bucket


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of the same aspect ratio that covers `size`; the longer edge is rounded down.

    For a square `size` this is the rule of torchvision's `Resize(int)`, and so of the diffusers scripts.

    Raises:
        UserError: a strip would become larger than `limits.image_pixels`.
    """
    if size[0] * width >= size[1] * height:
        scaled = size[0], size[0] * width // height
    else:
        scaled = size[1] * height // width, size[1]
    check_pixels(*scaled, f'An image of {height} x {width}, scaled to cover {size[0]} x {size[1]},')
    return scaled


def images_in(sample: dict[str, Any]) -> dict[str, Image.Image]:
    """Return the images of a sample that share the geometry of 'img', itself included."""
    return {key: value for key, value in sample.items() if isinstance(value, Image.Image)}


def main_image(sample: dict[str, Any]) -> Image.Image:
    """Return 'img'; its original size is recorded before a transform changes it."""
    image = sample.get('img')
    if not isinstance(image, Image.Image):
        raise UserError(f"Sample '{sample.get('key')}' has no image 'img'; PackInputs must be the last transform.")
    sample.setdefault('original_size', (image.height, image.width))
    return image


def sample_generator(sample: dict[str, Any], stream: str) -> torch.Generator:
    """Return the sample's own generator for one purpose."""
    return rng.generator(sample['seed'], sample['key'], sample['epoch'], stream)


def _geometry_key(sample: dict[str, Any], stream: str) -> tuple[int, str, int, str]:
    """Return what random geometry is drawn from: as other draws, but by the variant in place of the epoch."""
    return sample['seed'], sample['key'], sample.get('variant', sample['epoch']), stream


def probability(value: float, key: str = 'prob') -> float:
    """Return `value`; check that it lies in [0, 1].

    Raises:
        UserError: it does not.
    """
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f'{key}={value!r} must be a probability between 0 and 1.')
    return value


def _same_aspect(a: Image.Image, b: Image.Image) -> bool:
    """Return whether aspect ratios are equal within 1 % and 1 pixel of the smaller image, along either edge."""
    small, large = sorted((a, b), key=lambda p: p.width * p.height)
    width, height = large.width * small.height / large.height, large.height * small.width / large.width
    return abs(small.width - width) <= 0.01 * width + 1 or abs(small.height - height) <= 0.01 * height + 1


@TRANSFORMS.register_module()
class Resize:
    """Scale the image so that it just covers `size`, and every condition to the image's new size.

    Args:
        size: pixels; an int is the short edge, (height, width) what the image must cover. The aspect ratio stays.
            'bucket': that of the sample's bucket, see `BucketSampler`.
        interpolation: 'nearest', 'bilinear', 'bicubic', 'lanczos' or 'box', by PIL, so antialiased.

    Raises:
        UserError: a condition has another aspect ratio than the image, or the sample has no bucket.
    """

    reads = 'images'

    def __init__(self, size: BucketOrSize, interpolation: str = 'bilinear') -> None:
        self.size = _target(size, 'Resize: size')
        one_of('interpolation', interpolation, FILTERS)
        self.filter = FILTERS[interpolation]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = main_image(sample)
        if 'canvas_size' in sample:
            raise UserError("Resize must stand before Crop: SDXL's time ids locate the crop in the resized image.")
        size = _size_in(sample, self.size)
        try:
            height, width = covering(image.height, image.width, size)
        except UserError as error:  # a strip; `on_bad_image` may pass it over
            raise BadImageError(f"Sample '{sample.get('key')}': {error}") from error
        for key, other in images_in(sample).items():
            if not _same_aspect(other, image):
                raise UserError(f"'{key}' of sample '{sample.get('key')}' is {other.height} x {other.width} and its "
                                f'image {image.height} x {image.width} (height x width): another aspect ratio. Make '
                                'the condition from this image.')
            # A condition of another size is resized once, which loses less than twice.
            if other.size != (width, height):
                sample[key] = other.resize((width, height), self.filter)
        return sample

    def draws(self, sample: dict[str, Any]) -> Hashable:
        """Return what this transform takes from the sample besides its images."""
        return _size_in(sample, self.size)


@TRANSFORMS.register_module()
class Crop:
    """Cut the same window out of the image and all conditions, and record its place.

    Args:
        size: pixels; an int or (height, width); 'bucket': that of the sample's bucket, see `BucketSampler`.
        mode: 'center', rounded as in torchvision, or 'random', keyed.

    Raises:
        UserError: the image is smaller than the window, a condition has another size than the image, or the sample has
            no bucket.
    """

    reads = 'images'

    def __init__(self, size: BucketOrSize, mode: Literal['center', 'random'] = 'center') -> None:
        self.size = _target(size, 'Crop: size')
        one_of('mode', mode, ('center', 'random'))
        self.mode = mode

    @property
    def draws_anew(self) -> bool:
        """Whether every epoch, or variant, has another result."""
        return self.mode == 'random'

    def draws(self, sample: dict[str, Any]) -> Hashable:
        """Return what this transform takes from the sample besides its images."""
        key = _geometry_key(sample, 'crop') if self.mode == 'random' else None
        return _size_in(sample, self.size), key

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = main_image(sample)
        height, width = _size_in(sample, self.size)
        margins = image.height - height, image.width - width
        for key, other in images_in(sample).items():
            if other.size != image.size:
                raise UserError(f"'{key}' of sample '{sample.get('key')}' is {other.height} x {other.width} and the "
                                f'image {image.height} x {image.width} (height x width): put Resize before Crop.')
        if min(margins) < 0:
            raise UserError(f"Sample '{sample.get('key')}' is {image.height} x {image.width} (height x width), "
                            f'smaller than the crop of {height} x {width}: put Resize before Crop.')
        if self.mode == 'center':
            top, left = (round(margin / 2) for margin in margins)
        else:
            generator = rng.generator(*_geometry_key(sample, 'crop'))
            top, left = (int(torch.randint(margin + 1, (), generator=generator)) for margin in margins)
        for key, other in images_in(sample).items():
            sample[key] = other.crop((left, top, left + width, top + height))
        sample.setdefault('canvas_size', (image.height, image.width))
        before = sample.get('crop_top_left', (0, 0))
        sample['crop_top_left'] = before[0] + top, before[1] + left
        return sample


@TRANSFORMS.register_module()
class Flip:
    """Mirror the image and all conditions left to right, with a probability.

    The crop's place is counted in the mirrored image: after a flip the window's left edge is as far from the left as
    its right edge was from the right. The diffusers scripts flip before they crop; a flip after the crop gives the same
    numbers here. (Their older `x1 = image.width - x1`, after the crop, was a place outside of the image.)

    Args:
        prob: probability of a flip, 0 to 1.
    """

    reads = 'images'

    def __init__(self, prob: float = 0.5) -> None:
        self.prob = probability(prob)

    def draws(self, sample: dict[str, Any]) -> bool:
        """Return whether the sample is mirrored."""
        return float(torch.rand((), generator=rng.generator(*_geometry_key(sample, 'flip')))) < self.prob

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = main_image(sample)
        if not self.draws(sample):
            return sample
        for key, other in images_in(sample).items():
            sample[key] = other.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if 'canvas_size' in sample:
            top, left = sample['crop_top_left']
            sample['crop_top_left'] = top, sample['canvas_size'][1] - left - image.width
        return sample


@TRANSFORMS.register_module()
class ComputeTimeIds:
    """Write SDXL's 'time_ids', float32 [6]: original height, width, crop top, left, target height, width (pixels).

    Source: Podell et al. 2023, "SDXL", section 2.2.

    Each is the image's true value (its size as read, the crop's place in the resized image, its present size) unless a
    constant is set. Put it after Resize, Crop and Flip, before PackInputs.

    Args:
        original_size, target_size: constants; an int or (height, width).
        crops_coords_top_left: constant (top, left); the diffusers script's `crops_coords_top_left_h/w`.
        aesthetic_score: for the refiner, which takes it in place of the target size: float32 [5].
    """

    reads = 'images'

    def __init__(self, original_size: Size | None = None, crops_coords_top_left: Size | None = None,
                 target_size: Size | None = None, aesthetic_score: float | None = None) -> None:
        self.original_size = None if original_size is None else height_width(original_size, 'original_size')
        self.target_size = None if target_size is None else height_width(target_size, 'target_size')
        crop = crops_coords_top_left
        self.crop = None if crop is None else (crop, crop) if isinstance(crop, int) else tuple(crop)
        if self.crop is not None and len(self.crop) != 2:
            raise UserError(f'crops_coords_top_left={crop!r} must be two numbers (top, left).')
        self.aesthetic_score = aesthetic_score

    def draws(self, sample: dict[str, Any]) -> None:
        """Return None: the time ids follow from the images and the transforms before."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = main_image(sample)
        original = self.original_size or sample['original_size']
        crop = sample.get('crop_top_left', (0, 0)) if self.crop is None else self.crop
        target = self.target_size or (image.height, image.width)
        last = target if self.aesthetic_score is None else (self.aesthetic_score,)
        sample['time_ids'] = torch.tensor([*original, *crop, *last], dtype=torch.float32)
        return sample
