"""Settings of SDXL's components: their dtypes, those of another model, and the names that adapters cannot have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.loading import base as loading

PRECISIONS = {'no': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def component_dtypes(dtype: str | Mapping[str, str] | None, trainable: Sequence[str],
                     compute_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each component's weights, without 'vae' where that depends on the VAE's config.

    Args:
        dtype, trainable: see SDXL. compute_dtype: its `mixed_precision`.

    Raises:
        UserError: a component or a dtype is unknown.
    """
    if isinstance(dtype, Mapping):
        for part in dtype:
            one_of('dtype', part, loading.MODULES)
    dtypes: dict[str, torch.dtype] = {}
    for part in loading.MODULES:
        name = dtype.get(part) if isinstance(dtype, Mapping) else dtype
        if name is not None:
            one_of('dtype', name, DTYPES)
            dtypes[part] = getattr(torch, name)
        elif part in trainable or compute_dtype is None:
            dtypes[part] = torch.float32
        elif part != 'vae':
            dtypes[part] = compute_dtype
    return dtypes


def shared_components(parts: Sequence[str], base_model: Any, trainable: Sequence[str]) -> dict[str, Any]:
    """Return the components `parts` of `base_model`, an SDXL or None.

    Raises:
        UserError: there is no such component, or it trains.
    """
    key = f'shared_components={list(parts)!r}'
    for part in parts:
        one_of('shared_components', part, loading.MODULES)
        if base_model is None:
            raise UserError(f"{key}: there is no other model to take '{part}' from; it is for a refiner "
                            'beside its base.')
        if getattr(base_model, part) is None:
            raise UserError(f"{key}: the other model has no '{part}'.")
        if part in trainable:
            raise UserError(f"{key}: '{part}' cannot be shared and train; remove it from `trainable`.")
    return {part: getattr(base_model, part) for part in parts}


def check_adapter_name(name: str) -> None:
    """Check that nn.ModuleDict and the folders of an export take an adapter's name.

    Raises:
        UserError: they don't.
    """
    reserved = {*loading.MODULES, 'text', 'pipeline'}
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name in reserved:
        raise UserError(f"'{name}' cannot name an adapter: use letters, digits and _, and neither a name of torch "
                        f"(type, train, to, ...) nor {', '.join(sorted(reserved))}.")
