"""From a config that trains to one that tests what was trained."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.config import RUNNER_KEYS, references
from diffengine_sdxl.engine.export import PIPELINE, read_manifest
from diffengine_sdxl.registry import nearest

#: In place of a checkpoint: the base alone; or the adapters with the `weights` that the config names.
NONE, WEIGHTS = 'none', 'weights'
#: What only training or validation reads.
TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'val_dataloader',
            'val_evaluator', 'val_cfg')


def tested(config: Config, name: str) -> Config:
    """`config` without what trains, and with the weights that `name` stands for.

    Args:
        config: as `engine.config.load` returned it; changed in place.
        name: a `step<N>.pth` (its EMA's weights, if it has an EMA); a work_dir, for its latest one; a folder
            `step<N>`, or that of one adapter in it; or 'none', for the base alone, without the config's adapters; or
            'weights', for the adapters as the config names them.

    Raises:
        ValueError: the config says nothing of a test, or there is nothing of that name.
    """
    for key in ('test_dataloader', 'test_evaluator'):
        if not config.get(key):
            hint = ' It has one to validate with: write the same for the test.' if config.get(
                key.replace('test', 'val')) else ''
            raise ValueError(f'The config has no `{key}`, so there is nothing to test with; see docs/evaluation.md.'
                             f'{hint}')
    for key in TRAINING:
        config.pop(key, None)
    # What only those referred to would be refused where the dumped config is read again.
    while unread := config.keys() - {*RUNNER_KEYS, *references(config.to_dict())}:
        for key in unread:
            config.pop(key)
    config.resume, config.load_from = False, None
    if name == NONE:
        config.test_cfg = {**(config.get('test_cfg') or {}), 'variants': ['base']}
    elif name == WEIGHTS and not any((config.model.get('adapters') or {}).values()):
        raise ValueError("A test of 'weights' needs adapters whose `weights` the config names; it has none.")
    path = weighted(config, None if name == WEIGHTS else name)
    config.load_from = None if path is None else str(path)
    return config


def weighted(config: Config, name: str | None) -> Path | None:
    """The file or folder of weights to load into the model of `config`, if there is one.

    Args:
        config: changed in place where `name` brings the base, or takes the adapters out.
        name: as of `tested`; None for 'weights'.

    Raises:
        ValueError: there is nothing of that name, or an adapter that the config does not say the weights of.
    """
    if name == NONE:
        config.model.adapters = dict.fromkeys(config.model.get('adapters') or {})
        return None
    if name is None or name == WEIGHTS:
        adapters = {key: adapter for key, adapter in (config.model.get('adapters') or {}).items() if adapter}
        fresh = [key for key, adapter in adapters.items() if not adapter.get('weights')]
        if fresh:
            raise ValueError(f"The config does not name the `weights` of {', '.join(fresh)}; name them "
                             f'(model.adapters.{fresh[0]}.weights), or a checkpoint or export that holds them.')
        return None
    path = find(name)
    notes = read_manifest(path) if path.is_dir() else None
    above = read_manifest(path.parent) if notes is None and path.is_dir() else None
    if above is not None and PIPELINE in above['contents']:
        raise ValueError(f"'{name}' was trained together with its base; name '{path.parent}', which holds both.")
    if notes is not None and PIPELINE in notes['contents']:
        # The base itself was trained: its folder takes the place of the config's base and VAE.
        config.model.update(pretrained=str(path / PIPELINE), unet=None, vae=None, revision=None, variant=None)
    return path


def find(name: str) -> Path:
    """The checkpoint's file, or the exported folder, that `name` stands for.

    Raises:
        ValueError: there is none; what there is.
    """
    path = Path(name)
    if path.is_file():
        return path
    if not path.exists():
        there = [p.name for p in checkpoint.found(path.parent)]
        raise ValueError(f"There is no checkpoint '{name}'.{nearest(path.name, there)} Name a step<N>.pth, a work_dir, "
                         f"an exported folder, '{NONE}' for the base alone, or '{WEIGHTS}' for those in the config.")
    if (latest := checkpoint.latest(path)) is not None:
        return latest
    if read_manifest(path) is None and not any(path.glob('*.safetensors')):
        raise ValueError(f"'{name}' holds neither a checkpoint (step<N>.pth) nor an exported adapter.")
    return path
