"""Replay the UNet's calls of a sampling loop as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffengine_sdxl.errors import first_line
from diffengine_sdxl.protocols import Model

#: Signatures that are remembered, the latest ones: a request with an active range and a guidance range has four.
MOST = 8


class Graph(Protocol):
    """What records the kernels of a function, and runs them again on the same memory."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record `function`, which computes on the same inputs whenever it is called; return its output."""

    def replay(self) -> None:
        """Compute the output anew, in place, from what the inputs hold now."""


class CUDAGraph:
    """torch's CUDA graph.

    Args:
        pool: memory that graphs share. They run one after the other, and nobody reads an output once the next one runs.
        stream: what they are captured on, of the UNet's device: on another one nothing would be recorded.
    """

    def __init__(self, pool: Any, stream: Any) -> None:
        self.pool, self.stream, self.graph = pool, stream, torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Run `function` once on a side stream, as torch asks for, then record it."""
        with torch.cuda.device(self.stream.device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                function()
            current.wait_stream(side)
            # Threads of data loaders may pin memory meanwhile.
            with torch.cuda.graph(self.graph, self.pool, self.stream, capture_error_mode='thread_local'):
                return function()

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


@dataclass
class Captured:
    """A graph with its memory.

    Attributes:
        inputs: tensors that it reads, in the order of `tensors_in`.
        output: the tensor that it writes.
        left: argument -> how many entries of that list the UNet leaves; it pops the others from the front.
    """

    graph: Graph
    inputs: list[Tensor]
    output: Tensor
    left: dict[str, int]


class UNetGraphs:
    """The UNet of a model, for sampling: the second call of a signature is captured, the later ones are replayed.

    A signature is all that a graph cannot follow: the inputs' shapes, strides and dtypes, the other values among the
    arguments, tensors on the CPU too (the scale of an image prompt), what adapters' layers compute with
    (`Adapter.constants`), and where the weights lie. Weights that are changed in place are followed. The kernels are
    those that the UNet itself launches. It calls the UNet itself with gradients, under autocast, and once a capture has
    failed.

    Args:
        graph: makes the graphs; None for those of CUDA, in one pool.
    """

    def __init__(self, model: Model, graph: Callable[[], Graph] | None = None) -> None:
        self.model, self.failed = model, False
        self.make = graph or partial(CUDAGraph, torch.cuda.graph_pool_handle(), torch.cuda.Stream(model.device))
        self.calls: dict[Any, Captured | None] = {}

    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        """Call it as the UNet, with `return_dict=False`."""
        key, captured = self._signature(arguments), None
        if key is not None:
            known, captured = key in self.calls, self.calls.pop(key, None)
            if known and captured is None:  # what runs once only is not worth a graph
                captured = self._captured(arguments)
        if key is not None and not self.failed:
            while len(self.calls) >= MOST:
                del self.calls[next(iter(self.calls))]
            self.calls[key] = captured
        if captured is None:
            output: tuple[Tensor, ...] = self.model.unet(**arguments)
            return output
        torch._foreach_copy_(captured.inputs, self._inputs(arguments))
        captured.graph.replay()
        for name, number in captured.left.items():
            del arguments[name][:len(arguments[name]) - number]
        # The next replay overwrites it, and solvers remember predictions.
        return (captured.output.clone(),)

    def _inputs(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors that a graph reads: kernels hold numbers of the CPU as they were."""
        device = self.model.unet_weight.device
        return [tensor for tensor in tensors_in(arguments) if tensor.device == device]

    def _signature(self, arguments: Mapping[str, Any]) -> Any:
        """Return what a graph depends on; None where none can be used."""
        model, weight = self.model, self.model.unet_weight
        if self.failed or torch.is_grad_enabled() or torch.is_autocast_enabled('cuda'):
            return None
        constants = {name: adapter.constants() for name, adapter in model.adapters.items()}
        if tensors_in(constants):
            return None
        return _form(arguments, weight.device), _form(constants), model.adapters_disabled, weight.data_ptr()

    def _captured(self, arguments: Mapping[str, Any]) -> Captured | None:
        """Return the graph of a call; None, with a warning, if it cannot be captured."""
        static = _map(arguments, torch.clone)
        left: dict[str, int] = {}

        def call() -> Tensor:
            fresh = _map(static, lambda tensor: tensor)  # the UNet pops from lists
            output: Tensor = self.model.unet(**fresh)[0]
            left.update({name: len(value) for name, value in fresh.items() if isinstance(value, list)})
            return output
        try:
            graph = self.make()
            return Captured(graph, self._inputs(static), graph.capture(call), left)
        except RuntimeError as error:  # torch's errors of CUDA, and of its memory, are some
            self.failed, self.calls = True, {}
            warnings.warn('A CUDA graph of the UNet cannot be captured, so it is called as without '
                          f"speed.compile='graph': {first_line(error)}", stacklevel=2)
            return None


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, lists, tuples and dataclasses, in their order."""
    tensors: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor
    _map(value, add)
    return tensors


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy with `function` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: _map(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(v, function) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _map(getattr(value, f.name), function) for f in fields(value)})
    return value


def _form(value: Any, device: torch.device | None = None) -> Any:
    """Return what is equal for values that differ in what tensors on `device` hold only."""
    if isinstance(value, Tensor):
        held = None if value.device == device else tuple(value.flatten().tolist())
        return value.shape, value.stride(), value.dtype, held
    if isinstance(value, Mapping):
        return tuple((k, _form(v, device)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), *(_form(v, device) for v in value)
    if is_dataclass(value):
        return type(value), *(_form(getattr(value, f.name), device) for f in fields(value))
    return value
