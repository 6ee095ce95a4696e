"""Images to tensors: ImagePrompt for an IP-Adapter's image encoder, LossMask, and PackInputs for all others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl.datasets.transforms.geometry import FILTERS, GEOMETRY_KEYS, images_in, probability
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.images import clip_pixels
from diffengine_sdxl.pixel_values import as_floats
from diffengine_sdxl.registry import TRANSFORMS


def pixels_of(image: Image.Image) -> Tensor:
    """Return an image's pixels, uint8 [3, H, W]."""
    array = np.array(image if image.mode == 'RGB' else image.convert('RGB'))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@TRANSFORMS.register_module()
class ImagePrompt:
    """Turn images into an IP-Adapter's condition: float32 [3, size, size] in [0, 1], or [n, 3, size, size].

    Put it before Resize, Crop and Flip. These transform all images of a sample, so they would crop a reference like the
    image, and refuse one of another aspect ratio; a tensor they leave as it is.

    Args:
        key: the key to write.
        source: the key to read, of an image or a list of images; or several keys, whose images are one prompt. None for
            `key`. 'img' makes the image its own prompt, as IP-Adapters are trained.
        size, resample, short_edge, stretch: from the image encoder's preprocessor_config.json; see `clip_pixels`.
        keep: leave the images that were read in the sample; 'img' always stays.

    Raises:
        UserError: an option is invalid; in a call, an image is missing.
    """

    reads = 'images'

    def __init__(self, key: str = 'reference', source: str | Sequence[str] | None = None, size: int = 224,
                 resample: str = 'bicubic', short_edge: int | None = None, stretch: bool = False,
                 keep: bool = False) -> None:
        if not isinstance(size, int) or size < 1 or short_edge is not None and short_edge < size:
            raise UserError(f'ImagePrompt: size={size!r} must be a positive whole number of pixels, and '
                            f'short_edge={short_edge!r} at least as large.')
        one_of('ImagePrompt: resample', resample, FILTERS)
        self.key, self.keep = key, keep
        self.sources = [source or key] if source is None or isinstance(source, str) else list(source)
        self.many = source is not None and not isinstance(source, str)
        self.options: dict[str, Any] = {'size': size, 'resample': resample, 'short_edge': short_edge,
                                        'stretch': stretch}

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels: list[Tensor] = []
        many = self.many
        for source in self.sources:
            value = sample.get(source)
            many = many or isinstance(value, list | tuple)
            images = [value] if isinstance(value, Image.Image) else value
            if not isinstance(images, list | tuple) or not images or not all(
                    isinstance(image, Image.Image) for image in images):
                raise UserError(f"ImagePrompt reads '{source}', an image or a list of images, which sample "
                                f"'{sample.get('key')}' lacks; it has {', '.join(map(repr, sample))}.")
            pixels += [clip_pixels(image, **self.options) for image in images]
        if not self.keep:
            for source in set(self.sources) - {'img'}:
                del sample[source]
        sample[self.key] = torch.stack(pixels) if many else pixels[0]
        return sample


@TRANSFORMS.register_module()
class LossMask:
    """Turn an image into the weight of each place in the loss: 1 for white, `outside` for black.

    Put it after Resize and Crop, which transform the mask with the image, and before PackInputs. The objective averages
    it over the pixels of each latent, and does not divide the loss by it (as `--masked_loss` of sd-scripts).

    Args:
        key: of the image in the sample (`extra_columns=dict(loss_mask='column')`), which is removed.
        outside: weight of black, 0 to 1.

    Raises:
        UserError: the sample has no such image.
    """

    reads = 'images'

    def __init__(self, key: str = 'loss_mask', outside: float = 0.0) -> None:
        self.key, self.outside = key, probability(outside, 'outside')

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample.pop(self.key, None)
        if not isinstance(image, Image.Image):
            raise UserError(f"Sample '{sample.get('key')}' has no image '{self.key}' for LossMask: name its column "
                            f"(extra_columns=dict({self.key}='...')), and put LossMask before PackInputs.")
        white = as_floats(pixels_of(image.convert('L'))[:1])
        sample['mask'] = torch.lerp(torch.tensor(self.outside), torch.tensor(1.0), white)
        return sample


@TRANSFORMS.register_module()
class PackInputs:
    """Turn every image into uint8 [3, H, W], which the model's BatchPreprocessor turns into floats on its device.

    'img' becomes [-1, 1] there, any other image [0, 1]. The last transform: entries that only transforms use are
    dropped. If one of a user's own follows, images are floats at once, which it may compute with.

    Raises:
        UserError: the images of a sample have different sizes.
    """

    reads = 'images'
    #: Whether a transform that is not of this package follows; the data set says so.
    followed = False

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        images = images_in(sample)
        if len({image.size for image in images.values()}) > 1:
            sizes = ', '.join(f'{key} {image.height} x {image.width}' for key, image in images.items())
            raise UserError(f"The images of sample '{sample.get('key')}' differ in size (height x width): {sizes}. "
                            'Add Resize and Crop.')
        packed = {key: value for key, value in sample.items() if key not in GEOMETRY_KEYS}
        pixels = {key: pixels_of(image) for key, image in images.items()}
        return packed | ({key: as_floats(value, centred=key == 'img') for key, value in pixels.items()}
                         if self.followed else pixels)
