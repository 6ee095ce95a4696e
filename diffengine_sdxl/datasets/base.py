"""What every data set does with a row: read it, pass over it if it is unreadable, key it, transform it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from mmengine.logging import print_log
from torch.utils.data import Dataset

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.images import BadImageError
from diffengine_sdxl.datasets.sampler import Draw
from diffengine_sdxl.registry import TRANSFORMS

Sample = dict[str, Any]
"""As read: img, conditioning_image, ... RGB pictures; text str; key str (the row's identity in its source);
epoch, seed, num_skipped int.
After the transforms: img float32 [3, H, W] in [-1, 1]; conditions float32 [3, H, W] in [0, 1]; time_ids float32 [6]."""

OnBadImage = Literal['raise', 'skip']
Transform = Callable[[Sample], Sample]


class SampleMaker:
    """The part that map-style and streamed data sets share.

    Args:
        transforms: configs of `TRANSFORMS`, or callables, applied in order.
        on_bad_image: 'raise' stops at an unreadable image; 'skip' takes the next readable row, with a warning
            that names the row once, and counts in 'num_skipped'.
    """

    def __init__(self, transforms: Sequence[dict[str, Any] | Transform], on_bad_image: OnBadImage) -> None:
        if on_bad_image not in ('raise', 'skip'):
            raise ValueError(f"on_bad_image='{on_bad_image}' is neither 'raise' nor 'skip'.")
        self.transforms: list[Transform] = [TRANSFORMS.build(t) if isinstance(t, dict) else t for t in transforms]
        self.on_bad_image = on_bad_image
        self._warned: set[str] = set()

    def bad(self, key: str, error: BadImageError) -> None:
        """Raise `error`, or warn of it at the first time, as `on_bad_image` says."""
        if self.on_bad_image == 'raise':
            raise error
        if key not in self._warned:
            self._warned.add(key)
            print_log(f'Skipped: {error}', logger='current', level=logging.WARNING)

    def finish(self, sample: Sample, key: str, draw: Draw, num_skipped: int) -> Sample:
        """Write the key and run the transforms.

        The transforms here draw from generators of their own; the global ones are seeded from the key as well,
        for transforms of the user's that know no keys, and are put back afterwards.
        """
        sample.update(key=key, epoch=draw.epoch, seed=draw.seed, num_skipped=num_skipped)
        with rng.fork('transform', draw.seed, key, draw.epoch):
            for transform in self.transforms:
                sample = transform(sample)
        return sample


class MapDataset(SampleMaker, Dataset[Sample]):
    """A data set of numbered rows; a source implements `__len__`, `key` and `load`.

    Attributes:
        source: the words that name the data in errors.
    """

    source: str

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The identity of row `index` in its source, whatever is shuffled or left out."""
        raise NotImplementedError

    def load(self, index: int, draw: Draw) -> Sample:
        """Pictures and text of row `index`.

        Raises:
            BadImageError: a picture is unreadable.
        """
        raise NotImplementedError

    def __getitem__(self, item: Draw | int) -> Sample:
        """The sample of a draw; of a plain number, its row in epoch 0 with seed 0.

        Raises:
            BadImageError: an image is unreadable and `on_bad_image` is 'raise'.
            ValueError: no row is readable, or a transform refuses the sample.
        """
        draw = item if isinstance(item, Draw) else Draw(int(item), 0, 0)
        if not 0 <= draw.index < len(self):
            raise IndexError(f'{self.source} has {len(self)} rows, no row {draw.index}.')
        for num_skipped in range(len(self)):
            index = (draw.index + num_skipped) % len(self)
            try:
                sample = self.load(index, draw)
            except BadImageError as error:
                self.bad(self.key(index), error)
                continue
            return self.finish(sample, self.key(index), draw, num_skipped)
        raise ValueError(f'None of the {len(self)} rows of {self.source} has a readable image.')
