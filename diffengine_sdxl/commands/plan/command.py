"""`diffengine-sdxl plan CONFIG`: what a training will need, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.commands.common import hide_loading_bars
from diffengine_sdxl.commands.plan import devices, meta_model, step_counts
from diffengine_sdxl.commands.plan.devices import Device
from diffengine_sdxl.commands.plan.estimate import Training, Weights, propose, setting
from diffengine_sdxl.commands.plan.table import Plan, report
from diffengine_sdxl.config import load, resolve
from diffengine_sdxl.engine.speed_choice import allows_checkpointing, check_checkpointing
from diffengine_sdxl.errors import UserError, error_prefix, whole_number
from diffengine_sdxl.models.compiled import CHECKPOINTING
from diffengine_sdxl.samplers.sampler import check_size
from diffengine_sdxl.speed import Memory, Speed, image_size


def run(args: Any, _: Any) -> None:
    """Print what a training will need.

    Args:
        args: config, device, json, cfg_options; as `cli` parses them.

    Raises:
        UserError: see `make_plan`; or the JSON file cannot be written.
    """
    if args.json is not None:
        _check_file(args.json)
    hide_loading_bars()
    plan = make_plan(load(args.config, args.cfg_options or ()), args.device)
    print(report(plan))
    if args.json is not None:
        with replacing(args.json.resolve()) as path:
            path.write_text(json.dumps(plan.figures(), indent=1) + '\n')


def _check_file(path: Path) -> None:
    reason = ('is no file' if path.exists() and not path.is_file() else
              f"would be in '{path.parent}', which is no folder" if not path.parent.is_dir() else
              f"would be in '{path.parent}', where you may not write" if not os.access(path.parent, os.W_OK) else None)
    if reason is not None:
        raise UserError(f"--json: '{path}' {reason}. Name a file in a folder that exists and that you may write to.")


def make_plan(config: Any, device: str | None = None) -> Plan:
    """Count the training of a config, as `config.load.load` returns it.

    Raises:
        UserError: the device is unknown, the config trains nothing, its model cannot be built, or its batch or image
            size is refused by a training too.
    """
    config = resolve(config)
    if config.get('train_cfg') is None:
        raise UserError('The config has no `train_cfg`, so it trains nothing and there is nothing to plan.')
    target = devices.find(device, bool((config.get('env_cfg') or {}).get('allow_tf32')))
    training = _training(config, 'off')
    model, notes = meta_model.build(config.model)
    if not model.trainables():
        raise UserError('Nothing to train: no adapter has trainable parameters and the config names no part of the '
                        'base to train. Add an adapter to model.adapters.')
    if config.model.get('mixed_precision') == 'bf16' and not target.has_bf16:
        notes.append(f'A {target.name} has no bf16: set mixed_precision=fp16.')
    size = _size(config, model.size_divisor)
    speed = Speed.of(config.get('speed'), config.model)
    own = speed.checkpointing
    check_checkpointing(own, model)
    modes = CHECKPOINTING if allows_checkpointing(model) else ('off',)
    counts = step_counts.count(model, size, training.batch_size, target.rates, 'off' if own == 'auto' else own, modes)
    weights = Weights.of(model, training, counts)
    if own == 'auto':
        own = _automatic(config, target, weights, training, size, model)
    training = _training(config, own)
    mine = setting(counts, weights, target, training, batch_size=training.batch_size, checkpointing=own,
                   cached=training.cached or not counts.encoders)
    return Plan(target, training, weights, size, mine, propose(counts, weights, target, training), counts, notes)


def _size(config: Any, divisor: int) -> tuple[int, int]:
    """Return height and width of the images; with buckets, whose sides fit by their step, of about as many pixels."""
    size = image_size(config)
    if str((config.train_dataloader.get('sampler') or {}).get('type')).endswith('BucketSampler'):
        return size[0] - size[0] % divisor, size[1] - size[1] % divisor
    with error_prefix('resolution: ', unless='resolution'):
        check_size(size, divisor)
    return size


def _training(config: Any, checkpointing: str) -> Training:
    loader, wrapper = config.train_dataloader, config.optim_wrapper
    hooks = [*(config.get('custom_hooks') or []), *(config.get('default_hooks') or {}).values()]
    steps = config.train_cfg.get('max_iters')
    return Training(
        whole_number('train_dataloader.batch_size', loader.get('batch_size', 1), 1),
        whole_number('optim_wrapper.accumulative_counts', wrapper.get('accumulative_counts', 1), 1), checkpointing,
        None if steps is None else whole_number('train_cfg.max_iters', steps, 1),
        bool(config.get('cache')), wrapper.optimizer,
        any(hook and str(hook.get('type')).endswith('EMAHook') for hook in hooks),
        wrapper.get('set_grads_to_none') is False)


def _automatic(config: Any, device: Device, weights: Weights, training: Training, size: tuple[int, int],
               model: Any) -> str:
    """Return what speed.checkpointing='auto' will be, by the same estimate as the training's."""
    if device.type != 'cuda' or not allows_checkpointing(model):
        return 'off'
    loaded = weights.base + weights.adapters + (0 if training.cached else weights.encoders)
    dtype = model.compute_dtype or model.unet_weight.dtype
    return Memory.of(config.model, free=int(device.memory - loaded), trained=weights.num_trained,
                     batch_size=training.batch_size, pixels=size[0] * size[1],
                     bytes_per_value=dtype.itemsize).checkpointing()
