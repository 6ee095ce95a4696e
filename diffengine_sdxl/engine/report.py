"""The results of an evaluation: a table, a JSON file, and a contact sheet of its first images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffengine_sdxl import atomic_files
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import labelled_grid

#: image set -> metric -> 'value', 'low', 'high' (its 95 % interval), 'num_samples'; None where a metric gives none.
Results = dict[str, dict[str, dict[str, float | int | None]]]
#: Last parts of a metric's name that qualify its value.
QUALIFIERS = ('low', 'high', 'num_samples')
#: The group of values whose metric names no image set, where there are several sets.
UNNAMED = 'all'
#: The contact sheet shows no more seeds than these.
MAX_SEEDS = 4


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
        low, high, count = (numbers.get(f'{name}/{qualifier}') for qualifier in QUALIFIERS)
        results.setdefault(image_set, {})['/'.join(parts)] = {
            'value': _finite(value), 'low': _finite(low), 'high': _finite(high),
            'num_samples': None if count is None else int(count)}
    return results


def _number(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a single number."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def _finite(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


def table(results: Results) -> str:
    """Format `results` as lines of text."""
    rows = [('image_set', 'metric', 'value', '95 % interval', 'samples')]
    for image_set, metrics in results.items():
        for name, result in metrics.items():
            interval = 'not given' if result['low'] is None and result['high'] is None else (
                f'{_format(result["low"])} to {_format(result["high"])}')
            count = result['num_samples']
            rows.append((image_set, name, _format(result['value']), interval, '?' if count is None else str(count)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _format(value: float | int | None) -> str:
    if value is None:
        return 'none'
    return f'{value:.4f}' if 1e-3 <= abs(value) < 1e5 or value == 0 else f'{value:.4g}'


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


def step_files(folder: Path) -> dict[int, Path]:
    """Return step -> `step<N>.json` for the files in `folder`, in order of steps."""
    files = {int(p.stem[4:]): p for p in folder.glob('step*.json') if p.stem[4:].isdigit()}
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
