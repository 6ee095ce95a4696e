"""Write the shapes world to files, with the columns of fusing/fill50k."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.commands.common import check_output_folder
from diffengine_sdxl.datasets import Draw, Shapes
from diffengine_sdxl.errors import UserError, one_of

#: Marks a folder that was written here, with its settings; `datasets` ignores hidden files.
MARK = '.shapes.json'
#: Column of images -> key of a sample, and folder of its files.
IMAGES = {'image': ('img', 'images'), 'conditioning_image': ('conditioning_image', 'conditioning_images'),
          'reference': ('reference', 'references')}
#: Rows of a parquet file that are written at once.
CHUNK = 1000
STOPPED = 'Stopped; nothing was written.'

Row = dict[str, Any]


def run(args: Any, _: Any) -> None:
    """Write the shapes world.

    Args:
        args: folder, format, and the arguments of `datasets.Shapes`; as `cli` parses them.

    Raises:
        UserError: see `write_shapes` and `datasets.Shapes`.
    """
    data = Shapes(**{k: v for k, v in vars(args).items() if k not in ('folder', 'format')})
    print(f'{write_shapes(data, args.folder, args.format)} rows are in {args.folder}.')


def write_shapes(data: Shapes, folder: Path, form: str = 'imagefolder') -> int:
    """Write all rows of `data` to `folder`, complete or not at all; return their number.

    `HFDataset(source=folder)` reads the same images and captions, bitwise. Columns: 'image', 'conditioning_image' and
    'reference' (PNG) if `data` has them, 'text', and all of `Scene.facts`.

    Args:
        data: without oversize, so that a row is the same in every epoch; its transforms are not applied.
        folder: new or empty, or one that this function wrote, which is replaced.
        form: 'imagefolder' (files and metadata.jsonl) or 'parquet' (data.parquet).

    Raises:
        UserError: the folder holds something else, the form is unknown, the disk is full, or `data` has oversize.
    """
    one_of('format', form, FORMS)
    if data.oversize:
        raise UserError(f'Shapes: oversize={data.oversize} draws other sizes in every epoch, which files cannot '
                        'store; set it to 0.')
    folder = check_output_folder(folder, MARK)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        from rich.progress import track
        rows = track((_row(data, i) for i in range(len(data))), 'Drawing', total=len(data))
        FORMS[form](iter(rows), temporary)
        settings = {'format': form, 'length': len(data), **{k: getattr(data, k) for k in (
            'seed', 'split', 'size', 'conditioning', 'styles', 'combinations', 'reference')}}
        (temporary / MARK).write_text(json.dumps(settings, indent=1) + '\n')
    return len(data)


def _row(data: Shapes, index: int) -> Row:
    """Return the columns of row `index`; images as the bytes of a PNG."""
    sample = data.load(index, Draw(index, 0, data.seed))
    images = {column: _png(sample[key]) for column, (key, _) in IMAGES.items() if key in sample}
    return {**images, 'text': sample['text'], **data.scene(index).facts}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def _write_imagefolder(rows: Iterator[Row], folder: Path) -> None:
    """Follow the page "Create an image dataset" of the docs of `datasets`."""
    with (folder / 'metadata.jsonl').open('w', encoding='utf-8') as metadata:
        for number, row in enumerate(rows):
            names = {}
            for column in [c for c in IMAGES if c in row]:
                name = f'{IMAGES[column][1]}/{number:06d}.png'
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(row.pop(column))
                names['file_name' if column == 'image' else f'{column}_file_name'] = name
            metadata.write(json.dumps({**names, **row}) + '\n')


def _write_parquet(rows: Iterator[Row], folder: Path) -> None:
    """Write one file, with the features by which `datasets` recognizes images."""
    import datasets
    from pyarrow import parquet
    first = next(rows)
    types = {bool: 'bool', int: 'int64', float: 'float64', str: 'string'}
    features = datasets.Features({column: datasets.Image() if column in IMAGES else datasets.Value(types[type(value)])
                                  for column, value in first.items()})
    rows = itertools.chain([first], rows)
    with parquet.ParquetWriter(folder / 'data.parquet', features.arrow_schema) as writer:
        while chunk := list(itertools.islice(rows, CHUNK)):
            cells = [{column: {'bytes': value, 'path': None} if column in IMAGES else value
                      for column, value in row.items()} for row in chunk]
            writer.write_table(datasets.Dataset.from_list(cells, features=features).with_format('arrow')[:])


#: Format -> what writes rows in it.
FORMS: dict[str, Callable[[Iterator[Row], Path], None]] = {
    'imagefolder': _write_imagefolder, 'parquet': _write_parquet}
