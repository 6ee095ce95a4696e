"""The share of the GPU's matrix products in the log: counted in a process of its own, and harmless where it fails."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from diffengine_sdxl.engine.hooks import utilization
from diffengine_sdxl.engine.hooks.utilization import UtilizationHook
from diffengine_sdxl.speed import Speed


@pytest.fixture
def runner() -> Any:
    return SimpleNamespace(message_hub=MessageHub('utilization'), speed=Speed('off', 'full', 'bf16'),
                           resolved=Config({'model': {'type': 'SDXL'}}),
                           bare_model=SimpleNamespace(device=torch.device('cuda'), compute_dtype=torch.bfloat16))


@pytest.mark.parametrize(('code', 'tflop'), [(0, 30.0), (1, None)])
def test_what_was_counted_is_logged(code: int, tflop: float | None, runner: Any,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """30 TFLOP in 0.1 s of 600 TFLOP/s are a half. The count is asked for as the run computes, without the GPU."""
    asked = {}

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        asked.update(command=command, env=env)
        Path(command[command.index('--json') + 1]).write_text(json.dumps({'own': {'tflop': 30.0}}))
        return SimpleNamespace(poll=lambda: code, returncode=code, kill=lambda: None, wait=lambda: None)
    monkeypatch.setattr(utilization, 'matmul_tflops', lambda device, dtype: 600.0)
    monkeypatch.setattr(utilization.subprocess, 'Popen', start)
    hook = UtilizationHook()
    hook.before_train(runner)
    command = asked['command']
    assert Config.fromfile(command[command.index('plan') + 1]).model.type == 'SDXL'
    assert command[-1] == 'speed.checkpointing=full' and asked['env']['CUDA_VISIBLE_DEVICES'] == ''
    runner.message_hub.update_scalar('train/time', 0.1)
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    logged = runner.message_hub.log_scalars
    assert hook.tflop == tflop and ('train/utilization' in logged) == (tflop is not None)
    assert tflop is None or logged['train/utilization'].current() == pytest.approx(0.5)
    assert not Path(command[command.index('--json') + 1]).parent.exists()


def test_nothing_on_a_cpu(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization.subprocess, 'Popen', lambda *_, **__: pytest.fail('a process was started'))
    runner.bare_model.device = torch.device('cpu')
    hook = UtilizationHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    assert not {'train/utilization'} & set(runner.message_hub.log_scalars)
