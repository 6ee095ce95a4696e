"""Collate samples to a batch, in the loader's workers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.registry import FUNCTIONS


@FUNCTIONS.register_module('collate')
def collate(samples: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
    """Return one dict of B samples, key by key. A row of several samples (PriorPreservation) counts as these.

    Tensors are stacked; numbers become tensors [B] (bool, int64, float32); 'num_skipped' is summed; dicts (such as
    'drop') are collated in turn; strings become a list.

    Raises:
        UserError: the samples have different keys, tensors of different sizes, or values of another type.
    """
    flat = [sample for row in samples for sample in (row if isinstance(row, list) else [row])]
    first = flat[0]
    for sample in flat:
        if sample.keys() != first.keys():
            raise UserError(f'Samples {_names([first, sample])} of one batch have different keys: '
                            f'{sorted(map(str, sample.keys() ^ first.keys()))} in one only.')
    return {key: _join(key, [sample[key] for sample in flat], flat) for key in first}


def _join(key: str, values: list[Any], samples: Sequence[dict[str, Any]]) -> Any:
    if key == 'num_skipped':
        return sum(values)
    types = {type(value) for value in values}
    if all(isinstance(value, Tensor) for value in values):
        if len({(value.shape, value.dtype) for value in values}) > 1:
            sizes = listed(f'{tuple(value.shape)} {str(value.dtype).removeprefix("torch.")}' for value in values)
            raise UserError(f"The samples {_names(samples)} have '{key}' of different sizes and cannot be one batch: "
                            f'{sizes}. Add Resize and Crop to the transforms.')
        return torch.stack(values)
    if types <= {str}:
        return values
    for numbers, dtype in (({bool}, torch.bool), ({int}, torch.int64), ({int, float}, torch.float32)):
        if types <= numbers:
            return torch.tensor(values, dtype=dtype)
    if all(isinstance(value, dict) for value in values):
        return collate(values)
    raise UserError(f"'{key}' of the samples {_names(samples)} has type {' and '.join(t.__name__ for t in types)}, "
                    'which cannot be collated. PackInputs at the end of the transforms turns images into tensors.')


def _names(samples: Sequence[dict[str, Any]]) -> str:
    return listed(repr(sample.get('key', '?')) for sample in samples)
