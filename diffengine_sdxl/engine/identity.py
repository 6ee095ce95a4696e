"""What makes a run the same run: model, objective, data and seed. Lengths, intervals and workers may change."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.config import to_plain

FILE = 'run.json'
#: Parts of the model's config that change no number of a run, or only pictures made on the way.
FREE = ('gradient_checkpointing', 'attention', 'cache_dir', 'sampler', 'seed')


def identity(config: Config) -> dict[str, Any]:
    """The part of a resolved config that a resumed run must share."""
    data = config.get('train_dataloader') or {}
    free = {'cache_dir'}
    return to_plain({
        'model': {k: v for k, v in (config.get('model') or {}).items() if k not in FREE},
        'train_dataloader': {'dataset': {k: v for k, v in (data.get('dataset') or {}).items() if k not in free},
                             'sampler': data.get('sampler'), 'batch_size': data.get('batch_size')},
        'optim_wrapper': config.get('optim_wrapper')})


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """Sentences for each place where two identities differ: 'model.vae was None, is now "x"'."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [line for key in {**old, **new}
                for line in differences(old.get(key), new.get(key), f'{path}.{key}' if path else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f'{path}.{i}')]
    return [] if old == new else [f'{path} was {old!r}, is now {new!r}']


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Raise if two identities differ.

    Raises:
        ValueError: names what differs.
    """
    lines = differences(old, new)
    if lines:
        raise ValueError(f'{where} belongs to another run: {"; ".join(lines[:5])}'
                         f'{f"; and {len(lines) - 5} more" if len(lines) > 5 else ""}. Choose another --work-dir, or '
                         'set the config back.')


def claim(config: Config) -> int:
    """Take or continue `config.work_dir`, and settle the seed: given, or that of the run, or drawn once and kept.

    All processes get the same seed. Only the main process reads and writes.

    Raises:
        ValueError: the folder belongs to another run, or to this one and it shall not be resumed.
    """
    answer: list[Any] = [None, None]
    if is_main_process():
        try:
            answer[0] = _claim(config)
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return int(answer[0])


def _claim(config: Config) -> int:
    work_dir, mine = Path(config.work_dir), identity(config)
    if config.get('train_cfg') is None:
        return int((config.get('randomness') or {}).get('seed') or 0)
    held, saved = read(work_dir), checkpoint.found(work_dir)
    if saved and not config.get('resume'):
        raise ValueError(f"'{work_dir}' already holds a run ('{saved[-1].name}'). Add --resume to go on with "
                         'it, or choose another --work-dir.')
    seed = _known_seed(config, held, saved)
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f'randomness.seed={seed!r} must be a whole number from 0 to 2**32 - 1, or None.')
    if held is not None and saved:
        refuse_other({**held['identity'], 'seed': held['seed']}, {**mine, 'seed': seed}, f"'{work_dir}'")
    seed = secrets.randbelow(2**31) if seed is None else int(seed)
    with checkpoint.replacing(work_dir / FILE) as temporary:
        temporary.write_text(json.dumps({'identity': mine, 'seed': seed}, indent=1) + '\n')
    checkpoint.clean(work_dir)
    return seed


def _known_seed(config: Config, held: Mapping[str, Any] | None, saved: list[Path]) -> int | None:
    """The seed that is given, or that of the run that goes on; None at the beginning of one."""
    given, resume = (config.get('randomness') or {}).get('seed'), config.get('resume')
    if given is not None or not resume:
        return given
    if held is not None and not isinstance(resume, str):
        return held['seed']
    source = resume if isinstance(resume, str) else next(reversed(saved), None)
    return None if source is None else checkpoint.load(source, mmap=True)['meta']['seed']


def read(work_dir: str | Path) -> dict[str, Any] | None:
    """What the run in `work_dir` said of itself, or None."""
    path = Path(work_dir) / FILE
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text())
        return {'identity': held['identity'], 'seed': held['seed']}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); remove it only if you know which run this folder holds."
                         ) from error
