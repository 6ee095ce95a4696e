"""Write files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffengine_sdxl.errors import WRITE_ERRORS, UserError, first_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success, flush it to the disk and move it to `path`.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind and `path` is unchanged.
    """
    # A hidden name, so that a half-written file is never mistaken for a whole one.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        # A folder cannot be replaced in one move: keep the old one aside until the new one is in place.
        old = path.with_name(f'.{path.name}.{os.getpid()}.old.part')
        if path.is_dir():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
        _flush_folder(path.parent)
    except Exception as error:
        if (reason := _write_error(error)) is None:
            raise
        free = f'{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there. ' if path.parent.is_dir() else ''
        raise UserError(f"'{path}' could not be written ({reason}). {free}What was saved before is untouched; make "
                        'room and resume.') from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


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


def clean(work_dir: str | Path) -> None:
    """Remove half-written files and folders that a killed process left."""
    for part in Path(work_dir).glob('.*.part'):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


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
