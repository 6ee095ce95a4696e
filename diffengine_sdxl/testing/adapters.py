"""Tiny adapters that look trained, in the formats of their ecosystems."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL

#: What says where an adapter's weights come from.
LOCATION = ('weights', 'subfolder', 'weight_name', 'revision', 'variant')
#: Deviation of the noise in place of training; a LoRA's is the product of two matrices.
NOISE = {'LoRA': 0.1}


def write_tiny_adapter(folder: str | Path, base: str | Path, config: Mapping[str, Any]) -> Path:
    """Write the adapter of a config, with noise added to its fresh weights. The same arguments give the same bytes.

    Args:
        base: folder of the base that it is for.
        config: of the adapter, with its `type`; what it says of existing weights is ignored.
    """
    fresh = {key: value for key, value in config.items() if key not in LOCATION} | {'trainable': True}
    model = SDXL(pretrained=str(base), adapters={'tiny': fresh})
    with torch.no_grad():
        for i, (_, parameter) in enumerate(model.trainables()['tiny']):
            noise = torch.randn(parameter.shape, generator=rng.generator('tiny adapter', str(config['type']), i))
            parameter.add_(NOISE.get(config['type'], 0.02) * noise)
    model.adapters['tiny'].save(folder)
    return Path(folder)
