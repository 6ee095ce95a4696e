"""The sizes of a data set's images, before any is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from mmengine.logging import print_log

from diffengine_sdxl.datasets.base import MapDataset
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.image_files import BadImageError, ImageReader

#: Rows of one task of a thread.
CHUNK = 256
#: Seconds between two lines of progress.
INTERVAL = 10.0
#: They wait for the disk side by side; parsing a header takes Python, one at a time.
THREADS = 8


def image_size(dataset: MapDataset, index: int) -> tuple[int, int]:
    """Return (height, width) of a row's 'img' as it is read: upright (EXIF), before the transforms.

    Of a file on this machine only the header is read. A row without a cell, which code draws, is loaded.

    Raises:
        BadImageError: the image is unreadable.
        UserError: a path leads outside of the data set's folder, or the row names a URL.
    """
    cell = dataset.cells(index).get('img')
    if cell is None:
        image = dataset.load(index, Draw(index, 0, 0))['img']
        return image.height, image.width
    reader: ImageReader = getattr(dataset, 'read_image', None) or ImageReader('/')
    return reader.size(cell, f"The image of row {dataset.key(index)} of '{dataset.source}'")


def read_sizes(dataset: MapDataset, rows: Sequence[int] | None = None) -> tuple[np.ndarray, dict[int, BadImageError]]:
    """Return (height, width) of many rows' images, int32 [N, 2], and the errors of unreadable ones, whose size is 0, 0.

    Args:
        rows: numbers of the rows; None: all.

    Raises:
        UserError: see `image_size`.
    """
    rows = range(len(dataset)) if rows is None else rows
    sizes, errors = np.zeros((len(rows), 2), np.int32), dict[int, BadImageError]()

    def read(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(rows))):
            try:
                sizes[i] = image_size(dataset, rows[i])
            except BadImageError as error:
                errors[rows[i]] = error

    last = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(read, start) for start in range(0, len(rows), CHUNK)]
        try:
            for number, task in enumerate(tasks, 1):
                task.result()
                if time.monotonic() - last > INTERVAL:
                    last = time.monotonic()
                    print_log(f"'{dataset.source}': read the sizes of {number * CHUNK:,} of {len(rows):,} images",
                              logger='current')
        finally:
            pool.shutdown(cancel_futures=True)
    return sizes, dict(sorted(errors.items()))
