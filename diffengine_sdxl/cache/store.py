"""The store: a folder of entries that any number of processes fill and read at the same time."""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import stat
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from multiprocessing import util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor

from diffengine_sdxl.atomic_files import clean
from diffengine_sdxl.cache import shards
from diffengine_sdxl.cache.index import NAME as INDEX
from diffengine_sdxl.cache.index import Index, Place
from diffengine_sdxl.errors import UserError, first_line, listed

#: A shard is written when this many bytes or entries are pending, or this many seconds after the first of them.
SHARD_BYTES, SHARD_ENTRIES, SHARD_SECONDS = 2**26, 10_000, 20.0
#: Further entries are not kept while this many bytes wait for a slow disk.
PENDING_BYTES = 2**30
#: What a process learnt of files and shards is noted when there is this much of it, or after this many seconds.
NOTES, NOTE_SECONDS = 256, 2.0
#: That a shard is used is noted again after this many seconds.
USED_SECONDS = 86400.0
#: Digests that a process remembers where it can note nothing.
MAX_DIGESTS = 100_000
#: A file that changed less than this many nanoseconds ago may change again without showing it in its times.
SETTLED = 2 * 10**9
#: Open shards of a process.
OPEN_FILES = 32
#: What a cache of an older version of this package held.
OLD_FILES = {'rows.jsonl', 'origin.json'}


class _Pending(NamedTuple):
    """A new entry, and the CUDA event after which its tensors are on the CPU."""

    entry: shards.NewEntry
    num_bytes: int
    copied: Any


class Store:
    """Entries on the disk, found by their keys; implements `plan.EntryStore`.

    Each process writes shards of its own, and finds those of others through the index. A process that is killed loses
    what it had not yet written. Can be pickled; a forked or spawned process opens its own files, and does not see what
    is pending in its parent.

    Args:
        folder: made if it does not exist.
        read_only: nothing is written in it. So too, with a sentence, if it is not writable.

    Raises:
        UserError: it cannot be made or read, holds something else, or is another version's.

    Attributes:
        counts: kind -> [hits, misses].
        written: kind -> entries that this process has written.
        stopped: why this process writes, or also reads, nothing more.
    """

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.folder = Path(os.path.expanduser(folder)).absolute()
        _check_folder(self.folder, read_only)
        if not read_only and not os.access(self.folder, os.W_OK):
            _report(f"The cache '{self.folder}' is not writable: it is only read.")
            read_only = True
        if not read_only:
            clean(self.folder)  # what killed writers left
        self.read_only, self.counts = read_only, {}  # type: bool, dict[str, list[int]]
        self.index = Index(self.folder, read_only, _report)
        self._start()

    def _start(self) -> None:
        """Begin anew in this process."""
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._pending: dict[str, _Pending] = {}  # those being written come first
        self._num_bytes = 0
        self._due: float | None = None
        self._thread: threading.Thread | None = None
        self._writes, self._reads, self._closing = not self.read_only, True, False
        self._num_shards = 0
        self.written, self.stopped = Counter(), None  # type: Counter[str], str | None
        self._files: dict[str, int] = {}
        self._digests: dict[bytes, tuple[str, str]] = {}
        self._used: set[str] = set()
        self._noted: dict[str, float] = {}
        self._note_due = time.monotonic() + NOTE_SECONDS
        host = re.sub(r'[^\w.-]', '_', socket.gethostname()) or 'host'
        self._prefix = f'{host}-{self._pid}-{secrets.token_hex(4)}'
        # A data loader's worker runs these at its end, and no atexit functions.
        util.Finalize(self, _note_at_end, (weakref.ref(self),), exitpriority=10)

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ('folder', 'read_only', 'index', 'counts')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # Reading

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of an entry, on the CPU and in memory of their own, or None."""
        self._here()
        if (pending := self._pending.get(key)) is not None:
            if pending.copied is not None:
                pending.copied.synchronize()
            return {name: tensor.clone() for name, tensor in pending.entry.tensors.items()}
        try:
            place = self.index.find(key) if self._reads else None
            return None if place is None else self._read(key, place)
        except sqlite3.Error as error:
            self._stop(error)
            return None

    def _read(self, key: str, place: Place) -> dict[str, Tensor] | None:
        try:
            file = self._open(place.shard)
            tensors = shards.read(file, key, place.checksum, place.layout)
        except FileNotFoundError:  # another process has dropped or pruned it
            self.index.forget([place.shard])
            return None
        except shards.DamagedError as error:
            self.index.drop(place.shard, str(error))
            return None
        except OSError as error:
            self.index.ignore(place.shard, error)
            return None
        if time.monotonic() > self._noted.get(place.shard, -math.inf) + USED_SECONDS:
            self._noted[place.shard] = time.monotonic()
            self._used.add(place.shard)
        if self._used and time.monotonic() > self._note_due:
            self._note()
        return tensors

    def _open(self, name: str) -> int:
        with self._changed:
            if name not in self._files:
                if len(self._files) >= OPEN_FILES:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[name] = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK)  # no pipe blocks it
            return self._files[name]

    # Writing

    def put(self, key: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of an entry. Waits neither for the device nor for the disk, and never fails."""
        self._here()
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if not self._writes or key in self._pending or self._num_bytes + num_bytes > PENDING_BYTES:
            return
        with torch.no_grad():
            copies = {name: shards.copy_to_host(tensor) for name, tensor in tensors.items()}
        device = next(iter(tensors.values())).device
        copied = torch.cuda.current_stream(device).record_event() if device.type == 'cuda' else None
        entry = shards.NewEntry(kind, shards.device_name(device), copies)
        with self._changed:
            self._pending[key] = _Pending(entry, num_bytes, copied)
            self._num_bytes += num_bytes
            if self._due is None:
                self._due = time.monotonic() + SHARD_SECONDS
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name='cache', daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify_all()

    def _write_all(self) -> None:
        """Write what is due, until the store closes; runs in the thread."""
        while True:
            with self._changed:
                while not self._is_due():
                    if self._closing:
                        return
                    self._changed.wait(None if self._due is None else max(self._due - time.monotonic(), 0.0))
                batch = dict(self._pending)
                self._due = None
            try:
                if self._writes:
                    self._write(batch)
            except Exception as error:  # no room, no permission: whatever it is, the run can go on without
                self._stop(error)
            with self._changed:
                for key in batch:
                    self._num_bytes -= self._pending.pop(key).num_bytes
                if self._pending and self._due is None:
                    self._due = time.monotonic() + SHARD_SECONDS
                self._changed.notify_all()

    def _is_due(self) -> bool:
        return bool(self._pending) and (
            self._closing or self._due is not None and time.monotonic() >= self._due
            or len(self._pending) >= SHARD_ENTRIES or self._num_bytes >= SHARD_BYTES)

    def _write(self, batch: dict[str, _Pending]) -> None:
        entries = {}
        for key, pending in batch.items():
            if self.index.find(key) is None:  # another process may have written it
                if pending.copied is not None:
                    pending.copied.synchronize()
                entries[key] = pending.entry
        if entries:
            name = self.next_name()
            shards.write(self.folder / name, entries)
            self.written.update(entry.kind for entry in entries.values())
            self.index.add(name)

    def next_name(self) -> str:
        """Return the name of this process's next shard."""
        self._num_shards += 1
        return f'{self._prefix}-{self._num_shards - 1:05d}.safetensors'

    def _stop(self, error: Exception) -> None:
        """Write nothing more in this process; if the index fails, don't read either. Say so once."""
        before = self._reads, self._writes
        self._writes, self._reads = False, self._reads and not isinstance(error, sqlite3.Error)
        if (self._reads, self._writes) != before:
            cause = error.__cause__ or error  # of a UserError, whose advice is for checkpoints
            self.stopped = getattr(cause, 'strerror', None) or first_line(cause)
            what = 'Nothing more is written to' if self._reads else 'Nothing more is looked up in'
            _report(f"{what} the cache '{self.folder}': {self.stopped}.")

    def flush(self) -> None:
        """Write what is pending, and wait for it."""
        self._here()
        with self._changed:
            while self._pending and self._thread is not None and self._thread.is_alive():
                self._due = time.monotonic()
                self._changed.notify_all()
                self._changed.wait(1.0)
        self._note()

    def close(self) -> None:
        """Write what is pending and close the files; a later call of any method opens them again."""
        self.flush()
        with self._changed:
            thread, self._thread, self._closing = self._thread, None, True
            self._changed.notify_all()
        if thread is not None:
            thread.join()
            atexit.unregister(self.close)
        with self._changed:
            self._closing = False
            while self._files:
                os.close(self._files.popitem()[1])
        self.index.close()

    # Digests of files

    def file_digest(self, path: Path) -> str:
        """Return BLAKE2b of a file's content, 32 hexadecimal digits.

        It is remembered for as long as size, times and inode stay, unless the file changed in the last two seconds.

        Raises:
            OSError: it cannot be read, or is not a file.
        """
        self._here()
        name, changed = os.fsencode(os.path.abspath(path)), os.stat(path)
        if not stat.S_ISREG(changed.st_mode):  # a pipe would never end
            raise OSError(errno.EINVAL, 'not a file', str(path))
        state, known = _state(changed), self._digests.get(name)
        if known is not None and known[0] == state:
            return known[1]
        try:
            found = self.index.digest_of(name, state) if self._reads else None
        except sqlite3.Error as error:
            self._stop(error)
            found = None
        if found is not None:
            return found
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        settled = time.time_ns() - max(changed.st_mtime_ns, changed.st_ctime_ns) > SETTLED
        if settled and file_state(name) == state:
            self._digests[name] = state, digest
            if len(self._digests) >= NOTES or time.monotonic() > self._note_due:
                self._note()
            if len(self._digests) > MAX_DIGESTS:  # nothing may be noted
                self._digests.clear()
        return digest

    def _note(self) -> None:
        """Write down what this process learnt of files and shards, if it may."""
        may_write = self._reads and (self.index.private is not None or not self.read_only)
        if self._pid != os.getpid() or not may_write or not (self._digests or self._used):
            return
        with self._changed:
            digests, self._digests = self._digests, {}
            used, self._used = self._used, set()
        try:
            self.index.note(digests, used)
        except sqlite3.Error:  # it is learnt again, or noted the next time
            self._used |= used
        self._note_due = time.monotonic() + NOTE_SECONDS

    def count(self, kind: str, hits: int, misses: int) -> None:
        """Count entries that were found, and that were not."""
        of_kind = self.counts.setdefault(kind, [0, 0])
        of_kind[0] += hits
        of_kind[1] += misses

    def hit_rates(self) -> str:
        """Return such as 'moments 98.5 % of 12,000, text 100.0 % of 300'; '' if nothing was looked up."""
        return ', '.join(f'{kind} {100 * hits / (hits + misses):.1f} % of {hits + misses:,}'
                         for kind, (hits, misses) in sorted(self.counts.items()) if hits + misses)

    def describe(self) -> str:
        """Return a line on what is in the store."""
        kinds = self.index.query('SELECT kind, COUNT(*) FROM entries GROUP BY kind ORDER BY kind')
        size, oldest, newest = self.index.query('SELECT SUM(size), MIN(written), MAX(written) FROM shards')[0]
        mode = ' (read only)' if self.read_only else ''
        if not kinds:
            return f"Cache '{self.folder}'{mode}: empty."
        return (f"Cache '{self.folder}'{mode}: {sum(num for _, num in kinds):,} entries "
                f'({", ".join(f"{num:,} {kind}" for kind, num in kinds)}), {_bytes(size)}, the oldest '
                f'{_age(oldest)} old, the newest {_age(newest)}.')


def _check_folder(folder: Path, read_only: bool) -> None:
    """Make the folder of a cache.

    Raises:
        UserError: it cannot be made or read, or holds something else.
    """
    try:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UserError(f"The cache '{folder}' cannot be used: {error.strerror}. Name another folder in `cache`."
                        ) from error
    if names >= OLD_FILES:
        raise UserError(f"'{folder}' is a cache of an older version, which kept one crop and one draw of the VAE. Name "
                        'a new folder in `cache`, train with the data set itself in place of CachedLatents, and delete '
                        'the old one.')
    others = {name for name in names if not name.startswith('.')}
    if others and INDEX not in names and not any(map(shards.NAME.fullmatch, names)):
        raise UserError(f"'{folder}' holds something else than a cache ({listed(sorted(others), 3)}). Name a new or "
                        'empty folder in `cache`.')


def _note_at_end(reference: weakref.ref[Store]) -> None:
    if (store := reference()) is not None:
        store._note()


def _state(found: os.stat_result) -> str:
    return f'{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}'


def file_state(path: bytes) -> str | None:
    """Return what a file's digest is remembered for; None if it is gone."""
    try:
        return _state(os.stat(path))
    except OSError:
        return None


def _report(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


def _bytes(number: float) -> str:
    return f'{number / 2**30:.1f} GiB' if number >= 2**30 else f'{number / 2**20:.1f} MiB'


def _age(written: float) -> str:
    """Return how long ago a time is, in its largest unit."""
    seconds = max(time.time() - written, 0.0)
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.0f} {unit}'
    return f'{seconds:.0f} seconds'
