"""The identity of a run: its model, objective, data and seed. Its length, intervals and workers may change."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from diffengine_sdxl import atomic_files
from diffengine_sdxl.config.references import differences, to_plain
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.loading import checkpoint

FILE = 'run.json'
#: Keys of the model's config that change no result of training.
IGNORED_MODEL_KEYS = ('gradient_checkpointing', 'attention', 'cache_dir', 'sampler', 'seed')


def identity(config: Config) -> dict[str, Any]:
    """Return the part of a resolved config that a resumed run must share."""
    data = config.get('train_dataloader') or {}
    return to_plain({
        'model': {k: v for k, v in (config.get('model') or {}).items() if k not in IGNORED_MODEL_KEYS},
        'train_dataloader': {
            'dataset': {k: v for k, v in (data.get('dataset') or {}).items() if k != 'cache_dir'},
            'sampler': data.get('sampler'), 'batch_size': data.get('batch_size')},
        'optim_wrapper': config.get('optim_wrapper')})


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Check that two identities are equal.

    Raises:
        UserError: they differ; in what.
    """
    lines = differences(old, new)
    if lines:
        more = f'; and {len(lines) - 5} more' if len(lines) > 5 else ''
        raise UserError(f'{where} belongs to another run: {"; ".join(lines[:5])}{more}. Choose another --work-dir, or '
                        'set the config back.')


def claim(config: Config) -> int:
    """Start or continue a run in `config.work_dir`; only the main process reads and writes.

    Returns:
        The seed, the same in all processes: the config's, the resumed run's, or one drawn now and kept.

    Raises:
        UserError: the folder belongs to another run, or to this one and `resume` is not set.
    """
    return on_main_process(lambda: _claim(config))


def _claim(config: Config) -> int:
    work_dir, current = Path(config.work_dir), identity(config)
    seed = (config.get('randomness') or {}).get('seed')
    if seed is not None:
        seed = whole_number('randomness.seed', seed, 0)
        if seed >= 2**32:
            raise UserError(f'randomness.seed={seed} must be below 2**32.')
    if config.get('train_cfg') is None:
        return seed or 0
    recorded, checkpoints = read(work_dir), checkpoint.list_checkpoints(work_dir)
    if checkpoints and not config.get('resume'):
        raise UserError(f"'{work_dir}' already holds a run ('{checkpoints[-1].name}'). Add --resume to continue it, or "
                        'choose another --work-dir.')
    if seed is None and config.get('resume'):
        seed = _resumed_seed(config.resume, recorded, checkpoints)
    if recorded is not None and checkpoints:
        check_same_run({**recorded['identity'], 'seed': recorded['seed']}, {**current, 'seed': seed}, f"'{work_dir}'")
    seed = secrets.randbelow(2**31) if seed is None else seed
    with atomic_files.replacing(work_dir / FILE) as temporary:
        temporary.write_text(json.dumps({'identity': current, 'seed': seed}, indent=1) + '\n')
    atomic_files.clean(work_dir)
    return seed


def _resumed_seed(resume: bool | str, recorded: Mapping[str, Any] | None, checkpoints: list[Path]) -> int | None:
    if recorded is not None and not isinstance(resume, str):
        return recorded['seed']
    source = resume if isinstance(resume, str) else next(reversed(checkpoints), None)
    return None if source is None else checkpoint.load(source, mmap=True)['meta']['seed']


def read(work_dir: str | Path) -> dict[str, Any] | None:
    """Return the identity and the seed of the run in `work_dir`, or None if no run has started there.

    Raises:
        UserError: run.json is damaged.
    """
    path = Path(work_dir) / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return {'identity': record['identity'], 'seed': record['seed']}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it only if you know which run this folder holds."
                        ) from error
