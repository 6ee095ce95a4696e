"""BucketSampler: batches of one shape, chosen by the images' aspect ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal

import numpy as np
from mmengine.logging import print_log

from diffengine_sdxl.datasets.base import MapDataset
from diffengine_sdxl.datasets.data_sampler import Draw, KeyedSampler, check_start
from diffengine_sdxl.datasets.image_sizes import read_sizes
from diffengine_sdxl.datasets.row_digests import is_ours
from diffengine_sdxl.datasets.transforms.geometry import Size, height_width
from diffengine_sdxl.errors import UserError, listed, one_of, whole_number
from diffengine_sdxl.registry import DATA_SAMPLERS

#: The part of an image that its bucket must at least keep.
KEPT = 0.5


def bucket_sizes(area: int, step: int, max_ratio: float, num: int, sizes: np.ndarray) -> list[tuple[int, int]]:
    """Return (height, width) of at most `num` buckets: a square, and pairs of an upright and a lying shape.

    Sides are multiples of `step`, areas at most `area` and by less than a step smaller. If there are more pairs than
    `num` holds, those that cut the least off the images are chosen, one after the other.

    Args:
        area: pixels.
        max_ratio: largest ratio of the long side to the short one.
        sizes: (height, width) of the images, int [N, 2].

    Raises:
        UserError: not even the square of one step has so few pixels.
    """
    side = int(area**0.5) // step * step
    if side == 0:
        raise UserError(f'BucketSampler: step={step} is more than the side of {area} pixels; choose a smaller step.')
    shapes: list[tuple[int, int]] = []
    for short in range(side - step, 0, -step):
        long = area // short // step * step
        if long > max_ratio * short:
            break
        if not shapes or long > shapes[-1][0]:
            shapes.append((long, short))
    num_pairs = (num - 1) // 2
    if len(shapes) > num_pairs:
        ratios, counts = np.unique(np.abs(_log_ratios(sizes)).round(3), return_counts=True)
        candidates = _log_ratios(np.array(shapes))
        # Distance of each ratio to each candidate, and to the nearest one chosen, the square first.
        distances, nearest, chosen = np.abs(ratios - candidates[:, None]), ratios, list[int]()
        for _ in range(num_pairs):
            kept = (np.exp(-np.minimum(distances, nearest)) * counts).sum(axis=1)
            kept[chosen] = -1
            chosen.append(int(kept.argmax()))
            nearest = np.minimum(nearest, distances[chosen[-1]])
        shapes = [shapes[i] for i in sorted(chosen)]
    return [*((short, long) for long, short in reversed(shapes)), (side, side), *shapes]


def _log_ratios(sizes: np.ndarray) -> np.ndarray:
    """Return log(height / width) of sizes [N, 2]."""
    ratios: np.ndarray = np.log(sizes[:, 0] / sizes[:, 1])
    return ratios


@DATA_SAMPLERS.register_module()
class BucketSampler(KeyedSampler):
    """An endless sequence of rows in which all samples of an optimizer step have one shape.

    Each image belongs to the bucket of the nearest aspect ratio. The rows of each epoch, in the order of
    `KeyedSampler`, fill a queue for each bucket; a queue that holds the samples of a step is read as a whole; what is
    left is read in a later epoch. So every row is read once for each epoch, in the number of its epoch. As in
    `KeyedSampler`, process r of w takes the positions with p % w == r, so the number of processes changes nothing.

    Resize and Crop with size='bucket' make the images that shape.

    Args:
        dataset: a data set of numbered rows, or a Mixture. Only the images' headers are read; of rows that are drawn by
            code, the images.
        resolution: the buckets' area is at most that of this size, in pixels; a number or (height, width).
        max_buckets: number of shapes. Each is compiled, and captured, on its own on a GPU.
        step: sides are multiples of it.
        max_ratio: largest ratio of the long side to the short one.
        upscale: accept images that are smaller than their bucket.
        buckets: (height, width) of all buckets, in place of the four options before `upscale`.
        unfit: 'raise' refuses images that are smaller than their bucket, or of which it would cut off more than half;
            'skip' leaves them out, and says how many.
        shuffle, seed, start: see `KeyedSampler`.

    Raises:
        UserError: an option is invalid, an image fits no bucket, or none fits, or the data set is of another kind.
    """

    def __init__(self, dataset: Any, resolution: Size = 1024, max_buckets: int = 9, step: int = 64,
                 max_ratio: float = 2.0, upscale: bool = False, buckets: Sequence[Size] | None = None,
                 unfit: Literal['raise', 'skip'] = 'raise', shuffle: bool = True, seed: int | None = None,
                 start: int = 0) -> None:
        super().__init__(dataset, shuffle, seed, start)
        one_of('BucketSampler: unfit', unfit, ('raise', 'skip'))
        height, width = height_width(resolution, 'BucketSampler: resolution')
        step = whole_number('BucketSampler: step', step, 1)
        num = whole_number('BucketSampler: max_buckets', max_buckets, 1)
        if isinstance(max_ratio, bool) or not isinstance(max_ratio, int | float) or not 1 <= max_ratio <= 16:
            raise UserError(f'BucketSampler: max_ratio={max_ratio!r} must be a number in [1, 16].')
        self._mixture = dataset if hasattr(dataset, 'place') else None
        #: Prefix of the keys of a set's samples -> the set.
        self._sets: dict[str, MapDataset] = {'': dataset} if self._mixture is None else {
            f'{name}/': part for name, part in dataset.sets.items()}
        if not all(isinstance(part, MapDataset) for part in self._sets.values()):
            raise UserError(f'BucketSampler cannot read the sizes of a {type(dataset).__name__}: it takes data sets of '
                            'numbered rows with one image each. For regularisation images use a Mixture with '
                            'loss_weights in place of PriorPreservation, whose rows are pairs.')
        for prefix, part in self._sets.items():
            known = bool(part.transforms) and all(map(is_ours, part.transforms))
            if known and not any(getattr(t, 'size', 0) is None for t in part.transforms):  # None: 'bucket'
                raise UserError(f"BucketSampler: no transform of {prefix}{part.source} makes images the shape of their "
                                "bucket. Set image_size='bucket', or size='bucket' in Resize and in Crop.")
        self._first = np.cumsum([0, *map(len, self._sets.values())])
        sizes = self._read_sizes()
        readable = sizes[:, 0] > 0
        self.sizes = bucket_sizes(height * width, step, max_ratio, num, sizes[readable]) if buckets is None else [
            height_width(size, 'BucketSampler: buckets') for size in buckets]
        if not self.sizes or len({*self.sizes}) < len(self.sizes):
            raise UserError(f'BucketSampler: buckets={buckets} must be a list of different (height, width).')
        shapes, sizes = np.array(self.sizes), np.maximum(sizes, 1)
        self._bucket = np.abs(_log_ratios(sizes)[:, None] - _log_ratios(shapes)).argmin(axis=1)
        self._fits = readable.copy()
        self._leave_out(sizes, shapes[self._bucket], upscale, unfit)
        #: Samples of all processes in one optimizer step.
        self.samples_per_step = self.world
        self._per_epoch = np.bincount(self._walk(0)[1], minlength=len(self.sizes))
        if not self._per_epoch.any():
            raise UserError('BucketSampler: no image fits a bucket.')

    def _read_sizes(self) -> np.ndarray:
        """Return (height, width) of all images, int32 [N, 2]; 0, 0 of unreadable ones.

        Raises:
            BadImageError: one is not, and its data set's `on_bad_image` is 'raise'.
        """
        parts = []
        for dataset in self._sets.values():
            sizes, errors = read_sizes(dataset)
            for row, error in errors.items():
                dataset.handle_bad_image(dataset.key(row), error)
            parts.append(sizes)
        return np.concatenate(parts)

    def _leave_out(self, images: np.ndarray, buckets: np.ndarray, upscale: bool, unfit: str) -> None:
        """Find images that do not fit their buckets, both [N, 2], and take them out of those that do.

        Raises:
            UserError: there are some, and `unfit` is 'raise'.
        """
        small: np.ndarray = np.logical_and((images < buckets).any(axis=1), not upscale)
        scale = (buckets / images).max(axis=1)
        cut = buckets.prod(axis=1) < KEPT * scale**2 * images.prod(axis=1)
        bad = np.flatnonzero((small | cut) & self._fits)
        if not len(bad):
            return

        def reason(i: int) -> str:
            number = int(np.searchsorted(self._first, i, 'right')) - 1
            why = 'smaller than' if small[i] else 'by more than half cut off by'
            prefix, dataset = list(self._sets.items())[number]
            key = dataset.key(int(i - self._first[number]))
            return f"'{prefix}{key}' ({_shape(images[i])}, {why} its bucket of {_shape(buckets[i])})"
        text = (f'{len(bad):,} of {len(images):,} images fit no bucket (height x width): '
                f'{listed(map(reason, bad[:4].tolist()), 3)}.')
        if unfit == 'raise':
            raise UserError(f"{text} Set train_dataloader.sampler.unfit='skip' to leave them out, upscale=True or a "
                            'lower resolution for small ones, a higher max_ratio for long ones.')
        print_log(f'{text} They are left out.', logger='current')
        self._fits[bad] = False

    def prepare(self, samples_per_step: int, size_divisor: int) -> None:
        """Take what the run says, before the first iteration.

        Args:
            samples_per_step: of all processes in one optimizer step, which have one shape; a multiple of the processes.
            size_divisor: sides must be multiples of it for the model.

        Raises:
            UserError: they are not.
        """
        self.samples_per_step = samples_per_step
        if bad := [size for size in self.sizes if size[0] % size_divisor or size[1] % size_divisor]:
            raise UserError(f'The bucket of {_shape(bad[0])} pixels does not suit this model and its adapters, which '
                            f'take multiples of {size_divisor}: set train_dataloader.sampler.step to such a multiple, '
                            'or choose other `buckets`.')

    def describe(self) -> str:
        """Return a line with the number of images in each bucket, and one with the buckets that are rarely full."""
        used = np.bincount(self._bucket[self._fits], minlength=len(self.sizes))
        text = 'Buckets (height x width): ' + ', '.join(
            f'{_shape(size)}: {number:,} images' for size, number in zip(self.sizes, used, strict=True) if number)
        if left := int((~self._fits).sum()):
            text += f'; {left:,} are left out'
        rare = [_shape(size) for size, number in zip(self.sizes, self._per_epoch, strict=True)
                if 0 < number < self.samples_per_step]
        if rare:
            text += (f'\nFewer than the {self.samples_per_step} samples of a step are in {", ".join(rare)}: such a '
                     'bucket is read once in several epochs.')
        return text

    def _images(self, epoch: int) -> np.ndarray:
        """Return which image each index of the data set is in an epoch, as a number in all sets; int64 [L]."""
        if self._mixture is None:
            return np.arange(self.num_rows)
        sets, rows, _ = self._mixture.place(epoch, self.seed)
        images: np.ndarray = self._first[sets] + rows
        return images

    def _walk(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of an epoch in reading order, without those that fit no bucket, and their buckets."""
        order = self.order(epoch).numpy()
        images = self._images(epoch)[order]
        fits = self._fits[images]
        return order[fits], self._bucket[images[fits]]

    def draw(self, index: int, epoch: int = 0) -> Draw:
        """Return the draw of a row with the size of its bucket, whether the run reads it or not."""
        return Draw(index, epoch, self.seed, self.sizes[self._bucket[self._images(epoch)[index]]])

    def draws(self, epoch: int) -> Iterator[Draw]:
        """Yield the draws of an epoch, in the order in which they enter the queues."""
        for index, bucket in zip(*(part.tolist() for part in self._walk(epoch)), strict=True):
            yield Draw(index, epoch, self.seed, self.sizes[bucket])

    def _steps(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Yield the size and the (index, epoch) of the samples of each step, int64 [samples_per_step, 2], endlessly."""
        num = self.samples_per_step
        queues = [np.zeros((0, 2), np.int64) for _ in self.sizes]
        for epoch in count():
            indices, buckets = self._walk(epoch)
            steps = []
            for bucket, waiting in enumerate(queues):
                places = np.flatnonzero(buckets == bucket)
                draws = np.concatenate([waiting, np.stack([indices[places], np.full_like(places, epoch)], axis=1)])
                whole = len(draws) // num * num
                queues[bucket] = draws[whole:]
                # A step is read when its last draw has come.
                steps += [(places[end - len(waiting) - 1], bucket, draws[end - num:end])
                          for end in range(num, whole + 1, num)]
            for _, bucket, draws in sorted(steps, key=lambda step: step[0]):
                yield self.sizes[bucket], draws

    def __iter__(self) -> Iterator[Draw]:
        check_start(self.start, self.world)
        position = 0
        for size, draws in self._steps():
            end = position + len(draws)
            if end > self.start:
                first = max(position, self.start) - position
                for index, epoch in draws[first + self.rank::self.world].tolist():
                    yield Draw(index, epoch, self.seed, size)
            position = end

    def __len__(self) -> int:
        """Return the samples of one epoch that one process reads, rounded up; the sequence itself has no end."""
        return -(-int(self._per_epoch.sum()) // self.world)


def _shape(size: Sequence[int] | np.ndarray) -> str:
    return f'{size[0]} x {size[1]}'
