"""What all data sets share: load a row, skip it if its image is unreadable, set its key, run the transforms."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal, Self

from mmengine.logging import print_log
from torch.utils.data import Dataset

from diffengine_sdxl import rng
from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.datasets.cached import ONLY_FOR_TRANSFORMS, Row, RowCache
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.row_digests import FileDigest, content_digest, is_ours
from diffengine_sdxl.errors import UserError, error_prefix, one_of, whole_number
from diffengine_sdxl.registry import SCOPE, TRANSFORMS

Sample = dict[str, Any]
"""The dict made of a row. Before the transforms: img, conditioning_image, ... RGB images; text str; key str (the row's
identity in its source); epoch, seed, num_skipped int. After them: img and conditions uint8 [3, H, W], or float32 in
[-1, 1] and in [0, 1] from transforms of a user's own; time_ids float32 [6].

With a cache also 'lookups', name -> `Lookups` of this row: 'moments', 'text', '<condition_key>' of image prompts, and
'sample', whose value is the entry to keep, if it is new. If all of a row was found, its image and prompts are None."""

OnBadImage = Literal['raise', 'skip']
Transform = Callable[[Sample], Sample]
Transforms = Sequence[dict[str, Any] | Transform]


class SampleBuilder:
    """What map-style and streamed data sets share.

    Args:
        transforms: configs of `TRANSFORMS`, or callables, applied in order.
        on_bad_image: 'raise' stops at an unreadable image; 'skip' takes the next readable row, warns once per row, and
            counts the skipped rows in 'num_skipped'.
        max_samples: use only the first rows of the source, at least 1; None for all.
        variants: how many crops, flips and sizes of each image are drawn, at least 1; epoch e has the one of number
            e % variants, so that a cache can hold them all. None: they are drawn anew in every epoch.
    """

    #: Whether images are drawn anew in every epoch, without a number that a cache could hold.
    draws_anew = False

    def __init__(self, transforms: Transforms = (), on_bad_image: OnBadImage = 'raise',
                 max_samples: int | None = None, variants: int | None = None) -> None:
        one_of('on_bad_image', on_bad_image, ('raise', 'skip'))
        self.transforms: list[Transform] = []
        for transform in transforms:
            name = str(transform.get('type')).split('.')[-1] if isinstance(transform, dict) else ''
            with error_prefix(f'{name}: ', unless=name):
                self.transforms.append(TRANSFORMS.build(transform) if isinstance(transform, dict) else transform)
        for i, transform in enumerate(self.transforms):
            if hasattr(transform, 'followed'):  # PackInputs
                transform.followed = any(not is_ours(later) for later in self.transforms[i + 1:])
        self.on_bad_image = on_bad_image
        self.max_samples = None if max_samples is None else whole_number('max_samples', max_samples, 1)
        self.variants = None if variants is None else whole_number('variants', variants, 1)
        self.cache: RowCache | None = None
        self._warned: set[str] = set()

    def attach_cache(self, plan: CachePlan) -> None:
        """Look rows up in a cache from now on; before a loader's workers start.

        Not if a user's class has its own `__getitem__`, `build` or `transform`: what these do, no key tells.
        """
        ours = [getattr(base, name) is getattr(type(self), name) for base in (SampleBuilder, MapDataset)
                for name in ('transform', 'build', '__getitem__') if hasattr(base, name) and isinstance(self, base)]
        if not all(ours):
            print_log(f'{type(self).__name__} has its own __getitem__, build or transform, so of its samples only the '
                      'captions are cached.', logger='current')
            return
        self.cache = RowCache(plan, self.transforms, self.variants, self.draws_anew, getattr(self, 'source', ''))

    def without_drops(self) -> Self:
        """Return this data set without the transforms that drop captions or image prompts at random, and uncached."""
        other = copy.copy(self)
        other.cache = None
        other.transforms = [t for t in self.transforms if not getattr(t, 'drops_conditioning', False)]
        return other

    def handle_bad_image(self, key: str, error: BadImageError) -> None:
        """Raise `error`, or warn once per row, as `on_bad_image` says."""
        if self.on_bad_image == 'raise':
            raise error
        if key not in self._warned:
            self._warned.add(key)
            print_log(f'Skipped: {error}', logger='current', level=logging.WARNING)

    def transform(self, sample: Sample, key: str, draw: Draw, num_skipped: int) -> Sample:
        """Set the key and run the transforms.

        Our transforms draw from their own generators. The global ones are seeded from the key too, for a user's
        transforms, and restored afterwards.
        """
        sample.update(self._head(key, draw, num_skipped))
        # Not for ours alone: it takes 1 ms.
        seeded = nullcontext() if all(map(is_ours, self.transforms)) else rng.fork(
            'transform', draw.seed, key, draw.epoch)
        with seeded:
            for transform in self.transforms:
                sample = transform(sample)
        for name in ONLY_FOR_TRANSFORMS:
            sample.pop(name, None)
        return sample

    def build(self, row: Row, key: str, draw: Draw, num_skipped: int) -> Sample:
        """Return the sample of a row, read and transformed, or taken from the cache.

        Raises:
            BadImageError: an image is unreadable.
        """
        if self.cache is None:
            return self.transform(row.load(), key, draw, num_skipped)
        return self.cache.sample(row, self._head(key, draw, num_skipped),
                                 lambda sample: self.transform(sample, key, draw, num_skipped))

    def variant(self, epoch: int) -> int:
        """Return what geometric transforms draw by in place of the epoch."""
        return epoch if self.variants is None else epoch % self.variants

    def _head(self, key: str, draw: Draw, num_skipped: int) -> Sample:
        """Return what a sample has before its transforms besides what its row holds."""
        head: Sample = dict(key=key, epoch=draw.epoch, seed=draw.seed, num_skipped=num_skipped,
                            variant=self.variant(draw.epoch))
        return head if draw.size is None else {**head, 'bucket': draw.size}


class MapDataset(SampleBuilder, Dataset[Sample]):
    """A data set of numbered rows; a subclass implements `__len__`, `key` and `load`.

    So that images which a cache knows need not be read, it implements `images`, `texts` and `cells` in place of `load`.

    Attributes:
        source: how errors name the data.
    """

    source: str

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Return the identity of row `index` in its source; shuffling and skipping don't change it."""
        raise NotImplementedError

    def load(self, index: int, draw: Draw) -> Sample:
        """Return the images and texts of row `index`.

        Raises:
            BadImageError: an image is unreadable.
        """
        return {**self.images(index, draw), **self.texts(index, draw)}

    def images(self, index: int, draw: Draw) -> Sample:
        """Return the images of row `index`."""
        raise NotImplementedError

    def texts(self, index: int, draw: Draw) -> Sample:
        """Return all that row `index` holds besides images."""
        raise NotImplementedError

    def cells(self, index: int) -> dict[str, Any]:
        """Return what row `index` holds of each image, as `ImageReader` takes it; {} if it is drawn by code.

        A path, bytes, {'bytes', 'path'} or a URL, by the image's key in the sample. Nothing is read. Paths are found
        by the attribute `read_image`, an `ImageReader`, if there is one.
        """
        return {}

    def content(self, index: int, draw: Draw, file_digest: FileDigest) -> Any:
        """Return what the images of row `index` are made of; see `cached.Row`."""
        reader = getattr(self, 'read_image', None)
        return {key: content_digest(cell, reader, f"'{key}' of row {self.key(index)} of {self.source}", file_digest)
                for key, cell in self.cells(index).items()}

    def caption_texts(self) -> Iterable[str]:
        """Return the rows' captions as they are in the source, without reading images; none if that is not possible."""
        return ()

    def captions(self) -> Iterator[str]:
        """Yield the rows' captions as transforms leave them, none dropped; nothing if a user's own may change them."""
        if all(map(is_ours, self.transforms)):
            changes = [transform for transform in self.transforms if getattr(transform, 'changes_caption', False)]
            for index, text in enumerate(self.caption_texts()):
                sample: Sample = {'text': text, 'key': self.key(index), 'epoch': 0, 'seed': 0}
                for transform in changes:
                    sample = transform(sample)
                yield sample['text']

    def __getitem__(self, item: Draw | int) -> Sample:
        """Return the sample of a draw; a plain number is that row in epoch 0 with seed 0.

        Raises:
            BadImageError: an image is unreadable, or a strip too long to be scaled, and `on_bad_image` is 'raise'.
            UserError: no row is readable, or a transform refuses the sample.
        """
        draw = item if isinstance(item, Draw) else Draw(int(item), 0, 0)
        if not 0 <= draw.index < len(self):
            raise IndexError(f'{self.source} has {len(self)} rows, no row {draw.index}.')
        for num_skipped in range(len(self)):
            index = (draw.index + num_skipped) % len(self)
            try:
                return self.build(self._row(index, draw), self.key(index), draw, num_skipped)
            except BadImageError as error:
                self.handle_bad_image(self.key(index), error)
        raise UserError(f'None of the {len(self)} rows of {self.source} has a readable image.')

    def _row(self, index: int, draw: Draw) -> Row:
        return Row(lambda: self.load(index, draw), lambda: self.texts(index, draw),
                   (lambda file_digest: self.content(index, draw, file_digest)) if self._tells_content else None)

    @cached_property
    def _tells_content(self) -> bool:
        """Return whether `cells` or `content` tells what `load` reads; of a user's own class, if it has its own."""
        order = type(self).__mro__
        place = {name: next(i for i, c in enumerate(order) if name in vars(c))
                 for name in ('load', 'images', 'texts', 'cells', 'content')}
        told = min(place['cells'], place['content'])
        return (is_ours(self) or not order[told].__module__.startswith(f'{SCOPE}.')) and place['texts'] <= place[
            'load'] and told <= min(place['load'], place['images'])
