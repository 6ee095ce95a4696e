"""Encode the training images of a config once, so that training can skip it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from safetensors.torch import save_file

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.commands.common import check_output_folder, hide_loading_bars
from diffengine_sdxl.config import load, resolve, to_plain
from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.datasets.cached import ORIGIN, ROWS, encoder_fingerprint
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import DATASETS, MODELS
from diffengine_sdxl.structures import Batch

#: Fields of a batch that are encoded here, or drawn anew when a row is read.
NOT_CACHED = ('img', 'latents', 'conditions', 'key', 'epoch', 'seed', 'size', 'num_skipped')
STOPPED = 'Stopped; nothing was written.'
OUT_OF_MEMORY = 'A smaller train_dataloader.batch_size or a smaller resolution may help.'


def run(args: Any, _: Any) -> None:
    """Encode training images.

    Args:
        args: config, folder, num_samples, cfg_options; as `cli` parses them.

    Raises:
        UserError: see `write_cache`.
    """
    cfg = load(args.config, args.cfg_options or ())
    hide_loading_bars()
    print(f'{write_cache(cfg, args.folder, args.num_samples)} samples are in {args.folder}.')


def write_cache(config: Config, folder: Path, num_samples: int | None = None, shard_size: int = 4096) -> int:
    """Write the latents of the train data set of `config` to `folder`, complete or not at all; return their number.

    Transforms run once, as in the first epoch of seed `randomness.seed` (default 0), and so does the VAE's sampling.
    Captions are stored before CaptionDrop, which training can still do.

    Args:
        config: as `config.load.load` returns it.
        folder: new or empty, or a cache to replace.
        num_samples: how many of the first rows; None for all. Beyond the data's length rows repeat, in other epochs and
            with keys of their own, so that training draws other noise for them.
        shard_size: samples in a file, rounded up to whole batches.

    Raises:
        UserError: the folder holds something else, the data or the model cannot be built, or the samples have
            something that cannot be cached.
    """
    for name, value in (('num_samples', num_samples), ('shard_size', shard_size)):
        if value is not None:
            whole_number(name, value, 1)
    folder = check_output_folder(folder, ORIGIN)
    cfg = resolve(config)
    loader: Any = cfg.get('train_dataloader') or {}
    for key, setting in (('model', cfg.get('model')), ('train_dataloader', loader),
                         ('train_dataloader.dataset', loader.get('dataset')),
                         ('train_dataloader.batch_size', loader.get('batch_size'))):
        if not setting:
            raise UserError(f"The config has no '{key}', so there is nothing to cache.")
    batch_size = whole_number('train_dataloader.batch_size', loader.batch_size, 1)
    seed = int((cfg.get('randomness') or {}).get('seed') or 0)
    dataset = _build_dataset(loader.dataset)
    model: SDXL = MODELS.build({'seed': seed, **cfg.model, 'adapters': {}, 'objective': None, 'sampler': None,
                                'trainable': []})
    if torch.cuda.is_available():
        model.cuda()
    total = num_samples or len(dataset)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        samples = (dataset[Draw(i % len(dataset), i // len(dataset), seed)] for i in range(total))
        _write(model, samples, total, batch_size, shard_size, temporary)
        origin = {'num_samples': total, 'seed': seed, 'pretrained': model.pretrained, 'vae': cfg.model.get('vae'),
                  'encoder': encoder_fingerprint(model), 'scaling_factor': model.vae.config.scaling_factor,
                  'dataset': to_plain(cfg)['train_dataloader']['dataset']}
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1) + '\n')
    return total


def _build_dataset(config: Any) -> Any:
    """Build the data set without CaptionDrop and JointDrop; changes `config`.

    Raises:
        UserError: its rows are not numbered, or each is several samples.
    """
    if 'instance' in config:
        raise UserError('The data set combines several (PriorPreservation); cache each with a config of its own.')
    config['transforms'] = [t for t in config.get('transforms') or ()
                            if str(t.get('type')).split('.')[-1] not in ('CaptionDrop', 'JointDrop')]
    dataset: Any = DATASETS.build(config)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError('A stream cannot be cached; use a data set with numbered rows (type HFDataset).')
    return dataset


@torch.no_grad()
def _write(model: SDXL, samples: Iterator[dict[str, Any]], total: int, batch_size: int, shard_size: int,
           folder: Path) -> None:
    from rich.progress import track
    shard: dict[str, list[torch.Tensor]] = {}
    with (folder / ROWS).open('w', encoding='utf-8') as rows:
        for start in track(range(0, total, batch_size), description='Encoding'):
            batch = model.data_preprocessor(collate(list(itertools.islice(samples, batch_size))))['inputs']
            rows.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in _texts(batch))
            for name, value in {'latents': model.latents(batch).float(), **_tensors(batch)}.items():
                shard.setdefault(name, []).append(value.cpu())
            end = start + len(batch)
            if end == total or end // shard_size > start // shard_size:
                save_file({k: torch.cat(v).contiguous() for k, v in shard.items()}, folder / f'{start:09d}.safetensors')
                shard.clear()


def _texts(batch: Batch) -> list[dict[str, str]]:
    """Return key and texts of each row."""
    texts = {name: value for name, value in vars(batch).items() if isinstance(value, list) and name not in NOT_CACHED}
    keys = [key if epoch == 0 else f'{key} (pass {epoch + 1})'
            for key, epoch in zip(batch.key, batch.epoch.tolist(), strict=True)]
    return [{'key': key, **{name: value[i] for name, value in texts.items()}} for i, key in enumerate(keys)]


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the other tensors of the rows, [B, ...]; conditions that are images as uint8.

    Raises:
        UserError: an image is not in [0, 1], or something is dropped.
    """
    if batch.drop:
        raise UserError(f'A transform drops {", ".join(map(repr, batch.drop))} in some rows, and a cache would drop '
                        'the same ones in every epoch. Leave it to the config that trains on the cache.')
    tensors = {name: value for name, value in vars(batch).items()
               if isinstance(value, torch.Tensor) and name not in NOT_CACHED}
    for name, value in batch.conditions.items():
        is_image = value.dim() == 4 and not name.endswith('_embeds')
        if is_image and not (value.min() >= 0 and value.max() <= 1):
            raise UserError(f"The condition '{name}' is in [{float(value.min()):.3g}, {float(value.max()):.3g}]; a "
                            'cache stores images in 8 bits, of values in [0, 1]. Scale it.')
        tensors[name] = value.mul(255).round().to(torch.uint8) if is_image else value
    return tensors
