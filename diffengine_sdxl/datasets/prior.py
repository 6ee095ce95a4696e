"""PriorPreservation: images of one subject beside images of its class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffengine_sdxl.datasets.base import Sample
from diffengine_sdxl.datasets.collate import fill_absent
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.mixture import SeveralSets
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATASETS


@DATASETS.register_module()
class PriorPreservation(SeveralSets):
    """Each row is two samples, one of each data set, weighted so that the mean loss is L_instance + weight L_prior.

    Ruiz et al. 2023, DreamBooth, arXiv:2208.12242. A batch of b rows has 2 b samples; the loss is the mean over them of
    2 l for an instance and 2 weight l for a prior, which is the sum of both means. (A plain mean over both halves would
    be half of that.) The shorter data set is repeated, each row equally often over the run. `Mixture` with
    `loss_weights` draws single samples of both, as kohya's scripts do.

    Args:
        instance, prior: configs of map-style data sets.
        weight: of the prior's loss.

    Raises:
        UserError: one of them is a stream, or the weight is negative.
    """

    def __init__(self, instance: Mapping[str, Any], prior: Mapping[str, Any], weight: float = 1.0) -> None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float('inf'):
            raise UserError(f'PriorPreservation: weight={weight!r} must be a number of at least 0.')
        super().__init__({'instance': instance, 'prior': prior})
        self.weight = float(weight)
        self.source = f'PriorPreservation({self.sets["instance"].source})'

    def __len__(self) -> int:
        return max(map(len, self.sets.values()))

    def __getitem__(self, item: Draw | int) -> list[Sample]:
        draw = self.draw(item)
        instance, prior = (self._sample(name, draw) for name in self.sets)
        # Else row 0 of one and row 0 of the other would get the same noise and timestep.
        prior['key'] = f'prior/{prior["key"]}'
        for sample, weight in ((instance, 1.0), (prior, self.weight)):
            sample['weight'] = 2 * weight * float(sample.get('weight', 1.0))
        fill_absent([instance, prior])
        if difference := sorted(map(str, (instance.keys() ^ prior.keys()) - {'lookups'})):
            raise UserError('PriorPreservation: instance and prior must have samples of the same keys; only one has '
                            f'{", ".join(map(repr, difference))}. Give both the same columns and transforms.')
        return [instance, prior]

    def captions(self) -> Iterator[str]:
        """Yield the instances' captions, as `MapDataset.captions`: a prior's lack a new word on purpose."""
        return self.sets['instance'].captions()

    def _sample(self, name: str, draw: Draw) -> Sample:
        """Return the draw's row; a shorter data set goes on in the next epoch where it stopped in this one."""
        dataset = self.sets[name]
        position, num = draw.epoch * len(self) + draw.index, len(dataset)
        return dataset[draw._replace(index=position % num, epoch=position // num)]
