"""Collate samples to a batch, in the loader's workers."""

from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.registry import FUNCTIONS
from diffengine_sdxl.structures import Lookups


@FUNCTIONS.register_module('collate')
def collate(samples: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
    """Return one dict of B samples, key by key. A row of several samples (PriorPreservation) counts as these.

    Tensors are stacked; numbers become tensors [B] (bool, int64, float32); 'num_skipped' is summed; dicts (such as
    'drop') are collated in turn; strings become a list; `Lookups` are joined. Beside other images one that was not
    read, as the cache has what is needed of it, is zeros; the key is left out if none was read.

    Raises:
        UserError: the samples have different keys, tensors of different sizes, or values of another type.
    """
    flat = [sample for row in samples for sample in (row if isinstance(row, list) else [row])]
    fill_absent(flat)
    first = flat[0]
    for sample in flat:
        if sample.keys() != first.keys():
            raise UserError(f'Samples {_names([first, sample])} of one batch have different keys: '
                            f'{sorted(map(str, sample.keys() ^ first.keys()))} in one only.')
    joined = {key: _join(key, [sample[key] for sample in flat], flat) for key in first}
    return {key: value for key, value in joined.items() if value is not None}


def fill_absent(samples: Sequence[dict[str, Any]]) -> None:
    """Where some samples have masks, drops, weights or lookups, give the others such as change nothing; in place."""
    mask = next((sample['mask'] for sample in samples if 'mask' in sample), None)
    drops = dict.fromkeys((name for sample in samples for name in sample.get('drop', {})), False)
    names = {name for sample in samples for name in sample.get('lookups', {})}
    weighted, looked_up = (any(key in sample for sample in samples) for key in ('weight', 'lookups'))
    for sample in samples:
        if mask is not None and 'mask' not in sample:
            sample['mask'] = torch.ones_like(mask)
        if drops:
            sample['drop'] = {**drops, **sample.get('drop', {})}
        if weighted:
            sample.setdefault('weight', 1.0)
        if looked_up:
            # Without a key, which `by_row` computes and does not keep.
            sample['lookups'] = {**{name: Lookups([''], [None]) for name in names}, **sample.get('lookups', {})}


def _join(key: str, values: list[Any], samples: Sequence[dict[str, Any]]) -> Any:
    if key == 'num_skipped':
        return sum(values)
    if 'lookups' in samples[0] and any(value is None for value in values):
        read = next((value for value in values if isinstance(value, Tensor)), None)
        if read is None:
            return None
        values = [torch.zeros_like(read) if value is None else value for value in values]
    types = {type(value) for value in values}
    if all(isinstance(value, Tensor) for value in values):
        if len({(value.shape, value.dtype) for value in values}) > 1:
            sizes = listed(f'{tuple(value.shape)} {str(value.dtype).removeprefix("torch.")}' for value in values)
            raise UserError(f"The samples {_names(samples)} have '{key}' of different sizes and cannot be one batch: "
                            f'{sizes}. Add Resize and Crop to the transforms.')
        return torch.stack(values)
    if types <= {str}:
        return values
    if types <= {Lookups}:
        return Lookups([key for found in values for key in found.keys],
                       [row for found in values for row in found.values])
    for numbers, dtype in (({bool}, torch.bool), ({int}, torch.int64), ({int, float}, torch.float32)):
        if types <= numbers:
            return torch.tensor(values, dtype=dtype)
    if all(isinstance(value, dict) for value in values):
        return collate(values)
    raise UserError(f"'{key}' of the samples {_names(samples)} has type {' and '.join(t.__name__ for t in types)}, "
                    'which cannot be collated. PackInputs at the end of the transforms turns images into tensors.')


def _reduce(lookups: Lookups) -> tuple[Any, ...]:
    """Send the tensors of a batch's lookups as one: each on its own takes a connection between worker and main process.

    Returns:
        `_rebuild` and its arguments.
    """
    names = [None if row is None else list(row) for row in lookups.values]
    tensors = [tensor.contiguous() for row in lookups.values for tensor in (row or {}).values()]
    kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
    # Each begins at a multiple of 16 bytes, to be viewed in its dtype.
    parts = [torch.nn.functional.pad(tensor.flatten().view(torch.uint8), (0, -tensor.nbytes % 16))
             for tensor in tensors]
    return _rebuild, (lookups.keys, names, kinds, torch.cat(parts) if parts else None)


def _rebuild(keys: list[str], names: list[list[str] | None], kinds: list[tuple[torch.dtype, torch.Size]],
             joined: Tensor | None) -> Lookups:
    tensors, start = [], 0
    for dtype, shape in kinds:
        assert joined is not None
        num = shape.numel() * dtype.itemsize
        tensors.append(joined[start:start + num].view(dtype).view(shape))
        start += num + -num % 16
    rest = iter(tensors)
    return Lookups(keys, [None if row is None else {name: next(rest) for name in row} for row in names])


ForkingPickler.register(Lookups, _reduce)


def _names(samples: Sequence[dict[str, Any]]) -> str:
    return listed(repr(sample.get('key', '?')) for sample in samples)
