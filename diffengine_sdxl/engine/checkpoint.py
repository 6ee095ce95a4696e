"""Checkpoints: plain files that `torch.load` reads as they are, written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

NAME = re.compile(r'step(\d+)\.pth')
#: Entries of each logged scalar's history that a checkpoint keeps; more than any smoothing window.
KEPT_SCALARS = 256


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success it is flushed to the disk and takes `path`'s place.

    Raises:
        ValueError: no room (or no right) to write; nothing is left behind and `path` is what it was.
    """
    # A hidden name: a half-written file is never taken for a whole one.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        # A folder cannot be replaced in one move; until the new one stands, the old one is only set aside.
        old = path.with_name(f'.{path.name}.{os.getpid()}.old.part')
        if path.is_dir():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
        _flush_folder(path.parent)
    except Exception as error:
        if (reason := _write_fault(error)) is None:
            raise
        free = f'{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there. ' if path.parent.is_dir() else ''
        raise ValueError(f"'{path}' could not be written ({reason}). {free}What was saved before is untouched; make "
                         'room and resume.') from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def _write_fault(error: BaseException | None) -> str | None:
    """The words of the operating system's refusal to write, if that is what `error` comes from."""
    first = error
    while error is not None:
        if isinstance(error, OSError):
            return _first_line(error)
        error = error.__cause__ or error.__context__
    # torch's zip writer and safetensors have errors of their own for a full disk.
    marks = ('PytorchStreamWriter', 'enforce fail', 'I/O error')
    return _first_line(first) if first is not None and any(mark in str(first) for mark in marks) else None


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` atomically, streaming. Everything in it becomes plain: tensors, numbers, strings, dicts, lists."""
    with replacing(path) as temporary, open(temporary, 'wb') as file:
        torch.save(plain(dict(state)), file)


def load(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with `weights_only=True`; with `mmap` tensors are read when they are used.

    Raises:
        ValueError: there is none, it is cut off, or it is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint '{path}'.")
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"The checkpoint '{path}' cannot be read ({_first_line(error)}). It is cut off, damaged or "
                         'not plain data; take an older one (--resume PATH).') from error
    wanted = {'step', 'position', 'seed', 'samples_per_iter', 'identity'}
    if not isinstance(state, dict) or 'state_dict' not in state or not wanted <= set(state.get('meta') or ()):
        raise ValueError(f"'{path}' is not a checkpoint of this engine: it holds no 'state_dict' and 'meta'.")
    return state


def found(work_dir: str | Path) -> list[Path]:
    """The checkpoints in `work_dir`, oldest step first."""
    steps = {int(m[1]): p for p in Path(work_dir).glob('step*.pth') if (m := NAME.fullmatch(p.name))}
    return [steps[step] for step in sorted(steps)]


def latest(work_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(found(work_dir)), None)


def clean(work_dir: str | Path) -> None:
    """Remove what a killed process left half-written."""
    for part in Path(work_dir).glob('.*.part'):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays, HistoryBuffers and subclasses of dict, list and tuple made plain."""
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {'history': torch.tensor(np.asarray(history[-KEPT_SCALARS:], dtype=np.float64)),
                'counts': torch.tensor(np.asarray(counts[-KEPT_SCALARS:], dtype=np.float64))}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else [plain(v) for v in value]
    return value


def buffer(stored: Mapping[str, torch.Tensor]) -> HistoryBuffer:
    """A HistoryBuffer from what `plain` made of one."""
    return bounded_buffer(stored['history'].tolist(), stored['counts'].tolist())


def bounded_buffer(history: list[float] | None = None, counts: list[float] | None = None) -> HistoryBuffer:
    """A HistoryBuffer that forgets: mmengine's own default grows to a million entries, and each update copies all."""
    return HistoryBuffer(history or [], counts or [], max_length=KEPT_SCALARS)


def load_strict(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load exactly the keys that `module.state_dict()` has (for an SDXL: what trains).

    Raises:
        ValueError: keys are missing, surplus or of other shapes; which.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f'{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}' for k in own.keys() & state.keys()
              if state[k].shape != own[k].shape]
    for what, keys in (('missing', missing), ('not in the model', surplus), ('of another shape', sorted(shapes))):
        if keys:
            raise ValueError(f"The weights in '{source}' don't fit the model: {len(keys)} keys {what}: "
                             f'{", ".join(keys[:10])}{" ..." if len(keys) > 10 else ""}.')
    module.load_state_dict(state, strict=False)


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
