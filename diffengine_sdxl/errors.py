"""Errors: a user's mistake is a `UserError`, printed as a sentence; any other keeps its traceback."""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

#: Errors of the disk: full, failing, or not writable, or a name that it does not take.
WRITE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)


class UserError(ValueError):
    """A mistake that the user can fix. The message names the value, the place and the fix."""


@contextmanager
def error_prefix(prefix: str, unless: str) -> Iterator[None]:
    """Inside, begin the message of a UserError with `prefix`, unless it holds the text `unless`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if unless in str(error) else f'{prefix}{error}') from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[object], num: int = 10) -> str:
    """Join `names` with commas; of more than `num`, only the first ones and ' ...'."""
    texts = [str(name) for name in names]
    return ', '.join(texts[:num]) + (' ...' if len(texts) > num else '')


def count_of(number: int, one: str, several: str) -> str:
    """Return a number with the word for one or for several, such as '1 image'."""
    return f'{number:,} {one if number == 1 else several}'


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return " Did you mean 'a' or 'b'?" with the entries of `known` closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close:
        folded = {k.lower(): k for k in known}
        close = [folded[k] for k in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ''


def one_of(key: str, value: object, known: Collection[object]) -> None:
    """Check that `value` is in `known`.

    Raises:
        UserError: it is not.
    """
    if value not in [*known]:  # as a list, so that a value that cannot be hashed is refused too
        raise UserError(f'{key}={value!r} is unknown; choose one of {", ".join(map(repr, known))}.'
                        f'{did_you_mean(str(value), [str(k) for k in known])}')


def whole_number(key: str, value: Any, low: int | None = None) -> int:
    """Return `value`, any whole number (numpy's too), as an int.

    Raises:
        UserError: it is not a whole number, or below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:  # type: ignore[operator]
        raise UserError(f'{key}={value!r} must be a whole number.')
    if low is not None and value < low:
        raise UserError(f'{key}={value!r} must be at least {low}.')
    return int(value)  # type: ignore[call-overload,no-any-return]


def checked_range(active_range: Sequence[float], key: str = 'active_range') -> tuple[float, float]:
    """Return a part of sampling, from noise (0) to image (1), as (start, end).

    Raises:
        UserError: it is not one.
    """
    try:
        start, end = (float(side) for side in active_range)
    except (TypeError, ValueError, OverflowError):  # the last: an integer of 400 digits
        start = end = -1.0
    if not 0 <= start < end <= 1:
        raise UserError(f'{key}={active_range!r} must be (start, end) with 0 <= start < end <= 1.')
    return start, end


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. On a CPU torch reports that as a plain RuntimeError."""
    torch = sys.modules.get('torch')
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or isinstance(error, RuntimeError) and any(
        mark in str(error) for mark in ('not enough memory', "can't allocate memory", 'out of memory', 'ALLOC_FAILED'))


def lost_process(error: BaseException) -> str | None:
    """Return which process of the group is gone: 'process 1' or 'another process'; None for other errors.

    gloo raises a plain RuntimeError that names the file of its source and a port.
    """
    if not isinstance(error, RuntimeError) or 'torch.distributed' not in sys.modules:
        return None
    if type(error).__name__ not in ('DistBackendError', 'DistNetworkError', 'DistStoreError') and not any(
            mark in str(error) for mark in ('gloo/transport', 'Connection closed by peer')):
        return None
    group = sys.modules['torch.distributed']
    pair = group.is_available() and group.is_initialized() and group.get_world_size() == 2
    return f'process {1 - group.get_rank()}' if pair else 'another process'


def user_message(error: BaseException, if_out_of_memory: str = '') -> str | None:
    """Return what to tell the user about `error`, or None if it is a bug of this package.

    Args:
        if_out_of_memory: advice to add if memory ran out.
    """
    if isinstance(error, UserError):
        text = str(error).strip()
        # A data loader's worker wraps its error into the text of a traceback.
        return text.splitlines()[-1].partition(': ')[2] or text if text.startswith('Caught ') else text
    if is_out_of_memory(error):
        return f'out of memory ({first_line(error)[:200]}). {if_out_of_memory}'.rstrip()
    if (process := lost_process(error)) is not None:
        return (f'{process} of this run ended, or is not reached any more ({first_line(error)[:200]}); this one cannot '
                'go on alone. Its own message says why. Then start all of them again, with --resume in training.')
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return str(error)
    # An ImportError without a name was raised by hand, by a library that lacks an optional package.
    if isinstance(error, ImportError) and (error.name is None or isinstance(error, ModuleNotFoundError)
                                           and not error.name.startswith('diffengine_sdxl')):
        return f'a package is missing: {error}' + (f' (pip install {error.name})' if error.name else '')
    return None


def report(message: str) -> None:
    """Print an error as the last line of stderr, and leave it for torchrun, whose own words come after it."""
    print(f'error: {message}', file=sys.stderr, flush=True)
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        # torch.distributed.elastic.multiprocessing.errors: shown at the end, as the root cause.
        Path(path).write_text(json.dumps({'message': f'error: {message}', 'timestamp': int(time.time())}))


def run_command(name: str, args: Any) -> int:
    """Run `commands.<name>.run(args, cleanup)` and print what the user can fix as one sentence.

    The module is imported here, so that Ctrl-C during the import of torch also ends in a sentence.

    Args:
        name: module of `diffengine_sdxl.commands`; may define STOPPED (printed on Ctrl-C) and OUT_OF_MEMORY (advice).
        args: parsed options; `launcher`, if present, tells whether other processes wait for this one.

    Returns:
        The exit code: 0, 1 for an error, 130 for Ctrl-C.
    """
    command: Any = None
    with ExitStack() as cleanup:
        try:
            command = importlib.import_module(f'diffengine_sdxl.commands.{name}')
            return int(command.run(args, cleanup) or 0)
        except KeyboardInterrupt:
            cleanup.close()
            print(getattr(command, 'STOPPED', 'Stopped.'), file=sys.stderr)
            return 130
        except Exception as error:
            cleanup.close()
            message = user_message(error, getattr(command, 'OUT_OF_MEMORY', ''))
            if message is None:
                print(f'internal error in {name}: a bug of diffengine_sdxl, not yours. Please report it with the '
                      'command, the config and the lines below.', file=sys.stderr, flush=True)
                traceback.print_exc()
                message = f'internal error in {name}: {type(error).__name__}: {first_line(error)[:300]}'
            report(message)
            if getattr(args, 'launcher', 'none') != 'none':
                os._exit(1)  # the other processes wait for this one; the launcher ends them
            return 1
