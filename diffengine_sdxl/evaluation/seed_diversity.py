"""Does a prompt still give different images for different noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.base import ImageMetric, Measured
from diffengine_sdxl.evaluation.interval import Estimate
from diffengine_sdxl.evaluation.networks import ImageFeatures, metric_name, unit
from diffengine_sdxl.registry import METRICS


@METRICS.register_module()
class SeedDiversity(ImageMetric):
    """Mean distance, 1 - cosine of their features, of the images that a sample has of different seeds.

    The mean over all pairs of a sample, then over samples; the interval is that of the mean over samples. An adapter
    that has learnt its images by heart, or copies its image prompt, lowers it. Noise has a high one, so read it beside
    another metric.

    Args:
        model, subfolder, revision: of the network, see `networks.ImageFeatures`.
        kwargs: see ImageMetric.
    """

    kind = 'seed_diversity'
    network = 'facebook/dinov2-base'

    def __init__(self, model: str = network, subfolder: str = '', revision: str | None = None, **kwargs: Any) -> None:
        self.features = ImageFeatures(model, subfolder, revision)
        self.name = metric_name(self.kind, self.features.network.source, self.network)
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Find the network's files; see `ImageMetric.check`.

        Raises:
            UserError: there is one seed only, or a file is missing.
        """
        if num_seeds < 2:
            raise UserError('SeedDiversity compares the images of one sample of several seeds, and there is one seed; '
                            'set `seeds` of test_cfg or val_cfg to 2 or more, or take the metric out.')
        self.features.check()
        return None

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[np.ndarray]:
        """Return the features of each image, fp32 [D]."""
        return list(self.features(images, self.device))

    def estimate(self, rows: Sequence[Measured], image_set: str) -> Estimate:
        """Return the mean of the samples' distances."""
        keys, values = _of_samples(rows, image_set)
        return interval.mean(values, keys, (0.0, 2.0))._replace(num_samples=len(rows))

    def difference(self, rows: Sequence[Measured], first: str, second: str) -> Estimate:
        """Return the mean of the paired differences of the samples' distances."""
        keys, values = _of_samples(rows, first)
        return interval.difference(values, _of_samples(rows, second)[1], keys)._replace(num_samples=len(rows))


def _of_samples(rows: Sequence[Measured], image_set: str) -> tuple[list[str], list[float]]:
    """Return key and mean pairwise distance of each sample with two images or more, of rows in the order of keys."""
    distances: dict[str, float] = {}
    for key, images in groupby(rows, key=lambda row: row.key):
        vectors = unit(np.stack([row.values[image_set] for row in images]))
        if (n := len(vectors)) > 1:
            # |sum of u|^2 is n plus the cosines of all ordered pairs.
            distances[key] = float(1 - ((vectors.sum(axis=0) ** 2).sum() - (vectors ** 2).sum()) / (n * (n - 1)))
    return list(distances), list(distances.values())
