"""Base class of the metrics of the shapes world: checks of a batch, cached measurements, means with intervals."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import interval
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


class ShapesMetric(BaseMetric):
    """A score of 0 to 1 for every image, averaged by image set.

    Computes '<image set>/<name>', its 95 % interval '.../low' and '.../high', and '.../num_samples'; see `interval`.
    Images of one 'key' are one cluster.

    Args:
        collect_device, prefix, collect_dir: see mmengine's BaseMetric; `prefix` distinguishes two metrics of one type.
    """

    name = ''
    #: Entries of a batch that `score` needs, besides 'key'.
    needs: tuple[str, ...] = ()

    def __init__(self, collect_device: str = 'cpu', prefix: str | None = None, collect_dir: str | None = None) -> None:
        # mmengine warns of a metric without a prefix; these need none, as their name follows the image set.
        super().__init__(collect_device, prefix or self.name, collect_dir)
        self.prefix = prefix

    @abstractmethod
    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return the score of an image [3, H, W], 0..1.

        Args:
            sample: 'key' and the entries that the metric needs, of the sample that the image was generated for.
        """

    @staticmethod
    def estimate(values: Sequence[float], clusters: Sequence[str]) -> interval.Estimate:
        """Return mean and interval of scores that are 0 or 1."""
        return interval.share(values, clusters)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Score all images of a batch.

        Args:
            data_batch: as collated: 'key' and the entries that the metric needs, B of each.
            data_samples: B dicts of 'key' and 'images', {image set: [3, H, W] in [0, 1]}.

        Raises:
            UserError: the batch lacks an entry, or an entry or an image is invalid.
        """
        for name in ('key', *self.needs):
            if name not in data_batch:
                raise UserError(f"{type(self).__name__} needs '{name}' of every sample, and the batch has none; the "
                                "data set 'Shapes' provides it with truth=True.")
        keys = list(data_batch['key'])
        assert keys == [generated['key'] for generated in data_samples], 'the images of a batch, in its order'
        for i, generated in enumerate(data_samples):
            sample = {name: data_batch[name][i] for name in ('key', *self.needs)}
            for image_set, image in generated['images'].items():
                if not bool(image.isfinite().all()):
                    raise UserError(f"The image '{image_set}' of sample '{generated['key']}' is not finite and cannot "
                                    'be measured; the model has diverged, or overflows in its dtype.')
            self.results.append({'key': str(generated['key']), 'scores': {
                image_set: float(self.score(image, sample)) for image_set, image in generated['images'].items()}})

    def compute_metrics(self, results: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Return the means, with intervals, of the scores of all processes."""
        numbers: dict[str, float | int] = {}
        for image_set in dict.fromkeys(name for result in results for name in result['scores']):
            scored = [result for result in results if image_set in result['scores']]
            scores = [result['scores'][image_set] for result in scored]
            mean = self.estimate(scores, [result['key'] for result in scored])
            name = f'{image_set}/{self.name}'
            numbers |= {name: mean.value, f'{name}/low': mean.low, f'{name}/high': mean.high,
                        f'{name}/num_samples': mean.num_samples}
        return numbers
