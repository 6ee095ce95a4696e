"""`diffengine-sdxl data CONFIG`: report on the training data of a config."""

from __future__ import annotations

from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.config import load, resolve
from diffengine_sdxl.datasets.report import describe_data
from diffengine_sdxl.engine.data_report import caption_limit
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.loading.base import load_tokenizers
from diffengine_sdxl.registry import DATA_SAMPLERS, DATASETS

STOPPED = 'Stopped.'
#: Keys of the model that say where its tokenizers are.
SOURCES = ('pretrained', 'config', 'tokenizer', 'revision', 'cache_dir')


def run(args: Any, _: Any) -> None:
    """Print the report that a training prints before its first step. Of the base only the tokenizers are loaded.

    Args:
        args: config, cfg_options; as `cli` parses them.

    Raises:
        UserError: the config has no training data, these cannot be opened, or an image fits no bucket.
    """
    cfg = resolve(load(args.config, args.cfg_options or ()))
    limits.set_limits(cfg.get('limits') or {})
    loader = cfg.get('train_dataloader') or {}
    if not loader.get('dataset'):
        raise UserError(f"The config '{args.config}' has no `train_dataloader.dataset`, so there is nothing to report.")
    dataset: Any = DATASETS.build(loader['dataset'])
    model = cfg.get('model') or {}
    tokenizers = load_tokenizers(**{key: model.get(key) for key in SOURCES})
    limit = caption_limit(list(tokenizers.values()), int(model.get('caption_chunks') or 1))
    print(describe_data(dataset, limit), flush=True)
    sampler = loader.get('sampler') or {}
    if sampler.get('type') == 'BucketSampler':
        buckets = DATA_SAMPLERS.build({**sampler, 'dataset': dataset})
        accumulated = (cfg.get('optim_wrapper') or {}).get('accumulative_counts') or 1
        buckets.samples_per_step = whole_number('batch_size', loader.get('batch_size', 1), 1) * accumulated
        print(buckets.describe())
