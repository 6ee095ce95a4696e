"""The shapes world as files, in the columns of fusing/fill50k, for whatever reads those."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine_sdxl.datasets import Draw, Shapes
from diffengine_sdxl.engine.checkpoint import replacing

#: What says that a folder was written here, and of what; `datasets` passes over hidden files.
MARK = '.shapes.json'
#: Columns that hold pictures, the keys of a sample that they come from, and the folders of their files.
PICTURES = {'image': ('img', 'images'), 'conditioning_image': ('conditioning_image', 'conditioning_images'),
            'reference': ('reference', 'references')}
#: Rows of a parquet file that are held in memory.
CHUNK = 1000

Row = dict[str, Any]


def write_shapes(data: Shapes, folder: Path, form: str = 'imagefolder') -> int:
    """Write all rows of `data` to `folder`, whole or not at all; their number.

    `HFDataset(source=folder)` reads it, and gives bitwise the pictures and captions of `data`. The columns: 'image',
    'conditioning_image' and 'reference' (PNG) where `data` has them, 'text', and all of `Scene.facts`.

    Args:
        data: without oversize, so that a row is the same in every epoch; its transforms don't act.
        folder: new or empty, or one that this function wrote, which is replaced.
        form: 'imagefolder' (files and metadata.jsonl) or 'parquet' (data.parquet).

    Raises:
        ValueError: the folder holds something else, the form is not known, there is no room, or `data` has oversize.
    """
    if form not in FORMS:
        raise ValueError(f"format='{form}' is not known; choose {' or '.join(map(repr, FORMS))}.")
    if data.oversize:
        raise ValueError(f'Shapes: oversize={data.oversize} draws other sizes in every epoch, which files cannot; set '
                         'it to 0.')
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder / MARK).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"'{folder}' exists and holds something else; name another folder.")
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        from rich.progress import track
        rows = track((_row(data, i) for i in range(len(data))), 'Drawing', total=len(data))
        FORMS[form](iter(rows), temporary)
        facts = {'format': form, 'length': len(data), **{k: getattr(data, k) for k in (
            'seed', 'split', 'size', 'conditioning', 'styles', 'combinations', 'reference')}}
        (temporary / MARK).write_text(json.dumps(facts, indent=1) + '\n')
    return len(data)


def _row(data: Shapes, index: int) -> Row:
    """Columns of row `index`; pictures as the bytes of a PNG."""
    sample = data.load(index, Draw(index, 0, data.seed))
    pictures = {column: _png(sample[key]) for column, (key, _) in PICTURES.items() if key in sample}
    return {**pictures, 'text': sample['text'], **data.scene(index).facts}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def _imagefolder(rows: Iterator[Row], folder: Path) -> None:
    """As `testing.write_circles` does; source: the page "Create an image dataset" of the docs of `datasets`."""
    with (folder / 'metadata.jsonl').open('w', encoding='utf-8') as metadata:
        for number, row in enumerate(rows):
            words = {}
            for column in [c for c in PICTURES if c in row]:
                name = f'{PICTURES[column][1]}/{number:06d}.png'
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(row.pop(column))
                words['file_name' if column == 'image' else f'{column}_file_name'] = name
            metadata.write(json.dumps({**words, **row}) + '\n')


def _parquet(rows: Iterator[Row], folder: Path) -> None:
    """One file, with the features that `datasets` reads pictures by."""
    import datasets
    from pyarrow import parquet
    first = next(rows)
    kinds = {bool: 'bool', int: 'int64', float: 'float64', str: 'string'}
    features = datasets.Features({column: datasets.Image() if column in PICTURES else datasets.Value(kinds[type(value)])
                                  for column, value in first.items()})
    rows = itertools.chain([first], rows)
    with parquet.ParquetWriter(folder / 'data.parquet', features.arrow_schema) as writer:
        while chunk := list(itertools.islice(rows, CHUNK)):
            cells = [{column: {'bytes': value, 'path': None} if column in PICTURES else value
                      for column, value in row.items()} for row in chunk]
            writer.write_table(datasets.Dataset.from_list(cells, features=features).with_format('arrow')[:])


#: Form -> what writes rows in it.
FORMS: dict[str, Callable[[Iterator[Row], Path], None]] = {'imagefolder': _imagefolder, 'parquet': _parquet}
