"""Train, stop, resume and compare tiny runs in this process; call the commands."""

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook

import diffengine_sdxl.engine  # noqa: F401  (fill the registries)
from diffengine_sdxl import config
from diffengine_sdxl.errors import run_command
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.registry import HOOKS, METRICS, RUNNERS

CONFIG = 'tiny_t2i_adapter'
#: Logged values that depend on the clock and the machine.
CLOCK = ('train/time', 'train/data_time', 'train/memory')
_numbers = itertools.count()


class DeathError(Exception):
    """End a run in the middle, as a crash would: no hook is called."""


class Die(Hook):
    """End the run after `step`, when all other hooks have run."""

    priority = 'LOWEST'

    def __init__(self, step: int) -> None:
        self.step = step

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.step:
            raise DeathError


@HOOKS.register_module(force=True)
class Poison(Hook):
    """Make the first trained weight infinite before step `step`, so that its loss is NaN."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter + 1 == self.step:
            with torch.no_grad():
                next(iter(runner.bare_model.trainables().values()))[0][1].view(-1)[0] = math.inf


def build(work_dir: Path, options: Mapping[str, Any], resume: bool | str = False, die_at: int | None = None,
          name: str = CONFIG) -> Any:
    """Build a runner of config `name` with `options` (dotted keys)."""
    cfg = config.load(name, options)
    cfg.work_dir, cfg.resume = str(work_dir), resume
    # mmengine finds loggers and hubs by name, and its default name is a time stamp in seconds.
    cfg.experiment_name = f'test{next(_numbers)}'
    runner = RUNNERS.build(cfg)
    if die_at is not None:
        runner.register_hook(Die(die_at))
    return runner


def train(work_dir: Path, options: Mapping[str, Any], resume: bool | str = False, die_at: int | None = None,
          name: str = CONFIG) -> Any:
    """Build a runner and train to the end or to `die_at`."""
    runner = build(work_dir, options, resume, die_at, name)
    try:
        runner.train()
    except DeathError:
        # A dying process would end these too.
        for hook in runner.hooks:
            if hasattr(hook, 'close'):
                hook.close()
    return runner


def cut_off(whole: Path, folder: Path, step: int = 2) -> Path:
    """Copy a finished run to `folder` and remove what it wrote after the checkpoint of `step`, but for the curves."""
    shutil.copytree(whole, folder)
    for path in folder.glob('step*'):
        if int(path.stem[4:]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def plain_arguments(options: Mapping[str, Any]) -> list[str]:
    """Format options for --cfg-options."""
    return [f'{key}={value}' for key, value in options.items()]


def command(work_dir: Path, options: Mapping[str, Any], resume: str | None = None, name: str = CONFIG,
            launcher: str = 'none') -> int:
    """Run tools/train.py in this process; return its exit code."""
    options = {**options, 'experiment_name': f'test{next(_numbers)}'}
    return run_command('train', argparse.Namespace(
        config=name, work_dir=str(work_dir), resume=resume, launcher=launcher, cfg_options=plain_arguments(options)))


def differences(one: Any, other: Any, path: str = '') -> Iterator[str]:
    """Yield the places where two checkpoints are not bitwise equal, except those of CLOCK."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            if key in CLOCK:
                continue
            if key not in one or key not in other:
                yield f'{path}.{key} (in one only)'
            else:
                yield from differences(one[key], other[key], f'{path}.{key}')
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f'{path}.{i}')
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f'{path} {tuple(one.shape)}'
    elif type(one) is not type(other) or one != other:
        yield f'{path}: {one!r} and {other!r}'


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Check that both folders hold bitwise the same checkpoint of `step` and the same curves, each step once."""
    states = [torch.load(folder / f'step{step}.pth', weights_only=True) for folder in (one, other)]
    assert states[0]['state_dict'] and states[0]['optimizer']['state'] and states[0]['log_scalars']['train/loss']
    different = list(differences(*states))
    assert not different, different[:10]
    rows = [curves(folder) for folder in (one, other)]
    assert rows[0] == rows[1]
    assert [row['step'] for row in rows[0]] == list(range(1, step + 1))


def curves(work_dir: Path) -> list[dict[str, Any]]:
    """Read curves.jsonl, whose rows must all be whole."""
    return [json.loads(line) for line in (work_dir / 'curves.jsonl').read_text().splitlines()]


def weights(work_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Read the trained weights of a checkpoint."""
    return checkpoint.load(work_dir / f'step{step}.pth')['state_dict']


def first_gradients(runner: Any) -> dict[str, torch.Tensor]:
    """Train; return the gradients of the first step, before clipping."""
    gradients: dict[str, torch.Tensor] = {}
    build_wrapper = runner.build_optim_wrapper

    def watched(*args: Any) -> Any:
        wrapper = build_wrapper(*args)
        clip = wrapper._clip

        def keep() -> float:
            if not gradients:
                trainables = runner.bare_model.trainables()
                gradients.update({n: p.grad.detach().clone() for part in trainables.values() for n, p in part})
            return clip()
        wrapper._clip = keep
        return wrapper
    runner.build_optim_wrapper = watched
    runner.train()
    return gradients


@METRICS.register_module(force=True)
class Brightness(BaseMetric):
    """Mean value of the images, with their range as the interval; `received` records the calls."""

    received: list[tuple[Any, Any]] = []

    def __init__(self, name: str = 'brightness', prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.name = name

    def process(self, data_batch: Any, data_samples: Any) -> None:
        Brightness.received.append((data_batch, data_samples))
        self.results += [(image_set, sample['key'], sample['seed'], float(image.double().mean()))
                         for sample in data_samples for image_set, image in sample['images'].items()]

    def compute_metrics(self, results: list[tuple[str, str, int, float]]) -> dict[str, float]:
        assert len({r[:3] for r in results}) == len(results), 'an image was counted twice'
        metrics: dict[str, float] = {}
        for image_set in dict.fromkeys(r[0] for r in results):
            values = sorted(r[3] for r in results if r[0] == image_set)
            name = f'{image_set}/{self.name}'
            metrics |= {name: sum(values) / len(values), f'{name}/low': values[0], f'{name}/high': values[-1],
                        f'{name}/num_samples': len(values)}
        return metrics


@METRICS.register_module(force=True)
class MeanRed(MeanMetric):
    """Mean of the red channel of each image."""

    name, better = 'redness', 0

    def measure(self, images: torch.Tensor, batch: Mapping[str, Any]) -> list[float]:
        return images[:, 0].double().mean(dim=(1, 2)).tolist()


def without_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run that has nothing but a test."""
    training = dict.fromkeys(('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler'))
    return {**{k: v for k, v in options.items() if k.split('.')[0] not in training}, **training}


def evaluation(mode: str, source: Any, num: int = 5, batch_size: int = 2, **cfg: Any) -> dict[str, Any]:
    """Return options that add a validation or test on the first `num` circles, measured by Brightness."""
    dataset = dict(type='HFDataset', source=str(source), max_samples=num,
                   conditioning_image_column='conditioning_image',
                   transforms=[dict(type='Resize', size='$resolution'), dict(type='ComputeTimeIds'),
                               dict(type='PackInputs')])
    if mode == 'test':  # the configs' own is that of the training, in other words
        dataset['_delete_'] = True
    return {f'{mode}_dataloader': dict(batch_size=batch_size, num_workers=0, dataset=dataset),
            f'{mode}_evaluator': [dict(type='Brightness')], f'{mode}_cfg': cfg}


def command_test(work_dir: Path, options: Mapping[str, Any], checkpoint: str | Path, name: str = CONFIG,
                 compare: str | Path | None = None) -> int:
    """Run tools/test.py in this process; return its exit code."""
    options = {**options, 'experiment_name': f'test{next(_numbers)}'}
    return run_command('test', argparse.Namespace(
        config=name, checkpoint=str(checkpoint), compare=compare and str(compare), work_dir=str(work_dir),
        launcher='none', cfg_options=plain_arguments(options)))


def numbers(path: Path) -> dict[str, Any]:
    """Read the results of an evaluation and check their keys."""
    results = json.loads(path.read_text())
    for metrics in results.values():
        assert metrics and all(
            list(m) == ['value', 'low', 'high', 'num_samples', 'p', 'better'] for m in metrics.values())
    return results
