"""Section of gpu.py: what `randomness.deterministic=True` holds on a device, and what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_steps import Meter
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: The step after which a run is stopped; the timed steps begin there.
STOP = 5


class Digest(Hook):
    """Record a checksum of weights and optimizer states at the end; or stop after `STOP` steps, as if killed."""

    # After the checkpoint of the same step.
    priority = 'LOWEST'

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.value = stop, ''

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Stop."""
        if batch_idx == self.stop:
            raise StoppedError

    def after_train(self, runner: Any) -> None:
        """Record."""
        state = runner.state()
        self.value = digest([state['state_dict'], state['optimizer']])


class StoppedError(Exception):
    """A run was stopped on purpose."""


def digest(tree: Any) -> str:
    """Return a checksum of all bits of the tensors in `tree`, computed where they are."""
    sums = [str(_checksum(leaf)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in tree_leaves(tree)]
    return hashlib.blake2b('\n'.join(sums).encode(), digest_size=8).hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Return the sum of the bits of each number times its odd place, modulo 2^64: no order of summing changes it."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().reshape(-1).view(words).long()
    return int((bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum())


def exact(bench: Any, kinds: Sequence[str]) -> None:
    """Train each kind twice, and stop and resume it, with deterministic kernels; compare all bits."""
    for kind in kinds:
        bench.measure(f'{kind}, deterministic=True', partial(_exact, bench, kind))


def _exact(bench: Any, kind: str) -> dict[str, Any]:
    size, base = 1 if kind == 'controlnet' or bench.base.tiny else 2, bench.base
    work_dir, stop = base.folder / f'stopped_{kind}', 2 if base.tiny else STOP
    default, plain = _train(bench, kind, size, stop)
    with deterministic():
        first, times = _train(bench, kind, size, stop, randomness__deterministic=True)
        second, _ = _train(bench, kind, size, stop, randomness__deterministic=True)
        values = {'batch': size, 'run_twice_equal': first == second, 'digest': first,
                  'ms_default': plain['ms'], 'ms': times['ms'], 'slowdown': round(times['ms'] / plain['ms'], 3),
                  'default_equals': default == first}
        if kind == 'controlnet' and not base.tiny:
            return {**values, 'resumed_equal': None}
        settings: dict[str, Any] = {'randomness__deterministic': True, 'work_dir': work_dir}
        _train(bench, kind, size, stop, stopped=True, **settings)
        resumed, _ = _train(bench, kind, size, stop, resume=True, **settings)
    return {**values, 'resumed_equal': resumed == first}


def _train(bench: Any, kind: str, size: int, stop: int, stopped: bool = False, resume: bool = False,
           work_dir: Path | None = None, **overrides: Any) -> tuple[str, dict[str, Any]]:
    """Train; return the digest, '' of a run that was stopped, and the times."""
    base = bench.base
    meter, hook = Meter(base.device, min(bench.steps, 3), warm_up=stop), Digest(stop if stopped else None)
    cfg = base.config(kind, size, meter.max_iters, work_dir=work_dir, **overrides)
    if stopped:
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=stop, export=False)
    cfg.resume = resume
    with base.runner(cfg, [meter, hook]) as runner:
        try:
            runner.train()
        except StoppedError:
            assert stopped
    return hook.value, meter.values


@contextmanager
def deterministic() -> Iterator[None]:
    """Undo afterwards what a run with deterministic=True sets for the process."""
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.deterministic = False
        torch.backends.cuda.enable_cudnn_sdp(True)
