"""Are images copies of the training data? The similarity to the nearest training image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import MeanMetric, Measured
from diffengine_sdxl.evaluation.networks import ImageFeatures, metric_name, unit
from diffengine_sdxl.evaluation.references import DatasetFeatures
from diffengine_sdxl.registry import METRICS

#: Images that are compared at once with all training images.
CHUNK = 256
#: Features of training data by network, config and number, so that both metrics here read them once.
_TRAINING: dict[tuple[object, ...], DatasetFeatures] = {}


@METRICS.register_module()
class NearestTrain(MeanMetric):
    """Mean cosine of each image's features with those of the training image that is nearest to it.

    Compare it with that of the base, which has not seen the data: the difference is what training added.

    Args:
        dataset: config of the training data, as `train_dataloader.dataset`; the key 'img' is read.
        max_samples: use so many of its images, evenly spaced; None: all. Each process reads its share, once.
        model, subfolder, revision: of the network, see `networks.ImageFeatures`.
        kwargs: see ImageMetric.
    """

    kind = 'nearest_train'
    network = 'facebook/dinov2-base'
    better = -1
    bounds = (-1.0, 1.0)

    def __init__(self, dataset: Mapping[str, Any], max_samples: int | None = 2000, model: str = network,
                 subfolder: str = '', revision: str | None = None, **kwargs: Any) -> None:
        self.features = ImageFeatures(model, subfolder, revision)
        source = self.features.network.source
        self.training = _TRAINING.setdefault((source, repr(dataset), max_samples), DatasetFeatures(
            dataset, self.features, max_samples, 'Memorisation'))
        self.name = metric_name(self.kind, source, self.network)
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Warn if only a part of the training data is compared with; see `ImageMetric.check`."""
        self.features.check()
        used, total = len(self.training), len(self.training.dataset)
        return None if used == total else (
            f'{type(self).__name__} compares with {used:,} of {total:,} training images; copies of the others are not '
            'found. Set max_samples=None to compare with all.')

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[np.ndarray]:
        """Return the features of each image, fp32 [D], until `evaluate` compares them."""
        return list(self.features(images, self.device))

    def evaluate(self, size: int) -> dict[str, Any]:
        """See BaseMetric; called in all processes, which share the reading of training images."""
        self.training.compute(self.device)
        numbers: dict[str, Any] = super().evaluate(size)
        return numbers

    def compute_metrics(self, results: Sequence[Measured]) -> dict[str, float | int]:
        """Compare all images with the training data; see `ImageMetric.compute_metrics`."""
        training = unit(self.training.compute(self.device)).T
        # In order first: the last bits of a product depend on what it is computed with.
        ordered, scores = sorted(results, key=lambda row: (row.key, row.seed)), []
        for start in range(0, len(ordered), CHUNK):
            rows = ordered[start:start + CHUNK]
            names = [(i, name) for i, row in enumerate(rows) for name in row.values]
            nearest = (unit(np.stack([rows[i].values[name] for i, name in names])) @ training).max(axis=1)
            values: list[dict[str, float]] = [{} for _ in rows]
            for (i, name), cosine in zip(names, nearest.tolist(), strict=True):
                values[i][name] = self.score(cosine)
            scores += [replace(row, values=own) for row, own in zip(rows, values, strict=True)]
        return super().compute_metrics(scores)

    def score(self, cosine: float) -> float:
        """Return the number of an image from its greatest cosine with a training image."""
        return cosine


@METRICS.register_module()
class Memorisation(NearestTrain):
    """Share of images whose features have a cosine of at least `threshold` with those of a training image.

    No network has a threshold that tells a copy from a likeness for all data: look at what images of held-out data have
    (`NearestTrain`), and take one above that.

    Source: Somepalli et al., Diffusion Art or Digital Forgery? (2023), for the share; they use SSCD, which transformers
    has not.

    Args:
        dataset, max_samples, model, subfolder, revision, kwargs: see NearestTrain.
        threshold: another than 0.9 is part of the metric's name.

    Raises:
        UserError: the threshold is not above 0 and below 1.
    """

    kind = 'memorisation'
    is_share = True

    def __init__(self, dataset: Mapping[str, Any], threshold: float = 0.9, **kwargs: Any) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
            raise UserError(f'Memorisation: threshold={threshold!r} must be a cosine, above 0 and below 1.')
        self.threshold = threshold
        super().__init__(dataset, **kwargs)
        self.name += '' if threshold == 0.9 else f'_{threshold:g}'

    def score(self, cosine: float) -> float:
        """Return 1 for a copy, else 0."""
        return float(cosine >= self.threshold)
