"""Samples to a batch: `collate` in the loader's workers, `pack` in the model's data_preprocessor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.registry import FUNCTIONS
from diffengine_sdxl.structures import Batch


@FUNCTIONS.register_module('collate')
def collate(samples: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
    """One dict of B samples, key by key. A row that is several samples (PriorPreservation) counts as these.

    Tensors are stacked; numbers become tensors [B] (bool, int64, float32); 'num_skipped' is summed; dicts (as
    'drop') are collated by themselves; strings become a list.

    Raises:
        ValueError: the samples hold different keys, tensors of different sizes, or something of another kind.
    """
    flat = [sample for row in samples for sample in (row if isinstance(row, list) else [row])]
    first = flat[0]
    for sample in flat:
        if sample.keys() != first.keys():
            raise ValueError(f"Samples {_names([first, sample])} of one batch hold different keys: "
                             f'{sorted(map(str, sample.keys() ^ first.keys()))} in one only.')
    return {key: _join(key, [sample[key] for sample in flat], flat) for key in first}


def _join(key: str, values: list[Any], samples: Sequence[dict[str, Any]]) -> Any:
    if key == 'num_skipped':
        return sum(values)
    kinds = {type(value) for value in values}
    if all(isinstance(value, Tensor) for value in values):
        if len({(value.shape, value.dtype) for value in values}) > 1:
            sizes = ', '.join(f'{tuple(value.shape)} {str(value.dtype).removeprefix("torch.")}' for value in values)
            raise ValueError(f"The samples {_names(samples)} have '{key}' of different sizes and cannot be one batch: "
                             f'{sizes}. Bring them to one size (Resize, Crop).')
        return torch.stack(values)
    if kinds <= {str}:
        return values
    if kinds <= {bool}:
        return torch.tensor(values, dtype=torch.bool)
    if kinds <= {int}:
        return torch.tensor(values, dtype=torch.int64)
    if kinds <= {int, float}:
        return torch.tensor(values, dtype=torch.float32)
    if all(isinstance(value, dict) for value in values):
        return collate(values)
    raise ValueError(f"'{key}' of the samples {_names(samples)} is of type {' and '.join(k.__name__ for k in kinds)}, "
                     'which cannot be put into a batch. PackInputs at the end of the transforms turns pictures into '
                     'tensors.')


def _names(samples: Sequence[dict[str, Any]]) -> str:
    return ', '.join(repr(sample.get('key', '?')) for sample in samples)


def pack(collated: dict[str, Any]) -> Batch:
    """The Batch of what `collate` returned: names that Batch knows go to its fields, every other tensor to
    `conditions`; anything else was only of use before and is dropped.

    Raises:
        ValueError: a field that Batch needs is missing.
    """
    makers = {'text': 'a caption', 'time_ids': 'ComputeTimeIds among the transforms', 'key': 'a data set of ours',
              'epoch': 'a data set of ours', 'seed': 'a data set of ours'}
    missing = [f"'{name}' (from {maker})" for name, maker in makers.items() if name not in collated]
    if missing:
        raise ValueError(f"The batch lacks {', '.join(missing)}; it holds {', '.join(map(repr, collated))}.")
    names = Batch.names()
    known = {name: value for name, value in collated.items() if name in names}
    others = {name: value for name, value in collated.items() if name not in names and isinstance(value, Tensor)}
    return Batch(**{**known, 'conditions': {**known.get('conditions', {}), **others}})
