"""Which row is read at which place of the run: a function of (seed, place) alone."""

from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from diffengine_sdxl import rng
from diffengine_sdxl.registry import DATA_SAMPLERS


class Draw(NamedTuple):
    """What a sampler asks a data set for: the row, how often the data was passed before, and the run's seed."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a draw for
    epoch: int
    seed: int


def check_start(start: int, world: int) -> None:
    """Raises ValueError where `start` (samples read by all processes) cannot be split over `world` processes."""
    if start < 0 or start % world:
        raise ValueError(f'A run cannot go on at sample {start} of its data on {world} processes: their number must '
                         'divide it. Resume with the number of processes, or the batch size, of before.')


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler[Draw]):
    """An endless stream of rows, in an order keyed by (seed, epoch).

    Place p of the global stream is row p % N of epoch p // N; process r of w takes the places with p % w == r.
    So one process with batches of 2b and two with batches of b see the same rows at each step, and a resumed
    run sets `start` and reads nothing twice.

    Args:
        dataset: only its length N is used.
        shuffle: a permutation for each epoch; the source's order otherwise.
        seed: of the order, and handed on to the samples; None means 0.
        start: the place of the global stream at which to begin; a multiple of the number of processes.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, start: int = 0) -> None:
        self.num_rows: int = len(dataset)
        if self.num_rows == 0:
            raise ValueError('The data set is empty: there is nothing to sample.')
        self.shuffle = shuffle
        self.seed = 0 if seed is None else seed
        self.start = start
        self.rank, self.world = get_dist_info()

    def order(self, epoch: int) -> torch.Tensor:
        """The rows of `epoch` in the order they are read, int64 [N]."""
        if not self.shuffle:
            return torch.arange(self.num_rows)
        return torch.randperm(self.num_rows, generator=rng.generator(self.seed, 'order', epoch))

    def __iter__(self) -> Iterator[Draw]:
        check_start(self.start, self.world)
        place, epoch = self.start + self.rank, -1
        while True:
            if place // self.num_rows != epoch:
                epoch = place // self.num_rows
                order = self.order(epoch)
            yield Draw(int(order[place % self.num_rows]), epoch, self.seed)
            place += self.world

    def __len__(self) -> int:
        """Samples that one process reads while the data is passed once (rounded up); the stream has no end."""
        return int((self.num_rows + self.world - 1) // self.world)


@DATA_SAMPLERS.register_module()
class FiniteSampler(Sampler[Draw]):
    """Each row once, in the source's order, split over the processes without padding: for validation and tests.

    Args:
        dataset: only its length is used.
        seed: handed on to the samples; None means 0.
    """

    def __init__(self, dataset: Sized, seed: int | None = None) -> None:
        self.num_rows = len(dataset)
        self.seed = 0 if seed is None else seed
        self.rank, self.world = get_dist_info()

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0, self.seed) for index in range(self.rank, self.num_rows, self.world))

    def __len__(self) -> int:
        return len(range(self.rank, self.num_rows, self.world))
