"""Precision beside a half-precision base: autocast, and copies of trained fp32 weights in the dtype that computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors as unflatten
from torch.autograd.function import once_differentiable

Tensors = list[Tensor] | tuple[Tensor, ...]


def autocast(device_type: str, dtype: torch.dtype, enabled: bool = True) -> AbstractContextManager[Any]:
    """Autocast inside; nothing on the meta device, which has no autocast."""
    return nullcontext() if device_type == 'meta' else torch.autocast(device_type, dtype, enabled=enabled)


def is_mixed(component: nn.Module, adapters: Iterable[Any]) -> bool:
    """Return whether a component of the base holds weights of another dtype, of an adapter that does not cast them."""
    added = {id(p) for adapter in adapters if not adapter.brings_precision
             for p in (*adapter.all_parameters(), *adapter.trainables())}
    dtypes = {p.dtype for p in component.parameters() if id(p) not in added}
    return any(id(p) in added and p.dtype not in dtypes for p in component.parameters())


def under_autocast(model: Any, part: str) -> bool:
    """Return whether a component of an SDXL computes under autocast: it trains, or mixes dtypes by its adapters."""
    return part in model.trainable_parts or part in model.mixed_parts and not model.adapters_disabled


def cast(weights: Sequence[Tensor], dtype: torch.dtype, factors: Sequence[float] | None = None) -> tuple[Tensor, ...]:
    """Return factor x weight in `dtype` for each; a gradient reaches the weights in their own dtype, the same for all.

    It takes a kernel or two on a GPU, and as many in the backward pass.

    Args:
        factors: one for each weight; None as all 1.
    """
    copies: tuple[Tensor, ...] = _Cast.apply(dtype, factors or [1.0] * len(weights), *weights)
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, factors: Sequence[float], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a copy that nothing read has no gradient
        ctx.factors, ctx.dtype = factors, weights[0].dtype
        copies = empty(weights, dtype)
        fill(copies, weights, factors)
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [grad for grad in grads if grad is not None]
        cast_back = empty(found, ctx.dtype)
        torch._foreach_copy_(cast_back, found)
        if any(factor != 1 for factor in ctx.factors):
            torch._foreach_mul_(cast_back, [f for f, grad in zip(ctx.factors, grads, strict=True) if grad is not None])
        results = iter(cast_back)
        return None, None, *(None if grad is None else next(results) for grad in grads)


def empty(like: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return tensors of these shapes in one piece of memory: a thousand allocations take the host milliseconds."""
    flat = torch.empty(sum(tensor.numel() for tensor in like), dtype=dtype, device=like[0].device)
    parts: tuple[Tensor, ...] = tuple(unflatten(flat, like))
    return parts


def fill(copies: Tensors, weights: Tensors, factors: Sequence[float]) -> None:
    """Write factor x weight into each copy; products are rounded once."""
    if any(factor != 1 for factor in factors):
        weights = torch._foreach_mul(weights, factors)
    torch._foreach_copy_(copies, weights)
