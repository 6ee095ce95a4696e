"""HFDataset: numbered rows of a hub id, saved folder, imagefolder, parquet, jsonl or csv file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import MapDataset, OnBadImage, Sample, SampleBuilder, Transforms
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.image_files import ImageReader
from diffengine_sdxl.datasets.row_digests import FileDigest, content_digest
from diffengine_sdxl.datasets.sources import open_source, reading
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.structures import Batch

#: What a cell of numbers holds; a list may hold lists.
NUMBERS = (bool, int, float, list, np.ndarray)
TEXTS = {name for name in Batch.names() if name.endswith(('text', 'text_2'))}


class HFRows(SampleBuilder):
    """What `HFDataset` and `HFStream` share: the source, its columns, and the sample that is made of a row.

    Args:
        source: hub id, folder or file; see `sources.open_source`.
        split, name, data_files, cache_dir, revision: as in `datasets.load_dataset` (`name`: the config).
        image_column: 'img' of the sample. The cell is an image, its bytes, a path or a URL.
        conditioning_image_column: 'conditioning_image' of the sample, as `image_column`; None: no condition.
        caption_column: 'text' of the sample; of a list of captions, a keyed draw chooses one. None: ''.
        extra_columns: sample key -> column. Strings are text under a key that Batch has for text ('text_2',
            'negative_text', ...) and name an image under any other; numbers and lists become tensors.
        image_root: the folder of images that rows name by a path: relative paths begin there, and no path may lead
            outside of it. By default the source's own folder; '/' allows every absolute path.
        transforms, on_bad_image, max_samples, variants: see `SampleBuilder`.

    Raises:
        UserError: the source cannot be opened or is empty, or a column is missing.
    """

    streaming = False

    def __init__(self, source: str | Path, split: str = 'train', name: str | None = None,
                 image_column: str = 'image', conditioning_image_column: str | None = 'conditioning_image',
                 caption_column: str | None = 'text', extra_columns: Mapping[str, str] | None = None,
                 transforms: Transforms = (), data_files: Any = None, cache_dir: str | Path | None = None,
                 revision: str | None = None, max_samples: int | None = None, on_bad_image: OnBadImage = 'raise',
                 image_root: str | Path | None = None, variants: int | None = None) -> None:
        super().__init__(transforms, on_bad_image, max_samples, variants)
        self.source = str(source)
        cache = None if cache_dir is None else str(cache_dir)
        data = open_source(self.source, split, name, data_files, cache, revision, self.streaming)
        columns = {'img': image_column, 'conditioning_image': conditioning_image_column}
        self.image_columns = {key: column for key, column in columns.items() if column is not None}
        self.caption_column = caption_column
        self.extra_columns = dict(extra_columns or {})
        reserved = {*self.image_columns, 'text', 'key', 'epoch', 'seed', 'num_skipped'} & self.extra_columns.keys()
        if reserved:
            raise UserError(f'extra_columns cannot write {sorted(reserved)}: every sample has them already.')
        self.data = self._select(data)
        folder = _folder_of(self.source)
        # Rows of a local folder may not name what `datasets` stored of other data sets.
        self.read_image = ImageReader(image_root or folder, _caches(self.source, cache) if folder is None else [],
                                      None if folder else self.source)

    def _select(self, data: Any) -> Any:
        """Keep the columns and rows that are used."""
        import datasets
        with reading(self.source):
            columns = data.column_names or list(next(iter(data), {}))
        if not columns or not self.streaming and len(data) == 0:
            raise UserError(f"The data set '{self.source}' is empty.")
        options = {'image_column' if key == 'img' else f'{key}_column': c for key, c in self.image_columns.items()}
        options |= {} if self.caption_column is None else {'caption_column': self.caption_column}
        options |= {f'extra_columns.{key}': column for key, column in self.extra_columns.items()}
        for option, column in options.items():
            if column not in columns:
                raise UserError(f"The data set '{self.source}' has no column '{column}' ({option}). Its columns are "
                                f'{", ".join(map(repr, columns))}.{did_you_mean(column, columns)}')
        for column, feature in (data.features or {}).items():
            # ImageReader decodes: errors of `datasets` would not tell which row and column is broken.
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        data = data.with_format(None).select_columns(list(dict.fromkeys(options.values())))
        if self.max_samples is None:
            return data
        return data.take(self.max_samples) if self.streaming else data.select(range(min(self.max_samples, len(data))))

    def image_cells(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a row holds of each image, by the image's key in the sample."""
        extra = {name: column for name, column in self.extra_columns.items()
                 if name not in TEXTS and not isinstance(row[column], NUMBERS)}
        return {name: row[column] for name, column in {**self.image_columns, **extra}.items()}

    def read_images(self, row: Mapping[str, Any], key: str) -> Sample:
        """Return the images of a row.

        Raises:
            BadImageError: an image is unreadable.
            UserError: a cell holds a value of another type.
        """
        return {name: self.read_image(cell, self._place(name, key)) for name, cell in self.image_cells(row).items()}

    def read_texts(self, row: Mapping[str, Any], key: str, draw: Draw) -> Sample:
        """Return the caption of a row, and the extra entries that are no images.

        Raises:
            UserError: a cell holds a value of another type.
        """
        sample: Sample = {'text': ''}
        if self.caption_column is not None:
            generator = rng.generator(draw.seed, key, draw.epoch, 'caption')
            sample['text'] = _caption(row[self.caption_column], self._place('text', key), generator)
        for name, column in self.extra_columns.items():
            if name in TEXTS or isinstance(row[column], NUMBERS):
                sample[name] = _text_or_numbers(name, row[column], self._place(name, key))
        return sample

    def content_of(self, row: Mapping[str, Any], key: str, file_digest: FileDigest) -> dict[str, Any]:
        """Return what the images of a row are made of; see `cached.Row`."""
        return {name: content_digest(cell, self.read_image, self._place(name, key), file_digest)
                for name, cell in self.image_cells(row).items()}

    def _place(self, name: str, key: str) -> str:
        """Return how errors name the cell of an entry."""
        column = {'text': self.caption_column, **self.image_columns, **self.extra_columns}[name]
        return f"Column '{column}' of row {key} of '{self.source}'"


@DATASETS.register_module()
class HFDataset(HFRows, MapDataset):
    """Numbered rows of Hugging Face `datasets`; see `HFRows` for the arguments, `HFStream` for a stream.

    A row's key is its number in the source's split.
    """

    _last: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        return str(index)

    def caption_texts(self) -> Iterator[str]:
        """Yield the captions; of a row with several, all of them in one text."""
        if self.caption_column is not None:
            with reading(self.source):
                for value in self.data[self.caption_column]:
                    yield value if isinstance(value, str) else ' '.join(map(str, value if value is not None else ()))

    def images(self, index: int, draw: Draw) -> Sample:
        """Return the images."""
        return self.read_images(self._cells_of(index), self.key(index))

    def texts(self, index: int, draw: Draw) -> Sample:
        """Return the caption and the extra entries that are no images."""
        return self.read_texts(self._cells_of(index), self.key(index), draw)

    def cells(self, index: int) -> dict[str, Any]:
        """Return the undecoded cells of the images."""
        return self.image_cells(self._cells_of(index))

    def _cells_of(self, index: int) -> dict[str, Any]:
        """Return a row; the last one is kept, as a sample's images and texts are asked for one after the other."""
        last = self._last  # threads read sizes
        if last is None or last[0] != index:
            with reading(self.source):
                last = self._last = index, self.data[index]
        return last[1]


def _text_or_numbers(name: str, value: Any, what: str) -> Any:
    if name in TEXTS:
        if not isinstance(value, str):
            raise UserError(f'{what} holds a {type(value).__name__}, not text.')
        return value
    try:
        array = np.asarray(value)
        return torch.as_tensor(array.astype(np.float32) if array.dtype.kind == 'f' else array)
    except (TypeError, ValueError) as error:
        raise UserError(f'{what} does not hold numbers of one shape: {error}') from error


def _caption(value: Any, what: str, generator: torch.Generator) -> str:
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        value = value[int(torch.randint(len(value), (), generator=generator))]
    if not isinstance(value, str):
        raise UserError(f'{what} must hold a caption or a list of captions; it holds {value!r:.80}.')
    return value


def _folder_of(source: str) -> Path | None:
    path = Path(os.path.expanduser(source)).absolute()
    return path if path.is_dir() else path.parent if path.is_file() else None


def _caches(source: str, cache_dir: str | None) -> list[Path]:
    """Return where `datasets` puts the images of a source of the hub, or of files that the config names."""
    import datasets
    from huggingface_hub import constants
    return [Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / 'downloads',
            Path(datasets.config.DOWNLOADED_DATASETS_PATH),
            Path(constants.HF_HUB_CACHE) / f'datasets--{source.replace("/", "--")}']
