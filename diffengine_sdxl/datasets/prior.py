"""PriorPreservation: images of one subject beside images of its class."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from diffengine_sdxl.datasets.base import Sample
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.protocols import Components
from diffengine_sdxl.registry import DATASETS


@DATASETS.register_module()
class PriorPreservation(Dataset[list[Sample]]):
    """Each row is two samples, one of each data set, weighted so that the mean loss is L_instance + weight L_prior.

    Ruiz et al. 2023, DreamBooth, arXiv:2208.12242. A batch of b rows has 2 b samples; the loss is the mean over them of
    2 l for an instance and 2 weight l for a prior, which is the sum of both means. (A plain mean over both halves would
    be half of that.) The shorter data set is repeated, each row equally often
    over the run.

    Args:
        instance, prior: configs of map-style data sets.
        weight: of the prior's loss.

    Raises:
        UserError: one of them is a stream, or the weight is negative.
    """

    def __init__(self, instance: Mapping[str, Any], prior: Mapping[str, Any], weight: float = 1.0) -> None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float('inf'):
            raise UserError(f'PriorPreservation: weight={weight!r} must be a number of at least 0.')
        self.instance, self.prior = (DATASETS.build(dict(d)) if isinstance(d, dict) else d for d in (instance, prior))
        for name, dataset in (('instance', self.instance), ('prior', self.prior)):
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__') or len(dataset) == 0:
                raise UserError(f'PriorPreservation: {name} must be a data set of numbered rows, not empty; a '
                                'stream cannot be paired.')
        self.weight = float(weight)
        self.source = f'PriorPreservation({getattr(self.instance, "source", "")})'

    def __len__(self) -> int:
        return max(len(self.instance), len(self.prior))

    def __getitem__(self, item: Draw | int) -> list[Sample]:
        draw = item if isinstance(item, Draw) else Draw(int(item), 0, 0)
        if not 0 <= draw.index < len(self):
            raise IndexError(f'{self.source} has {len(self)} rows, no row {draw.index}.')
        instance, prior = (self._sample(dataset, draw) for dataset in (self.instance, self.prior))
        # Else row 0 of one and row 0 of the other would get the same noise and timestep.
        prior['key'] = f'prior/{prior["key"]}'
        for sample, weight in ((instance, 1.0), (prior, self.weight)):
            sample['weight'] = 2 * weight * float(sample.get('weight', 1.0))
        for sample, other in ((instance, prior), (prior, instance)):
            if 'mask' in sample and 'mask' not in other:  # a half without masks counts fully
                other['mask'] = torch.ones_like(sample['mask'])
            if 'drop' in sample:  # nothing is dropped of a half without drops
                other['drop'] = {**dict.fromkeys(sample['drop'], False), **other.get('drop', {})}
        if instance.keys() != prior.keys():
            difference = ', '.join(map(repr, sorted(map(str, instance.keys() ^ prior.keys()))))
            raise UserError('PriorPreservation: instance and prior must have samples of the same keys; only one has '
                            f'{difference}. Give both the same columns and transforms.')
        return [instance, prior]

    def check_model(self, model: Components) -> None:
        """Check that `model` can be trained on both data sets; see `CachedLatents.check_model`."""
        for dataset in (self.instance, self.prior):
            if hasattr(dataset, 'check_model'):
                dataset.check_model(model)

    def captions(self) -> Iterator[str]:
        """Yield the instances' captions, as `MapDataset.captions`: a prior's lack a new word on purpose."""
        return iter(self.instance.captions() if hasattr(self.instance, 'captions') else ())

    def without_drops(self) -> PriorPreservation:
        """See `SampleBuilder.without_drops`."""
        other = copy.copy(self)
        other.instance, other.prior = (d.without_drops() if hasattr(d, 'without_drops') else d
                                       for d in (self.instance, self.prior))
        return other

    def _sample(self, dataset: Any, draw: Draw) -> Sample:
        """Return the draw's row; a shorter data set goes on in the next epoch where it stopped in this one."""
        position, num = draw.epoch * len(self) + draw.index, len(dataset)
        return dataset[Draw(position % num, position // num, draw.seed)]
