"""A contact sheet of an adapter at several scales, from the same noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from PIL import Image

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.commands.common import hide_loading_bars
from diffengine_sdxl.config import load, resolve
from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import first_image, labelled_grid, to_pil
from diffengine_sdxl.models.generate import ADAPTED, BASE, generate
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import DATASETS, MODELS
from diffengine_sdxl.structures import Batch


def run(args: Any, _: Any) -> None:
    """Write an adapter's contact sheet.

    Args:
        args: config, cfg_options, work_dir (of a training), adapter, scales.

    Raises:
        UserError: see `write_sheet`.
    """
    hide_loading_bars()
    write_sheet(load(args.config, args.cfg_options or ()), Path(args.work_dir), args.adapter, args.scales)


def scale_sheet(model: SDXL, batch: Batch, name: str, scales: Sequence[float], title: str = '') -> Image.Image:
    """Return a labelled grid, a row per sample: its condition, the base alone, and adapter `name` at each scale.

    Args:
        model: an SDXL with a sampler; its adapter's scale is restored.
        batch: B samples.
        scales: of the adapter.
        title: a line at the top.
    """
    adapter = model.adapters[name]
    columns: dict[str, list[Any]] = {}
    if adapter.condition_key in batch.conditions:
        columns[adapter.condition_key] = [first_image(image) for image in batch.conditions[adapter.condition_key]]
    columns['base alone'] = [sample['images'][BASE] for sample in generate(model, batch, (BASE,))]
    previous = adapter.scale
    try:
        for scale in scales:
            adapter.scale = float(scale)
            columns[f'{name} x {scale:g}'] = [sample['images'][ADAPTED]
                                              for sample in generate(model, batch, (ADAPTED,))]
    finally:
        adapter.scale = previous
    rows = [(prompt, [image if isinstance(image, Image.Image) else to_pil(image.float().cpu().numpy())
                      for image in (images[i] for images in columns.values())])
            for i, prompt in enumerate(batch.text)]
    return labelled_grid(rows, list(columns), title)


def write_sheet(config: Config, work_dir: Path, name: str, scales: Sequence[float], num_samples: int = 6) -> Path:
    """Write `work_dir`/contact_sheet.png of the last exported adapter `name` on the first test samples.

    Args:
        config: of the training, as `config.load.load` returns it, with a `test_dataloader`.

    Raises:
        UserError: nothing was exported there, the config has no such adapter, or something cannot be built.
    """
    from mmengine.device import get_device
    exports = {int(step[1]): path for path in work_dir.glob(f'step*/{name}')
               if (step := re.fullmatch(r'step(\d+)', path.parent.name))}
    if not exports or name not in (config.model.get('adapters') or {}):
        raise UserError(f"'{work_dir}' has no exported adapter '{name}' of this config; train it first.")
    weights = str(exports[max(exports)])
    cfg = resolve(config)
    if not cfg.get('test_dataloader'):
        raise UserError("The config has no 'test_dataloader', whose samples the contact sheet shows.")
    cfg.model.adapters[name].weights = weights
    model: SDXL = MODELS.build({**cfg.model, 'objective': None}).to(get_device()).eval()
    dataset: Any = DATASETS.build(cfg.test_dataloader.dataset)
    samples = [dataset[Draw(i, 0, 0)] for i in range(min(num_samples, len(dataset)))]
    batch = model.data_preprocessor(collate(samples))['inputs']
    batch.seed = torch.arange(len(batch))
    path = work_dir / 'contact_sheet.png'
    with torch.no_grad(), replacing(path) as temporary:
        scale_sheet(model, batch, name, scales, f"'{weights}'").save(temporary, format='PNG')
    return path
