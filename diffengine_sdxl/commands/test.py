"""`mim test diffengine_sdxl CONFIG --checkpoint X`: evaluate trained weights."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from diffengine_sdxl.commands.common import load_config, run_task
from diffengine_sdxl.config.load import RUNNER_KEYS
from diffengine_sdxl.config.references import references
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.trained import NONE, WEIGHTS, apply_weights

STOPPED = 'Stopped.'
OUT_OF_MEMORY = 'A smaller test_dataloader.batch_size or a smaller resolution may help.'
#: Keys that only training or validation reads.
TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'val_dataloader',
            'val_evaluator', 'val_cfg')


def run(args: Any, cleanup: Any) -> None:
    """Evaluate the weights that `args.checkpoint` names on the config's test data.

    Args:
        args: config, checkpoint, work_dir, launcher, cfg_options; as `cli` parses them.

    Raises:
        UserError: see `to_test_config`.
    """
    run_task(to_test_config(load_config(args), args.checkpoint), 'test', cleanup)


def to_test_config(config: Config, name: str) -> Config:
    """Turn a training config into a test config with the weights that `name` stands for.

    Args:
        config: as `config.load.load` returns it; changed in place.
        name: a `step<N>.pth` (its EMA weights, if any); a work_dir (its latest checkpoint); an exported `step<N>`
            or the folder of one adapter in it; 'none' for the base without adapters; or 'weights' for the `weights`
            that the config names.

    Raises:
        UserError: the config has no test data or metrics, or there are no such weights.
    """
    for key in ('test_dataloader', 'test_evaluator'):
        if not config.get(key):
            hint = ' It has one for validation; reuse it for the test.' if config.get(
                key.replace('test', 'val')) else ''
            raise UserError(f'The config has no `{key}`, so there is nothing to test with; see docs/evaluation.md.'
                             f'{hint}')
    for key in TRAINING:
        config.pop(key, None)
    # The dumped config must not hold keys that only the removed sections refer to: reading it would fail.
    while unread := config.keys() - {*RUNNER_KEYS, *references(config.to_dict())}:
        for key in unread:
            config.pop(key)
    config.resume, config.load_from = False, None
    if name == NONE:
        config.test_cfg = {**(config.get('test_cfg') or {}), 'image_sets': ['base']}
    elif name == WEIGHTS and not any((config.model.get('adapters') or {}).values()):
        raise UserError("A test of 'weights' needs adapters whose `weights` the config names; it has none.")
    path = apply_weights(config, None if name == WEIGHTS else name)
    config.load_from = None if path is None else str(path)
    return config
