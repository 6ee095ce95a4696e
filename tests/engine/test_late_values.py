"""Runs whose losses and norms arrive a step late, forced on the CPU: what they log, save and stop at."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from runs import assert_same_run, build, curves, cut_off, train

from diffengine_sdxl.engine import optim
from diffengine_sdxl.errors import UserError


@pytest.fixture
def options(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Four steps with an average, a checkpoint after the third, a line after each."""
    monkeypatch.setattr(optim, 'decides_on_device', lambda parameters: True)
    return {**tiny, 'custom_hooks': [dict(type='EMAHook')], 'default_hooks.checkpoint.interval': 3,
            'default_hooks.checkpoint.export': False, 'default_hooks.logger.interval': 1,
            'default_hooks.first_steps': None, 'optim_wrapper.clip_grad': dict(max_norm=0.05)}


def test_a_run_is_as_one_that_waits(options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and averages to the fused kernel's rounding; every step is logged once; resumed, it is bitwise itself."""
    runner = train(tmp_path / 'late', options)
    assert runner.optim_wrapper.on_device
    lines = [line for line in ''.join(capfd.readouterr()).splitlines() if 'Iter(train)' in line]
    assert len(lines) == 4 and all('loss:' in line for line in lines[1:])
    train(cut_off(tmp_path / 'late', tmp_path / 'cut', step=3), options, resume=True)
    assert_same_run(tmp_path / 'late', tmp_path / 'cut', 4)
    monkeypatch.setattr(optim, 'decides_on_device', lambda parameters: False)
    train(tmp_path / 'waiting', options)
    rows, states = [], []
    for name in ('late', 'waiting'):
        rows.append(curves(tmp_path / name))
        states.append(torch.load(tmp_path / name / 'step3.pth', weights_only=True))
    # fp32; AdamW's first steps are lr x sign of the gradient, so that rounding decides where it is near 0.
    for late, waiting in zip(*rows, strict=True):
        assert late == pytest.approx(waiting, rel=1e-4)
    late, waiting = states
    assert late['ema']['step'] == waiting['ema']['step'] == 3
    for key in ('train/loss', 'train/grad_norm', 'train/lr'):
        torch.testing.assert_close(late['log_scalars'][key], waiting['log_scalars'][key], rtol=1e-4, atol=0)
    for name, average in waiting['ema']['weights'].items():
        torch.testing.assert_close(late['ema']['weights'][name], average, rtol=0, atol=1e-5)


class Break(Hook):
    """Make the gradients of step `step` NaN; keep weights and averages as they are after each step."""

    priority = 'LOWEST'

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter + 1 == self.step:
            parameter = next(iter(runner.bare_model.trainables().values()))[0][1]
            self.handle = parameter.register_hook(lambda grad: grad * math.nan)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.step:
            self.handle.remove()
        self.seen.append({k: v.clone() for k, v in {**runner.bare_model.state_dict(), **{
            f'ema.{k}': v for k, v in runner.ema.weights.items()}}.items()})


@pytest.mark.parametrize(('step', 'first_steps', 'finished'), [(2, False, 2), (3, False, 2), (2, True, 1)])
def test_a_nan_is_found_a_step_later(step: int, first_steps: bool, finished: int, options: dict[str, Any],
                                     tmp_path: Path) -> None:
    """It names its own step; weights and averages are those of the step before; nothing is written of it.

    The checkpoint of step 3 waits for its values, as the guard of the first steps does.
    """
    if first_steps:
        del options['default_hooks.first_steps']
    runner, watch = build(tmp_path, options), Break(step)
    runner.register_hook(watch)
    with pytest.raises(UserError, match=rf"stopped at step {step}: The gradients of 'adapter' are not finite.*loss=\d"):
        runner.train()
    assert len(watch.seen) == finished
    last = {**runner.bare_model.state_dict(), **{f'ema.{k}': v for k, v in runner.ema.weights.items()}}
    assert all(torch.equal(v, last[k]) for k, v in watch.seen[step - 2].items())
    assert {int(s['step']) for s in runner.optim_wrapper.optimizer.state.values()} == {step - 1}
    assert not list(tmp_path.glob('step*'))
