"""Image prompts: the pictures that an IP-Adapter's image encoder looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl.datasets.transforms.geometry import FILTERS
from diffengine_sdxl.pictures import clip_pixels
from diffengine_sdxl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ImagePrompt:
    """Turn pictures into what an IP-Adapter `reads`: float32 [3, size, size] in [0, 1], or [n, 3, size, size].

    Put it before Resize, Crop and Flip: these take along all pictures of a sample, so a reference would be cropped
    like the image, and one of other proportions refused. What this transform writes is a tensor, which stays.

    Args:
        key: the entry to write.
        source: the entry to read, a picture or a list of pictures; or several entries, all of whose pictures are one
            prompt. None for `key`. 'img' makes the image its own prompt, as IP-Adapters are trained.
        size, resample, short_edge, stretch: of the image encoder's preprocessor_config.json; see `clip_pixels`.
        keep: leave entries that were read in the sample; 'img' stays in any case.

    Raises:
        ValueError: an option is none; in a call, if a picture is missing.
    """

    def __init__(self, key: str = 'reference', source: str | Sequence[str] | None = None, size: int = 224,
                 resample: str = 'bicubic', short_edge: int | None = None, stretch: bool = False,
                 keep: bool = False) -> None:
        if not isinstance(size, int) or size < 1 or short_edge is not None and short_edge < size:
            raise ValueError(f'ImagePrompt: size={size!r} must be a positive whole number of pixels, and '
                             f'short_edge={short_edge!r} at least as large.')
        if resample not in FILTERS:
            raise ValueError(f"ImagePrompt: resample='{resample}' is not known; there are {', '.join(FILTERS)}.")
        self.key, self.keep = key, keep
        self.sources = [source or key] if source is None or isinstance(source, str) else list(source)
        self.several = source is not None and not isinstance(source, str)
        self.options: dict[str, Any] = {'size': size, 'resample': resample, 'short_edge': short_edge,
                                        'stretch': stretch}

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels: list[Tensor] = []
        several = self.several
        for source in self.sources:
            found = sample.get(source)
            several = several or isinstance(found, list | tuple)
            images = [found] if isinstance(found, Image.Image) else found
            if not isinstance(images, list | tuple) or not images or not all(
                    isinstance(image, Image.Image) for image in images):
                raise ValueError(f"ImagePrompt reads '{source}', a picture or a list of pictures, which sample "
                                 f"'{sample.get('key')}' does not hold; it holds {', '.join(map(repr, sample))}.")
            pixels += [clip_pixels(image, **self.options) for image in images]
        if not self.keep:
            for source in set(self.sources) - {'img'}:
                del sample[source]
        sample[self.key] = torch.stack(pixels) if several else pixels[0]
        return sample
