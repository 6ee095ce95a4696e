"""Count where the host would wait for a device, with the `meta` device in the place of CUDA.

Nothing is computed on `meta`: reading a value from it would fail, so what is read here is zeros. Operations whose
result's shape depends on values (`nonzero`, an index by a mask), for which CUDA waits too, fail.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parents[1])
#: Functions that copy Python numbers to a device, and wait.
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


@contextmanager
def count_waits() -> Iterator[list[str]]:
    """Yield a list that receives 'file:line operation' for each wait: a value read (`item`, `tolist`, `bool`, `float`,
    `cpu`, ...), a copy to or from the device without `non_blocking=True`, and Python numbers copied to it.
    """
    waits: list[str] = []
    with _Numbers(waits), _Operations(waits):
        yield waits


def to_meta(model: nn.Module) -> nn.Module:
    """Move `model` as `.to('cuda')` does, which keeps its Parameters; `.to('meta')` alone makes new ones."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to('meta')
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _note(waits: list[str], what: str) -> None:
    frames = [f for f in traceback.extract_stack() if f.filename != __file__]
    ours = [f for f in frames if f.filename.startswith(ROOT) and '/.venv/' not in f.filename]
    frame = (ours or frames)[-1]
    waits.append(f'{frame.filename.removeprefix(ROOT + "/")}:{frame.lineno} {what}')


class _Numbers(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FROM_NUMBERS:
            device = kwargs.get('device') or (args[0].device if func is Tensor.new_tensor else 'cpu')
            source = args[1] if func is Tensor.new_tensor else args[0] if args else kwargs.get('data')
            if torch.device(device).type == 'meta' and not isinstance(source, Tensor):
                _note(self.waits, func.__name__)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = func.overloadpacket.__name__, args[0] if args else None
        on_device = isinstance(first, Tensor) and first.is_meta
        if on_device and name == '_local_scalar_dense':
            _note(self.waits, 'item')
            return torch.zeros((), dtype=first.dtype).item()
        if on_device and name in ('equal', 'is_nonzero'):
            _note(self.waits, name)
            return False
        if on_device and name.startswith('index') and isinstance(args[1], list | tuple) and any(
                index is not None and not index.is_meta for index in args[1]):
            _note(self.waits, 'indices to the device')
        if name == '_to_copy' and kwargs.get('device') is not None:
            return self._copied(func, args, kwargs)
        if name == 'copy_' and args[0].is_meta != args[1].is_meta:
            if not (args[2] if len(args) > 2 else kwargs.get('non_blocking', False)):
                _note(self.waits, 'copy_')
            return args[0]
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        source, to_device = args[0], torch.device(kwargs['device']).type == 'meta'
        if source.is_meta != to_device and not kwargs.get('non_blocking'):
            _note(self.waits, 'to the device' if to_device else 'from the device')
        if source.is_meta and not to_device:
            return torch.zeros(source.shape, dtype=kwargs.get('dtype') or source.dtype)
        return func(*args, **kwargs)
