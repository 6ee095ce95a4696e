"""The results of an evaluation: a table, JSON and CSV files, and a contact sheet of its first images."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import QUALIFIERS
from diffengine_sdxl.images import labelled_grid
from diffengine_sdxl.pages.numbers import format_number, format_p

#: image set (or difference of two) -> metric -> 'value' and the QUALIFIERS; None where a metric gives none.
Results = dict[str, dict[str, dict[str, float | int | None]]]
#: Qualifiers that are whole numbers.
WHOLE = ('num_samples', 'better')
#: The group of values whose metric names no image set, where there are several sets.
UNNAMED = 'all'
#: The contact sheet shows no more seeds than these.
MAX_SEEDS = 4
#: First columns of the table of images; a column for each metric follows.
SAMPLE_COLUMNS = ('key', 'seed', 'noise_seed', 'image_set', 'file', 'prompt')


def group_by_image_set(metrics: Mapping[str, Any], image_sets: Sequence[str]) -> Results:
    """Group mmengine's flat dict of metrics.

    Args:
        metrics: '<image set>/<metric>' -> value, and '.../low', '.../high', '.../num_samples'; with a metric's `prefix`
            in front, '<prefix>/<image set>/<metric>'. What is not a single number is left out.
        image_sets: those that were made.
    """
    numbers = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
    results: Results = {image_set: {} for image_set in image_sets}
    for name, value in numbers.items():
        head, _, last = name.rpartition('/')
        if last in QUALIFIERS and head in numbers:
            continue
        parts = name.split('/')
        at = next((i for i, part in enumerate(parts[:2]) if part in image_sets and i < len(parts) - 1), None)
        unnamed = image_sets[0] if len(image_sets) == 1 else UNNAMED
        image_set = unnamed if at is None else parts.pop(at)
        found = {qualifier: finite(numbers.get(f'{name}/{qualifier}')) for qualifier in QUALIFIERS}
        results.setdefault(image_set, {})['/'.join(parts)] = {
            'value': finite(value), **{q: int(n) if n is not None and q in WHOLE else n for q, n in found.items()}}
    return results


def _number(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a single number."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def finite(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


def table(results: Results) -> str:
    """Format `results` as lines of text."""
    rows: list[tuple[str, ...]] = [('image_set', 'metric', 'value', '95 % interval', 'images', 'p')]
    for image_set, metrics in results.items():
        for name, result in metrics.items():
            value, low, high = (format_number(result[key]) for key in ('value', 'low', 'high'))
            interval = 'not given' if result['low'] is None and result['high'] is None else f'{low} to {high}'
            count, p = result['num_samples'], result['p']
            rows.append((image_set, name, value, interval, '?' if count is None else str(count),
                         '' if p is None else format_p(p).removeprefix('= ')))
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]  # no difference was measured
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def save(path: Path, results: Results) -> None:
    """Write the JSON file atomically.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_files.replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + '\n')


def read(path: Path) -> Results:
    """Read what `save` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it.") from error


def save_table(path: Path, results: Results) -> None:
    """Write the numbers of `save` as a CSV file, atomically: a line for each image set and metric.

    Raises:
        UserError: it cannot be written.
    """
    _write_csv(path, ('image_set', 'metric', 'value', *QUALIFIERS), [
        {'image_set': image_set, 'metric': name, **result}
        for image_set, metrics in results.items() for name, result in metrics.items()])


def save_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line for each image as a CSV file, atomically.

    Args:
        rows: SAMPLE_COLUMNS and metric -> value; 'file' is relative to the folder of `path`, '' if it is not kept.

    Raises:
        UserError: it cannot be written.
    """
    _write_csv(path, list(dict.fromkeys([*SAMPLE_COLUMNS, *(name for row in rows for name in row)])), rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a header and `rows`; what a row lacks, and None, is empty. Floats are exact."""
    with atomic_files.replacing(path) as temporary, temporary.open('w', newline='', encoding='utf-8',
                                                                   errors='surrogateescape') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def read_samples(path: Path) -> list[dict[str, str]]:
    """Read what `save_samples` wrote: column -> text, '' where there is no value.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with path.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
        names = reader.fieldnames or []
        if tuple(names[:len(SAMPLE_COLUMNS)]) != SAMPLE_COLUMNS:
            raise csv.Error(f'its first line is not {",".join(SAMPLE_COLUMNS)}')
        if any(None in row or None in row.values() for row in rows):
            raise csv.Error('a line has more or fewer values than the first one')
    except csv.Error as error:
        raise UserError(f"'{path}' is damaged ({error}); remove it.") from error
    return rows


def step_files(folder: Path, suffix: str = '.json') -> dict[int, Path]:
    """Return step -> `step<N><suffix>` for the files in `folder`, in order of steps."""
    files = {int(name): p for p in folder.glob(f'step*{suffix}') if (name := p.name[4:-len(suffix)]).isdigit()}
    return dict(sorted(files.items()))


class SheetRow(NamedTuple):
    """A row of the contact sheet: the sample's position in the data, its prompt, column -> image."""

    position: int
    prompt: str
    images: dict[str, Image.Image]


def contact_sheet(rows: Iterable[SheetRow], columns: Sequence[str], title: str) -> Image.Image:
    """Draw the labelled grid of `rows`, in the data's order."""
    return labelled_grid([(row.prompt or '(no prompt)', [row.images.get(c) for c in columns])
                          for row in sorted(rows, key=lambda row: row.position)], columns, title)
