"""Fill the cache of a config ahead of its training; show, verify or prune it."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader

from diffengine_sdxl import limits
from diffengine_sdxl.cache.samples import keep_samples
from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.cache.verify import Verifier, discard, prune
from diffengine_sdxl.commands.common import hide_loading_bars
from diffengine_sdxl.commands.launch import start_processes
from diffengine_sdxl.config import load, resolve
from diffengine_sdxl.datasets import Draw, KeyedSampler, collate
from diffengine_sdxl.engine.run_cache import open_store
from diffengine_sdxl.errors import UserError, listed, whole_number
from diffengine_sdxl.models.cache_plan import cache_plan
from diffengine_sdxl.registry import DATA_SAMPLERS, DATASETS, MODELS

STOPPED = 'Stopped; what was encoded is kept, and the same command goes on.'
OUT_OF_MEMORY = 'A smaller resolution may help; images are encoded one by one, whatever the batch size.'
#: Arguments of the loader that the command shares with training.
LOADER = ('num_workers', 'prefetch_factor', 'multiprocessing_context', 'timeout', 'worker_init_fn')


def run(args: Any, cleanup: Any) -> int:
    """Fill the cache, or show, verify or prune it.

    Args:
        args: config, folder, num_samples, verify, prune, show, launcher, cfg_options; as `cli` parses them.

    Returns:
        The exit code: 1 if entries were wrong.

    Raises:
        UserError: the config names no cache, has nothing that can be cached, or its parts cannot be built; or the
            cache cannot be written.
    """
    cfg = resolve(load(args.config, args.cfg_options or ()))
    limits.set_limits(cfg.get('limits') or {})
    if args.folder is not None:
        cfg.cache = args.folder
    if not cfg.get('cache'):
        raise UserError("The config names no cache. Add --folder F, or cache='F' to the config.")
    setting = cfg.cache
    folder = setting.get('folder') if isinstance(setting, dict) else setting
    exists = not isinstance(folder, str) or Path(folder).expanduser().exists()
    if not exists and (args.verify or args.show or args.prune is not None):
        raise UserError(f"There is no cache '{folder}'.")
    if args.launcher != 'none' and (args.verify or args.prune is not None):
        raise UserError('--verify and --prune work in one process; leave out --launcher.')
    num_samples = None if args.num_samples is None else whole_number('num_samples', args.num_samples, 1)
    start_processes(args.launcher, (cfg.get('env_cfg') or {}).get('dist_cfg'))

    @functools.cache
    def opened() -> Store:
        store: Any = open_store(cfg)
        cleanup.callback(store.close)
        if not (args.verify or args.show):
            _check_writable(store, 'filled' if args.prune is None else 'pruned')
        return store  # type: ignore[no-any-return]
    if exists:
        opened()  # a folder that cannot be used is said at once; a new one is made when all else is built
    if args.prune is not None:
        number, num_bytes = prune(opened(), args.prune)
        print(f'{number:,} files with {num_bytes / 2**20:,.1f} MiB are removed.')
    if args.prune is not None or args.show:
        print(opened().describe())
        return 0
    hide_loading_bars()
    if args.verify:
        return _verify(cfg, opened(), num_samples)
    encode(cfg, opened, num_samples)
    store = opened()
    store.close()
    rank, world = get_dist_info()
    share = f'Process {rank + 1} of {world}: ' if world > 1 else ''
    for kind, (hits, _) in sorted(store.counts.items()):
        print(f'{share}{kind}: {hits:,} were there, {store.written[kind]:,} are new.')
    _check_stopped(store)
    print(store.describe())
    return 0


def encode(config: Any, store: Store | Verifier | Callable[[], Store], num_samples: int | None = None) -> None:
    """Read the training data of a resolved config, every variant of each image, and put what `store` lacks.

    Of captions that a transform draws anew in each epoch, those of the epochs that are read.

    Args:
        store: or what opens it, called when data and model are built.
        num_samples: only the first ones of each epoch.

    Raises:
        UserError: the config lacks something, or its parts cannot be built; see `SDXL.encode_frozen`.
    """
    loader: Any = config.get('train_dataloader') or {}
    for key, setting in (('model', config.get('model')), ('train_dataloader.dataset', loader.get('dataset'))):
        if not setting:
            raise UserError(f"The config has no '{key}', so there is nothing to cache.")
    seed = int((config.get('randomness') or {}).get('seed') or 0)
    dataset: Any = DATASETS.build(loader.dataset)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, 'attach_cache'):
        raise UserError(f"A {type(dataset).__name__} cannot be read ahead; its training fills the cache as it goes, if "
                        'the config names one.')
    model: Any = MODELS.build({'seed': seed, **config.model, 'lazy_encoders': True}).to(get_device())
    sampler = DATA_SAMPLERS.build({'type': 'KeyedSampler', **(loader.get('sampler') or {}), 'dataset': dataset,
                                   'seed': seed})
    batches = functools.partial(_batches, dataset, sampler, num_samples, int(loader.get('batch_size') or 1))
    # Counted first: the number of batches depends on the buckets.
    total = sum(map(len, batches()))
    store = store() if callable(store) else store
    dataset.attach_cache(cache_plan(model, store))
    settings = {key: loader[key] for key in LOADER if loader.get(key) is not None}
    data: Any = DataLoader(dataset, batch_sampler=batches(), collate_fn=collate,  # type: ignore[arg-type]
                           pin_memory=torch.cuda.is_available(), **settings)
    _run(model, data, store, total)


def _run(model: Any, batches: Any, store: Store | Verifier, total: int) -> None:
    from rich.progress import Progress
    with Progress(disable=get_dist_info()[0] != 0) as progress:
        task = progress.add_task('Encoding', total=total)
        for collated in batches:
            num = len(collated['key'])
            keep_samples(collated, store)
            model.encode_frozen(model.data_preprocessor(collated)['inputs'])
            progress.advance(task, num)
            if getattr(store, 'stopped', None):  # the disk is full: the rest would be lost
                return


def _batches(dataset: Any, sampler: Any, num_samples: int | None, batch_size: int) -> Iterator[list[Draw]]:
    """Yield what this process reads, each batch of one shape."""
    rank, world = get_dist_info()
    waiting: dict[Any, list[Draw]] = {}
    for epoch in range(_num_epochs(dataset)):
        for draw in itertools.islice(_draws(sampler, epoch), rank, num_samples, world):
            batch = waiting.setdefault(draw.size, [])
            batch.append(draw)
            if len(batch) == batch_size:
                yield waiting.pop(draw.size)
    yield from waiting.values()


def _draws(sampler: Any, epoch: int) -> Iterator[Draw]:
    """Yield the draws of an epoch; of a sampler of another class, each row once."""
    if isinstance(sampler, KeyedSampler):
        return sampler.draws(epoch)
    return (Draw(index, epoch, getattr(sampler, 'seed', 0) or 0) for index in range(len(sampler)))


def _num_epochs(dataset: Any) -> int:
    """Return in how many epochs all variants of every row are read."""
    sets = getattr(dataset, 'sets', None)
    if sets is None:
        return getattr(dataset, 'variants', None) or 1
    needed = [len(part) * (getattr(part, 'variants', None) or 1) for part in sets.values()]
    if not hasattr(dataset, 'counts'):  # each epoch reads so many of each set
        return max(math.ceil(num / len(dataset)) for num in needed)
    shares = dataset.counts(1_000_000)
    return next(epochs for epochs in itertools.count(1) if all(
        read >= num or not share for read, num, share in zip(dataset.counts(epochs), needed, shares, strict=True)))


def _verify(config: Any, store: Store, num_samples: int | None) -> int:
    verifier = Verifier(store)
    encode(config, verifier, num_samples)
    _check_stopped(store)
    verifier.settle()
    print(f'Of the entries that this config reads, {len(verifier.right):,} are right, {len(verifier.wrong):,} are '
          f'wrong, {len(verifier.missing):,} are not in the cache.')
    for line in itertools.islice(verifier.wrong.values(), 20):
        print(line)
    if not verifier.wrong:
        return 1 if store.index.unreadable else 0
    if store.read_only:
        print('The cache is only read, so the wrong entries stay in it.')
    else:
        discard(store, verifier.wrong)
        print(f'The wrong entries are removed: {listed(verifier.wrong, 3)}. The next training computes them again.')
    return 1


def _check_writable(store: Store, what: str) -> None:
    if store.read_only:
        fix = ('Set read_only=False.' if os.access(store.folder, os.W_OK) else
               'Its folder is not writable here; name another one in `cache`.')
        raise UserError(f"The cache '{store.folder}' is only read, so it cannot be {what}. {fix}")


def _check_stopped(store: Store) -> None:
    if store.stopped:
        raise UserError(f"The cache '{store.folder}' cannot be used any further: {store.stopped}. What is in it stays, "
                        'and the same command goes on.')
