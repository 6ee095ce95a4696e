"""The best step is kept and named, and a training ends when more steps bring nothing: decided by files only."""

import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from runs import assert_same_run, evaluation, train
from scipy import stats

from diffengine_sdxl.engine import measured_steps, report
from diffengine_sdxl.engine.hooks.checkpoint import CheckpointHook
from diffengine_sdxl.engine.hooks.early_stop import EarlyStop, without_gain
from diffengine_sdxl.engine.measured_steps import Metric
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.loading.trained import resolve_checkpoint
from diffengine_sdxl.registry import HOOKS, METRICS


@METRICS.register_module(force=True)
class Level(MeanMetric):
    """What `levels` says of the step that is validated, whatever the images."""

    name = 'level'
    levels: Mapping[int, float] = {}
    step = 0

    def measure(self, images: Any, batch: Any) -> Sequence[float]:
        return [self.levels[Level.step]] * len(images)


@HOOKS.register_module(force=True)
class TellStep(Hook):
    """Tell Level the step; end the run in the validation of step `die`, before anything is measured."""

    def __init__(self, die: int | None = None) -> None:
        self.die = die

    def before_val(self, runner: Any) -> None:
        Level.step = runner.iter
        if Level.step == self.die:
            raise KeyboardInterrupt


def options_of(tiny: dict[str, Any], circles: Path, levels: Sequence[float],
               monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of as many steps as levels, validated after each by one image."""
    monkeypatch.setattr(Level, 'levels', dict(enumerate(levels, start=1)))
    return {**tiny, **evaluation('val', circles, 1), 'val_evaluator': [dict(type='Level')], 'val_cfg.num_pictures': 0,
            'train_cfg.val_interval': 1, 'train_cfg.max_iters': len(levels), 'custom_hooks': [dict(type='TellStep')],
            'default_hooks.first_steps': None}


# The best step

def test_the_best_step_stays(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between a checkpoint and its validation and resumed; of equal values the earlier one."""
    options = {**options_of(tiny, circles, (0.2, 0.9, 0.5, 0.9, 0.3), monkeypatch), 'default_hooks.checkpoint': dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1, keep_best='level', export=False)}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, {**options, 'custom_hooks': [dict(type='TellStep', die=3)]})
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ['step2.pth', 'step3.pth']
    train(tmp_path, options, resume=True)
    assert sorted(p.name for p in tmp_path.glob('step*')) == ['step2.pth', 'step5.pth']
    best = json.loads((tmp_path / 'best.json').read_text())
    assert best == {'metric': 'adapted/level', 'better': 1, 'step': 2, 'value': 0.9, 'low': 0.0, 'high': 1.0}
    assert resolve_checkpoint(str(tmp_path / 'best')) == tmp_path / 'step2.pth'
    (tmp_path / 'step2.pth').rename(tmp_path / 'step2')  # an export alone
    assert resolve_checkpoint(str(tmp_path / 'best')) == tmp_path / 'step2'


@pytest.mark.parametrize(('kept', 'better'), [(None, 1), (1, -1), (2, 1)])
def test_what_is_removed(kept: int | None, better: int, tmp_path: Path) -> None:
    """After each save and each validation, the newest and the best so far are there; BEST names one that is."""
    values = (0.3, 0.1, 0.9, 0.9, 0.2, 0.05, 0.9, 0.4)
    hook = CheckpointHook(max_keep_ckpts=kept, keep_best='x')
    hook.metric = Metric('adapted', 'x', better, 1)
    for step, value in enumerate(values, start=1):
        (tmp_path / f'step{step}.pth').touch()
        hook._prune(tmp_path)  # a kill here leaves the best of those that were validated
        (tmp_path / 'val').mkdir(exist_ok=True)
        report.save(tmp_path / 'val' / f'step{step}.json', {'adapted': {'x': {'value': value, 'low': 0, 'high': None}}})
        hook._prune(tmp_path, step)
        seen = [better * one for one in values[:step]]
        best = seen.index(max(seen)) + 1
        there = [int(path.stem[4:]) for path in checkpoint.list_checkpoints(tmp_path)]
        assert there == sorted({best, *range(1, step + 1)[-(kept or step):]})
        assert json.loads((tmp_path / 'best.json').read_text())['step'] == best


def runner_of(metrics: Sequence[Any] = (), losses: Sequence[str] = (), **changes: Any) -> Any:
    """What `find_metric` reads of a runner."""
    hooks = [types.SimpleNamespace(loss_names=lambda runner: list(losses), interval=3)] if losses else []
    loop = types.SimpleNamespace(image_sets=('base', 'adapted'), evaluator=types.SimpleNamespace(metrics=metrics))
    return types.SimpleNamespace(**{'val_loop': loop if metrics else None, 'hooks': hooks, 'val_interval': 2,
                                    **changes})


class Neither(Level):
    name, better = 'neither', 0


def test_names_of_metrics() -> None:
    runner = runner_of([Level(), Level(prefix='two'), Neither()], ['val/loss'])

    def find(setting: Any) -> tuple[str, int, int | None]:
        found = measured_steps.find_metric(runner, setting, 'K')
        return str(found), found.better, found.interval
    assert find('level') == find('adapted/level') == ('adapted/level', 1, 2)
    assert find('two/level') == ('adapted/two/level', 1, 2) and find('base/level') == ('base/level', 1, 2)
    assert find('adapted - base/level') == ('adapted - base/level', 1, 2)
    assert find('val/loss') == ('val/loss', -1, 3)
    assert find(dict(metric='neither', better='lower')) == ('adapted/neither', -1, 2)
    # A user's own, of which only a validation can say the names.
    runner = runner_of([types.SimpleNamespace()])
    assert find(dict(metric='base/mine', better='lower')) == ('base/mine', -1, 2)
    assert find(dict(metric='mine/x', better='higher')) == ('adapted/mine/x', 1, 2)


@pytest.mark.parametrize(('setting', 'metrics', 'message'), [
    ('levle', [Level()], r"K='levle' is unknown; choose one of 'level', .*Did you mean 'level'"),
    ('val/loss', [Level()], "'val/loss' is unknown"), ('level', [], 'neither a `val_dataloader` nor a ValidationLoss'),
    ('neither', [Neither()], "Say which you want: dict\\(metric='neither', better='higher'\\)"),
    ('mine', [types.SimpleNamespace()], 'A metric of your own needs its direction'),
    (dict(metric='level', better='up'), [Level()], "K.better='up' is unknown"),
    (dict(name='level'), [Level()], "must be a metric's name, or dict"), (3, [Level()], "K=3 must be a metric's name")])
def test_names_that_are_refused(setting: Any, metrics: Sequence[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measured_steps.find_metric(runner_of(metrics), setting, 'K')


def test_a_metric_that_a_validation_lacks(tmp_path: Path) -> None:
    write(tmp_path, {1: 0.5})
    measured_steps.check_written(tmp_path, Metric('adapted', 'x', 1, 1), 1)
    with pytest.raises(UserError, match="has no 'adapted/y'; it has adapted/x"):
        measured_steps.check_written(tmp_path, Metric('adapted', 'y', 1, 1), 1)


@pytest.mark.parametrize(('measured', 'saved', 'message'), [
    (300, 500, 'They meet every 1,500 steps and at the end'), (300, 4000, 'They meet at the end only'),
    (None, 500, 'They meet at the end only'), (500, 1000, None), (500, 500, None)])
def test_where_validations_and_checkpoints_meet(measured: int | None, saved: int, message: str | None,
                                                tmp_path: Path) -> None:
    warnings: list[str] = []
    runner = runner_of([Level()], val_interval=measured, iter=0, max_iters=6000, work_dir=str(tmp_path),
                       logger=types.SimpleNamespace(warning=warnings.append))
    CheckpointHook(interval=saved, keep_best='level').before_train(runner)
    assert len(warnings) == (message is not None) and str(message or '') in ''.join(warnings)


# The end

X = Metric('adapted', 'x', 1, 1)


def write(folder: Path, levels: Mapping[int, float | Sequence[float]], low: float = 0.1, seed: int = 0) -> None:
    """Write made-up validations: of a list, images of three samples and two seeds each have one of its numbers."""
    (folder / 'val').mkdir(exist_ok=True)
    for step, level in levels.items():
        value = float(np.mean(level))
        report.save(folder / 'val' / f'step{step}.json', {'adapted': {'x': {
            'value': value, 'low': value - low, 'high': value + 2 * low, 'better': 1}}})
        if not isinstance(level, float):
            report.save_samples(folder / 'val' / f'step{step}.samples.csv', [
                {'key': str(i // 2), 'seed': i % 2, 'noise_seed': 10 * i + seed, 'image_set': image_set, 'file': '',
                 'x': one} for i, one in enumerate(level) for image_set in ('base', 'adapted')])


@pytest.mark.parametrize('better', [1, -1])
def test_a_gain_is_the_paired_difference(better: int, tmp_path: Path) -> None:
    """With the interval of scipy's paired t-test, of the means of each sample's seeds."""
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=6), draw.normal(size=6)
    write(tmp_path, {1: other.tolist(), 2: one.tolist()})
    found = measured_steps.gain(tmp_path, Metric('adapted', 'x', better, 1), 2, 1)
    means = [better * np.reshape(values, (3, 2)).mean(axis=1) for values in (one, other)]
    test = stats.ttest_rel(*means)
    interval = test.confidence_interval(0.95)
    assert found == pytest.approx((means[0].mean() - means[1].mean(), interval.low, interval.high), rel=1e-9)
    # Other noise: not the same images.
    write(tmp_path, {2: one.tolist()}, seed=1)
    assert measured_steps.gain(tmp_path, X, 2, 1) is None


def test_the_gain_of_a_set(tmp_path: Path) -> None:
    """Of independent sets: variances add up (the intervals here reach 0.1 down and 0.2 up)."""
    write(tmp_path, {1: 0.5, 2: 0.75})
    half = math.hypot(0.1, 0.2)
    assert measured_steps.gain(tmp_path, X, 2, 1) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert measured_steps.gain(tmp_path, Metric('adapted', 'x', -1, 1), 2, 1) == pytest.approx(
        (-0.25, -0.25 - half, -0.25 + half))
    (tmp_path / 'val_loss.jsonl').write_text('{"step": 1, "val/loss": 0.5}\n{"step": 2, "val/loss": 0.25}\n')
    assert measured_steps.gain(tmp_path, Metric(None, 'val/loss', -1, 1), 2, 1) == (0.25, None, None)


RISE = [0.1, 0.3, 0.5, 0.7, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize(('levels', 'changes', 'stop'), [
    # Steps 10, 20, ...; over 20 steps nothing comes after step 40: without a gain are 60, 70, 80.
    (RISE, {}, 80), (RISE, dict(patience=1, steps=10), 50),
    (RISE, dict(patience=1, min_steps=65), 70), (RISE, dict(patience=9), None),
    (RISE, dict(min_gain=0.0), 80),  # noise alone is no gain
    (RISE, dict(patience=1, min_gain=0.3), 50),
    ([0.1] * 8, {}, None),  # nothing learned yet
    ([0.1] * 5 + [0.5, 0.9, 0.9], dict(patience=1), None),  # sudden
    ([0.1, 0.8, 0.7, 0.6, 0.5, 0.4], {}, 60),  # worse and worse
    ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], {}, 50)])  # from the start
def test_when_it_stops(levels: Sequence[float], changes: dict[str, Any], stop: int | None, tmp_path: Path) -> None:
    hook = EarlyStop('adapted/x', **{'steps': 20, **changes})
    noise = np.random.default_rng(0).normal(scale=0.001, size=(len(levels) + 1, 6))
    write(tmp_path, {10 * (i + 1): (level + noise[i]).tolist() for i, level in enumerate([*levels, levels[-1]])})
    assert hook.first_stop(tmp_path) == stop


def test_too_few_samples_stop_nothing_that_has_not_begun(tmp_path: Path) -> None:
    """One sample has no interval of its own, so nothing is known of a gain."""
    write(tmp_path, {step: [0.1 * step, 0.1 * step] for step in range(1, 9)})
    assert without_gain(tmp_path, X, 8, 2, 2, 0.0) is None


@pytest.mark.parametrize(('interval', 'message'), [(None, 'measured at the end only; set train_cfg.val_interval'),
                                                   (2, '')])
def test_early_stop_needs_validations_on_the_way(interval: int | None, message: str) -> None:
    warnings: list[str] = []
    runner = runner_of([Level()], val_interval=interval, max_iters=10,
                       logger=types.SimpleNamespace(warning=warnings.append))
    if message:
        with pytest.raises(UserError, match=message):
            EarlyStop('level').before_train(runner)
    else:
        EarlyStop('level').before_train(runner)  # a fifth: 2 steps; first at 2 + 2 + 2 * 2
        assert not warnings
        EarlyStop('level', patience=4).before_train(runner)
        assert 'step 10 would be the first' in warnings[0]
    with pytest.raises(UserError, match='min_gain=-1'):
        EarlyStop('level', min_gain=-1)


def test_a_run_that_is_stopped(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bitwise the run of that many steps, with all that one leaves at its end; resumed it stays stopped, and goes
    on without the hook."""
    options = options_of(tiny, circles, (0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), monkeypatch)
    validation = dict(type='ValidationLoss', interval=3, timesteps=[500], at_start=False,
                      dataset=options['val_dataloader']['dataset'])
    samples = dict(type='SampleHook', interval=3, num_from_dataset=1, num_images=1, size=32, base=False,
                   at_start=False)
    options |= {'val_evaluator': [dict(type='Level')], 'val_dataloader.dataset.max_samples': 2,
                'default_hooks.checkpoint.interval': 9, 'default_hooks.samples': samples}
    hooks = [dict(type='TellStep'), validation]
    stopping = {**options, 'custom_hooks': [*hooks, dict(type='EarlyStop', metric='level', steps=1, patience=2)]}
    train(tmp_path / 'whole', {**options, 'custom_hooks': hooks, 'train_cfg.max_iters': 4})
    stopped = train(tmp_path / 'W', stopping)
    assert stopped.iter == stopped.max_iters == 4
    assert_same_run(tmp_path / 'W', tmp_path / 'whole', 4)
    exports = [{p.name: p.read_bytes() for p in (tmp_path / run / 'step4' / 'adapter').iterdir()
                if p.suffix == '.json'} for run in ('W', 'whole')]
    assert exports[0] == exports[1] and exports[0]
    for name in ('val_loss.jsonl', 'val/step4.json'):
        assert (tmp_path / 'W' / name).read_text() == (tmp_path / 'whole' / name).read_text()
    assert sorted(p.name for p in (tmp_path / 'W' / 'samples').glob('step[0-9].png')) == ['step3.png', 'step4.png']
    record = json.loads((tmp_path / 'W' / 'early_stop.json').read_text())
    assert (record['metric'], record['step'], record['max_iters']) == ('adapted/level', 4, 7)
    assert 'steps 3, 4' in record['reason'] and '--resume' in record['reason']
    before = (tmp_path / 'W' / 'step4.pth').stat().st_mtime_ns
    again = train(tmp_path / 'W', stopping, resume=True)
    assert again.iter == again.max_iters == 4 and (tmp_path / 'W' / 'step4.pth').stat().st_mtime_ns == before
    on = train(tmp_path / 'W', {**options, 'custom_hooks': hooks, 'train_cfg.max_iters': 5}, resume=True)
    assert on.iter == 5 and torch.load(tmp_path / 'W' / 'step5.pth', weights_only=True)['meta']['step'] == 5
