"""Counts of what a computation does, on torch's meta device, where nothing is computed.

A kernel is an ATen operation that is not a view; each is taken to read its inputs and write its outputs once. Attention
counts as flash attention. Not counted: layout copies inside libraries, their workspaces, the allocator's fragments.
Autocast computes by CUDA's rules.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CHECKPOINT = torch.utils.checkpoint.checkpoint
#: Operations that only make or describe a tensor.
FREE = ('aten.empty', 'aten.new_empty', 'aten.detach', 'aten.lift_fresh', 'aten._unsafe_view', 'aten._reshape_alias',
        'aten.is_same_size', 'aten.alias', 'aten.sym_', 'prim.')
#: Convolutions and their backward passes -> the place of the weight among the arguments.
CONVOLUTIONS = {torch.ops.aten.convolution.default: 1, torch.ops.aten.convolution_backward.default: 2}
WORKSPACE = -1
#: CUDA's autocast: what computes in half precision, and what in fp32.
HALF = {functional.linear, functional.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm,
        Tensor.matmul, Tensor.__matmul__, functional.scaled_dot_product_attention, torch.addbmm}
FULL = {functional.layer_norm, torch.layer_norm, functional.group_norm, torch.group_norm, functional.softmax,
        torch.softmax, Tensor.softmax, functional.mse_loss, Tensor.pow, torch.pow, torch.exp, torch.rsqrt}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second; the defaults are about what an H100 reaches.

    Attributes:
        copy: bytes read and written.
        half, full: FLOP of matrix products in bf16 or fp16, and in fp32.
        attention: FLOP of attention, of 2 bytes a value.
        launch: seconds of the shortest kernel.
        host: seconds that the host needs for each kernel; a GPU works meanwhile, a CPU does not.
    """

    copy: float = 2.7e12
    half: float = 600e12
    full: float = 50e12
    attention: float = 380e12
    launch: float = 2.5e-6
    host: float = 0.0


class Counter(TorchDispatchMode):
    """Count what runs inside.

    Args:
        rates: of the device whose seconds are estimated.

    Attributes:
        kernels, bytes, flop: totals.
        seconds: estimated: of each kernel the longest of its bytes, its FLOP and the shortest kernel's time.
        live, peak: bytes of the tensors made inside that are alive, and the most of them at one time.
        history: number of a tensor and its bytes, when it is made; the same number and negative bytes when it is freed.
            Of WORKSPACE: a library's memory for the time of one operation.
    """

    def __init__(self, rates: Rates | None = None) -> None:
        super().__init__()
        self.rates = rates or Rates()
        self.kernels = self.bytes = self.flop = self.live = self.peak = 0
        self.seconds = 0.0
        self.history: list[tuple[int, int]] = []
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs, inputs = _on_meta((out,)), _on_meta((*args, *(kwargs or {}).values()))
        known = {t.untyped_storage()._cdata for t in inputs}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in known:
                self._track(tensor)
        if (place := CONVOLUTIONS.get(func)) is not None:
            # oneDNN and cuDNN reorder weights, and compute their gradients, in memory of the same size.
            size = args[place].numel() * args[place].element_size()
            self.history += [(WORKSPACE, size), (WORKSPACE, -size)]
            self.peak = max(self.peak, self.live + size)
        if (inputs or outputs) and not _is_free(func):
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        num_bytes = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*inputs, *outputs]}.values())
        formula = flop_registry.get(func._overloadpacket)
        flop = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        rate = self.rates.full if (inputs or outputs)[0].element_size() > 2 else (
            self.rates.attention if 'attention' in str(func) else self.rates.half)
        self.kernels += 1
        self.bytes += num_bytes
        self.flop += flop
        self.seconds += max(num_bytes / self.rates.copy, flop / rate, self.rates.launch)

    def _track(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        number = len(self.history)

        def freed(_: Any) -> None:
            del self._storages[key]
            self.live -= size
            self.history.append((number, -size))
        self._storages[key] = weakref.ref(storage, freed)
        self.history.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)


def _on_meta(values: Iterable[Any]) -> list[Tensor]:
    """Return the meta tensors among the arguments or results of an operation."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.device.type == 'meta':
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _on_meta(value)
    return found


@functools.cache
def _is_free(func: Any) -> bool:
    """Return whether an operation starts no kernel."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or str(func).startswith(FREE)


class EmptyOnMeta(TorchFunctionMode):
    """Put what `torch.empty` makes without a device, as layers make their weights, on the meta device.

    Numbers that decide something, such as a noise schedule's, are still computed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


class Autocast(TorchFunctionMode):
    """CUDA's autocast on the meta device, which has none: weights are cast once, and norms compute in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._weights = dtype, {}  # type: torch.dtype, dict[int, Tensor]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.dtype if func in HALF else torch.float32 if func in FULL else None
        if dtype is not None:
            args, kwargs = ([self._cast(a, dtype) for a in args],
                            {k: self._cast(v, dtype) for k, v in (kwargs or {}).items()})
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype != torch.float32):
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]


def autocast(dtype: torch.dtype | None) -> Callable[[bool], AbstractContextManager[Any]]:
    """Return what `SDXL.autocast` is for a model on the meta device that computes in `dtype` (None: no autocast)."""
    return lambda enabled: Autocast(dtype) if enabled and dtype is not None else nullcontext()


@contextmanager
def counted(rates: Rates | None = None) -> Iterator[Counter]:
    """Count what runs inside, with attention and checkpoints as on a GPU."""
    # Replaced rather than done in a TorchFunctionMode: checkpointing recomputes in another thread, which has none.
    with ExitStack() as stack:
        for module, name, value in ((functional, 'scaled_dot_product_attention', _flash),
                                    (torch.utils.checkpoint, 'checkpoint', _checkpointed)):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield stack.enter_context(Counter(rates))


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Compute attention as flash attention does, whatever the mask; the meta device would write out the maps."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


def _checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `function`, which is recomputed under the Autocast that it ran in; torch knows its own only."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Autocast)]

    def run(*inputs: Any, **named: Any) -> Any:
        if not modes or any(isinstance(mode, Autocast) for mode in _get_current_function_mode_stack()):
            return function(*inputs, **named)
        with Autocast(modes[-1].dtype):
            return function(*inputs, **named)
    return CHECKPOINT(run, *args, **kwargs)
