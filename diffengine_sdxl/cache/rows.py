"""The rows of a batch: found ones taken, the others computed one by one and kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffengine_sdxl.cache.plan import EntryStore
from diffengine_sdxl.structures import Lookups, send


def by_row(num: int, compute: Callable[[int], dict[str, Tensor]], kind: str, lookups: Lookups | None = None,
           store: EntryStore | None = None, device: torch.device | str = 'cpu') -> dict[str, Tensor]:
    """Return the tensors of `num` rows, [num, ...] each.

    Each row is computed alone, with a cache and without: kernels, and with them the last bits, go by the batch size.
    Rows of one key are computed once.

    Args:
        compute: number of a row -> its tensors, without the batch's dimension.
        kind: of the entries, see `plan.KINDS`.
        lookups: what was found, on the model's device; None: nothing was looked up. A row whose key is '' is computed
            and not kept.
        store: where computed rows are kept; None: nowhere. It is asked again before a row is computed: the entry may be
            younger than the lookup, which a loader's worker did some batches ago.
        device: the model's.
    """
    if lookups is None:
        rows = [compute(i) for i in range(num)]
    else:
        known = {key: value for key, value in zip(lookups.keys, lookups.values, strict=True) if value is not None}
        rows, misses = [], 0
        for i, key in enumerate(lookups.keys):
            row = known.get(key)
            if row is None and store is not None and key and (late := store.get(key)) is not None:
                row = known[key] = {name: send(tensor, device) for name, tensor in late.items()}
            elif row is None:
                row = compute(i)
                misses += 1
                if key:
                    known[key] = row
                    if store is not None:
                        store.put(key, kind, row)
            rows.append(row)
        if store is not None:
            store.count(kind, num - misses, misses)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
