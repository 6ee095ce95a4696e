"""Plain LoRA in the dtype of the base, for accelerators: y = layer(x) + (x A^T) (s B)^T, s = scale * alpha / rank.

peft computes x A^T and its product with B beside the layer, then scales and adds, in six kernels and in fp32 where the
weights are; autocast around a UNet makes its norms fp32 too. Here a linear layer and its LoRA are three matrix
products forward and five backward, that of B is added into the layer's output, and x and x A^T are all that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffengine_sdxl.adapters import precision
from diffengine_sdxl.structures import where

HALF = (torch.bfloat16, torch.float16)


def used_on(weight: Tensor) -> bool:
    """Return whether a LoRA of a layer with this weight computes as here; on the CPU, and in fp32, as peft does."""
    return weight.device.type != 'cpu' and weight.dtype in HALF


def lora_linear(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor, rows: Tensor | None = None,
                dropout: nn.Module | None = None) -> Tensor:
    """Return layer(x) + (x A^T) B^T.

    Args:
        layer: a linear layer of the base, or other wrappers around one.
        x: [B, ..., in].
        a, b: [rank, in] and [out, rank] in the layer's dtype, the scale in `b`.
        rows: bool [B], where it acts; None: everywhere.
        dropout: of x on its way to A.
    """
    # torch.compile fuses the formula by itself. A quantized weight is of another class, and does more than a product.
    # Around a part that trains in half precision, CUDA's autocast gives x in fp32, from norms.
    if (rows is None and dropout is None and type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
            and not layer.weight.requires_grad and x.dtype == a.dtype and not torch.compiler.is_compiling()):
        output: Tensor = _LoRALinear.apply(x, layer.weight, layer.bias, a, b)
        return output
    change = F.linear(F.linear(x if dropout is None else dropout(x), a), b)
    result: Tensor = layer(x)
    return result + (change if rows is None else where(rows, change, torch.zeros_like(change)))


class ComputeCopies:
    """A and s B of one adapter's plain LoRAs in a component, in its dtype, all cast at once for a call of it.

    In training every call makes new ones, in the graph of its step, so that several calls of a step don't disturb each
    other. Without gradients they are rewritten in place, where a CUDA graph reads them.

    Args:
        wrappers: of the adapter, of any kinds.
        adapter: the name of its weights.
        changing: whether an optimizer steps the weights, so that copies are old after each call.
    """

    def __init__(self, wrappers: Sequence[Any], adapter: str, changing: bool) -> None:
        self.wrappers = [wrapper for wrapper in wrappers if wrapper.plain_lora]
        self.adapter, self.changing = adapter, changing
        self.weights: list[Tensor] = [layers[adapter].weight for kind in ('lora_A', 'lora_B')
                                      for layers in (getattr(wrapper, kind) for wrapper in self.wrappers)]
        #: Whether weights or scales have changed since the last call.
        self.stale = True
        self._memory: tuple[Tensor, ...] = ()

    def refresh(self) -> None:
        """Give the wrappers current copies, if they compute by this file."""
        if not self.wrappers or not used_on(weight := self.wrappers[0].weight):
            return
        factors = [1.0] * len(self.wrappers) + [float(wrapper.scaling[self.adapter]) for wrapper in self.wrappers]
        moved = not self._memory or self._memory[0].device != weight.device or self._memory[0].dtype != weight.dtype
        if torch.is_grad_enabled() and any(w.requires_grad for w in self.weights):
            copies = precision.cast(self.weights, weight.dtype, factors)
            self.stale = True
        elif self.changing or self.stale or moved:
            with torch.no_grad():
                if moved:
                    self._memory = precision.empty(self.weights, weight.dtype)
                    # As those of a training call: a checkpointed pass may be recomputed with these.
                    for copy in self._memory:
                        copy.requires_grad_(self.changing)
                precision.fill(self._memory, self.weights, factors)
            copies, self.stale = self._memory, False
        else:
            return
        for wrapper, *pair in zip(self.wrappers, copies, copies[len(self.wrappers):], strict=False):
            vars(wrapper)['copies'] = tuple(pair)  # a module's own setting of attributes takes 1 us each


class _LoRALinear(torch.autograd.Function):
    """Both products for a frozen weight W [out, in] and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ a.t()
        # Into memory of the output's shape: a view of a matrix could not be changed in place outside.
        output = x.new_empty(*x.shape[:-1], weight.shape[0])
        matrix = output.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(flat, weight.t(), out=matrix)
        else:
            torch.addmm(bias, flat, weight.t(), out=matrix)
        matrix.addmm_(hidden, b.t())
        ctx.shape = x.shape
        ctx.save_for_backward(flat, hidden, weight, a, b)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        of_hidden = grad @ b
        of_x = (grad @ weight).addmm_(of_hidden, a).view(ctx.shape) if needs_x else None
        return of_x, None, None, of_hidden.t() @ flat if needs_a else None, grad.t() @ hidden if needs_b else None
