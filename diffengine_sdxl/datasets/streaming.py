"""Rows of Hugging Face `datasets` as a stream, for data that is too large to download first."""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import IterableDataset, get_worker_info

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import Sample
from diffengine_sdxl.datasets.huggingface import HFRows
from diffengine_sdxl.datasets.images import BadImageError
from diffengine_sdxl.datasets.sampler import Draw, check_start
from diffengine_sdxl.registry import DATASETS

MAX_BAD_ROWS = 1000
"""So many unreadable rows one after the other end the run, as a stream's length is not known."""


class Entry(NamedTuple):
    """A row on its way: its number in the source, how often the source was passed before, its cells."""

    number: int
    epoch: int
    row: dict[str, Any]


@DATASETS.register_module()
class HFStream(HFRows, IterableDataset[Sample]):
    """The rows of Hugging Face `datasets` as an endless stream; a type of its own beside `HFDataset`.

    The stream has one global order, whatever reads it: process r of w takes the places with p % w == r, and the
    workers of a process take its batches in turn. So the samples of each step do not depend on the number of
    workers, and a resumed run sets `start`. The price: every worker reads the undecoded rows of all, and going on
    reads again (but doesn't decode) what was passed. It takes the place of a sampler: `sampler=None`.

    Args:
        buffer_size: rows of the shuffle buffer, whose draws are keyed by (seed, epoch); 0 keeps the source's order.
        repeat: begin again at the source's end, with the next epoch.
        seed: of the order, and handed on to the samples; None means 0.
        start: the place of the global stream at which to begin; a multiple of the number of processes.
        batch_size: of the loader; needed with two workers or more.
        options: as for `HFRows`.
    """

    streaming = True

    def __init__(self, *args: Any, buffer_size: int = 1000, repeat: bool = True, seed: int | None = None,
                 start: int = 0, batch_size: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.buffer_size, self.repeat = buffer_size, repeat
        self.seed, self.start, self.batch_size = 0 if seed is None else seed, start, batch_size
        # Read here and not in `__iter__`: a spawned worker knows nothing of the other processes.
        self.rank, self.world = get_dist_info()

    def __iter__(self) -> Iterator[Sample]:
        check_start(self.start, self.world)
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if num_workers > 1 and self.batch_size is None:
            raise ValueError('HFStream with several workers needs the batch_size of its loader.')
        batch_size = self.batch_size or 1
        entries, ahead = self.entries(), deque[Entry]()
        for place in itertools.count():
            if not ahead:
                entry = next(entries, None)
                if entry is None:
                    return
                ahead.append(entry)
            turn, rank = divmod(place - self.start, self.world)
            if place >= self.start and rank == self.rank and turn // batch_size % num_workers == worker_id:
                sample = self._first_readable(ahead, entries)
                if sample is not None:
                    yield sample
            ahead.popleft()

    def _first_readable(self, ahead: deque[Entry], entries: Iterator[Entry]) -> Sample | None:
        for num_skipped in range(MAX_BAD_ROWS):
            if len(ahead) <= num_skipped:
                entry = next(entries, None)
                if entry is None:
                    return None
                ahead.append(entry)
            number, epoch, row = ahead[num_skipped]
            draw = Draw(number, epoch, self.seed)
            try:
                sample = self.read(row, str(number), draw)
            except BadImageError as error:
                self.bad(str(number), error)
                continue
            return self.finish(sample, str(number), draw, num_skipped)
        raise ValueError(f"{MAX_BAD_ROWS} rows of '{self.source}' in a row have no readable image.")

    def entries(self) -> Iterator[Entry]:
        """The rows of all epochs in the order they are read, undecoded."""
        for epoch in itertools.count():
            empty = True
            for entry in self._shuffled(epoch):
                empty = False
                yield entry
            if empty:
                raise ValueError(f"The data set '{self.source}' is empty.")
            if not self.repeat:
                return

    def _shuffled(self, epoch: int) -> Iterator[Entry]:
        # In a worker, plain iteration over `datasets` would keep this worker's shards only; `iter` keeps the order.
        rows = ({column: cells[0] for column, cells in batch.items()} for batch in self.data.iter(batch_size=1))
        entries = (Entry(number, epoch, row) for number, row in enumerate(rows))
        if not self.buffer_size:
            yield from entries
            return
        generator = rng.generator(self.seed, 'order', epoch)
        buffer = list(itertools.islice(entries, self.buffer_size))
        for entry in entries:
            drawn = int(torch.randint(len(buffer), (), generator=generator))
            buffer[drawn], entry = entry, buffer[drawn]
            yield entry
        for drawn in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[drawn]
