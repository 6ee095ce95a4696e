"""From what the data loader collated to a Batch on the model's device."""

from collections.abc import Mapping
from typing import Any

from mmengine.model import BaseDataPreprocessor

from diffengine_sdxl.datasets.collate import pack
from diffengine_sdxl.registry import MODELS
from diffengine_sdxl.structures import Batch, to_device


@MODELS.register_module()
class BatchPreprocessor(BaseDataPreprocessor):
    """Hands the model `{'inputs': Batch, 'data_samples': None}`, the Batch on its device."""

    def forward(self, data: Mapping[str, Any] | Batch, training: bool = False) -> dict[str, Any]:
        """Pack and move. A Batch is only moved."""
        batch = data if isinstance(data, Batch) else pack(dict(data))
        return {'inputs': to_device(batch, self.device), 'data_samples': None}
