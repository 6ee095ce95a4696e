"""Go back to an older checkpoint: what a run wrote after it is moved to `abandoned_<n>/`, and nothing is deleted.

So the checkpoint of the highest step in a work_dir is always the one that its run wrote last. A plan is written first
and removed last: after a kill in between the next run finishes the move, and whoever looks for the latest checkpoint
meanwhile passes over those that are to be moved (`checkpoint.list_checkpoints`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError, first_line, listed
from diffengine_sdxl.loading import checkpoint

#: Where a run leaves files of steps, in its work_dir; files that show the whole run, and what a test of it left.
_FOLDERS = ('.', 'val', 'samples', 'samples/images')
_STEP = re.compile(r'step(\d+)(\.pth|\.json|\.samples\.csv|\.png|_\d+_seed-?\d+\.png)?')
_OF_ALL_STEPS = ('curves.png', 'val/pictures.png', 'samples/steps.png', 'best.json', 'early_stop.json', 'report.html',
                 'metrics.json', 'metrics.csv', 'test')
#: Files with a line for each step.
CURVES = ('curves.jsonl', 'val_loss.jsonl')


def go_back(work_dir: Path, source: Path, step: int) -> str | None:
    """Make the checkpoint `source` of `step` the newest of `work_dir`, which is about to be resumed from it.

    What `work_dir` holds of later steps is set aside. If `source` lies elsewhere, everything of steps is, as it is no
    part of the resumed run's past, and `source` becomes a file of `work_dir`, so that a later --resume finds it.

    Returns:
        What was moved, for people; None if nothing was.

    Raises:
        UserError: a file cannot be moved.
    """
    own = work_dir / f'step{step}.pth'
    inside = own.is_file() and os.path.samefile(source, own)
    if inside and checkpoint.latest(work_dir) == own:
        return None  # later files without a checkpoint are made again
    moved = sorted(path.name for path in _later(work_dir, step if inside else -1) if path.suffix == '.pth')
    plan: dict[str, Any] = {'step': step, 'folder': next(name for i in itertools.count(1) if not (
        work_dir / (name := f'abandoned_{i}')).exists()), 'source': None if inside else os.path.abspath(source)}
    with atomic_files.replacing(work_dir / checkpoint.PLAN) as temporary:
        temporary.write_text(json.dumps(plan))
    finish(work_dir)
    if not (work_dir / plan['folder']).is_dir():
        return None
    return (f"Going back to step {step}: the abandoned branch ({listed(moved) or 'files of steps'}) was moved to "
            f"'{work_dir / plan['folder']}'. To go on with it, resume from a checkpoint there.")


def finish(work_dir: Path) -> None:
    """Carry out the plan in `work_dir`, if there is one; also one that a killed process left.

    Raises:
        UserError: a file cannot be moved.
    """
    plan = checkpoint.read_plan(work_dir)
    if plan is None:
        return
    step, target, source = plan['step'], work_dir / plan['folder'], plan['source']
    try:
        later = list(_later(work_dir, step if source is None else -1))
        rest = [work_dir / name for name in (*_OF_ALL_STEPS, *CURVES) if (work_dir / name).exists()]
        for path in [*later, *rest] if later or source is not None or target.is_dir() else ():
            place = target / path.relative_to(work_dir)
            if place.exists():  # the plan was carried out up to here, and `path` is new
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.name in CURVES and source is None:
                _copy(path, place)  # the steps before belong to both branches
            else:
                os.replace(path, place)
        if source is not None:
            _copy(Path(source), work_dir / f'step{step}.pth')
        atomic_files.clean(target)
        (work_dir / checkpoint.PLAN).unlink()
    except OSError as error:
        raise UserError(f"The files after step {step} cannot be moved from '{work_dir}' to '{target}' "
                        f'({first_line(error)}). Nothing is lost; make room or mend the folder, and resume '
                        'again.') from error


def _later(work_dir: Path, step: int) -> Iterator[Path]:
    """Yield files and folders of steps after `step`."""
    for folder in _FOLDERS:
        for path in sorted((work_dir / folder).glob('step*')):
            if (match := _STEP.fullmatch(path.name)) and int(match[1]) > step:
                yield path


def _copy(source: Path, target: Path) -> None:
    """Copy a file, atomically; as a link where the disk has them: no file of a run is changed in place but curves."""
    with atomic_files.replacing(target) as temporary:
        if source.suffix == '.pth':
            try:
                os.link(source.resolve(), temporary)
                return
            except OSError:  # another disk, or one without links
                pass
        shutil.copyfile(source, temporary)
