"""Rows of Hugging Face `datasets`: hub id, saved folder, imagefolder, parquet, jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import MapDataset, OnBadImage, Sample, SampleMaker, Transform
from diffengine_sdxl.datasets.images import ImageReader
from diffengine_sdxl.datasets.sampler import Draw
from diffengine_sdxl.datasets.sources import open_source
from diffengine_sdxl.registry import DATASETS, nearest
from diffengine_sdxl.structures import Batch

TEXTS = {name for name in Batch.names() if name.endswith(('text', 'text_2'))}


class HFRows(SampleMaker):
    """What `HFDataset` and `HFStream` share: the source, its columns, and a row's way to a sample.

    Args:
        source: hub id, folder or file; see `sources.open_source`.
        split, name, data_files, cache_dir, revision: as `datasets.load_dataset` has them (`name`: the config).
        image_column: 'img' of the sample. The cell is an image, its bytes, a path or a URL (also in the others).
        conditioning_image_column: 'conditioning_image' of the sample; None where there is none.
        caption_column: 'text' of the sample; where a cell holds a list, a keyed draw takes one of it. None: ''.
        extra_columns: sample key -> column. Strings are text under a key that Batch has for text ('text_2',
            'negative_text', ...) and name a picture under any other; numbers and lists become tensors.
        max_samples: only the source's first so many rows.
        image_root: the folder that holds the images which rows name by a path: relative paths begin there, and no
            path may lead outside of it. By default the source's own folder; '/' allows every absolute path.
        transforms, on_bad_image: see `SampleMaker`.

    Raises:
        ValueError: the source cannot be opened or is empty, or a column is missing.
    """

    streaming = False

    def __init__(self, source: str | Path, split: str = 'train', name: str | None = None,
                 image_column: str = 'image', conditioning_image_column: str | None = 'conditioning_image',
                 caption_column: str | None = 'text', extra_columns: Mapping[str, str] | None = None,
                 transforms: Sequence[dict[str, Any] | Transform] = (), data_files: Any = None,
                 cache_dir: str | Path | None = None, revision: str | None = None, max_samples: int | None = None,
                 on_bad_image: OnBadImage = 'raise', image_root: str | Path | None = None) -> None:
        super().__init__(transforms, on_bad_image)
        self.source = str(source)
        cache = None if cache_dir is None else str(cache_dir)
        data = open_source(self.source, split, name, data_files, cache, revision, self.streaming)
        pictures = {'img': image_column, 'conditioning_image': conditioning_image_column}
        self.pictures = {key: column for key, column in pictures.items() if column is not None}
        self.caption_column = caption_column
        self.extra = dict(extra_columns or {})
        taken = {*self.pictures, 'text', 'key', 'epoch', 'seed', 'num_skipped'} & self.extra.keys()
        if taken:
            raise ValueError(f'extra_columns cannot write {sorted(taken)}: the sample has them already.')
        self.data = self._select(data, max_samples)
        self.images = ImageReader(image_root or _root(self.source), _caches(cache))

    def _select(self, data: Any, max_samples: int | None) -> Any:
        import datasets
        if not self.streaming and len(data) == 0:
            raise ValueError(f"The data set '{self.source}' is empty.")
        wanted = {f'{key}_column' if key != 'img' else 'image_column': column for key, column in self.pictures.items()}
        wanted |= {} if self.caption_column is None else {'caption_column': self.caption_column}
        wanted |= {f'extra_columns.{key}': column for key, column in self.extra.items()}
        columns = data.column_names or list(_first(data, self.source))
        for option, column in wanted.items():
            if column not in columns:
                raise ValueError(f"The data set '{self.source}' has no column '{column}' ({option}). Its columns are "
                                 f'{", ".join(map(repr, columns))}.{nearest(column, columns)}')
        for column, feature in (data.features or {}).items():
            # Our own reader decodes: `datasets` would not tell which row and column is broken.
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        data = data.with_format(None).select_columns(list(dict.fromkeys(wanted.values())))
        if max_samples is None:
            return data
        if max_samples < 1:
            raise ValueError(f'max_samples={max_samples} leaves no sample.')
        return data.take(max_samples) if self.streaming else data.select(range(min(max_samples, len(data))))

    def read(self, row: Mapping[str, Any], key: str, draw: Draw) -> Sample:
        """Pictures, text and extra entries of a row.

        Raises:
            BadImageError: a picture is unreadable.
            ValueError: a cell holds something of another kind.
        """
        def place(column: str) -> str:
            return f"Column '{column}' of row {key} of '{self.source}'"
        sample: Sample = {name: self.images(row[column], place(column)) for name, column in self.pictures.items()}
        sample['text'] = ''
        if self.caption_column is not None:
            keys = draw.seed, key, draw.epoch
            sample['text'] = _caption(row[self.caption_column], place(self.caption_column), keys)
        for name, column in self.extra.items():
            sample[name] = self._extra(name, row[column], place(column))
        return sample

    def _extra(self, name: str, value: Any, place: str) -> Any:
        if name in TEXTS:
            if not isinstance(value, str):
                raise ValueError(f'{place} holds a {type(value).__name__}, no text.')
            return value
        if isinstance(value, bool | int | float | list | np.ndarray):
            try:
                array = np.asarray(value)
                return torch.as_tensor(array.astype(np.float32) if array.dtype.kind == 'f' else array)
            except (TypeError, ValueError) as error:
                raise ValueError(f'{place} holds no numbers of one shape: {error}') from error
        return self.images(value, place)


@DATASETS.register_module()
class HFDataset(HFRows, MapDataset):
    """Numbered rows of Hugging Face `datasets`; the arguments are those of `HFRows`.

    A row's key is its number in the source's split. For a stream, use the type `HFStream`.
    """

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        """The row's number in the source's split: rows are only ever left out at the end."""
        return str(index)

    def load(self, index: int, draw: Draw) -> Sample:
        """See `HFRows.read`."""
        return self.read(self.data[index], self.key(index), draw)


def _caption(value: Any, place: str, key: tuple[rng.Key, ...]) -> str:
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        value = value[int(torch.randint(len(value), (), generator=rng.generator(*key, 'caption')))]
    if not isinstance(value, str):
        raise ValueError(f'{place} should hold a caption or a list of captions, but holds {value!r:.80}.')
    return value


def _first(data: Any, source: str) -> Mapping[str, Any]:
    for row in data:
        return row  # type: ignore[no-any-return]
    raise ValueError(f"The data set '{source}' is empty.")


def _root(source: str) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return path.absolute().parent if path.is_file() else None


def _caches(cache_dir: str | None) -> list[str]:
    import datasets
    from huggingface_hub import constants
    return [str(datasets.config.HF_DATASETS_CACHE), constants.HF_HUB_CACHE, *([cache_dir] if cache_dir else [])]
