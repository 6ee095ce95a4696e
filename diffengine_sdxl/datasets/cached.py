"""CachedLatents: samples whose images `diffengine-sdxl cache` encoded once."""

import bisect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffengine_sdxl.datasets.base import MapDataset, Sample, Transforms
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.strict import fingerprint
from diffengine_sdxl.protocols import Components
from diffengine_sdxl.registry import DATASETS

#: Files of a cache: keys and texts of the rows, and which VAE and data set they come from.
ROWS, ORIGIN = 'rows.jsonl', 'origin.json'


@DATASETS.register_module()
class CachedLatents(MapDataset):
    """Rows of a cache: 'latents' [4, h, w], 'time_ids' [6], conditions as uint8 [C, H, W], and texts.

    A row of the first pass keeps the key of its source, so its noise and timesteps are those of the uncached run.
    Random transforms and the VAE's draw are those of the first epoch, in every epoch.

    Args:
        source: the folder.
        transforms: what may still change, such as CaptionDrop; see `SampleBuilder`.
        max_samples: see `SampleBuilder`.

    Raises:
        UserError: the folder is not a cache, or its files are damaged or don't fit together.
    """

    def __init__(self, source: str | Path, transforms: Transforms = (), max_samples: int | None = None) -> None:
        super().__init__(transforms, max_samples=max_samples)
        self.source, self.folder = str(source), Path(os.path.expanduser(source))
        if not (self.folder / ROWS).is_file() or not (self.folder / ORIGIN).is_file():
            raise UserError(f"'{source}' is not a cache: it lacks {ROWS} or {ORIGIN}. Write one with "
                            f'`diffengine-sdxl cache CONFIG {source}`.')
        rows = _read_rows(self.folder / ROWS)
        self.shards: list[Path] = sorted(self.folder.glob('*.safetensors'))
        #: Number of the first row after each shard.
        self.ends: list[int] = []
        num_latents = 0
        for path in self.shards:
            with _open_shard(path) as tensors:
                if 'latents' not in list(tensors.keys()):
                    raise UserError(f"The file '{path}' holds no latents, so it is not part of a cache. Remove it.")
                num_latents += tensors.get_slice('latents').get_shape()[0]
            self.ends.append(num_latents)
        # Checked before max_samples: without one shard, texts would be paired with other rows' latents.
        if not rows or len(rows) != num_latents:
            raise UserError(f"The cache '{source}' is incomplete: {len(rows)} rows of text, {num_latents} of latents. "
                            'Write it again.')
        self.rows = rows[:self.max_samples]
        self._open: dict[Path, Any] = {}

    def check_model(self, model: Components) -> None:
        """Check that `model` has the VAE that encoded the latents.

        Raises:
            UserError: its encoder or scaling factor differs, or the cache's record is damaged.
        """
        path = self.folder / ORIGIN
        with _reading(path):
            origin = json.loads(path.read_text(encoding='utf-8'))
            encoder, factor, vae = origin['encoder'], origin['scaling_factor'], origin['vae'] or origin['pretrained']
        if encoder != encoder_fingerprint(model) or factor != model.vae.config.scaling_factor:
            raise UserError(f"The cache '{self.source}' holds latents of another VAE ({vae}, scaling factor {factor}; "
                            f"the model's has {model.vae.config.scaling_factor}). Write the cache again.")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return str(self.rows[index]['key'])

    def caption_texts(self) -> Iterator[str]:
        """Yield the captions."""
        return (str(row['text']) for row in self.rows)

    def load(self, index: int, draw: Draw) -> Sample:
        shard = bisect.bisect_right(self.ends, index)
        path = self.shards[shard]
        if path not in self._open:  # opened in the worker that reads it: an open file cannot be pickled
            self._open[path] = _open_shard(path)
        tensors, row = self._open[path], index - (self.ends[shard - 1] if shard else 0)
        sample: Sample = {k: v for k, v in self.rows[index].items() if k != 'key'}
        for name in list(tensors.keys()):
            sample[name] = tensors.get_slice(name)[row]
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_open': {}}


def encoder_fingerprint(model: Components) -> str:
    """Return a digest of the weights of a model's VAE encoder."""
    return fingerprint(model.vae, ('encoder.', 'quant_conv.'))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with _reading(path), path.open(encoding='utf-8', newline='\n') as lines:
        rows = [json.loads(line) for line in lines]
        return [{**row, 'key': str(row['key']), 'text': row['text']} for row in rows]


def _open_shard(path: Path) -> Any:
    with _reading(path):
        return safe_open(path, framework='pt')


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Re-raise what a damaged file of a cache raises as UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"The cache file '{path}' cannot be read: {type(error).__name__}: {error}. Write the cache "
                        'again.') from error
