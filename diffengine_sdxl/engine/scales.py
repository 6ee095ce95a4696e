"""What an adapter does, at a glance: the same noise without it and at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffengine_sdxl.models.predictions import ADAPTED, BASE, predictions
from diffengine_sdxl.pictures import labelled_grid, to_pil
from diffengine_sdxl.structures import Batch


def scale_sheet(model: Any, batch: Batch, name: str, scales: Sequence[float], title: str = '') -> Image.Image:
    """A labelled grid: a row for each sample, with its condition, the base alone, and adapter `name` at each scale.

    Args:
        model: an SDXL with a sampler; its adapter's scale is afterwards what it was.
        batch: B samples.
        scales: of the adapter.
        title: a line at the top.
    """
    adapter = model.adapters[name]
    columns: dict[str, list[Any]] = {}
    if adapter.reads in batch.conditions:
        columns[adapter.reads] = list(batch.conditions[adapter.reads])
    columns['base alone'] = [made['images'][BASE] for made in predictions(model, batch, (BASE,))]
    held = adapter.scale
    try:
        for scale in scales:
            adapter.scale = float(scale)
            columns[f'{name} x {scale:g}'] = [made['images'][ADAPTED] for made in predictions(model, batch, (ADAPTED,))]
    finally:
        adapter.scale = held
    rows = [(prompt, [to_pil(images[i].float().cpu().numpy()) for images in columns.values()])
            for i, prompt in enumerate(batch.text)]
    return labelled_grid(rows, list(columns), title)
