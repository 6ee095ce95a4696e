"""Rows of a folder or a zip archive of images: its metadata files, or the images alone.

The layout is that of `datasets`' imagefolder: `metadata.jsonl`, `.csv` or `.parquet` with `file_name` and any
`*_file_name`, relative to the metadata file; without one, the images, and a label where folders are classes.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.datasets import archives
from diffengine_sdxl.datasets.files import SYSTEM_FILES, image_suffixes, read_regular
from diffengine_sdxl.errors import UserError

METADATA = ('metadata.jsonl', 'metadata.csv', 'metadata.parquet')
NUMBER = re.compile(r'\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*')


@dataclass
class Tree:
    """Files of a folder or an archive.

    Attributes:
        source: how errors name it.
        names: paths inside it, with '/', sorted.
        cell: a path inside -> what `ImageReader` reads.
        read: a path inside -> its bytes.
        used: the paths that `rows` used.
    """

    source: str
    names: Sequence[str]
    cell: Callable[[str], str]
    read: Callable[[str], bytes]
    used: set[str] = field(default_factory=set)


def folder_tree(folder: Path, names: Sequence[str]) -> Tree:
    """Return the tree of some files of a folder."""
    return Tree(str(folder), names, lambda name: str(folder / name),
                lambda name: read_regular(folder / name, 'metadata_bytes'))


def zip_tree(path: Path) -> Tree:
    """Return the tree of a zip archive, whose members are read where they are.

    Raises:
        UserError: it is damaged.
    """
    def read(name: str) -> bytes:
        with path.open('rb') as file:
            return archives.read_member([f'zip://{name}'], file)
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir() and not any(
                part.startswith('.') or part.lower() in SYSTEM_FILES for part in info.filename.split('/')))
    except archives.ERRORS as error:
        raise UserError(f"The archive '{path}' cannot be read, or is cut off: {error}.") from error
    return Tree(str(path), names, lambda name: f'zip://{name}::{path}', read)


def rows(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """Return the columns of all rows: 'image', what the metadata has, and 'label' where only folders tell classes.

    Raises:
        UserError: a metadata file is damaged, names a file outside, or has values of several types in one column.
    """
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    for tree in trees:
        normal = {unicodedata.normalize('NFC', name): name for name in tree.names}
        for name in tree.names:
            if posixpath.basename(name).lower() not in METADATA:
                continue
            tree.used.add(name)
            for line, record in _records(tree, name):
                place = f"'{tree.source}/{name}', {line}"
                row: dict[str, Any] = {}
                for key, value in record.items():
                    column = key
                    if key == 'file_name' or key.endswith('_file_name'):
                        column = key.removesuffix('file_name').removesuffix('_') or 'image'
                        value = None if value is None else _inside(tree, name, value, normal, place)
                    if column in row:
                        raise UserError(f"{place}: '{key}' and another key are both the column '{column}'.")
                    row[column] = value
                for column, value in row.items():
                    if column not in columns:
                        columns[column] = [None] * len(places)
                    columns[column].append(value)
                places.append(place)
                for values in columns.values():
                    values += [None] * (len(places) - len(values))
    if places:
        if 'image' not in columns:
            raise UserError(f"{places[0]}: no column 'file_name' names the images; it has "
                            f'{", ".join(map(repr, columns))}.')
        _check_types(columns, places)
        return columns
    return _without_metadata(trees)


def _without_metadata(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    suffixes = image_suffixes()
    images = [(tree, name) for tree in trees for name in tree.names if posixpath.splitext(name)[1].lower() in suffixes]
    for tree, name in images:
        tree.used.add(name)
    if not images:
        return {}
    folders = [posixpath.basename(posixpath.dirname(name)) for _, name in images]
    classes, depths = sorted({*folders}), {name.count('/') for _, name in images}
    labels = {'label': [classes.index(name) for name in folders]} if len(classes) > 1 and len(depths) == 1 else {}
    return {'image': [tree.cell(name) for tree, name in images], **labels}


def _inside(tree: Tree, metadata: str, value: Any, normal: dict[str, str], place: str) -> str:
    """Return the cell of a path in a metadata file."""
    if not isinstance(value, str) or not value:
        raise UserError(f'{place}: {value!r:.80} must be the path of a file.')
    name = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), value))
    if '://' in value or name.startswith('/') or name == '..' or name.startswith('../'):
        raise UserError(f"{place} names '{value}', outside of '{tree.source}'. Put the images there, or write a "
                        '.jsonl of another name with a column of paths, and set image_root.')
    # Names from macOS are decomposed, those that an editor writes are not.
    name = normal.get(unicodedata.normalize('NFC', name), name)
    tree.used.add(name)
    return tree.cell(name)


def _records(tree: Tree, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, record) of a metadata file."""
    where = f"'{tree.source}/{name}'"
    try:
        data = tree.read(name)
        if name.lower().endswith('.parquet'):
            yield from _parquet(data)
            return
        text = data.decode('utf-8-sig')
    except (UserError, UnicodeDecodeError, *archives.ERRORS) as error:
        raise UserError(f'{where} cannot be read, or is no UTF-8: {error}.') from error
    yield from (_csv if name.lower().endswith('.csv') else _json_lines)(text, where)


def _parquet(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        # Values that are repeated take no space in the file.
        if max(size, 8 * file.metadata.num_rows * file.metadata.num_columns) > limits.CURRENT.metadata_bytes:
            raise OSError('it unpacks to more than limits.metadata_bytes')
        yield from ((f'row {i}', record) for i, record in enumerate(
            record for batch in file.iter_batches() for record in batch.to_pylist()))
    except pyarrow.ArrowException as error:
        raise OSError(f'it is no parquet file, or is cut off: {error}') from error


def _json_lines(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        yield f'line {number}', json_object(line, f'{where}, line {number}')


def json_object(line: str, place: str) -> dict[str, Any]:
    """Return the object that a line of JSON holds.

    Raises:
        UserError: it holds none.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{place} is no JSON: {error.msg} at character {error.pos + 1}.') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{place} is no JSON: {error}.') from error
    if not isinstance(record, dict):
        raise UserError(f'{place} holds a {type(record).__name__}; a row is an object {{"column": value, ...}}.')
    return record


def _csv(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=''), strict=True)
    try:
        header = next(reader, [])
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise UserError(f'{where}, line {reader.line_num} is no CSV: {error}.') from error
    for number, line in lines:
        if len(line) != len(header):
            raise UserError(f'{where}, line {number} has {len(line)} fields, and the header {len(header)}. Quote texts '
                            'that have commas.')
    numeric = [all(not line[i] or NUMBER.fullmatch(line[i]) for _, line in lines) for i in range(len(header))]
    for number, line in lines:
        yield f'line {number}', {name: (float(cell) if is_number else cell) if cell else None
                                 for name, cell, is_number in zip(header, line, numeric, strict=True)}


def _check_types(columns: dict[str, list[Any]], places: Sequence[str]) -> None:
    """Check that each column has values of one type, which Arrow needs; its own error does not say where."""
    def kind(value: Any) -> str:
        return 'number' if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    for key, values in columns.items():
        first = next((i for i, value in enumerate(values) if value is not None), 0)
        for place, value in zip(places, values, strict=True):
            if value is not None and kind(value) != kind(values[first]):
                raise UserError(f"{place}: '{key}' is {value!r:.80}, a {kind(value)}; in {places[first]} it is a "
                                f'{kind(values[first])}.')
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError(f"{place}: '{key}' is {str(value)[:40]}, too large for a whole number of 64 bits.")
