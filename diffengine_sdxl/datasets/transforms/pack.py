"""The last transform: pictures to tensors."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl.datasets.transforms.geometry import HELPERS, pictures
from diffengine_sdxl.registry import TRANSFORMS


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    array = np.array(image if image.mode == 'RGB' else image.convert('RGB'))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)


@TRANSFORMS.register_module()
class PackInputs:
    """Turn 'img' into float32 [3, H, W] in [-1, 1] and every other picture into float32 [3, H, W] in [0, 1].

    Entries that were of use to the transforms only are dropped.

    Raises:
        ValueError: the pictures of a sample are of different sizes.
    """

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        found = pictures(sample)
        if len({picture.size for picture in found.values()}) > 1:
            sizes = ', '.join(f'{key} {picture.height} x {picture.width}' for key, picture in found.items())
            raise ValueError(f"The pictures of sample '{sample.get('key')}' differ in size (height x width): {sizes}. "
                             'Resize and Crop bring them to one.')
        packed = {key: value for key, value in sample.items() if key not in HELPERS}
        for key, picture in found.items():
            tensor = to_tensor(picture)
            packed[key] = tensor.sub(0.5).div(0.5) if key == 'img' else tensor
        return packed
