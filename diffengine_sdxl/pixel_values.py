"""Pixels of 8 bits as floats, the same bits on every device."""

from functools import cache

import torch
from torch import Tensor

from diffengine_sdxl.structures import send


def as_floats(pixels: Tensor, centred: bool = False) -> Tensor:
    """Turn pixels of 8 bits into fp32 in [0, 1], or in [-1, 1] if `centred`; another tensor is returned as it is."""
    # By a table from the CPU, so that all devices give the same bits: CUDA rounds a division by 255 otherwise.
    if pixels.dtype != torch.uint8:
        return pixels
    return _levels(centred, pixels.device).index_select(0, pixels.flatten().int()).view(pixels.shape)


@cache
def _levels(centred: bool, device: torch.device) -> Tensor:
    levels = torch.arange(256, dtype=torch.float32).div(255)
    return send(levels.sub(0.5).div(0.5) if centred else levels, device)
