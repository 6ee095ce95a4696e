"""What an adapter does, at a glance: the same noise without it and at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from PIL import Image

from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.engine.checkpoint import replacing
from diffengine_sdxl.engine.config import resolve
from diffengine_sdxl.models.predictions import ADAPTED, BASE, predictions
from diffengine_sdxl.pictures import first_picture, labelled_grid, to_pil
from diffengine_sdxl.registry import DATASETS, MODELS
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
        columns[adapter.reads] = [first_picture(condition) for condition in batch.conditions[adapter.reads]]
    columns['base alone'] = [made['images'][BASE] for made in predictions(model, batch, (BASE,))]
    held = adapter.scale
    try:
        for scale in scales:
            adapter.scale = float(scale)
            columns[f'{name} x {scale:g}'] = [made['images'][ADAPTED] for made in predictions(model, batch, (ADAPTED,))]
    finally:
        adapter.scale = held
    rows = [(prompt, [image if isinstance(image, Image.Image) else to_pil(image.float().cpu().numpy())
                      for image in (images[i] for images in columns.values())])
            for i, prompt in enumerate(batch.text)]
    return labelled_grid(rows, list(columns), title)


def write_sheet(config: Config, work_dir: Path, name: str, scales: Sequence[float], num_samples: int = 6) -> Path:
    """Write `work_dir`/contact_sheet.png: the first test samples by the last exported adapter `name`; its path.

    Args:
        config: as `engine.config.load` gives it, that of the training, with a `test_dataloader`.

    Raises:
        ValueError: nothing was exported there, the config has no such adapter, or something cannot be built.
    """
    from mmengine.device import get_device
    exports = sorted(work_dir.glob(f'step*/{name}'), key=lambda path: int(path.parent.name[4:]))
    if not exports or name not in (config.model.get('adapters') or {}):
        raise ValueError(f"'{work_dir}' holds no exported adapter '{name}' of this config; train it first.")
    cfg = resolve(config)
    cfg.model.adapters[name].weights = str(exports[-1])
    model: Any = MODELS.build({**cfg.model, 'objective': None}).to(get_device()).eval()
    dataset: Any = DATASETS.build(cfg.test_dataloader.dataset)
    samples = [dataset[Draw(i, 0, 0)] for i in range(min(num_samples, len(dataset)))]
    batch = model.data_preprocessor(collate(samples))['inputs']
    batch.seed = torch.arange(len(batch))
    path = work_dir / 'contact_sheet.png'
    with torch.no_grad(), replacing(path) as temporary:
        scale_sheet(model, batch, name, scales, f"'{exports[-1]}'").save(temporary, format='PNG')
    return path
