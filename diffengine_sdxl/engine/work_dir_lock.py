"""One training at a time in a work_dir, and one test: a lock of the operating system, which dies with its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from mmengine.logging import print_log

from diffengine_sdxl.errors import UserError, first_line

#: In the locked folder.
FILE = 'run.lock'
#: Real path of a folder -> the open file whose lock this process holds.
_HELD: dict[str, int] = {}
#: What file systems without locks answer.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def acquire(work_dir: str | Path, does: str = 'trains') -> None:
    """Lock `work_dir`, which is made if it does not exist, for this process, until `release` or its death.

    Where the file system has no locks, a warning says so.

    Args:
        work_dir: of a training; of a test the folder `test` in it, so that it may run beside a training.
        does: what this process does there, 'trains' or 'tests'.

    Raises:
        UserError: another process does so, or the folder cannot be written to.
    """
    key, path = os.path.realpath(work_dir), Path(work_dir) / FILE
    if key in _HELD:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"'{path}' could not be written ({first_line(error)}). Choose another --work-dir.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            holder = os.pread(file, 200, 0).decode(errors='replace').strip()
            os.close(file)
            raise UserError(f"'{work_dir}' is in use: {holder or 'another process'} {does} there, and two runs in one "
                            'folder would mix their files. Wait until it ends or stop it, or choose another '
                            '--work-dir.') from error
        print_log(f"'{work_dir}' lies on a file system without locks ({first_line(error)}): make sure that no second "
                  'run is started there.', logger='current', level=logging.WARNING)
    _HELD[key] = file
    os.ftruncate(file, 0)
    os.pwrite(file, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)


def release(work_dir: str | Path) -> None:
    """Let other processes use `work_dir`. The file stays: removing it could take a lock from a third process."""
    file = _HELD.pop(os.path.realpath(work_dir), None)
    if file is not None:
        os.close(file)


def _forget() -> None:
    """Close a forked process's copies, so that a lock does not outlive its owner in a data loader's worker."""
    while _HELD:
        os.close(_HELD.popitem()[1])


os.register_at_fork(after_in_child=_forget)
