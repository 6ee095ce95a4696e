"""The rows of a batch: found ones taken, the others computed one by one and kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffengine_sdxl.cache.plan import EntryStore
from diffengine_sdxl.structures import Lookups


def by_row(num: int, compute: Callable[[int], dict[str, Tensor]], kind: str, lookups: Lookups | None = None,
           store: EntryStore | None = None) -> dict[str, Tensor]:
    """Return the tensors of `num` rows, [num, ...] each.

    Each row is computed alone, with a cache and without: kernels, and with them the last bits, go by the batch size.
    Rows of one key are computed once.

    Args:
        compute: number of a row -> its tensors, without the batch's dimension.
        kind: of the entries, see `plan.KINDS`.
        lookups: what was found, on the model's device; None: nothing was looked up.
        store: where computed rows are kept; None: nowhere.
    """
    if lookups is None:
        rows = [compute(i) for i in range(num)]
    else:
        known = {key: value for key, value in zip(lookups.keys, lookups.values, strict=True) if value is not None}
        for i, key in enumerate(lookups.keys):
            if key not in known:
                known[key] = compute(i)
                if store is not None:
                    store.put(key, kind, known[key])
        rows = [known[key] for key in lookups.keys]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
