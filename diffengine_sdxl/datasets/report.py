"""What can be known of training data before step 1, without decoding an image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.datasets.base import MapDataset
from diffengine_sdxl.datasets.image_sizes import read_sizes
from diffengine_sdxl.datasets.mixture import Mixture, SeveralSets
from diffengine_sdxl.datasets.transforms import CaptionTagDrop, Resize
from diffengine_sdxl.errors import UserError, count_of, listed

#: What is looked at of each set: captions; headers of images, evenly spaced; files that may be equal; bytes of these.
MAX_CAPTIONS, MAX_HEADERS, MAX_FILES, MAX_BYTES = 10_000, 2_000, 10_000, 2**28
#: Width and height of the ratios in the histogram, whose first and last take all longer ones; and its longest bar.
RATIOS = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))
BAR = 30


@dataclass(frozen=True)
class CaptionLimit:
    """How much of a caption the text encoders read.

    Attributes:
        most: the number that is read; unit: of what, for people: one, several; count: captions -> the number of each.
    """

    most: int
    unit: tuple[str, str]
    count: Callable[[Sequence[str]], Sequence[int]]


def describe_data(dataset: Any, limit: CaptionLimit | None = None, sampler: Any = None) -> str:
    """Return a report of several lines on each data set: captions, sizes, aspect ratios, equal files; and on buckets.

    Only so much of a large one is looked at that it takes a few seconds; the lines say how much.

    Args:
        limit: of captions; None: they are not counted.
        sampler: the loader's; a BucketSampler says how many images each bucket has.
    """
    sets = dataset.sets if isinstance(dataset, SeveralSets) else {getattr(dataset, 'source', ''): dataset}
    lines = ['The training data:']
    for name, each in sets.items():
        lines.append(f'  {name or type(each).__name__}: {_length(dataset, name, each)}')
        if isinstance(each, MapDataset):
            lines += [f'    {line}' for line in (*_captions(each, limit), *_images(each))]
    if hasattr(sampler, 'describe'):
        lines += [f'  {line}' for line in sampler.describe().splitlines()]
    return '\n'.join(lines)


def _length(dataset: Any, name: str, each: Any) -> str:
    if not hasattr(each, '__len__'):
        return 'a stream, which is not looked at'
    text = count_of(len(each), 'row', 'rows')
    if isinstance(dataset, Mixture):
        count = dataset.counts(1)[list(dataset.sets).index(name)]
        text += f', {count:,} of the {len(dataset):,} samples of an epoch'
        if dataset.loss_weights is not None:
            text += f', loss x {dataset.loss_weights[name]:g}'
    return text


def _captions(dataset: MapDataset, limit: CaptionLimit | None) -> Iterator[str]:
    """Yield lines on the captions as transforms leave them, but with all tags."""
    whole = copy.copy(dataset)
    whole.transforms = [each for each in dataset.transforms if not isinstance(each, CaptionTagDrop)]
    texts = list(islice(whole.captions(), MAX_CAPTIONS))
    if not texts:
        return
    counted = ('' if len(texts) == len(dataset) else 'the first ') + count_of(len(texts), 'caption', 'captions')
    different = list(dict.fromkeys(texts))
    by_text = {} if limit is None else dict(zip(different, limit.count(different), strict=True))
    lengths = [by_text.get(text, 0) for text in texts]
    longest = f', the longest of {count_of(max(lengths), *limit.unit)}' if limit is not None else ''
    yield f'{counted}, {len(different):,} different, {texts.count("")} empty{longest}'
    if limit is not None and (long := [i for i, length in enumerate(lengths) if length > limit.most]):
        examples = listed((f"'{dataset.key(i)}' ({lengths[i]}: {texts[i][:60]!r})" for i in long[:4]), 3)
        yield (f'{count_of(len(long), "is", "are")} longer than the {count_of(limit.most, *limit.unit)} that are read: '
               f'{examples}')
    if several := sum('\n' in text for text in texts):
        yield f'{count_of(several, "has", "have")} several lines, read as one text; CaptionLine would choose one'


def _images(dataset: MapDataset) -> Iterator[str]:
    """Yield lines on the images: sizes, those that are too small or unreadable, aspect ratios, equal files."""
    if not dataset.cells(0):
        yield 'images are drawn by code'
        return
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_HEADERS)).astype(int)).tolist()
    try:
        sizes, errors = read_sizes(dataset, rows)
        equal = list(_equal_files(dataset))
    except UserError as error:  # a URL, or a path that leads outside; training says so in its turn
        yield f'images are not looked at: {error}'
        return
    if errors:
        names = listed((str(error) for error in errors.values()), 3)
        yield f'{count_of(len(errors), "image", "images")} cannot be read: {names}'
    readable = np.asarray((sizes > 0).all(axis=1))
    if readable.any():
        num = int(readable.sum())
        looked = (count_of(num, 'image', 'images') if len(rows) == len(dataset) else
                  f'{num:,} of the images, evenly spaced')
        areas = np.where(readable, sizes.prod(axis=1), -1)
        small, large = (_shape(sizes[i]) for i in (int(np.where(readable, areas, 2**62).argmin()), int(areas.argmax())))
        yield f'{looked}: {f"all {small}" if small == large else f"from {small} to {large}"} (height x width)'
        yield from _too_small(dataset, rows, sizes, readable)
        yield from _histogram(sizes[readable])
    yield from equal


def _too_small(dataset: MapDataset, rows: list[int], sizes: np.ndarray, readable: np.ndarray) -> Iterator[str]:
    """Yield a line on images that Resize enlarges; with buckets, the sampler has a line of its own."""
    target = next((transform.size for transform in dataset.transforms if isinstance(transform, Resize)), None)
    if target is None:
        return
    small = np.flatnonzero(readable & (sizes < target).any(axis=1))
    if len(small):
        names = listed((f"'{dataset.key(rows[i])}' ({_shape(sizes[i])})" for i in small[:4]), 3)
        yield f'{count_of(len(small), "is", "are")} smaller than {_shape(target)}, and will be enlarged: {names}'


def _histogram(sizes: np.ndarray) -> Iterator[str]:
    """Yield a line for each aspect ratio to which some images are the nearest."""
    ratios, found = np.log([width / height for width, height in RATIOS]), np.log(sizes[:, 1] / sizes[:, 0])
    nearest = np.abs(found[:, None] - ratios).argmin(axis=1)
    longest = {RATIOS[0]: f', up to 1 : {math.exp(-found.min()):.3g}',
               RATIOS[-1]: f', up to {math.exp(found.max()):.3g} : 1'}
    counts = np.bincount(nearest, minlength=len(RATIOS)).tolist()
    yield 'aspect ratios (width : height):'
    for (width, height), num in zip(RATIOS, counts, strict=True):
        if num:
            bar = '#' * math.ceil(BAR * num / max(counts))
            yield f'  {width:>2} : {height:<2} {bar:<{BAR}} {num:,}{longest.get((width, height), "")}'


def _equal_files(dataset: MapDataset) -> Iterator[str]:
    """Yield a line on images whose files are equal, byte for byte; only files of equal sizes are read."""
    by_size: dict[int, list[tuple[int, Path]]] = {}
    num = min(len(dataset), MAX_FILES)
    for index in range(num):
        found = _locate(dataset, index)
        if not isinstance(found, Path):
            return  # of bytes in a table, all would have to be read
        with suppress(OSError):  # `read_sizes` has named it
            by_size.setdefault(found.stat().st_size, []).append((index, found))
    left, first, pairs = MAX_BYTES, dict[str, int](), list[tuple[int, int]]()
    for size, files in by_size.items():
        for index, path in files if len(files) > 1 else ():
            left -= size
            if left < 0:
                break
            content = digest(path.read_bytes())
            if content in first:
                pairs.append((first[content], index))
            first.setdefault(content, index)
    if pairs:
        names = listed((f"'{dataset.key(a)}' = '{dataset.key(b)}'" for a, b in pairs[:4]), 3)
        yield f'{count_of(len(pairs), "image is an exact duplicate", "images are exact duplicates")}: {names}'
    if num < len(dataset) or left < 0:
        what = f'the first {num:,} files' if num < len(dataset) else f'{MAX_BYTES >> 20} MiB of files of equal sizes'
        yield f'duplicates were looked for among {what} only'


def _locate(dataset: MapDataset, index: int) -> Any:
    """Return where a row's image is: a path within the folders that may be read, or something else."""
    cell, reader = dataset.cells(index).get('img'), getattr(dataset, 'read_image', None)
    return cell if reader is None else reader.locate(
        cell, f"The image of row {dataset.key(index)} of '{dataset.source}'")


def _shape(size: Sequence[int] | np.ndarray) -> str:
    return f'{size[0]} x {size[1]}'
