"""Encode the images of a config's training data once, so that training need not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from safetensors.torch import save_file

from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.datasets.cached import ORIGIN, ROWS
from diffengine_sdxl.engine.checkpoint import replacing
from diffengine_sdxl.engine.config import resolve, to_plain
from diffengine_sdxl.registry import DATASETS, MODELS


def write_cache(config: Config, folder: Path, num_samples: int | None = None, shard_size: int = 4096) -> int:
    """Write the latents of the train data set of `config` to `folder`, whole or not at all; the number of samples.

    Transforms act once, as in the first epoch of seed `randomness.seed` (0 if none is given), and so does the VAE's
    draw; captions are taken before anything drops them, since training can still do that (CaptionDrop is left out).

    Args:
        config: as `engine.config.load` gives it.
        folder: new, or a cache to replace.
        num_samples: of the first rows; None for all. Beyond the data's length it is passed again, in other epochs.
        shard_size: samples in a file.

    Raises:
        ValueError: the folder holds something else, or the data or the model cannot be built.
    """
    if folder.exists() and not (folder / ORIGIN).is_file():
        raise ValueError(f"'{folder}' exists and is no cache; name another folder.")
    cfg = resolve(config)
    seed = int((cfg.get('randomness') or {}).get('seed') or 0)
    data: Any = cfg.train_dataloader.dataset
    data['transforms'] = [t for t in data.get('transforms') or () if t.get('type') != 'CaptionDrop']
    dataset: Any = DATASETS.build(data)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError('A stream cannot be cached; name a data set of numbered rows (type HFDataset).')
    model: Any = MODELS.build({**cfg.model, 'adapters': {}, 'objective': None, 'sampler': None, 'trainable': []})
    if torch.cuda.is_available():
        model.cuda()
    total = num_samples or len(dataset)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        samples = (dataset[Draw(i % len(dataset), i // len(dataset), seed)] for i in range(total))
        _write(model, samples, total, cfg.train_dataloader.batch_size, shard_size, temporary)
        origin = {'num_samples': total, 'seed': seed, 'pretrained': model.pretrained, 'vae': cfg.model.get('vae'),
                  'scaling_factor': model.vae.config.scaling_factor, 'dataset': to_plain(cfg)['train_dataloader']
                  ['dataset']}
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1) + '\n')
    return total


@torch.no_grad()
def _write(model: Any, samples: Iterator[dict[str, Any]], total: int, batch_size: int, shard_size: int,
           folder: Path) -> None:
    from rich.progress import track
    held: dict[str, list[torch.Tensor]] = {}
    with (folder / ROWS).open('w', encoding='utf-8') as rows:
        for start in track(range(0, total, batch_size), description='Encoding'):
            batch = model.data_preprocessor(collate(list(itertools.islice(samples, batch_size))))['inputs']
            for key, text in zip(batch.key, batch.text, strict=True):
                rows.write(json.dumps({'key': key, 'text': text}, ensure_ascii=False) + '\n')
            held.setdefault('latents', []).append(model.latents(batch).float().cpu())
            held.setdefault('time_ids', []).append(batch.time_ids.cpu())
            for name, value in batch.conditions.items():
                held.setdefault(name, []).append(value.mul(255).round().to(torch.uint8).cpu())
            done = start + len(batch)
            if done == total or done // shard_size > start // shard_size:
                save_file({k: torch.cat(v) for k, v in held.items()}, folder / f'{start:09d}.safetensors')
                held.clear()
