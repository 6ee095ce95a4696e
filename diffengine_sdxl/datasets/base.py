"""What all data sets share: load a row, skip it if its image is unreadable, set its key, run the transforms."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

from mmengine.logging import print_log
from torch.utils.data import Dataset

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.errors import UserError, one_of, whole_number
from diffengine_sdxl.registry import SCOPE, TRANSFORMS

Sample = dict[str, Any]
"""The dict made of a row. Before the transforms: img, conditioning_image, ... RGB images; text str; key str (the row's
identity in its source); epoch, seed, num_skipped int. After them: img and conditions uint8 [3, H, W], or float32 in
[-1, 1] and in [0, 1] from transforms of a user's own; time_ids float32 [6]."""

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
    """

    def __init__(self, transforms: Transforms = (), on_bad_image: OnBadImage = 'raise',
                 max_samples: int | None = None) -> None:
        one_of('on_bad_image', on_bad_image, ('raise', 'skip'))
        self.transforms: list[Transform] = [TRANSFORMS.build(t) if isinstance(t, dict) else t for t in transforms]
        for i, transform in enumerate(self.transforms):
            if hasattr(transform, 'followed'):  # PackInputs
                transform.followed = any(not _is_ours(later) for later in self.transforms[i + 1:])
        self.on_bad_image = on_bad_image
        self.max_samples = None if max_samples is None else whole_number('max_samples', max_samples, 1)
        self._warned: set[str] = set()

    def without_drops(self) -> Self:
        """Return this data set without the transforms that drop captions or image prompts at random."""
        other = copy.copy(self)
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
        sample.update(key=key, epoch=draw.epoch, seed=draw.seed, num_skipped=num_skipped)
        # Not for ours alone: it takes 1 ms.
        seeded = nullcontext() if all(map(_is_ours, self.transforms)) else rng.fork(
            'transform', draw.seed, key, draw.epoch)
        with seeded:
            for transform in self.transforms:
                sample = transform(sample)
        return sample


class MapDataset(SampleBuilder, Dataset[Sample]):
    """A data set of numbered rows; a subclass implements `__len__`, `key` and `load`.

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
        raise NotImplementedError

    def caption_texts(self) -> Iterable[str]:
        """Return the rows' captions as they are in the source, without reading images; none if that is not possible."""
        return ()

    def captions(self) -> Iterator[str]:
        """Yield the rows' captions as transforms leave them, none dropped; nothing if a user's own may change them."""
        if all(map(_is_ours, self.transforms)):
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
                return self.transform(self.load(index, draw), self.key(index), draw, num_skipped)
            except BadImageError as error:
                self.handle_bad_image(self.key(index), error)
        raise UserError(f'None of the {len(self)} rows of {self.source} has a readable image.')


def _is_ours(transform: Transform) -> bool:
    return type(transform).__module__.startswith(f'{SCOPE}.')
