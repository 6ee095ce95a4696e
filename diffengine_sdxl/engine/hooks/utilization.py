"""The share of a GPU's matrix products that a training reaches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.registry import HOOKS

#: Side of the matrices whose product is the measure.
SIDE = 8192


@HOOKS.register_module()
class UtilizationHook(Hook):
    """Log `utilization`: TFLOP of a step / its seconds / what matrix products of the same dtype reach on this GPU.

    The TFLOP are counted by `diffengine-sdxl plan`, once, in a process of the lowest priority that sees no GPU, while
    the first steps run. On a CPU it does nothing. What is recomputed counts too: the share is the GPU's, not the
    model's.
    """

    def __init__(self) -> None:
        #: TFLOP of a step of one process, once counted, and TFLOP/s of the GPU.
        self.tflop: float | None = None
        self.peak = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @master_only
    def before_train(self, runner: ExperimentRunner) -> None:
        """Begin to count."""
        if runner.bare_model.device.type == 'cuda':
            self.peak = matmul_tflops(runner.bare_model.device, runner.bare_model.compute_dtype or torch.float32)
            self.start(runner)

    def start(self, runner: ExperimentRunner) -> None:
        """Start the process that counts the run's config."""
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        runner.resolved.dump(str(folder / 'config.py'))
        command = [sys.executable, '-m', 'diffengine_sdxl', 'plan', str(folder / 'config.py'), '--device', 'H100',
                   '--json', str(folder / 'plan.json'),
                   '--cfg-options', f'speed.checkpointing={runner.speed.checkpointing}']
        self._process = subprocess.Popen(
            [*(['nice', '-n', '19'] if shutil.which('nice') else []), *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'})

    @master_only
    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Log the share of the last steps."""
        if self._process is not None and self._process.poll() is not None:
            self.collect()
        scalars = runner.message_hub.log_scalars
        if self.tflop is not None and 'train/time' in scalars:
            seconds = scalars['train/time'].mean(20)
            runner.message_hub.update_scalar('train/utilization', self.tflop / seconds / self.peak)

    def collect(self) -> None:
        """Read what was counted; a config that cannot be counted has no share."""
        assert self._process is not None and self._folder is not None
        path = Path(self._folder.name) / 'plan.json'
        if self._process.returncode == 0 and path.is_file():
            self.tflop = json.loads(path.read_text())['own']['tflop']
        self._folder.cleanup()
        self._process = self._folder = None

    def after_train(self, runner: ExperimentRunner) -> None:
        """End the process, if it still counts."""
        self.close()

    def close(self) -> None:
        """The same; also called when training fails."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.collect()


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of matrix products on a GPU; it takes a tenth of a second."""
    a, b = (torch.ones(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    a @ b
    torch.cuda.synchronize(device)
    begun, num = time.perf_counter(), 10
    for _ in range(num):
        a @ b
    torch.cuda.synchronize(device)
    return 2 * SIDE**3 * num / (time.perf_counter() - begun) / 1e12
