"""A training step, from the loader to the log, makes the host wait for nothing: counted on `meta` in the place of CUDA.

tests/models/test_waits_for_the_loss.py counts for every adapter, up to the gradients.
"""

import sys
from pathlib import Path
from typing import Any

import mmengine.device
import pytest
from runs import build, curves
from waits import count_waits

from diffengine_sdxl.engine import deferred
from diffengine_sdxl.engine.train_loop import StepLoop


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on `meta`; numbers that the host copies without waiting are 1."""
    monkeypatch.setattr(mmengine.device, 'get_device', lambda: 'meta')
    # torch.optim has removed the module's name from itself.
    monkeypatch.setattr(sys.modules['torch.optim.optimizer'], '_get_fused_kernels_supported_devices', lambda: ['meta'])
    monkeypatch.setattr(deferred, '_reader', lambda values: lambda: [1.0] * len(values))


def test_no_wait(on_meta: None, tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step, with clipping, an average and a log line; the first one's losses arrive in it."""
    waits: list[str] = []
    run_iter = StepLoop.run_iter

    def counted(loop: StepLoop, batches: Any) -> None:
        if loop.iter == 0:
            run_iter(loop, batches)
            return
        with count_waits() as found:
            run_iter(loop, batches)
        waits.extend([*found, 'counted'])
    monkeypatch.setattr(StepLoop, 'run_iter', counted)
    runner = build(tmp_path, {
        **tiny, 'train_cfg.max_iters': 2, 'default_hooks.checkpoint': None, 'default_hooks.first_steps': None,
        'default_hooks.logger.interval': 1, 'custom_hooks': [dict(type='EMAHook')], 'mixed_precision': 'bf16',
        'optim_wrapper.clip_grad': dict(max_norm=1.0)})
    runner.train()
    assert runner.optim_wrapper.on_device
    assert waits == ['counted']
    assert [(row['step'], row['loss']) for row in curves(tmp_path)] == [(1, 1.0), (2, 1.0)]
