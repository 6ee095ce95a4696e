"""What an evaluation found: numbers by variant, as a table and as JSON; and a contact sheet of its first pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.pictures import labelled_grid

#: variant -> metric -> 'value', 'low', 'high' (its 95 % interval), 'num_samples'; None for what a metric left out.
Numbers = dict[str, dict[str, dict[str, float | int | None]]]
#: What a metric says of its value, as the last part of a name.
PARTS = ('low', 'high', 'num_samples')
#: Where values go whose metric named no variant, though several were made.
UNNAMED = 'all'
#: More seeds than these would make a sheet that nobody can read.
MAX_SEEDS = 4


def grouped(flat: Mapping[str, Any], variants: Sequence[str]) -> Numbers:
    """mmengine's flat dict of metrics, by variant.

    Args:
        flat: '<variant>/<metric>' -> value, and '.../low', '.../high', '.../num_samples'; with a metric's `prefix` in
            front, '<prefix>/<variant>/<metric>'. What is no number is left out.
        variants: those that were made.
    """
    numbers = {name: number for name, value in flat.items() if (number := _number(value)) is not None}
    groups: Numbers = {variant: {} for variant in variants}
    for name, value in numbers.items():
        head, _, last = name.rpartition('/')
        if last in PARTS and head in numbers:
            continue
        parts = name.split('/')
        at = next((i for i, part in enumerate(parts[:2]) if part in variants and i < len(parts) - 1), None)
        unnamed = variants[0] if len(variants) == 1 else UNNAMED
        variant = unnamed if at is None else parts.pop(at)
        given = {part: numbers.get(f'{name}/{part}') for part in PARTS}
        count = given['num_samples']
        groups.setdefault(variant, {})['/'.join(parts)] = {
            'value': _finite(value), 'low': _finite(given['low']), 'high': _finite(given['high']),
            'num_samples': None if count is None else int(count)}
    return groups


def _number(value: Any) -> float | None:
    """`value` as a float, or None for what is no single number."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _finite(value: float | None) -> float | None:
    """JSON has no word for NaN."""
    return value if value is not None and math.isfinite(value) else None


def table(numbers: Numbers) -> str:
    """Lines of text: variant, metric, value, interval, samples."""
    rows = [('variant', 'metric', 'value', '95 % interval', 'samples')]
    for variant, metrics in numbers.items():
        for name, found in metrics.items():
            interval = 'not given' if found['low'] is None and found['high'] is None else (
                f'{_shown(found["low"])} to {_shown(found["high"])}')
            count = found['num_samples']
            rows.append((variant, name, _shown(found['value']), interval, '?' if count is None else str(count)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _shown(value: float | int | None) -> str:
    if value is None:
        return 'none'
    return f'{value:.4f}' if 1e-3 <= abs(value) < 1e5 or value == 0 else f'{value:.4g}'


def save(path: Path, numbers: Numbers) -> None:
    """Write the JSON, atomically.

    Raises:
        ValueError: it could not be written.
    """
    with checkpoint.replacing(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1) + '\n')


def read(path: Path) -> Numbers:
    """What `save` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is damaged ({error}); remove it.") from error


def step_files(folder: Path) -> dict[int, Path]:
    """step -> `step<N>.json` of a folder, in order."""
    found = {int(p.stem[4:]): p for p in folder.glob('step*.json') if p.stem[4:].isdigit()}
    return dict(sorted(found.items()))


class Shown(NamedTuple):
    """A row of the contact sheet: the sample's place in the data, its prompt, column -> picture."""

    place: int
    prompt: str
    pictures: dict[str, Image.Image]


def sheet(rows: Iterable[Shown], columns: Sequence[str], title: str) -> Image.Image:
    """The labelled grid of `rows`, in the data's order."""
    return labelled_grid([(row.prompt or '(no prompt)', [row.pictures.get(c) for c in columns])
                          for row in sorted(rows, key=lambda row: row.place)], columns, title)
