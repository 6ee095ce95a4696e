"""Where each entry lies and what each file's digest was: SQLite, as a summary that can be made anew from the shards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.cache import shards
from diffengine_sdxl.cache.shards import DamagedError, Entry
from diffengine_sdxl.errors import UserError

NAME = 'index.sqlite'
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, name TEXT UNIQUE, size INTEGER, written REAL, used REAL);
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, shard INTEGER, kind TEXT, device TEXT, checksum INTEGER,
                                    layout TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, state TEXT, digest TEXT) WITHOUT ROWID;
PRAGMA user_version = {shards.VERSION};
"""
#: Seconds to wait for another process that writes.
PATIENCE = 30
#: Held whenever SQLite is called, and so while a process forks: a child must not inherit half a transaction.
_LOCK = threading.Lock()
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
#: Connections of the parent process. SQLite forbids to close them in a child.
_INHERITED: list[sqlite3.Connection] = []

Result = TypeVar('Result')
Report = Callable[[str], None]


class Place(NamedTuple):
    """Where an entry lies: the name of its shard, and what `shards.read` needs."""

    shard: str
    checksum: int
    layout: str
    device: str


class Index:
    """The index of a folder; each process opens its own connection. Can be pickled.

    Args:
        folder: of the shards, which exists.
        read_only: nothing is written in the folder. If the index there lacks shards, a private copy is completed.
        report: takes sentences for the user.

    Raises:
        UserError: the folder was written by another version of this package.

    Attributes:
        private: the temporary folder of a private copy of the index.
        unreadable: shards that this process has found damaged or could not read.
        lost: key -> a line on an entry of these.
    """

    def __init__(self, folder: Path, read_only: bool, report: Report) -> None:
        self.folder, self.read_only = folder, read_only
        self.path, self.private = folder / NAME, None  # type: Path, Path | None
        self.unreadable: set[str] = set()
        self.lost: dict[str, str] = {}
        self._report, self._repaired = report, False
        self._db: sqlite3.Connection | None = None
        self._pid = os.getpid()
        try:
            if not read_only:
                self._prepare()
            elif not self.path.is_file() or self._is_behind():
                self._go_private(copy=True)
        except sqlite3.OperationalError as error:  # no locks on this file system, or not readable
            report(f"The index of the cache '{folder}' cannot be used ({error}); this process makes one of its own.")
            self._go_private(copy=False)
        except sqlite3.DatabaseError as error:
            if read_only:
                report(f"The index of the cache '{folder}' is damaged ({error}); this process makes one of its own.")
                self._go_private(copy=False)
            else:
                self.rebuild(error)
        if not read_only or self.private is not None:
            try:
                self.adopt()
            except sqlite3.OperationalError as error:  # another process writes for too long, or the disk is full
                report(f"The index of the cache '{folder}' cannot be completed ({error}); what it lacks is computed.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_db': None}

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a SELECT. A damaged index is made anew, once in a process.

        Raises:
            sqlite3.Error: the index is busy, or damaged for good.
        """
        try:
            with _LOCK:
                return self._connection().execute(sql, values).fetchall()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            if self._repaired or self.read_only:
                raise
            self._repaired = True
            self.rebuild(error)
            self.adopt()
            return self.query(sql, *values)

    @contextmanager
    def transaction(self, patience: float = PATIENCE) -> Iterator[sqlite3.Connection]:
        """Yield a connection to write; commit in the end.

        Args:
            patience: seconds to wait for another process that writes.

        Raises:
            sqlite3.Error: the index is damaged or busy, or the disk is full.
        """
        due, reopened = time.monotonic() + patience, False
        while True:
            with _LOCK:
                db = self._connection()
                # Not SQLite's own patience, which would keep this process's other threads waiting for _LOCK.
                db.execute('PRAGMA busy_timeout = 0')
                try:
                    db.execute('BEGIN IMMEDIATE')
                    begun = True
                except sqlite3.OperationalError as error:
                    begun = False
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY and not reopened:  # replaced by another process
                        db.close()
                        self._db, reopened = None, True
                    elif error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > due:
                        raise
                finally:
                    if self._db is not None:
                        db.execute(f'PRAGMA busy_timeout = {PATIENCE * 1000}')
                if begun:
                    try:
                        yield db
                        db.execute('COMMIT')
                    except BaseException:
                        if db.in_transaction:
                            db.execute('ROLLBACK')
                        raise
                    return
            time.sleep(0.02)

    def find(self, key: str) -> Place | None:
        """Return where an entry lies.

        Raises:
            sqlite3.Error: the index is damaged or busy.
        """
        rows = self.query('SELECT name, checksum, layout, device FROM entries JOIN shards ON shards.id = shard '
                          'WHERE key = ?', bytes.fromhex(key))
        # A name from a foreign index must not lead out of the folder.
        is_shard = bool(rows) and shards.NAME.fullmatch(str(rows[0][0])) and rows[0][0] not in self.unreadable
        return Place(*rows[0]) if is_shard else None

    def adopt(self) -> None:
        """Add shards of the folder that the index lacks, and forget those that are gone or damaged."""
        known = dict(self.query('SELECT name, size FROM shards'))
        there = _list_shards(self.folder)  # after the index was read: another process writes the shard first
        self.forget([name for name in known if name not in there])
        for name, size in there.items():
            if name not in known:
                self.add(name)
            elif size != known[name]:
                self.drop(name, 'it is cut off')

    def add(self, name: str) -> None:
        """Add the entries of a shard; a damaged one is dropped.

        Raises:
            UserError: it was written by another version of this package.
        """
        try:
            entries = shards.read_header(self.folder / name)
            state = os.stat(self.folder / name)
        except FileNotFoundError:
            return
        except DamagedError as error:
            self.drop(name, str(error))
            return
        except OSError as error:
            self.ignore(name, error)
            return
        with self.transaction() as db:
            _insert(db, name, state, entries)

    def drop(self, name: str, reason: str) -> None:
        """Forget a damaged shard and delete it."""
        self._lose(name, f'is damaged ({reason})')
        self.forget([name])
        if not self.read_only:
            try:
                os.unlink(self.folder / name)
            except FileNotFoundError:  # another process has dropped it
                return
            except OSError:  # it is another user's
                pass
        self._report(f"'{self.folder / name}' is damaged ({reason}) and is dropped; training computes what it held "
                     'again.')

    def ignore(self, name: str, error: OSError) -> None:
        """Pass over a shard that this process cannot read."""
        if name not in self.unreadable:
            self._lose(name, f'cannot be read ({error.strerror})')
            self._report(f"'{self.folder / name}' cannot be read ({error.strerror}); training computes what it holds "
                         'again.')

    def _lose(self, name: str, why: str) -> None:
        self.unreadable.add(name)
        rows = self.query('SELECT lower(hex(key)), kind FROM entries JOIN shards ON shards.id = shard WHERE name = ?',
                          name)
        self.lost.update((key, f"{kind} {key}: its file '{name}' {why}") for key, kind in rows)

    def forget(self, names: Iterable[str]) -> None:
        """Forget shards and their entries."""
        if (names := list(names)) and (not self.read_only or self.private):
            with self.transaction() as db:
                _forget(db, names)

    def rebuild(self, error: sqlite3.DatabaseError) -> None:
        """Replace a damaged index by an empty one, for `adopt` to fill.

        Raises:
            UserError: the folder cannot be written.
        """
        self._report(f"The index of the cache '{self.folder}' is damaged ({error}); it is made anew from the shards.")
        self.close()
        (self.folder / f'{NAME}-journal').unlink(missing_ok=True)  # else it would be applied to the new one
        with replacing(self.folder / NAME) as temporary, closing(_connect(temporary, 'rwc')) as db:
            db.executescript(SCHEMA)

    def digest_of(self, path: bytes, state: str) -> str | None:
        """Return the remembered digest of a file in the given state.

        Raises:
            sqlite3.Error: the index is damaged or busy.
        """
        rows = self.query('SELECT digest FROM files WHERE path = ? AND state = ?', path, state)
        return str(rows[0][0]) if rows else None

    def note(self, digests: Mapping[bytes, tuple[str, str]], used: Iterable[str]) -> None:
        """Remember the digests of files, path -> (state, digest), and that shards were used now.

        Raises:
            sqlite3.Error: the index is damaged or busy.
        """
        with self.transaction(patience=0.5) as db:  # else it is noted another time
            db.executemany('INSERT OR REPLACE INTO files VALUES (?, ?, ?)',
                           [(path, state, digest) for path, (state, digest) in digests.items()])
            db.executemany('UPDATE shards SET used = ? WHERE name = ?', [(time.time(), name) for name in used])

    def close(self) -> None:
        """Close this process's connection; the next call opens another."""
        with _LOCK:
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
                self._db = None

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._pid != os.getpid():
            _INHERITED.append(self._db)
            self._db = None
        if self._db is None:
            self._db = _connect(self.path, 'rwc' if not self.read_only or self.private else 'ro')
            self._pid = os.getpid()
        return self._db

    def _is_behind(self) -> bool:
        """Return whether the folder has shards that its index lacks, and check its version."""
        self._check_version()
        known = {str(name) for name, in self.query('SELECT name FROM shards')}
        return not _list_shards(self.folder).keys() <= known

    def _go_private(self, copy: bool) -> None:
        """Go on with an index in a temporary folder, a copy or an empty one."""
        self.close()
        self.private = Path(tempfile.mkdtemp('', 'diffengine-cache-'))
        weakref.finalize(self, _remove, self.private, os.getpid())
        path = self.private / NAME
        if copy and self.path.is_file():
            with closing(_connect(self.path, 'ro')) as source, closing(_connect(path, 'rwc')) as target:
                source.backup(target)
        self.path = path
        self._prepare()

    def _check_version(self) -> int:
        version = int(self.query('PRAGMA user_version')[0][0])
        if any(kind != 'table' for kind, in self.query('SELECT type FROM sqlite_master WHERE sql IS NOT NULL')):
            raise sqlite3.DatabaseError('it holds views or triggers')
        if version not in (0, shards.VERSION):
            raise UserError(f"The cache '{self.folder}' was written by another version of this package (layout "
                            f'{version}, not {shards.VERSION}). Name another folder in `cache`, or delete this one: it '
                            'is filled anew.')
        return version

    def _prepare(self) -> None:
        """Check the version, and make the tables if there are none."""
        if self._check_version() == 0:
            with self.transaction() as db:
                for statement in SCHEMA.split(';'):
                    db.execute(statement)


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a child that drops its copy
        shutil.rmtree(folder, ignore_errors=True)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # Threads share it under _LOCK. Transactions are begun by hand.
    db = sqlite3.connect(f'{path.absolute().as_uri()}?mode={mode}', timeout=PATIENCE, isolation_level=None, uri=True,
                         check_same_thread=False)
    # A killed process harms nothing without it, and an index that a power failure damaged is made anew.
    db.execute('PRAGMA synchronous = OFF')
    return db


def _list_shards(folder: Path) -> dict[str, int]:
    """Return name -> bytes of all shards in a folder."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as found:
        for entry in found:
            if shards.NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # another process has pruned it
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes


def _insert(db: sqlite3.Connection, name: str, state: os.stat_result, entries: list[Entry]) -> None:
    db.execute('INSERT OR IGNORE INTO shards (name, size, written, used) VALUES (?, ?, ?, ?)',
               (name, state.st_size, state.st_mtime, state.st_mtime))
    number = db.execute('SELECT id FROM shards WHERE name = ?', (name,)).fetchone()[0]
    db.executemany('INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?)', [
        (bytes.fromhex(e.key), number, e.kind, e.device, e.checksum, e.layout) for e in entries])


def _forget(db: sqlite3.Connection, names: list[str]) -> None:
    marks = ', '.join('?' * len(names))
    db.execute(f'DELETE FROM entries WHERE shard IN (SELECT id FROM shards WHERE name IN ({marks}))', names)
    db.execute(f'DELETE FROM shards WHERE name IN ({marks})', names)
