"""Prompts from a file, a row each: text, JSON lines or a table. A broken row is told by its line; the others go on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffengine_sdxl.datasets.images import is_url
from diffengine_sdxl.engine.inference.request import CORNERS, REFINER, ROWS, SIZES, TEXTS, Request
from diffengine_sdxl.registry import nearest

KEYS = tuple(f.name for f in fields(Request))
#: Keys whose columns in a table may go deeper: 'scales.style'.
NESTED = ('conditions', 'scales', 'windows', 'refiner')
#: Cells that are taken as they are written.
WRITTEN = (*TEXTS, 'name', 'syntax')
#: Cells that hold several numbers, with or without brackets.
SEVERAL = (*SIZES, *CORNERS, 'timesteps', 'sigmas')


@dataclass(frozen=True)
class Row:
    """One row of a prompt file.

    Attributes:
        number: of the line in which it begins, from 1 on, as an editor shows it.
        settings: keys of `Request`, with the paths of pictures absolute; empty where there is an error.
        error: a sentence with the line and what is wrong there, or None.
    """

    number: int
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_prompts(path: str | Path, defaults: Mapping[str, Any] | None = None) -> list[Row]:
    """The rows of a prompt file, in UTF-8.

    - .txt: a prompt a line; empty lines and those that begin with '#' are passed over.
    - .jsonl: an object a line, with Request's keys.
    - .csv: the first line names Request's keys, with dots for what lies deeper ('conditions.depth', 'scales.style',
      'refiner.strength'); pairs as 1024,768 (in quotes) or [1024, 768]; '|' between several pictures; an empty cell is
      not given.

    Paths of pictures and latents begin at the file's folder and must stay in it; links in it are followed, and http(s)
    addresses are taken.

    Args:
        path: of the file.
        defaults: what else is asked for, from the command line: a row is checked together with it.

    Raises:
        ValueError: no such file, another suffix, nothing in it, not UTF-8, or a header that cannot be right.
    """
    path = Path(path)
    readers: dict[str, Callable[[str, str], Iterator[tuple[int, Any]]]] = {
        '.txt': _lines, '.jsonl': _objects, '.csv': _table}
    if path.suffix.lower() not in readers:
        raise ValueError(f"'{path}' is no prompt file: its name must end in .txt (a prompt a line), .jsonl or .csv.")
    text = _text(path)
    rows = [_row(number, found, path, defaults or {})
            for number, found in readers[path.suffix.lower()](text, str(path))]
    if not rows:
        raise ValueError(f"'{path}' holds no prompts.")
    return rows


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"There is no prompt file '{path}'.")
    try:
        data = path.read_bytes()
        text = data.decode('utf-8-sig')
    except OSError as error:
        raise ValueError(f"The prompt file '{path}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise ValueError(f"'{path}' is not in UTF-8 (line {line}: {error.reason}); save it as UTF-8.") from error
    # Only what an editor counts as a line's end; str.splitlines knows six more.
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _row(number: int, found: Any, path: Path, defaults: Mapping[str, Any]) -> Row:
    """What a reader found (a dict, or an error) as a row."""
    try:
        if isinstance(found, ValueError):
            raise found
        settings = {key: value for key, value in found.items() if value is not None}
        folder = Path(os.path.abspath(path.parent))
        for key in (*ROWS, 'conditions'):
            if key in settings:
                settings[key] = _placed(key, settings[key], folder)
        Request.of(defaults, settings)
    except ValueError as error:
        return Row(number, error=f"line {number} of '{path}': {error}")
    return Row(number, settings)


def _placed(key: str, value: Any, folder: Path) -> Any:
    """`value` with each path in it absolute.

    Raises:
        ValueError: it is none, leads out of `folder`, or nothing is there.
    """
    if isinstance(value, Mapping):
        return {name: _placed(f'{key}.{name}', part, folder) for name, part in value.items()}
    if isinstance(value, list) and (key in ROWS or key.startswith('conditions.')):
        return [_placed(f'{key}.{i}', part, folder) for i, part in enumerate(value)]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{key}={value!r} must be a path or an http(s) address.')
    if is_url(value):
        return value
    if '://' in value:
        raise ValueError(f"{key}='{value}': only http and https addresses are fetched.")
    # By its letters, as datasets.images.ImageReader: a prompt file may be a stranger's, links in its folder are not.
    place = Path(os.path.abspath(folder / value))
    if not place.is_relative_to(folder):
        raise ValueError(f"{key}='{value}' leads out of the file's folder, '{folder}'.")
    if not place.is_file():
        raise ValueError(f"{key}='{value}': there is no file '{place}'.")
    return str(place)


def _lines(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip() and not line.startswith('#'):
            yield number, {'prompt': line.strip()}


def _objects(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_once)
            yield number, found if isinstance(found, dict) else ValueError(
                f'a {type(found).__name__} where an object {{"prompt": ...}} is expected.')
        except json.JSONDecodeError as error:
            yield number, ValueError(f'not JSON: {error.msg} at column {error.colno}.')
        except (ValueError, RecursionError) as error:  # a key twice, a number of 5000 digits, brackets without end
            yield number, ValueError(str(error))


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"'{next(k for k in keys if keys.count(k) > 1)}' stands there twice.")
    return dict(pairs)


def _table(text: str, path: str) -> Iterator[tuple[int, Any]]:
    lines = [f'{line}\n' for line in text.split('\n')]
    header: list[str] | None = None
    before, reader = 0, _reader(lines)
    while True:
        number = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise ValueError(f"The header of '{path}' cannot be read: {error}.") from error
            yield number, ValueError(f'{error}. A cell that begins with a quote must end with one; a quote in it is '
                                     'written twice.')
            # A quote that nothing closes has swallowed lines that may be rows of their own.
            before, reader = number, _reader(lines[number:])
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, path)
        elif len(cells) != len(header):
            yield number, ValueError(f'{len(cells)} cells under {len(header)} columns; a text with a comma must stand '
                                     'in quotes.')
        else:
            yield number, _settings(header, cells)


def _reader(lines: Sequence[str]) -> Any:
    # strict: a quote that nothing closes is an error, and does not take the rest of the file as a prompt.
    return csv.reader(lines, strict=True, skipinitialspace=True)


def _check_header(header: Sequence[str], path: str) -> None:
    """Refuse columns that a table cannot have.

    Raises:
        ValueError: names the column.
    """
    if len(header) == 1 and (mark := next((m for m in ';\t' if m in header[0]), None)):
        raise ValueError(f"The columns of '{path}' are parted by {mark!r}; a .csv has commas.")
    for column in header:
        key, dot, rest = column.partition('.')
        if key not in KEYS or dot and key not in NESTED:
            raise ValueError(f"Column '{column}' of '{path}' is nothing that can be asked for."
                             f'{nearest(key, list(KEYS))} The first line names the columns.')
        if dot and not rest:
            raise ValueError(f"Column '{column}' of '{path}' lacks a name behind the dot.")
        if key == 'refiner' and rest and rest not in REFINER:
            raise ValueError(f"Column '{column}' of '{path}' is nothing that the refiner can be told."
                             f'{nearest(rest, list(REFINER))}')
        if header.count(column) > 1 or dot and key in header:
            raise ValueError(f"Column '{column if header.count(column) > 1 else key}' of '{path}' says the same as "
                             f"another; keep one of them.")


def _settings(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        if cell.strip():
            key, dot, rest = column.partition('.')
            place = settings.setdefault(key, {}) if dot else settings
            place[rest if dot else key] = _value(key, rest, cell.strip())
    return settings


def _value(key: str, rest: str, cell: str) -> Any:
    """What a cell says; one that cannot be read stays text, which `Request.of` refuses by its key."""
    if key in ROWS or key == 'conditions' and rest and not cell.startswith('{'):
        parts = [part.strip() for part in cell.split('|')]
        return parts if len(parts) > 1 else cell
    if (rest if key == 'refiner' else key) in WRITTEN:
        return cell
    several = (rest if key == 'refiner' else key) in SEVERAL or key == 'windows' and rest
    for text in (cell, f'[{cell}]') if several else (cell,):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    return cell
