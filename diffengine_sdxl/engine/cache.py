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
from diffengine_sdxl.datasets.cached import ORIGIN, ROWS, encoder_of
from diffengine_sdxl.engine.checkpoint import replacing
from diffengine_sdxl.engine.config import resolve, to_plain
from diffengine_sdxl.registry import DATASETS, MODELS
from diffengine_sdxl.structures import Batch

#: Of a batch, what is encoded here, or drawn anew whenever a row is read.
NOT_KEPT = ('img', 'latents', 'conditions', 'key', 'epoch', 'seed', 'size', 'num_skipped')


def write_cache(config: Config, folder: Path, num_samples: int | None = None, shard_size: int = 4096) -> int:
    """Write the latents of the train data set of `config` to `folder`, whole or not at all; the number of samples.

    Transforms act once, as in the first epoch of seed `randomness.seed` (0 if none is given), and so does the VAE's
    draw; captions are taken before anything drops them, since training can still do that (CaptionDrop is left out).

    Args:
        config: as `engine.config.load` gives it.
        folder: new or empty, or a cache to replace.
        num_samples: of the first rows; None for all. Beyond the data's length it is passed again, in other epochs and
            under keys of their own, so that training draws other noise for them.
        shard_size: samples in a file, rounded up to whole batches.

    Raises:
        ValueError: the folder holds something else, the data or the model cannot be built, or the samples hold
            something that a cache cannot.
    """
    for name, value in (('num_samples', num_samples), ('shard_size', shard_size)):
        if value is not None and value < 1:
            raise ValueError(f'{name}={value} must be at least 1.')
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder / ORIGIN).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"'{folder}' exists and is no cache; name another folder.")
    cfg = resolve(config)
    for key in ('model', 'train_dataloader'):
        if not cfg.get(key):
            raise ValueError(f"The config has no '{key}', so there is nothing to cache.")
    seed = int((cfg.get('randomness') or {}).get('seed') or 0)
    for key in ('dataset', 'batch_size'):
        if not cfg.train_dataloader.get(key):
            raise ValueError(f"The config has no 'train_dataloader.{key}', so there is nothing to cache.")
    data: Any = cfg.train_dataloader.dataset
    if 'instance' in data:
        raise ValueError('The data set is several in one (PriorPreservation); cache each by a config of its own.')
    data['transforms'] = [t for t in data.get('transforms') or ()
                          if str(t.get('type')).split('.')[-1] not in ('CaptionDrop', 'JointDrop')]
    dataset: Any = DATASETS.build(data)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError('A stream cannot be cached; name a data set of numbered rows (type HFDataset).')
    model: Any = MODELS.build({'seed': seed, **cfg.model, 'adapters': {}, 'objective': None, 'sampler': None,
                               'trainable': []})
    if torch.cuda.is_available():
        model.cuda()
    total = num_samples or len(dataset)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        samples = (dataset[Draw(i % len(dataset), i // len(dataset), seed)] for i in range(total))
        _write(model, samples, total, cfg.train_dataloader.batch_size, shard_size, temporary)
        origin = {'num_samples': total, 'seed': seed, 'pretrained': model.pretrained, 'vae': cfg.model.get('vae'),
                  'encoder': encoder_of(model),
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
            rows.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in _words(batch))
            held.setdefault('latents', []).append(model.latents(batch).float().cpu())
            for name, value in _tensors(batch).items():
                held.setdefault(name, []).append(value.cpu())
            done = start + len(batch)
            if done == total or done // shard_size > start // shard_size:
                save_file({k: torch.cat(v).contiguous() for k, v in held.items()}, folder / f'{start:09d}.safetensors')
                held.clear()


def _words(batch: Batch) -> list[dict[str, str]]:
    """Key and texts of each row."""
    texts = {name: value for name, value in vars(batch).items() if isinstance(value, list) and name not in NOT_KEPT}
    keys = [key if epoch == 0 else f'{key} (pass {epoch + 1})'
            for key, epoch in zip(batch.key, batch.epoch.tolist(), strict=True)]
    return [{'key': key, **{name: value[i] for name, value in texts.items()}} for i, key in enumerate(keys)]


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """What a row holds besides its latents, [B, ...]; conditions that are pictures in 8 bits.

    Raises:
        ValueError: a picture is not in [0, 1], or something is dropped.
    """
    if batch.drop:
        raise ValueError(f'A transform drops {", ".join(map(repr, batch.drop))} in some rows, and a cache would drop '
                         'the same ones in every epoch. Leave it to the config that trains on the cache.')
    tensors = {name: value for name, value in vars(batch).items()
               if isinstance(value, torch.Tensor) and name not in NOT_KEPT}
    for name, value in batch.conditions.items():
        picture = value.dim() == 4 and not name.endswith('_embeds')
        if picture and not (value.min() >= 0 and value.max() <= 1):
            raise ValueError(f"The condition '{name}' lies in [{float(value.min()):.3g}, {float(value.max()):.3g}]; a "
                             'cache keeps pictures in 8 bits, as numbers in [0, 1]. Scale it.')
        tensors[name] = value.mul(255).round().to(torch.uint8) if picture else value
    return tensors
