"""HFStream: rows of a hub id, folder or file as an endless stream, for data that is too large to download first."""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import IterableDataset, get_worker_info

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import Sample
from diffengine_sdxl.datasets.cached import Row
from diffengine_sdxl.datasets.data_sampler import Draw, check_start
from diffengine_sdxl.datasets.huggingface import HFRows
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.row_digests import is_ours
from diffengine_sdxl.datasets.sources import reading
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import DATASETS

MAX_BAD_ROWS = 1000
"""How many consecutive unreadable rows end the run, since the length of a stream is unknown."""


class StreamedRow(NamedTuple):
    """A row's number in the source, the number of earlier passes, and its undecoded cells."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which a row does not need
    epoch: int
    cells: dict[str, Any]


@DATASETS.register_module()
class HFStream(HFRows, IterableDataset[Sample]):
    """The rows of Hugging Face `datasets` as an endless stream; `HFDataset` reads them by number.

    The stream has one global order: process r of w takes the positions with p % w == r, and the workers of a process
    take its batches in turn. So the samples of a step do not depend on the number of workers, and a resumed run sets
    `start`. In return every worker reads all undecoded rows, and resuming reads, without decoding, the rows before
    `start`. A stream takes the place of a data sampler: `sampler=None`.

    Args:
        buffer_size: rows of the shuffle buffer, whose draws are keyed by (seed, epoch); 0 keeps the source's order.
        repeat: begin again at the source's end, with the next epoch.
        seed: of the order, and passed on to the samples; None means 0.
        start: the global position to begin at; a multiple of the number of processes.
        batch_size: of the loader; required with two workers or more.
        options: see `HFRows`.
    """

    streaming = True

    def __init__(self, *args: Any, buffer_size: int = 1000, repeat: bool = True, seed: int | None = None,
                 start: int = 0, batch_size: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.buffer_size, self.repeat = whole_number('buffer_size', buffer_size, 0), repeat
        self.seed, self.start, self.batch_size = 0 if seed is None else seed, start, batch_size
        # Here, not in `__iter__`: a spawned worker does not know the other processes.
        self.rank, self.world = get_dist_info()

    def __iter__(self) -> Iterator[Sample]:
        check_start(self.start, self.world)
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if num_workers > 1 and self.batch_size is None:
            raise UserError('HFStream with several workers needs the batch_size of its loader.')
        batch_size = self.batch_size or 1
        rows, read_ahead = self.rows(), deque[StreamedRow]()
        for position in itertools.count():
            if not read_ahead:
                row = next(rows, None)
                if row is None:
                    return
                read_ahead.append(row)
            turn, rank = divmod(position - self.start, self.world)
            if position >= self.start and rank == self.rank and turn // batch_size % num_workers == worker_id:
                sample = self._first_readable(read_ahead, rows)
                if sample is not None:
                    yield sample
            read_ahead.popleft()

    def _first_readable(self, read_ahead: deque[StreamedRow], rows: Iterator[StreamedRow]) -> Sample | None:
        """Return the sample of the first readable row of `read_ahead` and then `rows`; None at the source's end."""
        for num_skipped in range(MAX_BAD_ROWS):
            if len(read_ahead) <= num_skipped:
                row = next(rows, None)
                if row is None:
                    return None
                read_ahead.append(row)
            index, epoch, cells = read_ahead[num_skipped]
            draw = Draw(index, epoch, self.seed)
            try:
                return self.build(self._row(cells, str(index), draw), str(index), draw, num_skipped)
            except BadImageError as error:
                self.handle_bad_image(str(index), error)
        raise UserError(f"{MAX_BAD_ROWS} consecutive rows of '{self.source}' have no readable image.")

    def _row(self, cells: dict[str, Any], key: str, draw: Draw) -> Row:
        return Row(lambda: {**self.read_images(cells, key), **self.read_texts(cells, key, draw)},
                   lambda: self.read_texts(cells, key, draw),
                   (lambda file_digest: self.content_of(cells, key, file_digest)) if is_ours(self) else None)

    def rows(self) -> Iterator[StreamedRow]:
        """Iterate over the rows of all epochs in reading order."""
        for epoch in itertools.count():
            empty = True
            for row in self._shuffled(epoch):
                empty = False
                yield row
            if empty:
                raise UserError(f"The data set '{self.source}' is empty.")
            if not self.repeat:
                return

    def _in_order(self, epoch: int) -> Iterator[StreamedRow]:
        # In a worker, plain iteration over `datasets` would keep only this worker's shards; `iter` keeps the order.
        batches = self.data.iter(batch_size=1)
        for index in itertools.count():
            with reading(self.source):  # streamed files are parsed here
                batch = next(batches, None)
            if batch is None:
                return
            yield StreamedRow(index, epoch, {column: cells[0] for column, cells in batch.items()})

    def _shuffled(self, epoch: int) -> Iterator[StreamedRow]:
        rows = self._in_order(epoch)
        if not self.buffer_size:
            yield from rows
            return
        generator = rng.generator(self.seed, 'order', epoch)
        buffer = list(itertools.islice(rows, self.buffer_size))
        for row in rows:
            drawn = int(torch.randint(len(buffer), (), generator=generator))
            buffer[drawn], row = row, buffer[drawn]
            yield row
        for drawn in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[drawn]
