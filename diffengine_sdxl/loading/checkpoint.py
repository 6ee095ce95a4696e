"""Checkpoints: files of plain tensors and numbers that `torch.load(weights_only=True)` reads, written atomically."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError, count_of, is_out_of_memory, listed
from diffengine_sdxl.loading.files import TORCH_LOAD_ERRORS, read_json
from diffengine_sdxl.loading.weights import unreadable

NAME = re.compile(r'step(\d+)\.pth')
#: Entries of each logged scalar's history that a checkpoint keeps; more than any smoothing window.
NUM_SCALARS = 256
#: In a work_dir whose run goes back: which files are being moved away (`engine.branches`).
PLAN = 'going_back.json'


class Stateful(Protocol):
    """A module that weights are loaded into."""

    def state_dict(self) -> dict[str, Any]:
        """Return its weights; of an SDXL, those that train."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load weights."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` atomically, converted by `as_plain_data`."""
    with atomic_files.replacing(path) as temporary, open(temporary, 'wb') as file:
        torch.save(as_plain_data(dict(state)), file)


def load(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with `weights_only=True`; with `mmap` tensors are read when they are used.

    Raises:
        UserError: it does not exist, is damaged, or is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint '{path}'.{_suggest(path)}")
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except TORCH_LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f'The checkpoint {unreadable(path, error)} Use that of another step (in a training: '
                        '--resume PATH).') from error
    entries = {'step', 'position', 'seed', 'samples_per_iter', 'identity'}
    meta = state.get('meta') if isinstance(state, dict) else None
    if not isinstance(meta, dict) or not entries <= meta.keys() or 'state_dict' not in state:
        raise UserError(f"'{path}' is not a checkpoint of this engine: it has no 'state_dict' and 'meta'.")
    return state


def list_checkpoints(work_dir: str | Path) -> list[Path]:
    """Return the checkpoints of the run in `work_dir`, oldest step first; without those of branches it abandoned.

    Raises:
        UserError: the folder's plan to go back is damaged.
    """
    plan = read_plan(work_dir)
    if plan is not None and plan['source'] is not None:
        return [Path(plan['source'])]
    steps = {int(m[1]): p for p in Path(work_dir).glob('step*.pth') if (m := NAME.fullmatch(p.name))}
    return [steps[step] for step in sorted(steps) if plan is None or step <= plan['step']]


def latest(work_dir: str | Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(work_dir)), None)


def read_plan(work_dir: str | Path) -> dict[str, Any] | None:
    """Return the plan to go back that a killed process left in `work_dir`, or None.

    Returns:
        `step`, to go back to; `folder`, which later files are moved to; `source`, the checkpoint to resume from if it
        lies elsewhere, or None.

    Raises:
        UserError: it is damaged.
    """
    path = Path(work_dir) / PLAN
    if not path.is_file():
        return None
    plan = read_json(path)
    try:
        return {'step': int(plan['step']), 'folder': str(plan['folder']), 'source': plan['source']}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{path}' is damaged ({type(error).__name__}: {error}); remove it.") from error


def _suggest(path: Path) -> str:
    """Return where a missing checkpoint may be: in a folder of this name, or in a branch that was set aside."""
    if path.is_dir():
        names = [one.name for one in list_checkpoints(path)]
        return f' It is a folder; name a file in it: {listed(names)}.' if names else ' It is a folder without any.'
    others = sorted(path.parent.glob(f'abandoned_*/{glob.escape(path.name)}'))
    return f" It was set aside when the run went back: '{others[-1]}'." if others else ''


def as_plain_data(value: Any) -> Any:
    """Convert numpy scalars and arrays, HistoryBuffers and subclasses of dict, list and tuple to plain types."""
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {'history': torch.tensor(np.asarray(history[-NUM_SCALARS:], dtype=np.float64)),
                'counts': torch.tensor(np.asarray(counts[-NUM_SCALARS:], dtype=np.float64))}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: as_plain_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if type(value) is tuple else list)(as_plain_data(v) for v in value)
    return value


def restore_buffer(stored: Mapping[str, torch.Tensor]) -> HistoryBuffer:
    """Return the HistoryBuffer that `as_plain_data` converted."""
    return bounded_buffer(stored['history'].tolist(), stored['counts'].tolist())


def bounded_buffer(history: list[float] | None = None, counts: list[float] | None = None) -> HistoryBuffer:
    """Return a HistoryBuffer of limited length: mmengine's own grows to a million entries, and updates copy all."""
    return HistoryBuffer(history or [], counts or [], max_length=NUM_SCALARS)


def load_strict(module: Stateful, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load exactly the keys that `module.state_dict()` has (for an SDXL: what trains).

    Raises:
        UserError: keys are missing, unexpected or of other shapes; which.
    """
    expected = module.state_dict()
    shapes = [f'{k} {tuple(state[k].shape)} for {tuple(expected[k].shape)}' for k in expected.keys() & state.keys()
              if state[k].shape != expected[k].shape]
    for what, keys in (('missing', expected.keys() - state.keys()),
                       ('not in the model', state.keys() - expected.keys()), ('of another shape', shapes)):
        if keys:
            raise UserError(f"The weights in '{source}' don't fit the model: {count_of(len(keys), 'key', 'keys')} "
                            f'{what} ({listed(sorted(keys))}).')
    module.load_state_dict(state, strict=False)
