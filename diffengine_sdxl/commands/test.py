"""`mim test diffengine_sdxl CONFIG --checkpoint X`: evaluate trained weights, alone or beside others."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from diffengine_sdxl.commands.common import load_config, run_task
from diffengine_sdxl.config.load import RUNNER_KEYS
from diffengine_sdxl.config.references import references, resolve
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.trained import (
    NONE,
    PIPELINE,
    WEIGHTS,
    apply_weights,
    check_same_adapters,
    read_manifest,
    resolve_checkpoint,
)

STOPPED = "Stopped. Finished images stay in the work_dir's test/images; the same command goes on with them."
OUT_OF_MEMORY = 'A smaller test_dataloader.batch_size or a smaller resolution may help.'
#: Keys that only training or validation reads.
TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'val_dataloader',
            'val_evaluator', 'val_cfg')


def run(args: Any, cleanup: Any) -> None:
    """Evaluate the weights that `args.checkpoint` names on the config's test data.

    Args:
        args: config, checkpoint, compare, work_dir, launcher, cfg_options; as `cli` parses them.

    Raises:
        UserError: see `to_test_config`.
    """
    run_task(to_test_config(load_config(args), args.checkpoint, args.compare), 'test', cleanup)


def to_test_config(config: Config, name: str, compare: str | None = None) -> Config:
    """Turn a training config into a test config with the weights that `name` stands for.

    Args:
        config: as `config.load.load` returns it; changed in place.
        name: a `step<N>.pth` (its EMA weights, if any); a work_dir (its latest checkpoint); an exported `step<N>`
            or the folder of one adapter in it; 'none' for the base without adapters; or 'weights' for the `weights`
            that the config names.
        compare: a second checkpoint or export, whose images are the image set 'compared'; None: that of
            `test_cfg.compare`, if any.

    Raises:
        UserError: the config has no test data or metrics, or there are no such weights.
    """
    for key in ('test_dataloader', 'test_evaluator'):
        if not config.get(key):
            hint = ' It has one for validation; reuse it for the test.' if config.get(
                key.replace('test', 'val')) else ''
            raise UserError(f'The config has no `{key}`, so there is nothing to test with; see docs/evaluation.md.'
                             f'{hint}')
    resolved = resolve(config)
    for key in ('test_dataloader', 'test_evaluator'):
        if {*references(config[key])} & {*TRAINING}:  # such as the data set that trains
            config[key] = resolved[key]
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
    if compare := compare or (config.get('test_cfg') or {}).get('compare'):
        config.test_cfg = {**(config.get('test_cfg') or {}), 'compare': _compared(config, compare, name)}
    path = apply_weights(config, None if name == WEIGHTS else name)
    config.load_from = None if path is None else str(path)
    return config


def _compared(config: Config, compare: str, name: str) -> str:
    """Return the path of the weights to compare those of `name` with.

    Raises:
        UserError: they do not exist, are of other adapters, or cannot be loaded into a model that is there already.
    """
    if NONE in (compare, name):
        raise UserError(f"--checkpoint {name} --compare {compare}: '{NONE}' is the base alone, which every test makes "
                        "as the image set 'base'; name two checkpoints, or leave out --compare.")
    if compare == WEIGHTS:
        raise UserError(f"--compare {WEIGHTS}: the weights that the config names are loaded first; exchange the two: "
                        f'--checkpoint {WEIGHTS} --compare {name}.')
    path = resolve_checkpoint(compare)
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is not None and PIPELINE in manifest['contents']:
        raise UserError(f"--compare {compare}: an exported base cannot be loaded into another one; name its "
                        f"checkpoint, '{path}.pth'.")
    check_same_adapters(config.model, path)
    return str(path)
