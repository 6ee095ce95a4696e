"""What a picture is made of, told apart: the SHA-256 of files, folders and things in memory.

Digests of large files are kept between starts in the user's cache folder, ~/.cache/diffengine_sdxl/digests.json, with
size, times, inode and disk of the file; deleting it costs no more than reading the files once again.
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

from diffengine_sdxl import hub
from diffengine_sdxl.engine import checkpoint

#: Files of a folder at most (a base has some forty), and bytes of a file: /proc/kcore says that it has 2 ** 47.
MOST_FILES, MOST_BYTES = 10_000, 2**40
#: Digests of files from this size on are kept between starts, so many of them; a list of more bytes is not ours.
LARGE, KEPT, MOST_KEPT_BYTES = 32 * 2**20, 1000, 2**22
#: Nanoseconds that a file must have rested: one written this moment may be written again within the same tick.
RESTED = 2 * 10**9
SHA256 = re.compile('[0-9a-f]{64}')


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
        raise ValueError(f"There is no file '{path}'.{hub.beside(path)}")
    state = _state(path)
    if state[0] > MOST_BYTES:
        raise ValueError(f"'{path}' has {state[0]} bytes, so it is no picture and no model's file.")
    return _read(str(path.absolute()), state)


def _state(path: str | Path) -> tuple[int, ...]:
    """Size, times, inode and disk of a file: while they are the same, so is what it holds.

    The time of the last change of its entry is among them, as a program can set the other one back.
    """
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


@lru_cache(maxsize=4 * MOST_FILES)
def _read(path: str, state: tuple[int, ...]) -> str:
    size, *times, _, _ = state
    if size >= LARGE and (kept := _kept().get(path)) and kept[:-1] == [*state]:
        return str(kept[-1])
    began, digest = time.time_ns(), hashlib.sha256()
    with open(path, 'rb', buffering=0) as file:
        # No more than it has: what has no size (/proc/kmsg) may never end.
        while size > 0 and (block := file.read(min(2**20, size))):
            size -= len(block)
            digest.update(block)
    found = digest.hexdigest()
    if state[0] >= LARGE and began - max(times) > RESTED and _state(path) == state:
        _keep(path, [*state, found])
    return found


def _kept_at() -> Path | None:
    """Where digests are kept between starts, or None: there is no home."""
    place = os.environ.get('XDG_CACHE_HOME', '')
    # By the XDG specification a relative path counts as none.
    folder = place if os.path.isabs(place) else os.path.join(os.path.expanduser('~'), '.cache')
    return Path(folder, 'diffengine_sdxl', 'digests.json') if os.path.isabs(folder) else None


def _kept() -> dict[str, list[Any]]:
    """Absolute path -> state and digest; nothing where the list is missing, damaged or not ours."""
    path = _kept_at()
    try:
        if path is None or path.stat().st_size > MOST_KEPT_BYTES:
            return {}
        found = json.loads(path.read_bytes())
        return {name: entry for name, entry in found['files'].items() if isinstance(entry, list) and len(entry) == 6
                and isinstance(entry[-1], str) and SHA256.fullmatch(entry[-1])}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: str, entry: list[Any]) -> None:
    place, kept = _kept_at(), _kept()
    kept.pop(path, None)
    newest = [*kept.items(), (path, entry)][-KEPT:]
    # What cannot be kept is read again the next time.
    with suppress(ValueError, OSError):
        if place is not None:
            with checkpoint.replacing(place) as temporary:
                temporary.write_text(json.dumps({'files': dict(newest)}))


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
