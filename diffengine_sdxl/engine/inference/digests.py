"""SHA-256 of what a picture is made of: files, folders of weights, and pictures and tensors in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: Files of a folder at most; a base has some forty.
MOST_FILES = 10_000


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file; of a folder, that of its files' names and SHA-256s, without hidden ones.

    A file that has the same size and time as before is not read again.

    Raises:
        ValueError: there is nothing, it cannot be read, or the folder holds too many files to be a model's.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return _of_file(path)
        digest = hashlib.sha256()
        for name in sorted(_files(path)):
            digest.update(f'{name}\0{_of_file(path / name)}\n'.encode('utf-8', 'surrogateescape'))
        return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error


def _files(folder: Path) -> Iterator[str]:
    count = 0
    # Links too: a base may be put together of other bases' folders.
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.'):
                count += 1
                if count > MOST_FILES:
                    raise ValueError(f"'{folder}' holds more than {MOST_FILES} files, so it is no model's folder.")
                yield (Path(place) / name).relative_to(folder).as_posix()


def _of_file(path: Path) -> str:
    if not path.is_file():  # nor a device, which would never end
        raise ValueError(f"There is no file '{path}'.")
    stat = path.stat()
    return _read(str(path.absolute()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4 * MOST_FILES)
def _read(path: str, mtime: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb', buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def in_memory(value: Any) -> str:
    """SHA-256 of a picture's pixels, or a tensor's or array's numbers, each with their kind and shape; or of bytes."""
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        head, data = f'{value.mode} {value.size}', value.tobytes()
    elif isinstance(value, Tensor):
        # As bytes first: numpy knows no bfloat16.
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        head, data = f'{value.dtype} {tuple(value.shape)}', plain.numpy().tobytes()
    else:
        array = np.asarray(value)
        head, data = f'{array.dtype} {array.shape}', array.tobytes()
    return hashlib.sha256(head.encode() + b'\0' + data).hexdigest()
