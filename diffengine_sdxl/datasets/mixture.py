"""Mixture: several data sets by weight or repeats; and what it shares with PriorPreservation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import accumulate, pairwise, zip_longest
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from diffengine_sdxl import rng
from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.datasets.base import MapDataset, Sample
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.errors import UserError, did_you_mean, error_prefix, whole_number
from diffengine_sdxl.registry import DATASETS

#: Entries that `collate.fill_absent` gives to the samples without them.
OPTIONAL = {'mask', 'drop', 'weight', 'lookups'}
#: Epochs whose places are kept: leftovers of a bucket come from earlier epochs.
MAX_PLACES = 3


class SeveralSets(Dataset[Any]):
    """Base: data sets of numbered rows by name, and what concerns all of them.

    Args:
        sets: name -> data set, or its config.

    Raises:
        UserError: one is empty, is a stream, or is itself made of several.
    """

    sets: dict[str, MapDataset]

    def __init__(self, sets: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        self.sets = {}
        for name, value in sets.items():
            with error_prefix(f"{kind}, set '{name}': ", unless=f"'{name}'"):
                self.sets[name] = DATASETS.build(dict(value)) if isinstance(value, Mapping) else value
        for name, dataset in self.sets.items():
            if not isinstance(dataset, MapDataset) or len(dataset) == 0:
                raise UserError(f'{kind}: {name} must be a data set of numbered rows, not empty; streams, and data '
                                'sets that are made of several, cannot be part of it.')

    def __len__(self) -> int:
        raise NotImplementedError

    def draw(self, item: Draw | int) -> Draw:
        """Return a draw of a row that exists; a plain number is that row in epoch 0 with seed 0."""
        draw = item if isinstance(item, Draw) else Draw(int(item), 0, 0)
        if not 0 <= draw.index < len(self):
            raise IndexError(f'{type(self).__name__} has {len(self)} rows, no row {draw.index}.')
        return draw

    def attach_cache(self, plan: CachePlan) -> None:
        """See `MapDataset.attach_cache`."""
        for dataset in self.sets.values():
            dataset.attach_cache(plan)

    def captions(self) -> Iterator[str]:
        """Yield the captions of all sets in turn; see `MapDataset.captions`."""
        for texts in zip_longest(*(dataset.captions() for dataset in self.sets.values())):
            yield from (text for text in texts if text is not None)

    def without_drops(self) -> Self:
        """See `SampleBuilder.without_drops`."""
        other = copy.copy(self)
        other.sets = {name: dataset.without_drops() for name, dataset in self.sets.items()}
        return other


@DATASETS.register_module()
class Mixture(SeveralSets):
    """Samples of several data sets, each with its own source, transforms and captions.

    An epoch has `len()` samples. With `repeats` each row of a set comes up that often in an epoch; with `weights` a
    set has its share of the samples, and goes on in the next epoch where it stopped. Either way each row of a set is
    read equally often over the run, in an order keyed by (seed, name of the set, the set's own epoch). Without
    shuffling (`KeyedSampler(shuffle=False)`) the sets take turns.

    A sample's 'key' begins with the name of its set ('photos/a.png'), which is also its 'data_set'; its 'epoch' is the
    set's own. Kohya's regularisation images are a set with a loss weight.

    Args:
        sets: name (a Python identifier) -> config of a map-style data set.
        weights: name -> share of the samples, in any unit, at least 0; 1 if not given.
        repeats: name -> how often a row comes up in an epoch, at least 1; 1 if not given. Instead of `weights`.
        loss_weights: name -> factor of the samples' loss, at least 0; 1 if not given. The mean over a batch is not
            divided by them.

    Raises:
        UserError: a name or a number is invalid, or weights sum to nothing; a sample has an entry that those of
            another set lack.
    """

    def __init__(self, sets: Mapping[str, Any], weights: Mapping[str, float] | None = None,
                 repeats: Mapping[str, int] | None = None, loss_weights: Mapping[str, float] | None = None) -> None:
        # An override takes a set out with None; its weight may stay.
        options: list[Any] = [given and {name: value for name, value in given.items()
                                         if name not in sets or sets[name] is not None}
                              for given in (weights, repeats, loss_weights)]
        weights, repeats, loss_weights = options
        sets = {name: value for name, value in sets.items() if value is not None}
        if not sets:
            raise UserError('Mixture: sets is empty; name at least one data set.')
        for name in sets:
            if not name.isidentifier():
                raise UserError(f"Mixture: the name '{name}' of a set must be an identifier, such as "
                                f"'{''.join(c if c.isalnum() else '_' for c in name).strip('_') or 'photos'}'.")
        if weights is not None and repeats is not None:
            raise UserError('Mixture: weights and repeats exclude one another; set one of them.')
        super().__init__(sets)
        self.source = f'Mixture({", ".join(self.sets)})'
        repeats = {name: whole_number(f'Mixture: repeats.{name}', value, 1)
                   for name, value in self._by_name('repeats', repeats).items()}
        shares = self._by_name('weights', weights)
        self.loss_weights = None if loss_weights is None else self._by_name('loss_weights', loss_weights)
        if self.loss_weights is not None and not any(self.loss_weights.values()):
            raise UserError(f'Mixture: loss_weights={loss_weights} let nothing train; give a set one above 0.')
        rows = [len(dataset) for dataset in self.sets.values()]
        if weights is None:
            counts = [num * repeats[name] for name, num in zip(self.sets, rows, strict=True)]
            self.length, self.shares = sum(counts), [Fraction(num) for num in counts]
        else:
            self.shares = [Fraction(shares[name]) for name in self.sets]
            if not sum(self.shares):
                raise UserError(f'Mixture: weights={dict(weights)} sum to nothing; give a set a weight above 0.')
            # At least one sample of each set in an epoch.
            least = min(share for share in self.shares if share)
            self.length = max(sum(rows), math.ceil(sum(self.shares) / least))
        self._places: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        #: Name of a set -> the entries of its samples, of those read so far.
        self._entries: dict[str, set[str]] = {}

    def _by_name(self, key: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return a number for each set, 1 where there is none."""
        for name, value in (values or {}).items():
            if name not in self.sets:
                raise UserError(f"Mixture: {key} names '{name}', which is not one of its sets {', '.join(self.sets)}."
                                f'{did_you_mean(name, list(self.sets))}')
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float('inf'):
                raise UserError(f'Mixture: {key}.{name}={value!r} must be a number of at least 0.')
        return {name: (values or {}).get(name, 1) for name in self.sets}

    def __len__(self) -> int:
        return self.length

    def counts(self, epochs: int) -> list[int]:
        """Return how many samples of each set the first `epochs` epochs have."""
        total, ends = sum(self.shares), [Fraction(0), *accumulate(self.shares)]
        bounds = [math.floor(epochs * self.length * end / total) for end in ends]
        return [high - low for low, high in pairwise(bounds)]

    def place(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where the samples of an epoch come from, int64 [L] each: number of the set, row, the set's own epoch.

        The sets take turns in proportion to their samples.
        """
        if (epoch, seed) not in self._places:
            numbers, rows, epochs, turns = [], [], [], []
            for number, (begin, end) in enumerate(zip(self.counts(epoch), self.counts(epoch + 1), strict=True)):
                positions = np.arange(begin, end, dtype=np.int64)
                own_rows, own_epochs = self._own(number, positions, seed)
                numbers.append(np.full(len(positions), number, dtype=np.int64))
                rows.append(own_rows)
                epochs.append(own_epochs)
                turns.append((np.arange(end - begin) + 0.5) / max(1, end - begin))
            order = np.argsort(np.concatenate(turns), kind='stable')
            if len(self._places) >= MAX_PLACES:
                del self._places[next(iter(self._places))]
            self._places[epoch, seed] = tuple(  # type: ignore[assignment]
                np.concatenate(parts)[order] for parts in (numbers, rows, epochs))
        return self._places[epoch, seed]

    def _own(self, number: int, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of a set at positions of its own endless sequence."""
        name, dataset = list(self.sets.items())[number]
        epochs, within = np.divmod(positions, len(dataset))
        rows = np.empty_like(positions)
        numbers, starts = np.unique(epochs, return_index=True)  # positions ascend
        for epoch, (begin, end) in zip(numbers.tolist(), pairwise([*starts.tolist(), len(rows)]), strict=True):
            order = torch.randperm(len(dataset), generator=rng.generator(seed, 'order', name, epoch)).numpy()
            rows[begin:end] = order[within[begin:end]]
        return rows, epochs

    def __getitem__(self, item: Draw | int) -> Sample:
        draw = self.draw(item)
        number, row, epoch = (int(values[draw.index]) for values in self.place(draw.epoch, draw.seed))
        name, dataset = list(self.sets.items())[number]
        sample = dataset[draw._replace(index=row, epoch=epoch)]
        sample.update(key=f'{name}/{sample["key"]}', data_set=name)
        if self.loss_weights is not None:
            sample['weight'] = float(self.loss_weights[name]) * float(sample.get('weight', 1.0))
        self._check_entries(name, sample)
        return sample

    def _check_entries(self, name: str, sample: Sample) -> None:
        """Check that the samples of all sets read so far have the same entries."""
        entries = sample.keys() - OPTIONAL
        if self._entries.get(name) == entries:
            return
        self._entries[name] = entries
        for other, others in self._entries.items():
            if others != entries:
                lacking, having, key = next((*names, key) for names, keys in (
                    ((other, name), entries - others), ((name, other), others - entries)) for key in sorted(keys))
                raise UserError(f"Mixture: the samples of '{having}' have '{key}', those of '{lacking}' don't. Give "
                                f"'{lacking}' a column or a transform for it, or take it from '{having}'.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_places': {}}
