"""Base classes of control fidelity: is the condition found again on the image that was made from it?

Source: Li et al. 2024, ControlNet++, arXiv:2404.07987: the network or filter that makes conditions of images is run on
the generated images, and its results are compared with the conditions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import ImageMetric, MeanMetric
from diffengine_sdxl.evaluation.references import sample_images
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.registry import TRANSFORMS


class ControlMetric(ImageMetric):
    """Base: compare each generated image with what is true of its sample.

    Args:
        key: the sample's condition, which is the truth.
        source: an image of the sample, such as its own, 'img', of which the truth is extracted instead; None: `key`.
        kwargs: see ImageMetric.
    """

    hint = "`key` names the sample's condition; with source='img' the truth is extracted from the sample's own image."

    def __init__(self, key: str = 'conditioning_image', source: str | None = None, **kwargs: Any) -> None:
        self.entry, self.extracted = source or key, source is not None
        self.needs = (self.entry,)
        super().__init__(**kwargs)
        self._truths: tuple[list[str], list[Any]] = [], []

    @abstractmethod
    def truth(self, image: Image.Image, sample: str) -> Any:
        """Return what is true of a sample, given its condition, or its image if `self.extracted`."""

    @abstractmethod
    def compare(self, image: Image.Image, truth: Any) -> Any:
        """Return what is kept of a generated image."""

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[Any]:
        """Return `compare` of each image; the truths of a batch are computed once for all its seeds and image sets.

        Raises:
            UserError: the condition is no image, or has another size than the generated one.
        """
        keys = [str(key) for key in batch['key']]
        if self._truths[0] != keys:
            entries = sample_images(batch, self.entry, type(self).__name__)
            if entries.shape[-2:] != images.shape[-2:]:
                raise UserError(f"{type(self).__name__}: '{self.entry}' of sample '{keys[0]}' is "
                                f'{list(entries.shape[-2:])} and its generated image {list(images.shape[-2:])} '
                                "(height, width); set the size of the data set's Resize and Crop to the images'.")
            self._truths = keys, [self.truth(to_pil(entry.numpy()), key)
                                  for entry, key in zip(entries, keys, strict=True)]
        return [self.compare(to_pil(image.numpy()), truth)
                for image, truth in zip(images, self._truths[1], strict=True)]

    def evaluate(self, size: int) -> dict[Any, Any]:
        """Return the metrics of all processes."""
        self._truths = [], []
        return super().evaluate(size)


class MapMetric(ControlMetric, MeanMetric):
    """Base: a score of the map that an extractor makes of the image, beside the sample's.

    Args:
        extractor: config of a transform that makes a condition: Canny, Depth, Preprocessor, or one of your own with
            `source`, `key`, and a `device` if it has a network. What made the conditions of the data set belongs here.
        kwargs: see ControlMetric.
    """

    def __init__(self, extractor: Mapping[str, Any], **kwargs: Any) -> None:
        self.extractor: Any = TRANSFORMS.build(dict(extractor))
        if not (hasattr(self.extractor, 'source') and hasattr(self.extractor, 'key')):
            raise UserError(f"{type(self).__name__}: the extractor {extractor['type']} makes no condition of an image; "
                            'use Canny, Depth or Preprocessor.')
        super().__init__(**kwargs)

    @abstractmethod
    def score(self, found: np.ndarray, truth: np.ndarray) -> float:
        """Return the score of two maps, gray levels 0..255, uint8 [H, W]: of the image, and of the sample."""

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Load the extractor's network, if it has one.

        Raises:
            UserError: it cannot be loaded.
        """
        self._place()
        getattr(self.extractor, 'model', None)
        return None

    def truth(self, image: Image.Image, sample: str) -> np.ndarray:
        """Return the map, uint8 [H, W]."""
        return self._extract(image) if self.extracted else np.asarray(image.convert('L'))

    def compare(self, image: Image.Image, truth: np.ndarray) -> float:
        """Return the score."""
        return self.score(self._extract(image), truth)

    def evaluate(self, size: int) -> dict[Any, Any]:
        """Return the metrics of all processes; drop the extractor's network, as training may go on."""
        if hasattr(self.extractor, 'release'):
            self.extractor.release()
        return super().evaluate(size)

    def _place(self) -> None:
        if hasattr(self.extractor, 'device'):
            self.extractor.device = str(self.device)

    def _extract(self, image: Image.Image) -> np.ndarray:
        self._place()
        sample = self.extractor({self.extractor.source: image, 'key': 'the generated image'})
        return np.asarray(sample[self.extractor.key].convert('L'))
