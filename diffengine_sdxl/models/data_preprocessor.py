"""Turn what the data loader collated into a Batch on the model's device."""

from collections.abc import Mapping
from typing import Any

from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.pixel_values import as_floats
from diffengine_sdxl.registry import MODELS
from diffengine_sdxl.structures import Batch, to_device

#: Required fields of a Batch -> what adds them to a sample.
SOURCES = {'text': 'a caption', 'time_ids': 'ComputeTimeIds among the transforms',
           **dict.fromkeys(('key', 'epoch', 'seed'), 'a data set of diffengine_sdxl')}


@MODELS.register_module()
class BatchPreprocessor(BaseDataPreprocessor):
    """Give the model `{'inputs': Batch, 'data_samples': None}`, the Batch on its device."""

    def forward(self, data: Mapping[str, Any] | Batch, training: bool = False) -> dict[str, Any]:
        """Move `data`; there, unless it is a Batch, turn its images into floats and pack it."""
        if isinstance(data, Batch):
            return {'inputs': to_device(data, self.device), 'data_samples': None}
        return {'inputs': pack(images_to_floats(to_device(data, self.device))), 'data_samples': None}


def images_to_floats(collated: Mapping[str, Any]) -> dict[str, Any]:
    """Turn images of 8 bits, [B, C, H, W], into fp32: 'img' in [-1, 1], conditions in [0, 1]; nothing else changes."""
    others = Batch.names() - {'img'}  # a mask of 0 and 1 is no image
    return {name: as_floats(value, centred=name == 'img')
            if isinstance(value, Tensor) and value.dim() == 4 and name not in others else value
            for name, value in collated.items()}


def pack(collated: Mapping[str, Any]) -> Batch:
    """Make a Batch: its fields by name, every other tensor as a condition; drop the rest.

    Raises:
        UserError: a required field is missing.
    """
    if missing := [f"'{name}' (from {source})" for name, source in SOURCES.items() if name not in collated]:
        raise UserError(f"The batch lacks {', '.join(missing)}; it holds {', '.join(map(repr, collated))}.")
    names = Batch.names() - {'conditions'}
    fields = {name: value for name, value in collated.items() if name in names}
    conditions = {name: value for name, value in collated.items() if name not in names and isinstance(value, Tensor)}
    return Batch(**fields, conditions=conditions)
