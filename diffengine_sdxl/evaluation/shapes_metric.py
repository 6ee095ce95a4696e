"""Base class of the metrics of the shapes world; measurements are cached."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from torch import Tensor

from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.shapes.measure import Observation, observe

#: Measurements to cache: more than a batch has images in all its variants.
CACHE_SIZE = 512
_cache: OrderedDict[bytes, Observation] = OrderedDict()


def observed(image: Tensor) -> Observation:
    """Measure an image [3, H, W] in [0, 1]; equal images are measured once for all metrics."""
    pixels = np.array(to_pil(image.detach().float().cpu().numpy()))
    key = blake2b(f'{pixels.shape}'.encode() + pixels.tobytes(), digest_size=16).digest()
    if key not in _cache:
        _cache[key] = observe(pixels)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return _cache[key]


class ShapesMetric(MeanMetric):
    """A score of 0 to 1 for every image, from what is observed on it and what is true of its sample."""

    hint = "The data set 'Shapes' provides it with truth=True."

    @abstractmethod
    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return the score of an image [3, H, W], 0..1.

        Args:
            sample: 'key' and the entries that the metric needs, of the sample that the image was generated for.
        """

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return the score of each image."""
        return [float(self.score(image, {name: batch[name][i] for name in ('key', *self.needs)}))
                for i, image in enumerate(images)]
