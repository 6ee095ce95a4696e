"""SDXL's micro-conditioning. Source: Podell et al. 2023, "SDXL", section 2.2."""

from typing import Any

import torch

from diffengine_sdxl.datasets.transforms.geometry import Size, image_of, pair
from diffengine_sdxl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ComputeTimeIds:
    """Write 'time_ids', float32 [6]: original height, width, crop top, left, target height, width (pixels).

    Each is the image's true value (its size as read, where the crop lay in the resized image, its size now)
    unless a constant is given. Stands after resize, crop and flip, before PackInputs.

    Args:
        original_size, target_size: constants; an int or (height, width).
        crops_coords_top_left: constant (top, left); the diffusers script's `crops_coords_top_left_h/w`.
        aesthetic_score: for the refiner, which is told it in place of the target size: float32 [5].
    """

    def __init__(self, original_size: Size | None = None, crops_coords_top_left: Size | None = None,
                 target_size: Size | None = None, aesthetic_score: float | None = None) -> None:
        self.original_size = None if original_size is None else pair(original_size, 'original_size')
        self.target_size = None if target_size is None else pair(target_size, 'target_size')
        crop = crops_coords_top_left
        self.crop = None if crop is None else (crop, crop) if isinstance(crop, int) else tuple(crop)
        if self.crop is not None and len(self.crop) != 2:
            raise ValueError(f'crops_coords_top_left={crop!r} is not two numbers (top, left).')
        self.aesthetic_score = aesthetic_score

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = image_of(sample)
        original = self.original_size or sample['original_size']
        crop = sample.get('crop_top_left', (0, 0)) if self.crop is None else self.crop
        target = self.target_size or (image.height, image.width)
        last = target if self.aesthetic_score is None else (self.aesthetic_score,)
        sample['time_ids'] = torch.tensor([*original, *crop, *last], dtype=torch.float32)
        return sample
