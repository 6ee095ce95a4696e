"""Base classes of metrics: what they measure of a batch, and how means, sets and differences get their intervals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.interval import Estimate

#: Image sets that others are compared with, the first that is made; and those that are subtracted from it.
COMPARED_WITH, SUBTRACTED = ('adapted', 'base'), ('base', 'compared')
#: Last parts of a metric's name that qualify its value; `better` is 1 where higher is better, -1 where lower is.
QUALIFIERS = ('low', 'high', 'num_samples', 'p', 'better')
#: Of no image.
NONE = Estimate(float('nan'), float('nan'), float('nan'), 0)


def difference_name(first: str, second: str) -> str:
    """Return the name under which a difference of image sets stands beside the sets' own names."""
    return f'{first} - {second}'


def differences(image_sets: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of image sets whose difference is measured, first minus second.

    'adapted' - 'base' and 'adapted' - 'compared', where they are made; 'base' - 'compared' of a model without adapters.
    """
    first = next((name for name in COMPARED_WITH if name in image_sets), None)
    return [(first, second) for second in SUBTRACTED if first is not None and second in image_sets and second != first]


def difference_names(image_sets: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all differences of `image_sets`."""
    return tuple(difference_name(*pair) for pair in differences(image_sets))


@dataclass(frozen=True)
class Measured:
    """What a metric keeps of one sample and seed.

    Attributes:
        key: of the sample: the cluster of its intervals. seed: one of the evaluation's.
        values: by image set, what `ImageMetric.measure` returned of its image.
        reference: what `ImageMetric.reference` returned of the sample; None if the metric needs none.
    """

    key: str
    seed: int
    values: Mapping[str, Any]
    reference: Any = None


class ImageMetric(BaseMetric):
    """A number of each image set, and of the paired difference of two, with 95 % intervals.

    Computes '<image set>/<name>' and '.../low', '/high', '/num_samples', '/p' (of differences), '/better'. Images are
    as PNG files hold them, in 8 bits, so a result is the same whether they come from the model or from files. The
    results of all processes are put in the order of (key, seed) first, so they don't depend on the number of processes.

    Args:
        collect_device, prefix, collect_dir: see mmengine's BaseMetric; `prefix` distinguishes two metrics of one type.

    Attributes:
        name: in tables and files; short, without spaces or '/'. What changes the number (a network) is part of it.
        better: 1 if higher is better, -1 if lower is; 0 if neither is.
        needs: entries of the batch that it reads, besides 'key'.
        hint: what to do about a missing one, a sentence.
        device: where its networks run; the evaluation sets it.
        rows: after `evaluate`, in the main process, all that was measured, in the order of (key, seed).
    """

    name = ''
    better = 1
    needs: tuple[str, ...] = ()
    hint = ''
    device = torch.device('cpu')

    def __init__(self, collect_device: str = 'cpu', prefix: str | None = None, collect_dir: str | None = None) -> None:
        # mmengine warns of a metric without a prefix; these need none, as their name follows the image set.
        super().__init__(collect_device, prefix or self.name or type(self).__name__, collect_dir)
        self.prefix = prefix
        self.rows: list[Measured] = []

    @abstractmethod
    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[Any]:
        """Return what is kept of each image: a number, an array, or a tuple of them; B of them.

        Args:
            images: of one image set, [B, 3, H, W] in [0, 1], fp32 on the CPU.
            batch: as collated: 'key' and the entries that the metric needs, B of each; images as floats.
        """

    def reference(self, batch: Mapping[str, Any]) -> Sequence[Any] | None:
        """Return what is kept of each sample itself, once for all seeds and image sets; None for nothing."""
        return None

    @abstractmethod
    def estimate(self, rows: Sequence[Measured], image_set: str) -> Estimate:
        """Return the number of an image set, of which each row has a value."""

    @abstractmethod
    def difference(self, rows: Sequence[Measured], first: str, second: str) -> Estimate:
        """Return the number of `first` minus that of `second`; each row has both."""

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Return a warning if so many samples and seeds are too few, before any image is made; None if they suffice.

        Raises:
            UserError: a file that it needs, of a network, is missing.
        """
        return None

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Measure all images of a batch.

        Args:
            data_batch: see `measure`.
            data_samples: B dicts of 'key', 'seed' and 'images', {image set: [3, H, W] in [0, 1]}.

        Raises:
            UserError: the batch lacks an entry, or an entry is invalid.
        """
        for name in ('key', *self.needs):
            if name not in data_batch:
                raise UserError(f"{type(self).__name__} needs '{name}' of every sample, and the batch has only "
                                f"{listed(list(data_batch), 20)}.{' ' * bool(self.hint)}{self.hint}")
        keys = [str(key) for key in data_batch['key']]
        assert keys == [str(sample['key']) for sample in data_samples], 'the images of a batch, in its order'
        measured: dict[str, Sequence[Any]] = {}
        try:
            for image_set in data_samples[0]['images']:
                images = torch.stack([sample['images'][image_set] for sample in data_samples]).float().cpu()
                measured[image_set] = self.measure(images, data_batch)
                self._check_finite(measured[image_set], keys, image_set)
            references = self._references(keys, data_batch)
        except Exception as error:
            error.add_note(f'{type(self).__name__} measured the images of {listed(keys)}.')
            raise
        for i, sample in enumerate(data_samples):
            self.results.append(Measured(keys[i], int(sample['seed']), {name: v[i] for name, v in measured.items()},
                                         None if references is None else references[i]))

    def _check_finite(self, values: Sequence[Any], keys: Sequence[str], image_set: str) -> None:
        for key, value in zip(keys, values, strict=True):
            try:
                finite = value is None or bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())
            except (TypeError, ValueError):  # no numbers, or of several shapes
                continue
            if not finite:
                raise UserError(f"{type(self).__name__}: '{self.name}' of the image '{image_set}' of sample '{key}' is "
                                "not finite, so the set has no number. A MeanMetric returns None for an image that "
                                'does not count.')

    _last: tuple[list[str], Sequence[Any] | None] | None = None

    def _references(self, keys: list[str], batch: Mapping[str, Any]) -> Sequence[Any] | None:
        """Return `reference`, computed once for the seeds of a batch, which come one after the other."""
        if self._last is None or self._last[0] != keys:
            self._last = keys, self.reference(batch)
        return self._last[1]

    def compute_metrics(self, results: Sequence[Measured]) -> dict[str, float | int]:
        """Return the numbers of all image sets and differences, with intervals, of the results of all processes."""
        self._last = None
        self.rows = sorted(results, key=lambda row: (row.key, row.seed))
        numbers: dict[str, float | int] = {}
        image_sets = list(dict.fromkeys(name for row in self.rows for name in row.values))

        def add(group: str, estimate: Estimate) -> None:
            name = f'{group}/{self.name}'
            numbers.update({name: estimate.value, f'{name}/low': estimate.low, f'{name}/high': estimate.high,
                            f'{name}/num_samples': estimate.num_samples, f'{name}/better': self.better})
            if estimate.p is not None:
                numbers[f'{name}/p'] = estimate.p
        for image_set in image_sets:
            add(image_set, self.estimate([row for row in self.rows if image_set in row.values], image_set))
        for first, second in differences(image_sets):
            if both := [row for row in self.rows if {first, second} <= row.values.keys()]:
                add(difference_name(first, second), self.difference(both, first, second))
        return numbers

    def per_image(self) -> dict[tuple[str, int, str], float]:
        """Return (key, seed, image set) -> its own number, of `rows`; {} of a metric that only sets have."""
        return {}


class MeanMetric(ImageMetric):
    """A score for each image, averaged; `measure` returns numbers, or None for an image that does not count.

    Attributes:
        bounds: within which scores, and so intervals, lie.
        is_share: scores are 0 or 1.
    """

    bounds = (0.0, 1.0)
    is_share = False

    def estimate(self, rows: Sequence[Measured], image_set: str) -> Estimate:
        """Return the mean of the scores."""
        rows = [row for row in rows if row.values[image_set] is not None]
        if not rows:
            return NONE
        values, clusters = [row.values[image_set] for row in rows], [row.key for row in rows]
        return interval.share(values, clusters) if self.is_share else interval.mean(values, clusters, self.bounds)

    def difference(self, rows: Sequence[Measured], first: str, second: str) -> Estimate:
        """Return the mean of the paired differences."""
        rows = [row for row in rows if row.values[first] is not None and row.values[second] is not None]
        if not rows:
            return NONE
        compare = interval.share_difference if self.is_share else interval.difference
        return compare([row.values[first] for row in rows], [row.values[second] for row in rows],
                       [row.key for row in rows])

    def per_image(self) -> dict[tuple[str, int, str], float]:
        """Return all scores."""
        return {(row.key, row.seed, image_set): float(value) for row in self.rows
                for image_set, value in row.values.items() if value is not None}


class SetMetric(ImageMetric):
    """A number that only a set of images has, with a jackknife's interval.

    Attributes:
        bounds: within which it lies.
    """

    bounds = (-np.inf, np.inf)

    @abstractmethod
    def statistic(self, values: Sequence[Any], rows: Sequence[Measured]) -> float:
        """Return the number of a set.

        Args:
            values: of its images, as `measure` returned them.
            rows: of the same images: key, seed, reference.
        """

    def estimate(self, rows: Sequence[Measured], image_set: str) -> Estimate:
        """Return the set's number."""
        return interval.jackknife(self._of(rows, image_set), [row.key for row in rows], self.bounds)._replace(p=None)

    def difference(self, rows: Sequence[Measured], first: str, second: str) -> Estimate:
        """Return the difference of the sets' numbers; the same samples are left out of both."""
        one, other = self._of(rows, first), self._of(rows, second)
        return interval.jackknife(lambda kept: one(kept) - other(kept), [row.key for row in rows])

    def _of(self, rows: Sequence[Measured], image_set: str) -> Callable[[np.ndarray], float]:
        def statistic(kept: np.ndarray) -> float:
            some = [row for row, keep in zip(rows, kept, strict=True) if keep]
            return self.statistic([row.values[image_set] for row in some], some)
        return statistic
