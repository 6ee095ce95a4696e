"""The order of the rows: which row is read at which position of a run, a function of (seed, position) only."""

from collections.abc import Collection, Iterator, Sized
from typing import NamedTuple

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import DATA_SAMPLERS


class Draw(NamedTuple):
    """What a data sampler requests from a data set.

    Attributes:
        index: a row; epoch: the number of earlier passes; seed: the run's.
        size: (height, width) in pixels that Resize and Crop with size='bucket' make; None: without buckets.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which a draw does not need
    epoch: int
    seed: int
    size: tuple[int, int] | None = None


def check_start(start: int, world: int) -> None:
    """Check that `start` (samples read by all processes) can be split over `world` processes.

    Raises:
        UserError: it cannot.
    """
    if start < 0 or start % world:
        raise UserError(f'A run cannot resume at sample {start} of its data on {world} processes, which do not divide '
                        'it. Resume with the same number of processes or the same batch size as before.')


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler[Draw]):
    """An endless sequence of rows, in an order keyed by (seed, epoch).

    Position p of the global sequence is row p % N of epoch p // N; process r of w takes the positions with p % w == r.
    So one process with batches of 2b and two with batches of b see the same rows at each step, and a resumed run sets
    `start` and reads nothing twice.

    Args:
        dataset: only its length N is used.
        shuffle: draw a permutation for each epoch; else keep the source's order.
        seed: of the order, and passed on to the samples; None means 0.
        start: the global position to begin at; a multiple of the number of processes.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, start: int = 0) -> None:
        self.num_rows: int = len(dataset)
        if self.num_rows == 0:
            raise UserError('The data set is empty.')
        self.shuffle = shuffle
        self.seed = 0 if seed is None else seed
        self.start = start
        self.rank, self.world = get_dist_info()

    def order(self, epoch: int) -> torch.Tensor:
        """Return the rows of `epoch` in reading order, int64 [N]."""
        if not self.shuffle:
            return torch.arange(self.num_rows)
        return torch.randperm(self.num_rows, generator=rng.generator(self.seed, 'order', epoch))

    def draw(self, index: int, epoch: int = 0) -> Draw:
        """Return the draw of a row, whether the run reads it or not."""
        return Draw(index, epoch, self.seed)

    def draws(self, epoch: int) -> Iterator[Draw]:
        """Yield the draws of the rows of `epoch` in reading order, those of all processes."""
        return (self.draw(index, epoch) for index in self.order(epoch).tolist())

    def __iter__(self) -> Iterator[Draw]:
        check_start(self.start, self.world)
        position, epoch = self.start + self.rank, -1
        while True:
            if position // self.num_rows != epoch:
                epoch = position // self.num_rows
                order = self.order(epoch)
            yield Draw(int(order[position % self.num_rows]), epoch, self.seed)
            position += self.world

    def __len__(self) -> int:
        """Return the samples of one epoch that one process reads, rounded up; the sequence itself has no end."""
        return int((self.num_rows + self.world - 1) // self.world)


@DATA_SAMPLERS.register_module()
class FiniteSampler(Sampler[Draw]):
    """Each row once, in the source's order: for validation and tests.

    Runs of `batch_size` consecutive rows are dealt to the processes in turn, so what is in a batch does not depend on
    their number.

    Args:
        dataset: only its length is used.
        seed: passed on to the samples; None means 0.
        batch_size: of the data loader; an evaluation sets it.
        max_samples: the first rows only; None: all.

    Attributes:
        done: first rows of batches that are left out, the same in all processes.
    """

    def __init__(self, dataset: Sized, seed: int | None = None, batch_size: int = 1, max_samples: int | None = None
                 ) -> None:
        self.num_rows, self.seed, self.batch_size = len(dataset), 0 if seed is None else seed, batch_size
        if max_samples is not None:
            self.num_rows = min(self.num_rows, whole_number('FiniteSampler: max_samples', max_samples, 1))
        self.done: Collection[int] = ()
        self.rank, self.world = get_dist_info()

    def all_batches(self) -> list[range]:
        """Return the rows of each batch of all processes, also of those that are done."""
        return [range(first, min(first + self.batch_size, self.num_rows))
                for first in range(0, self.num_rows, self.batch_size)]

    def batches(self) -> list[range]:
        """Return the rows of each batch that this process reads. Only its last one may have fewer than the others."""
        return [rows for rows in self.all_batches() if rows.start not in self.done][self.rank::self.world]

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(row, 0, self.seed) for rows in self.batches() for row in rows)

    def __len__(self) -> int:
        return sum(map(len, self.batches()))
