"""Samples whose images were encoded once and for all: what `tools/cache.py` wrote."""

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffengine_sdxl.datasets.base import MapDataset, Sample, Transform
from diffengine_sdxl.datasets.sampler import Draw
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.weights import fingerprint

#: Words of the rows, and what says whose latents they are.
ROWS, ORIGIN = 'rows.jsonl', 'origin.json'


@DATASETS.register_module()
class CachedLatents(MapDataset):
    """Rows of a cache: 'latents' [4, h, w], 'time_ids' [6], every condition [C, H, W] in [0, 1], and text.

    A row of the first pass keeps the key of its source, so its noise and timesteps are those of the uncached run;
    random transforms and the VAE's own draw are those of the first epoch for ever.

    Args:
        source: the folder.
        transforms: of what is left to change, as CaptionDrop; see `SampleMaker`.
        max_samples: only the first so many.

    Raises:
        ValueError: the folder is no cache, its parts don't fit together, or max_samples leaves none.
    """

    def __init__(self, source: str | Path, transforms: Sequence[dict[str, Any] | Transform] = (),
                 max_samples: int | None = None) -> None:
        super().__init__(transforms, 'raise')
        self.source, folder = str(source), Path(source).expanduser()
        if not (folder / ROWS).is_file() or not (folder / ORIGIN).is_file():
            raise ValueError(f"'{source}' holds no {ROWS} and {ORIGIN}, so it is no cache; write one with `python "
                             f'tools/cache.py CONFIG {source}`.')
        if max_samples is not None and max_samples < 1:
            raise ValueError(f'max_samples={max_samples} leaves no sample.')
        rows = _rows(folder / ROWS)
        self.shards: list[Path] = sorted(folder.glob('*.safetensors'))
        #: Number of the first row after each shard.
        self.ends: list[int] = []
        for path in self.shards:
            with said_open(path) as tensors:
                if 'latents' not in list(tensors.keys()):
                    raise ValueError(f"The file '{path}' holds no latents, so it is no part of a cache. Take it away.")
                count = tensors.get_slice('latents').get_shape()[0]
            self.ends.append(count + (self.ends[-1] if self.ends else 0))
        # All rows, also where few are wanted: without one shard the others' latents would stand in the wrong rows.
        if not rows or len(rows) != (self.ends[-1] if self.ends else 0):
            raise ValueError(f"The cache '{source}' is incomplete: {len(rows)} rows of text, "
                             f'{self.ends[-1] if self.ends else 0} of latents. Write it again.')
        self.rows = rows[:max_samples]
        self._open: dict[Path, Any] = {}

    def check_model(self, model: Any) -> None:
        """Refuse to train `model` (an SDXL) on latents of another VAE.

        Raises:
            ValueError: its VAE's encoder or scaling factor is another.
        """
        origin = json.loads((Path(self.source).expanduser() / ORIGIN).read_text())
        factors = origin['scaling_factor'], model.vae.config.scaling_factor
        if origin['encoder'] != encoder_of(model) or factors[0] != factors[1]:
            whose = origin['vae'] or origin['pretrained']
            raise ValueError(f"The cache '{self.source}' holds latents of another VAE ({whose}, scaling factor "
                             f"{factors[0]}; the model's has {factors[1]}). Write the cache again.")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """The row's key in the data set that was cached."""
        return str(self.rows[index]['key'])

    def load(self, index: int, draw: Draw) -> Sample:
        """Tensors and words of row `index`; pictures are kept in 8 bits and come as floats in [0, 1]."""
        shard = bisect.bisect_right(self.ends, index)
        path = self.shards[shard]
        if path not in self._open:  # in the worker that reads it: an open file does not travel
            self._open[path] = said_open(path)
        tensors, row = self._open[path], index - (self.ends[shard - 1] if shard else 0)
        sample: Sample = {k: v for k, v in self.rows[index].items() if k != 'key'}
        for name in list(tensors.keys()):
            value = tensors.get_slice(name)[row]
            sample[name] = value.float() / 255 if value.dtype == torch.uint8 else value
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_open': {}}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding='utf-8', newline='\n') as lines:
            rows = [json.loads(line) for line in lines]
        return [{**row, 'key': str(row['key']), 'text': row['text']} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The cache file '{path}' cannot be read: {type(error).__name__}: {error}. Write the cache "
                         'again.') from error


def encoder_of(model: Any) -> str:
    """What tells the encoder of an SDXL's VAE from others."""
    return fingerprint(model.vae, ('encoder.', 'quant_conv.'))


def said_open(path: Path) -> Any:
    """`safe_open`, whose errors name the file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return safe_open(path, framework='pt')
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The cache file '{path}' cannot be read: {error}. Write the cache again.") from error
