"""Write files and folders whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffengine_sdxl.errors import WRITE_ERRORS, UserError, first_line

#: Name of the folder in which 'x.png' is written before it is moved to its place: '.x.png.abcd1234.part'.
_NAME = re.compile(r'\.(.+)\.[a-z0-9_]{8}\.part')
#: Where an old folder waits until the new one is in its place.
_OLD = '.old'
#: Folders that this process has cleaned already.
_cleaned: set[Path] = set()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in a hidden folder beside `path`; on success, flush it to the disk and move it to `path`.

    What killed processes left there is removed first, see `clean`.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind and `path` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (parent := path.parent.resolve()) not in _cleaned:
            clean(parent)
            _cleaned.add(parent)
        with _locked_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            _flush(temporary)
            # A folder cannot be replaced in one move: keep the old one aside until the new one is in place.
            if path.is_dir():
                os.replace(path, folder / _OLD)
            try:
                os.replace(temporary, path)
            except BaseException:
                if (folder / _OLD).is_dir():
                    os.replace(folder / _OLD, path)
                raise
            _flush_folder(path.parent)
    except Exception as error:
        if (reason := _write_error(error)) is None:
            raise
        free = f'{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there. ' if path.parent.is_dir() else ''
        raise UserError(f"'{path}' could not be written ({reason}). {free}What was saved before is untouched; make "
                        'room and resume.') from error


@contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `path` that is locked as long as this process lives; remove it in the end."""
    while True:
        folder = Path(tempfile.mkdtemp('.part', f'.{path.name}.', path.parent))
        with _lock(folder) as locked:
            # Between the two calls another process may have taken it for a killed one's.
            if locked is not False and folder.is_dir():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextmanager
def _lock(part: Path) -> Iterator[bool | None]:
    """Lock a file or folder inside, as long as this process lives; yield whether that worked, None if it cannot."""
    try:
        handle = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # another process has just removed it
        yield False
        return
    try:
        locked: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # held by another process; else the file system knows no such locks
            locked = False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        yield locked
    finally:
        os.close(handle)


def clean(parent: str | Path) -> None:
    """Remove what killed processes left of `replacing` in a folder; what a living process writes stays.

    If one was killed after it had set an old folder aside, that goes back to its place. Nothing else is touched,
    whatever its name.
    """
    for part in Path(parent).glob('.*.part'):
        name = _NAME.fullmatch(part.name)
        if name is None or not part.is_dir():
            continue
        with _lock(part) as locked:
            held = {entry.name for entry in part.iterdir()} if locked else {''}
            if not held <= {name[1], _OLD}:
                continue
            if _OLD in held and not os.path.lexists(part.with_name(name[1])):
                os.replace(part / _OLD, part.with_name(name[1]))
            shutil.rmtree(part, ignore_errors=True)


def _write_error(error: BaseException | None) -> str | None:
    """Return the operating system's reason for a failed write, or None if `error` has another cause."""
    first = error
    while error is not None:
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            return first_line(error)
        error = error.__cause__ or error.__context__
    # torch's zip writer and safetensors raise their own errors for a full disk.
    marks = ('PytorchStreamWriter', 'enforce fail', 'I/O error')
    return first_line(first) if first is not None and any(mark in str(first) for mark in marks) else None


def _flush(path: Path) -> None:
    for file in path.rglob('*') if path.is_dir() else [path]:
        if file.is_file():
            with open(file, 'rb') as handle:
                os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
