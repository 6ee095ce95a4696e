"""The table that opens a training: what trains, on what, for how long, and what is saved."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import count_of

#: Characters of a line; only a name or path that is longer exceeds it.
WIDTH = 100


def run_summary(runner: ExperimentRunner) -> str:
    """Return the table, for a runner that is about to take its first step: everything is built and loaded.

    A hook adds rows with a method `describe(runner)`, which returns name -> text.
    """
    optimizer = {key: value for key, value in runner.resolved.optim_wrapper.optimizer.items() if key != 'lr'}
    rows = {'data': _data(runner), 'batch': _batch(runner), 'steps': _steps(runner), 'optimizer': _call(optimizer),
            'lr': _learning_rates(runner), 'precision': _precision(runner), 'speed': _speed(runner),
            'device': _device(runner), 'seed': str(runner.seed), 'work_dir': runner.work_dir}
    if runner.val_loop is not None:
        rows['validation'] = f'val/step<N>.json {every(runner.val_interval, at_end=True)}'
    for hook in runner.hooks:
        if hasattr(hook, 'describe'):
            rows |= hook.describe(runner)
    indent = max(map(len, rows)) + 4
    lines = [textwrap.fill(text, WIDTH, initial_indent=f'  {name}'.ljust(indent), subsequent_indent=' ' * indent,
                           break_long_words=False, break_on_hyphens=False) for name, text in rows.items()]
    return '\n'.join(['This training:', textwrap.indent(repr(runner.bare_model), '  '), *lines])


def every(interval: int | None, at_end: bool = False) -> str:
    """Say when something happens: every `interval` optimizer steps (None: not on the way), at the end."""
    times = ([] if interval is None else [f'every {interval:,} steps']) + (['at the end'] if at_end else [])
    return ' and '.join(times)


def _call(config: Any) -> str:
    """Format a config as a call, 'Resize(size=64)', also inside; without None, which stands for a default."""
    if isinstance(config, list | tuple) and any(isinstance(value, Mapping) for value in config):
        return f'[{", ".join(map(_call, config))}]'
    if isinstance(config, Mapping) and config and all(isinstance(v, Mapping) and 'type' in v for v in config.values()):
        return f'{{{", ".join(f"{name}: {_call(value)}" for name, value in config.items())}}}'
    if not isinstance(config, Mapping) or 'type' not in config:
        return repr(config)
    arguments = [f'{key}={_call(value)}' for key, value in config.items() if key != 'type' and value is not None]
    return str(config['type']) + (f'({", ".join(arguments)})' if arguments else '')


def _data(runner: ExperimentRunner) -> str:
    dataset: Any = runner.train_dataloader.dataset
    length = f'{len(dataset):,} rows' if hasattr(dataset, '__len__') else 'a stream of unknown length'
    return f'{length}: {_call(runner.resolved.train_dataloader.dataset)}'


def _batch(runner: ExperimentRunner) -> str:
    return (f'{runner.train_dataloader.batch_size} x {runner.accumulative_counts} accumulated x '
            f'{count_of(get_world_size(), "process", "processes")} = '
            f'{runner.train_loop.samples_per_iter} rows per step')


def _steps(runner: ExperimentRunner) -> str:
    dataset: Any = runner.train_dataloader.dataset
    text = f'{runner.max_iters:,}' + (f', from step {runner.iter + 1:,} on' if runner.iter else '')
    if not hasattr(dataset, '__len__'):
        return text
    epochs = runner.max_iters * runner.train_loop.samples_per_iter / len(dataset)
    return f'{text}; {epochs:,.0f} epochs' if epochs >= 100 else f'{text}; {epochs:.3g} epochs'


def _learning_rates(runner: ExperimentRunner) -> str:
    """Return the rates that the schedule multiplies, of each parameter group if they differ, and the schedule."""
    groups = runner.optim_wrapper.param_groups
    # A schedule has set `lr` to that of the first step, which a warmup makes 0.
    rates = {group.get('name'): group.get('initial_lr', group['lr']) for group in groups}
    texts = {name: 'relative steps' if rate is None else f'{rate:g}' for name, rate in rates.items()}
    same = len(set(texts.values())) == 1
    text = next(iter(texts.values())) if same else ', '.join(f'{name} {rate}' for name, rate in texts.items())
    schedule = runner.resolved.get('param_scheduler')
    return f'{text}; {_call(schedule)}' if schedule else text


def _precision(runner: ExperimentRunner) -> str:
    model = runner.bare_model
    autocast = 'no autocast' if model.compute_dtype is None else f'autocast to {_name(model.compute_dtype)}'
    scaled = ' with loss scaling' if getattr(runner.optim_wrapper, 'loss_scaler', None) is not None else ''
    tf32 = ', TF32' if torch.backends.cuda.matmul.allow_tf32 else ''
    dtypes = dict.fromkeys(_name(p.dtype) for parameters in model.trainables().values() for _, p in parameters)
    return f'{autocast}{scaled}{tf32}; what trains is stored in {", ".join(dtypes)}'


def _speed(runner: ExperimentRunner) -> str:
    exact = ', deterministic kernels' if runner.resolved.randomness.get('deterministic') else ''
    return f'{runner.speed}{exact}'


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _device(runner: ExperimentRunner) -> str:
    device, num = runner.bare_model.device, get_world_size()
    name = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{device.type} with {count_of(torch.get_num_threads(), "thread", "threads")}' if device.type == 'cpu' else
            device.type)
    return f'{num} x {name}' if num > 1 else name
