"""The identity of a run: its model, objective, data, samples per step and seed.

Its length, intervals and workers may change, how the samples of a step are split into processes, batches and
accumulation, and `speed`, except for a quantized base, which is another computation.
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size

from diffengine_sdxl import atomic_files
from diffengine_sdxl.config.references import differences, to_plain
from diffengine_sdxl.engine import branches, work_dir_lock
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.speed import QUANTIZED

FILE = 'run.json'
#: Keys of the model's config that change no result of training.
IGNORED_MODEL_KEYS = ('gradient_checkpointing', 'attention', 'cache_dir', 'sampler', 'seed', 'lazy_encoders')


def identity(config: Config) -> dict[str, Any]:
    """Return the part of a resolved config that a resumed run must share."""
    data, wrapper = config.get('train_dataloader') or {}, config.get('optim_wrapper') or {}
    base_dtype = (config.get('speed') or {}).get('base_dtype')
    return to_plain({
        **({'speed': {'base_dtype': base_dtype}} if base_dtype in QUANTIZED else {}),
        'model': {k: v for k, v in (config.get('model') or {}).items() if k not in IGNORED_MODEL_KEYS},
        'train_dataloader': {
            'dataset': {k: v for k, v in (data.get('dataset') or {}).items() if k != 'cache_dir'},
            'sampler': data.get('sampler')},
        'optim_wrapper': {k: v for k, v in wrapper.items() if k != 'accumulative_counts'},
        'split': {'batch_size': data.get('batch_size') or 1,
                  'accumulative_counts': wrapper.get('accumulative_counts') or 1, 'processes': get_world_size()}})


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], where: str | Path,
                   weights: Path | None = None) -> None:
    """Check that two identities are equal, but for how they split the samples of a step.

    Args:
        old, new: identities, with the seed.
        where: the folder or checkpoint of `old`.
        weights: the checkpoint that a new run could start from.

    Raises:
        UserError: they differ; in what, and how to go on from `weights` nevertheless.
    """
    same_step = _samples(old) == _samples(new)
    lines = ([] if same_step else [f'a step had {_samples(old)} samples, has now {_samples(new)} (batch_size x '
                                   'accumulative_counts x processes)'])
    lines += differences(_without_split(old), _without_split(new))
    if not lines:
        return
    more = f'; and {len(lines) - 5} more' if len(lines) > 5 else ''
    split, back = new.get('split') or {}, 'Set the config back to continue that run.'
    counts, rest = divmod(_samples(old), split.get('batch_size', 1) * split.get('processes', 1))
    if not same_step and counts and not rest:
        back = f'optim_wrapper.accumulative_counts={counts} keeps the samples of a step. {back}'
    start = '' if weights is None else (f' To begin with its weights: --cfg-options '
                                        f'{shlex.quote(f"load_from={weights}")}, if they fit the new model.')
    raise UserError(f"'{where}' belongs to another run: {'; '.join(lines[:5])}{more}. {back} With other settings, "
                    f'start a new one: another --work-dir, without --resume.{start}')


def describe_split(old: Mapping[str, int], new: Mapping[str, int]) -> str | None:
    """Return a sentence if the samples of a step are split in another way than before; None if they are not."""
    if old == new:
        return None
    before, now = (' x '.join(f'{name}={number}' for name, number in split.items()) for split in (old, new))
    return (f'The {math.prod(new.values())} samples of a step were split as {before}, and are now as {now}. The run '
            'goes on with the same samples, noise and timesteps; but sums are rounded in another order, and dropout '
            '(and what is drawn for a whole micro-batch) draws other numbers, so it is not bitwise the run that was '
            'not stopped.')


def _samples(identity: Mapping[str, Any]) -> int:
    return math.prod((identity.get('split') or {}).values())


def _without_split(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key != 'split'}


def claim(config: Config) -> int:
    """Start or continue a run in `config.work_dir`; only the main process reads and writes.

    Returns:
        The seed, the same in all processes: the config's, the resumed run's, or one drawn now and kept.

    Raises:
        UserError: the folder belongs to another run, or to this one and `resume` is not set; or a run trains there.
    """
    return on_main_process(lambda: _claim(config))


def _claim(config: Config) -> int:
    if config.get('train_cfg') is None:
        return _configured_seed(config) or 0
    work_dir_lock.acquire(config.work_dir)
    try:
        return _claim_locked(config)
    except BaseException:
        work_dir_lock.release(config.work_dir)
        raise


def _configured_seed(config: Config) -> int | None:
    seed = (config.get('randomness') or {}).get('seed')
    if seed is not None:
        seed = whole_number('randomness.seed', seed, 0)
        if seed >= 2**32:
            raise UserError(f'randomness.seed={seed} must be below 2**32.')
    return seed


def _claim_locked(config: Config) -> int:
    work_dir, current, seed = Path(config.work_dir), identity(config), _configured_seed(config)
    branches.finish(work_dir)
    recorded, checkpoints = read(work_dir), checkpoint.list_checkpoints(work_dir)
    if checkpoints and not config.get('resume'):
        raise UserError(f"'{work_dir}' already holds a run ('{checkpoints[-1].name}'). Add --resume to continue it, or "
                        'choose another --work-dir.')
    if isinstance(config.get('resume'), str):
        checkpoint.load(config.resume, mmap=True)  # a wrong path is refused before anything is built
    if seed is None and config.get('resume'):
        seed = _resumed_seed(config.resume, recorded, checkpoints)
    if recorded is not None and checkpoints:
        check_same_run({**recorded['identity'], 'seed': recorded['seed']}, {**current, 'seed': seed}, work_dir,
                       checkpoints[-1])
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
