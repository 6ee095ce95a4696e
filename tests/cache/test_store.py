"""The store: what was put is got, by any process, whatever was killed, damaged, full or read-only in between."""

import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffengine_sdxl.cache import index as index_file
from diffengine_sdxl.cache import shards
from diffengine_sdxl.cache import store as store_file
from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.cache.verify import prune
from diffengine_sdxl.errors import UserError

FORK = multiprocessing.get_context('fork')


def entry(number: int) -> dict[str, Tensor]:
    """An entry of odd shapes and dtypes, which `number` decides."""
    generator = torch.Generator().manual_seed(number)
    return {'mean': torch.randn(4, 1 + number % 3, 5, generator=generator).to(torch.bfloat16),
            'map': torch.randint(0, 256, (1, 3, 7), generator=generator, dtype=torch.uint8),
            'one': torch.tensor(float(number)), 'none': torch.zeros(0, 2), 'yes': torch.tensor([number % 2 == 0])}


def put(store: Store, *numbers: int) -> None:
    for number in numbers:
        store.put(digest(number), 'moments', entry(number))
    store.flush()


def right(store: Store, number: int) -> bool:
    """Whether an entry is there; if it is, it must be the one that was put, bit for bit."""
    found = store.get(digest(number))
    if found is not None:
        expected = entry(number)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    return found is not None


def there(store: Store, *numbers: int) -> list[int]:
    return [number for number in numbers if right(store, number)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told."""
    messages: list[str] = []
    monkeypatch.setattr(store_file, 'print_log', lambda message, **_: messages.append(message))
    return messages


@pytest.fixture
def make(tmp_path: Path, told: list[str]) -> Iterator[Callable[..., Store]]:
    """Open the same folder, again and again; closed in the end."""
    stores: list[Store] = []

    def make(**options: Any) -> Store:
        stores.append(Store(tmp_path / 'cache', **options))
        return stores[-1]
    yield make
    for store in stores:
        store.close()


def test_what_is_put_is_got(make: Callable[..., Store], tmp_path: Path) -> None:
    """Pending, written, by another store, a forked and an unpickled one; contiguous, and in memory of its own."""
    store = make()
    assert store.describe() == f"Cache '{tmp_path / 'cache'}': empty."
    wide = torch.randn(6, 8)
    store.put(digest('wide'), 'text', {'text_embeds': wide.T[1:, ::2]})
    pending = store.get(digest('wide'))
    assert pending is not None and not list((tmp_path / 'cache').glob('*.safetensors'))
    pending['text_embeds'].zero_()
    expected, wide = wide.T[1:, ::2].clone(), wide.zero_()
    put(store, *range(5))
    shard, index = (store.folder.glob(name).__next__().stat() for name in ('*.safetensors', 'index.sqlite'))
    assert shard.st_mode == index.st_mode, "the umask's"
    for other in (store, make(), pickle.loads(pickle.dumps(store))):
        found = other.get(digest('wide'))
        assert torch.equal(found['text_embeds'], expected) and found['text_embeds'].is_contiguous()
        found['text_embeds'].zero_()
        assert torch.equal(other.get(digest('wide'))['text_embeds'], expected)
        assert there(other, *range(6)) == [*range(5)]
    child = FORK.Process(target=lambda: os._exit(len(there(store, *range(6)))))
    child.start()
    child.join()
    assert child.exitcode == 5
    assert '6 entries (5 moments, 1 text), 0.0 MiB, the oldest 0 seconds old' in store.describe()
    store.count('moments', 3, 1)
    store.count('moments', 0, 996)
    assert store.counts == {'moments': [3, 997]} and store.hit_rates() == 'moments 0.3 % of 1,000'


def test_processes_find_what_others_write(make: Callable[..., Store]) -> None:
    """At once, and each key is written once."""
    one, other = make(), make()
    put(one, 1, 2)
    assert there(other, 1, 2, 3) == [1, 2]
    put(other, 2, 3)
    assert there(one, 1, 2, 3) == [1, 2, 3]
    sizes = [len(shards.read_header(path)) for path in one.folder.glob('*.safetensors')]
    assert sorted(sizes) == [1, 2], 'the second did not write 2 again'


def test_shards_are_written_when_they_are_due(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, by size, by time; and at most so many bytes wait for the disk."""
    def written(put_them: Callable[[Store], None]) -> bool:
        store = make()
        put_them(store)
        end = time.monotonic() + 5
        before = len(list(store.folder.glob('*.safetensors')))
        while store._pending and time.monotonic() < end:
            time.sleep(0.005)
        return len(list(store.folder.glob('*.safetensors'))) > before
    with monkeypatch.context() as patch:
        patch.setattr(store_file, 'SHARD_ENTRIES', 2)
        assert written(lambda s: [s.put(digest(i), 'text', entry(i)) for i in (1, 2)])  # type: ignore[func-returns-value]
    with monkeypatch.context() as patch:
        patch.setattr(store_file, 'SHARD_BYTES', 1000)
        assert written(lambda s: s.put(digest('big'), 'text', {'x': torch.zeros(300)}))
    with monkeypatch.context() as patch:
        patch.setattr(store_file, 'SHARD_SECONDS', 0.02)
        assert written(lambda s: s.put(digest('late'), 'text', {'x': torch.zeros(3)}))
    monkeypatch.setattr(store_file, 'PENDING_BYTES', 1000)
    store = make()
    store.put(digest('first'), 'text', {'x': torch.zeros(200)})
    store.put(digest('too many'), 'text', {'x': torch.zeros(200)})
    assert store.get(digest('first')) is not None and store.get(digest('too many')) is None


def test_a_lost_index_is_made_anew(make: Callable[..., Store], told: list[str]) -> None:
    """Removed, no database at all, damaged in the middle while it is used, or behind by what a killed process wrote."""
    store = make()
    put(store, *range(150))
    path = store.folder / index_file.NAME
    for damage in (None, b'not a database', 'middle'):
        store = make() if damage == 'middle' else store
        store.close()
        data = path.read_bytes()
        if damage == 'middle':
            assert there(store, 0) == [0]  # the connection is open
            path.write_bytes(data[:4096] + b'\xff' * (len(data) - 4096))
            store.index.close()
        elif damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        store = store if damage == 'middle' else make()
        assert there(store, *range(150)) == [*range(150)]
        assert len(told) == (damage is not None), told
        assert all('is damaged' in message and 'made anew from the shards' in message for message in told)
        told.clear()
    store.index.forget(path.name for path in store.folder.glob('*.safetensors'))
    assert there(store, 1) == [] and there(make(), 1) == [1]
    with sqlite3.connect(path) as db:
        db.execute('PRAGMA user_version = 7')
    for options in ({}, {'read_only': True}):
        with pytest.raises(UserError, match=r'another version of this package \(layout 7, not 1\). Name another'):
            make(**options)


@pytest.mark.parametrize('damage', ['cut', 'header', 'bit', 'gone', 'empty'])
def test_a_damaged_shard_is_dropped_and_filled_again(damage: str, make: Callable[..., Store], told: list[str]) -> None:
    """Found out at the opening or when an entry is read; said once; the others stay."""
    store = make()
    put(store, *range(4))
    put(store, 10)
    store.close()
    path = next(p for p in store.folder.glob('*.safetensors') if p.name.endswith('00000.safetensors'))
    data = bytearray(path.read_bytes())
    if damage == 'cut':
        path.write_bytes(data[:-20])
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'gone':
        path.unlink()
    else:
        place = 20 if damage == 'header' else len(data) - 3
        data[place] ^= 1
        path.write_bytes(data)
        if damage == 'header':
            (store.folder / index_file.NAME).unlink()
    again = make()
    left = there(again, *range(4), 10)
    assert left[-1] == 10 and len(left) < 5 and (damage == 'bit' or left == [10])
    assert there(again, *range(4), 10) == [10]
    assert len(told) == (damage != 'gone') and all('is dropped; training computes what it' in t for t in told)
    put(again, *range(4))
    assert there(make(), *range(4), 10) == [*range(4), 10] and len(told) <= 1
    assert path.exists() is False


def test_a_shard_that_says_what_is_not_so(tmp_path: Path) -> None:
    """Its header is data from outside."""
    path = tmp_path / 'x'
    shards.write(path, {digest(1): shards.NewEntry('text', 'cpu', {'x': torch.zeros(3)})})
    good = path.read_bytes()
    length = int.from_bytes(good[:8], 'little')
    header = good[8:8 + length]
    for old, new in ((b'[3]', b'[9]'), (b'[3]', b'"3"'), (b'F32', b'F33'), (b'[0,12]', b'[0,99]'), (b'}}', b'}'),
                     (digest(1).encode(), b'z' * 32), (header, b'[' * length), (b'cache 1', b'xxxxx 1')):
        assert old in header
        path.write_bytes(good[:8] + header.replace(old, new) + good[8 + length:])
        with pytest.raises((shards.DamagedError, UserError)):
            shards.read_header(path)
    path.write_bytes((2**60).to_bytes(8, 'little') + good[8:])
    with pytest.raises(shards.DamagedError, match='cut off'):
        shards.read_header(path)
    path.write_bytes(good)
    (found,) = shards.read_header(path)
    with open(path, 'rb') as file:
        for layout in ('x', '[["x", "F32", [99999], 8]]', '[["x", "F32", [3], 0]]', '[["x", "F32", [-3], 0]]'):
            with pytest.raises(shards.DamagedError):
                shards.read(file.fileno(), found.key, found.checksum, layout)


def test_what_a_foreign_folder_may_do(make: Callable[..., Store], told: list[str], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach no file outside, write nothing of its own, take no memory, block nothing."""
    victim = tmp_path / 'victim.txt'
    victim.write_text('mine')
    store = make()
    put(store, 1)
    (shard,) = store.folder.glob('*.safetensors')
    with store.index.transaction() as db:
        db.execute("UPDATE shards SET name = '../victim.txt'")
    assert there(store, 1) == []
    assert prune(store, 0) == (0, 0) and victim.read_text() == 'mine' and there(make(), 1) == [1]
    store.close()
    with sqlite3.connect(store.folder / index_file.NAME) as db:
        db.execute('CREATE TRIGGER t AFTER DELETE ON shards BEGIN INSERT INTO files VALUES (1, 2, 3); END')
    store = make()
    assert 'it holds views or triggers' in told.pop() and there(store, 1) == [1]
    assert store.index.query("SELECT name FROM sqlite_master WHERE type = 'trigger'") == []
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'MAX_ENTRY', 100)
        with pytest.raises(shards.DamagedError, match='its header is damaged'):
            shards.read_header(shard)

        def denied(*_: Any) -> None:
            raise PermissionError(1, 'Operation not permitted')
        patch.setattr(os, 'unlink', denied)
        assert there(store, 1) == [] and 'an entry of it is too large' in told.pop() and shard.exists()
    shard.unlink()
    os.mkfifo(shard)
    assert there(make(), 1) == []
    reader = make()
    with reader.index.transaction() as db:
        db.execute('INSERT INTO shards (id, name) VALUES (1, ?)', (shard.name,))
        db.execute('INSERT INTO entries VALUES (?, 1, ?, ?, 0, ?)',
                   (bytes.fromhex(digest(1)), 'text', 'cpu', '[["x", "F32", [3], 8]]'))
    assert there(reader, 1) == [] and 'cannot be read (Illegal seek)' in told.pop()


def test_a_read_only_cache(make: Callable[..., Store], told: list[str], monkeypatch: pytest.MonkeyPatch,
                           tmp_path: Path) -> None:
    """By the option or by the disk; whole, behind, or without an index: nothing is written in the folder."""
    store = make()
    put(store, 1, 2)
    store.close()
    picture = tmp_path / 'picture'
    picture.write_text('x')

    def state() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in store.folder.iterdir()}
    monkeypatch.setattr(store_file, 'SETTLED', -10**12)
    access = os.access
    for change in ('whole', 'behind', 'lost', 'damaged'):
        if change == 'behind':
            index = index_file.Index(store.folder, False, told.append)
            index.forget([next(store.folder.glob('*.safetensors')).name])
            index.close()
        elif change != 'whole':
            (store.folder / index_file.NAME).write_bytes(b'x' * 100)
            if change == 'lost':
                (store.folder / index_file.NAME).unlink()
        before = state()
        with monkeypatch.context() as patch:
            if change == 'whole':
                patch.setattr(os, 'access', lambda path, mode: mode != os.W_OK and access(path, mode))
            reader = make(read_only=change != 'whole')
        assert there(reader, 1, 2) == [1, 2]
        reader.put(digest(3), 'text', {'x': torch.zeros(1)})
        first = reader.file_digest(picture)
        with monkeypatch.context() as patch:
            patch.setattr(store_file.hashlib, 'file_digest', None)
            assert reader.file_digest(picture) == first
        private = reader.index.private
        copy = pickle.loads(pickle.dumps(reader))
        assert there(copy, 1, 2) == [1, 2]
        reader.close()
        assert state() == before and reader.get(digest(3)) is None and '(read only)' in reader.describe()
        assert (private is None) == (change == 'whole')
        assert len(told) == (change in ('whole', 'damaged')), told
        told.clear()
    with pytest.raises(UserError, match="nowhere' cannot be used: No such file or directory"):
        Store(tmp_path / 'nowhere', read_only=True)
    assert not (tmp_path / 'nowhere').exists()


def test_a_private_index_is_removed(make: Callable[..., Store]) -> None:
    """At the end of the process that made it, and not of a child that reads it."""
    put(make(), 1)
    folder = make().folder
    (folder / index_file.NAME).unlink()
    readers = [Store(folder, read_only=True)]
    private = readers[0].index.private
    assert private is not None and private.is_dir()

    def drop() -> None:
        found = there(readers.pop(), 1)
        os._exit(0 if found == [1] and private.is_dir() else 1)
    child = FORK.Process(target=drop)
    child.start()
    child.join()
    assert child.exitcode == 0 and private.is_dir()
    readers.clear()
    assert not private.exists()


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), PermissionError(13, 'Permission denied')])
def test_no_room_stops_caching_only(error: OSError, make: Callable[..., Store], told: list[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    put(store, 1)
    with monkeypatch.context() as patch:
        def full(*args: Any, **kwargs: Any) -> None:
            raise error
        patch.setattr(shards, 'save', full)
        put(store, 2)
        put(store, 3)
    assert told == [f"Nothing more is written to the cache '{store.folder}': {error.strerror}."]
    put(store, 4)
    assert store.stopped == error.strerror and store.written == {'moments': 1}
    assert there(store, 1, 2, 3, 4) == [1] and there(make(), 1, 4) == [1]
    assert [p.name for p in store.folder.iterdir() if p.name.startswith('.')] == []


def test_an_index_that_fails_stops_caching_only(make: Callable[..., Store], told: list[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    put(store, 1)

    def fails(*args: Any) -> Any:
        raise sqlite3.OperationalError('database is locked')
    monkeypatch.setattr(store.index, 'query', fails)
    assert store.get(digest(1)) is None and store.get(digest(1)) is None
    put(store, 2)
    assert len(told) == 1 and 'Nothing more is looked up in the cache' in told[0] and 'is locked' in told[0]


def test_folders_that_are_no_cache(make: Callable[..., Store], tmp_path: Path) -> None:
    folder = tmp_path / 'cache'
    folder.mkdir()
    (folder / 'thesis.tex').write_text('x')
    (folder / 'model.safetensors').write_text('x')
    with pytest.raises(UserError, match=r'holds something else than a cache \(model.safetensors, thesis.tex\)'):
        make()
    for name in ('rows.jsonl', 'origin.json', '0.safetensors'):
        (folder / name).write_text('x')
    with pytest.raises(UserError, match='is a cache of an older version.*in place of CachedLatents'):
        make()
    assert len(list(folder.iterdir())) == 5
    shutil.rmtree(folder)
    folder.write_text('x')
    with pytest.raises(UserError, match="cache' cannot be used: File exists. Name another folder in `cache`"):
        make()
    folder.unlink()
    (folder / 'in' / 'it').mkdir(parents=True)
    shutil.rmtree(folder / 'in')
    put(make(), 1)


def test_digests_of_files(make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content, read once; again after any change, and as long as a change might not show in the file's times."""
    read: list[str] = []
    stock = store_file.hashlib.file_digest

    def counted(file: Any, kind: Any) -> Any:
        read.append(Path(file.name).name)
        return stock(file, kind)
    monkeypatch.setattr(store_file.hashlib, 'file_digest', counted)
    store, one, copy = make(), tmp_path / 'one', tmp_path / 'copy'
    one.write_bytes(b'a' * 10)
    shutil.copy(one, copy)
    first = store.file_digest(one)
    assert store.file_digest(copy) == store.file_digest(one) == first and len(first) == 32
    assert read == ['one', 'copy', 'one'], 'it is too young to be remembered'
    monkeypatch.setattr(store_file, 'SETTLED', -10**12)
    store.file_digest(one)
    store.flush()
    read.clear()
    for other in (store, make(), pickle.loads(pickle.dumps(store))):
        assert other.file_digest(one) == first
    monkeypatch.chdir(tmp_path)
    assert store.file_digest(Path('one')) == first and read == []
    times = one.stat()
    one.write_bytes(b'b' * 10)
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = store.file_digest(one)
    assert second != first and read == ['one'], 'same size and mtime, another ctime'
    os.replace(copy, one)
    assert store.file_digest(one) == first
    os.mkfifo(tmp_path / 'pipe')
    for name in ('gone', 'pipe', '.'):
        with pytest.raises(OSError):
            store.file_digest(tmp_path / name)

    def work() -> None:  # a loader's worker: no atexit functions, but multiprocessing's
        store.file_digest(copy)
    copy.write_bytes(b'c')
    child = FORK.Process(target=work)
    child.start()
    child.join()
    store.file_digest(copy)
    assert read.count('copy') == 0, 'the worker wrote down what it had read'


def fill(folder: Path, numbers: list[int]) -> None:
    """Fill a store in a process of its own."""
    logging.disable()
    store_file.SHARD_ENTRIES = 3
    store = Store(folder)
    for number in numbers:
        if not right(store, number):
            store.put(digest(number), 'moments', entry(number))
        time.sleep(0.001)
    store.close()


def test_killed_at_random_nothing_is_wrong(tmp_path: Path) -> None:
    """Two processes fill and are killed, three times; afterwards each entry is right or missing, and can be filled."""
    draws, folder = random.Random(0), tmp_path / 'cache'
    numbers, kept = [*range(60)], []
    for _ in range(3):
        children = [FORK.Process(target=fill, args=(folder, draws.sample(numbers, len(numbers)))) for _ in range(2)]
        for child in children:
            child.start()
        time.sleep(draws.uniform(0.05, 0.15))
        for child in children:
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
        store = Store(folder)
        kept.append(len(there(store, *numbers)))
        store.close()
    assert kept == sorted(kept) and kept[-1] > 0, 'what was written stays'
    child = FORK.Process(target=fill, args=(folder, numbers))
    child.start()
    child.join()
    store = Store(folder)
    assert there(store, *numbers) == numbers
    store.close()
    assert not [path for path in folder.iterdir() if path.name.startswith('.')], "the dead writers' files are gone"
