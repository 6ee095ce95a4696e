"""SHA-256 of what an image is made of: files, folders and objects in memory.

Digests of large files are cached in ~/.cache/diffengine_sdxl/digests.json by size, times, inode and disk of the file;
if it is deleted, the files are read once more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import hub

#: Limits on the files of a folder (a base has some forty) and on the bytes of a file (/proc/kcore claims 2 ** 47).
MAX_FILES, MAX_BYTES = 10_000, 2**40
#: Digests of files from this size on are cached, so many of them; a cache of more bytes is not ours.
LARGE, MAX_CACHED, MAX_CACHE_BYTES = 32 * 2**20, 1000, 2**22
#: Nanoseconds since the last change before a digest is cached: a file may change again within one clock tick.
SETTLED = 2 * 10**9
SHA256 = re.compile('[0-9a-f]{64}')


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of the names and SHA-256s of its files.

    Hidden files don't count, nor does the card of an export.

    A file of the same size and times as before is not read again.

    Raises:
        UserError: there is no such file, it cannot be read, or the folder holds too many files to be a model's.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return _file_digest(path)
        digest = hashlib.sha256()
        for name in sorted(_files(path)):
            digest.update(f'{name}\0{_file_digest(path / name)}\n'.encode('utf-8', 'surrogateescape'))
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error


def _files(folder: Path) -> Iterator[str]:
    count = 0
    # Follow links: a base may be assembled from other bases' folders.
    for root, folders, names in os.walk(folder, followlinks=True):
        # The card of an export and its images are written again when the export has been measured.
        card = ('README.md', 'card-images') if 'manifest.json' in names else ()
        folders[:] = [name for name in folders if not name.startswith('.') and name not in card]
        for name in names:
            if not name.startswith('.') and name not in card:
                count += 1
                if count > MAX_FILES:
                    raise UserError(f"'{folder}' holds more than {MAX_FILES} files, so it is not a model's folder.")
                yield (Path(root) / name).relative_to(folder).as_posix()


def _file_digest(path: Path) -> str:
    if not path.is_file():  # a device may be endless
        raise UserError(f"There is no file '{path}'.{hub.suggest_sibling(path)}")
    state = _state(path)
    if state[0] > MAX_BYTES:
        raise UserError(f"'{path}' has {state[0]} bytes, too many for an image or a model's file.")
    return _read(str(path.absolute()), state)


def _state(path: str | Path) -> tuple[int, ...]:
    """Return size, times, inode and disk of a file: while they are equal, its content is taken as unchanged.

    Includes the time of the last inode change (ctime), which programs cannot set back.
    """
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


@lru_cache(maxsize=4 * MAX_FILES)
def _read(path: str, state: tuple[int, ...]) -> str:
    size, *times, _, _ = state
    if size >= LARGE and (entry := _cached().get(path)) and entry[:-1] == [*state]:
        return str(entry[-1])
    began, digest = time.time_ns(), hashlib.sha256()
    with open(path, 'rb', buffering=0) as file:
        # At most `size` bytes: a file without a size (/proc/kmsg) may be endless.
        while size > 0 and (block := file.read(min(2**20, size))):
            size -= len(block)
            digest.update(block)
    if state[0] >= LARGE and began - max(times) > SETTLED and _state(path) == state:
        _cache(path, [*state, digest.hexdigest()])
    return digest.hexdigest()


def _cache_path() -> Path | None:
    """Return the path of the cache, or None if there is no home folder."""
    root = os.environ.get('XDG_CACHE_HOME', '')
    # By the XDG specification a relative path is ignored.
    folder = root if os.path.isabs(root) else os.path.join(os.path.expanduser('~'), '.cache')
    return Path(folder, 'diffengine_sdxl', 'digests.json') if os.path.isabs(folder) else None


def _cached() -> dict[str, list[Any]]:
    """Return absolute path -> state and digest; empty if the cache is missing, damaged or not ours."""
    path = _cache_path()
    try:
        if path is None or path.stat().st_size > MAX_CACHE_BYTES:
            return {}
        entries = json.loads(path.read_bytes())['files']
        return {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 6
                and isinstance(entry[-1], str) and SHA256.fullmatch(entry[-1])}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _cache(name: str, entry: list[Any]) -> None:
    path, entries = _cache_path(), _cached()
    entries.pop(name, None)
    newest = [*entries.items(), (name, entry)][-MAX_CACHED:]
    with suppress(UserError, OSError):  # an unwritable cache only costs time
        if path is not None:
            with atomic_files.replacing(path) as temporary:
                temporary.write_text(json.dumps({'files': dict(newest)}))


def in_memory(value: Any) -> str:
    """Return the SHA-256 of bytes, or of the type, shape and data of an image, tensor or array."""
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        head, data = f'{value.mode} {value.size}', value.tobytes()
    elif isinstance(value, Tensor):
        # View as bytes first: numpy has no bfloat16.
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        head, data = f'{value.dtype} {tuple(value.shape)}', plain.numpy().tobytes()
    else:
        array = np.asarray(value)
        head, data = f'{array.dtype} {array.shape}', array.tobytes()
    return hashlib.sha256(head.encode() + b'\0' + data).hexdigest()
