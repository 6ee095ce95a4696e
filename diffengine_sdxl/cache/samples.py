"""Entries of samples: their tensors besides the image and image prompts, as they are kept and as they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.cache.plan import EntryStore

#: Before the name of a map of 8 bits of which one channel is kept, as all three are equal.
GRAY = 'gray:'


def pack_entry(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` as they are kept: of gray images, uint8 [3, H, W], one channel."""
    entry: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gray = tensor.dtype == torch.uint8 and tensor.dim() == 3 and len(tensor) == 3 and bool(
            torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[0], tensor[2]))
        entry[GRAY + name if gray else name] = tensor[:1].clone() if gray else tensor
    return entry


def unpack_entry(entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an entry as `pack_entry` was given them."""
    return {name.removeprefix(GRAY): tensor.expand(3, -1, -1) if name.startswith(GRAY) else tensor
            for name, tensor in entry.items()}


def keep_samples(collated: dict[str, Any], store: EntryStore) -> None:
    """Keep the new entries that the loader's workers made of samples, and take them out of the batch.

    Call it once for each collated batch, in the process that trains, before the batch goes to the device.
    """
    lookups = collated.get('lookups', {}).pop('sample', None)
    if lookups is None:
        return
    new = {key: entry for key, entry in zip(lookups.keys, lookups.values, strict=True) if entry is not None}
    for key, entry in new.items():
        store.put(key, 'sample', entry)
    known = [key for key in lookups.keys if key]
    misses = sum(key in new for key in known)
    store.count('sample', len(known) - misses, misses)
