"""One iteration is one optimizer step, and everything counts those; a loss that is not finite stops the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from runs import assert_same_run, build, command, curves, train, weights

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint


class Count(Hook):
    """How often the runner calls, and on how many samples."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        assert batch_idx == runner.iter == self.before
        self.before += 1

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.after += 1


def test_an_iteration_is_an_optimizer_step(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """With three micro-batches: steps of the optimizer, of the schedule, of hooks, and the place in the data."""
    schedule = dict(_delete_=True, type='DiffusersLR', name='linear')
    runner = build(tmp_path, {**tiny, 'optim_wrapper.accumulative_counts': 3, 'param_scheduler': schedule})
    count = Count()
    runner.register_hook(count)
    runner.train()
    state = torch.load(tmp_path / 'step4.pth', weights_only=True)
    assert {int(s['step']) for s in state['optimizer']['state'].values()} == {4}
    assert count.before == count.after == 4 and runner.iter == runner.max_iters == 4
    assert state['meta']['position'] == 4 * 3 * 2
    assert [row['lr'] for row in curves(tmp_path)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert sorted(p.name for p in tmp_path.glob('step*.pth')) == ['step2.pth', 'step4.pth']


def test_micro_batches_are_one_large_batch(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Two micro-batches of 2 take the samples, the loss and (in fp64) the step of one batch of 4."""
    options = {**tiny, 'model.dtype': 'float64', 'train_cfg.max_iters': 2, 'default_hooks.checkpoint.export': False,
               'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.1)}
    train(tmp_path / 'large', {**options, 'train_dataloader.batch_size': 4})
    train(tmp_path / 'micro', {**options, 'train_dataloader.batch_size': 2, 'optim_wrapper.accumulative_counts': 2})
    rows = [curves(tmp_path / name) for name in ('large', 'micro')]
    assert [r['loss'] for r in rows[0]] == pytest.approx([r['loss'] for r in rows[1]], rel=1e-12)
    one, other = (weights(tmp_path / name, 2) for name in ('large', 'micro'))
    moved = math.sqrt(sum(float((one[k] - v).square().sum()) for k, v in other.items()))
    assert moved / math.sqrt(sum(float(v.square().sum()) for v in one.values())) < 1e-10


def test_the_run_is_a_function_of_its_seed(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Whatever the global generators held before, and however many workers read the data."""
    options = {**tiny, 'train_cfg.max_iters': 2, 'train_dataloader.num_workers': 2}
    train(tmp_path / 'a', options)
    torch.manual_seed(12345)
    train(tmp_path / 'b', {**options, 'train_dataloader.num_workers': 0})
    train(tmp_path / 'c', {**options, 'randomness.seed': 1})
    assert_same_run(tmp_path / 'a', tmp_path / 'b', 2)
    assert curves(tmp_path / 'a')[0]['loss'] != curves(tmp_path / 'c')[0]['loss']
    first = weights(tmp_path / 'a', 2), weights(tmp_path / 'c', 2)
    assert any(not torch.equal(v, first[1][k]) for k, v in first[0].items())


@pytest.mark.parametrize(('epochs', 'samples', 'batch', 'accumulation', 'steps'), [
    (2, 8, 2, 1, 8), (2, 8, 2, 2, 4), (1, 7, 2, 2, 2), (3, 5, 2, 1, 9)])
def test_epochs_become_steps(epochs: int, samples: int, batch: int, accumulation: int, steps: int, tmp_path: Path,
                             tiny: dict[str, Any]) -> None:
    """Rounded up in each epoch, as diffusers' scripts count."""
    runner = build(tmp_path, {
        **tiny, 'train_cfg.max_iters': None, 'train_cfg.max_epochs': epochs, 'train_dataloader.batch_size': batch,
        'train_dataloader.dataset.max_samples': samples, 'optim_wrapper.accumulative_counts': accumulation})
    assert runner.build_train_loop(runner._train_loop).max_iters == steps


def test_epochs_of_a_stream_are_refused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    runner = build(tmp_path, {**tiny, 'train_cfg.max_iters': None, 'train_cfg.max_epochs': 1,
                              'train_dataloader.dataset.type': 'HFStream', 'train_dataloader.sampler': None})
    with pytest.raises(UserError, match='a stream takes max_iters'):
        runner.build_train_loop(runner._train_loop)


@pytest.mark.parametrize('base', [1, 4])
def test_learning_rates_scale_with_the_batch(base: int, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """lr x samples of a step / base: 2 samples, 3 micro-batches; once, also after a resume."""
    options = {**tiny, 'optim_wrapper.accumulative_counts': 3, 'auto_scale_lr.enable': True,
               'auto_scale_lr.base_batch_size': base}
    train(tmp_path, options, die_at=3)
    train(tmp_path, options, resume=True)
    assert [row['lr'] for row in curves(tmp_path)] == pytest.approx([1e-3 * 6 / base] * 4)


@pytest.mark.parametrize('micro', [1, 2])
def test_a_nan_stops_the_run(micro: int, tmp_path: Path, tiny: dict[str, Any],
                             capfd: pytest.CaptureFixture[str]) -> None:
    """At step 3: the step, the loss parts, the last good checkpoint; exit code 1, no traceback, nothing saved."""
    options = {**tiny, 'optim_wrapper.accumulative_counts': micro, 'default_hooks.checkpoint.interval': 1,
               'default_hooks.poison.type': 'Poison', 'default_hooks.poison.step': 3}
    assert command(tmp_path, options) == 1
    error = capfd.readouterr().err
    assert 'error: Training stopped at step 3' in error and 'loss=nan' in error and 'Traceback' not in error
    assert f"last good checkpoint is '{tmp_path / 'step2.pth'}'" in error
    assert checkpoint.latest(tmp_path) == tmp_path / 'step2.pth'
    assert all(bool(torch.isfinite(v).all()) for v in weights(tmp_path, 2).values())


@pytest.mark.parametrize('precision', ['no', 'fp16'])
def test_a_nan_touches_no_weight(precision: str, tmp_path: Path, tiny: dict[str, Any],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is NaN at the first step leaves weights, averages and optimizer as they were."""
    options = {**tiny, 'mixed_precision': precision, 'custom_hooks': [dict(type='EMAHook')]}
    runner = build(tmp_path, options)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    objective = type(runner.model.objective)
    honest = objective.__call__
    monkeypatch.setattr(objective, '__call__', lambda *args: {
        'loss': honest(*args)['loss'] * math.nan, 'loss_other': torch.tensor(2.0)})
    with pytest.raises(UserError, match=r'step 1: .*loss=nan, loss_other=2.*No checkpoint was saved yet'):
        runner.train()
    after = runner.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(torch.equal(v, before[k]) for k, v in runner.ema.weights.items()) and runner.ema.step == 0
    assert not runner.optim_wrapper.optimizer.state


def test_an_infinite_loss_with_finite_gradients_is_not_saved(tmp_path: Path, tiny: dict[str, Any],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the loss without gradient overflows: no checkpoint holds what came of it."""
    runner = build(tmp_path, {**tiny, 'default_hooks.checkpoint.interval': 1})
    objective = type(runner.model.objective)
    honest = objective.__call__
    monkeypatch.setattr(objective, '__call__', lambda *args: {
        **honest(*args), 'loss_other': torch.tensor(math.inf)})
    with pytest.raises(UserError, match=r'step 1: .*loss_other=inf'):
        runner.train()
    assert not list(tmp_path.glob('step*')) and not (tmp_path / 'curves.jsonl').read_text()


def test_a_learning_rate_that_is_too_large_ends_so(tmp_path: Path, tiny: dict[str, Any],
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    options = {**tiny, 'optim_wrapper.optimizer.lr': 1e20, 'train_cfg.max_iters': 20, 'optim_wrapper.clip_grad': None}
    assert command(tmp_path, options) == 1
    error = capfd.readouterr().err
    assert 'Training stopped at step' in error and 'Try a smaller learning rate' in error


def test_only_what_trains_is_in_training_mode(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Frozen parts keep their evaluation mode, and get no gradient."""
    runner = train(tmp_path, {**tiny, 'train_cfg.max_iters': 1})
    assert runner.model.adapters.training is False or runner.model.adapters['adapter'].training
    for part in ('unet', 'vae', 'text_encoder', 'text_encoder_2'):
        module = getattr(runner.model, part)
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
