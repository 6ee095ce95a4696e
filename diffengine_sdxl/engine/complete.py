"""Whether a config has all that its loops need."""

from __future__ import annotations

from mmengine.config import Config

from diffengine_sdxl.errors import UserError

#: The default types of `val_cfg` and `test_cfg`.
LOOP_TYPES = {'val': 'ValLoop', 'test': 'TestLoop'}


def fill_loops(config: Config) -> None:
    """Fill in `val_cfg` and `test_cfg`, or their types.

    A training runs no test: it leaves out half of one, as where `_base_` files of data bring a `test_dataloader`, and
    those of recipes no `test_evaluator` for it.
    """
    parts = config.get('test_dataloader'), config.get('test_evaluator'), (config.get('model') or {}).get('sampler')
    if config.get('train_cfg') is not None and not all(parts):
        for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
            config.pop(key, None)
    for mode, loop in LOOP_TYPES.items():
        if config.get(f'{mode}_cfg') is not None or config.get(f'{mode}_dataloader') is not None:
            config[f'{mode}_cfg'] = {'type': loop, **(config.get(f'{mode}_cfg') or {})}


def check_complete(config: Config) -> None:
    """Check that the config has all parts that its loops need.

    Raises:
        UserError: one is missing.
    """
    if config.get('model') is None:
        raise UserError('The config has no `model`.')
    if config.get('work_dir') is None:
        raise UserError('The config has no `work_dir`; pass --work-dir.')
    is_sdxl = config.model.get('type') == 'SDXL'
    if config.get('train_cfg') is not None:
        if is_sdxl and not config.model.get('objective'):
            raise UserError('The config trains, but model.objective is not set.')
        for key in ('train_dataloader', 'optim_wrapper'):
            if config.get(key) is None:
                raise UserError(f'The config trains, but has no `{key}`.')
        if config.train_cfg.get('val_interval') is not None and config.get('val_dataloader') is None:
            raise UserError('train_cfg.val_interval is set, but the config has no `val_dataloader`; add one '
                            '(docs/evaluation.md), or set val_interval=None.')
    elif alone := [key for key in ('train_dataloader', 'optim_wrapper') if config.get(key) is not None]:
        raise UserError(f'The config has `{alone[0]}`, but no `train_cfg`; a training needs '
                        "dict(type='StepLoop', max_iters=...).")
    for mode in LOOP_TYPES:
        keys = [f'{mode}_dataloader', f'{mode}_evaluator']
        present = [key for key in (*keys, f'{mode}_cfg') if config.get(key) is not None]
        missing = [key for key in keys if not config.get(key)]
        if present and missing:
            raise UserError(f'The config has `{present[0]}`, but no `{missing[0]}`; an evaluation needs '
                            f'`{keys[0]}` and `{keys[1]}` (docs/evaluation.md), or neither.')
        if present and is_sdxl and not config.model.get('sampler'):
            raise UserError(f'The config has `{keys[0]}`, but model.sampler, which makes the images, is not set.')
