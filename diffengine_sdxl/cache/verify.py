"""Compare entries with what would be computed; remove wrong and unused ones."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffengine_sdxl.atomic_files import clean
from diffengine_sdxl.cache import shards
from diffengine_sdxl.cache.store import Store, file_state

#: Largest difference over largest value between two kinds of processors, of 4-byte and of 2-byte numbers.
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2


class Verifier:
    """In place of a store: finds nothing, so that all is computed, and compares that with the store's entries.

    Attributes:
        right, missing: keys of entries that were compared and are right, and that the store lacks.
        wrong: key -> what differs.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.right: set[str] = set()
        self.missing: set[str] = set()
        self.wrong: dict[str, str] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry that was found right."""
        return self.store.get(key) if key in self.right else None

    def put(self, key: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Compare an entry with what was computed."""
        kept = self.store.get(key)
        place = None if kept is None else self.store.index.find(key)
        if place is None or kept is None:
            self.right.discard(key)
            if key not in self.wrong:
                self.missing.add(key)
            return
        device = next(iter(tensors.values())).device
        exact = device.type == 'cpu' and place.device == shards.device_name(device)
        if (found := difference(kept, {name: t.cpu() for name, t in tensors.items()}, exact)) is None:
            self.right.add(key)
        else:
            self.wrong[key] = f'{kind} {key}: {found}'

    def settle(self) -> None:
        """Count entries as wrong whose file was dropped since: it is damaged, or cannot be read."""
        lost = self.store.index.lost
        self.wrong.update((key, lost[key]) for key in sorted((self.right | self.missing) & lost.keys()))
        self.right -= lost.keys()
        self.missing -= lost.keys()

    def count(self, kind: str, hits: int, misses: int) -> None:
        """Count nothing: all is computed."""

    def file_digest(self, path: Path) -> str:
        """Return the digest of a file."""
        return self.store.file_digest(path)


def difference(kept: Mapping[str, Tensor], computed: Mapping[str, Tensor], exact: bool) -> str | None:
    """Return in which way an entry differs from what was computed, or None.

    Args:
        exact: bit by bit; else, as between two kinds of processors, within `TOLERANCE` of the largest value.
    """
    shapes = [{name: (t.dtype, tuple(t.shape)) for name, t in entry.items()} for entry in (kept, computed)]
    if shapes[0] != shapes[1]:
        return f'kept as {shapes[0]}, computed as {shapes[1]}'
    for name, tensor in computed.items():
        if torch.equal(kept[name], tensor):
            continue
        if exact or not tensor.is_floating_point():
            return f"'{name}' differs"
        one, other = kept[name].double(), tensor.double()
        ratio = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
        if not ratio <= (TOLERANCE if tensor.dtype.itemsize >= 4 else HALF_TOLERANCE):
            return f"'{name}' differs by {ratio:.2g} of its largest value"
    return None


def discard(store: Store, keys: Collection[str]) -> None:
    """Remove entries for good: their shards are written again without them.

    Raises:
        UserError: the folder cannot be written.
    """
    index = store.index
    places = {key: index.find(key) for key in keys}
    for name in {place.shard for place in places.values() if place is not None}:
        left = {}
        for entry in shards.read_header(store.folder / name):
            tensors = None if entry.key in keys else store.get(entry.key)
            if tensors is not None:
                left[entry.key] = shards.NewEntry(entry.kind, entry.device, tensors)
        new = store.next_name()
        if left:
            shards.write(store.folder / new, left)
        # Before the new one is known: the index finds it at the next opening, too.
        (store.folder / name).unlink(missing_ok=True)
        index.forget([name])
        if left:
            index.add(new)


def prune(store: Store, days: float) -> tuple[int, int]:
    """Remove shards that no run has read or written for `days`, shards that others repeat, and dead writers' files.

    Digests of files that have changed or are gone are forgotten.

    Returns:
        The number of removed shards, and their bytes.
    """
    index = store.index
    old = index.query('SELECT name, size FROM shards WHERE used < ? OR id NOT IN (SELECT shard FROM entries)',
                      time.time() - days * 86400)
    old = [(name, size) for name, size in old if shards.NAME.fullmatch(str(name))]  # of a foreign index: no other paths
    for name, _ in old:
        (store.folder / name).unlink(missing_ok=True)
    index.forget(name for name, _ in old)
    gone = [(path,) for path, state in index.query('SELECT path, state FROM files') if file_state(path) != state]
    with index.transaction() as db:
        db.executemany('DELETE FROM files WHERE path = ?', gone)
    clean(store.folder)
    return len(old), sum(size for _, size in old)
