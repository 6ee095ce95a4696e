"""Read prompts from a file: text, JSON lines or a table. An error in a row names its line; the other rows stand."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.commands.infer.bounds import check_bounds, check_pixels
from diffengine_sdxl.datasets.image_files import is_url
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.request import REFINER, ROWS, SETTINGS, Request, of_form
from diffengine_sdxl.settings import read_text

#: Keys that may be followed by a name in the columns of a table: 'scales.style'.
NESTED = of_form('dict')


@dataclass(frozen=True)
class Row:
    """One row of a prompt file.

    Attributes:
        number: of the line in which it begins, from 1, as an editor shows it.
        request: with absolute paths; None if there is an error.
        error: a sentence with the line and what is wrong there, or None.
    """

    number: int
    request: Request | None = None
    error: str | None = None


def read_prompts(path: str | Path, *defaults: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a prompt file in UTF-8.

    - .txt: a prompt per line; skips empty lines and those that begin with '#'.
    - .jsonl: an object per line, with Request's keys.
    - .csv: the first line names Request's keys, nested ones with a dot ('conditions.depth', 'scales.style',
      'refiner.strength'); pairs as 1024,768 (in quotes) or [1024, 768]; '|' between several images; an empty cell is
      not set.

    Paths of images and latents are relative to the file's folder and must stay in it; links in it are followed, and
    http(s) URLs are accepted. A row may ask for as much as a PNG may, see `limits`.

    Args:
        path: of the file.
        defaults: settings that a row is built on, see `Request.of`.

    Raises:
        UserError: the file is missing, not UTF-8, empty, too large, of another suffix, or has an invalid header.
    """
    path = Path(path)
    readers = {'.txt': _read_lines, '.jsonl': _read_objects, '.csv': _read_table}
    if path.suffix.lower() not in readers:
        raise UserError(f"'{path}' is not a prompt file: its "
                        'name must end in .txt (one prompt per line), .jsonl or .csv.')
    most = limits.CURRENT.prompt_file_rows
    contents = readers[path.suffix.lower()](_read_text(path), str(path))
    rows = [_row(number, content, path, defaults) for number, content in islice(contents, most)]
    if next(contents, None) is not None:
        raise UserError(f"'{path}' has more than {most} rows; split it, or raise limits.prompt_file_rows.")
    if not rows:
        raise UserError(f"'{path}' holds no prompts.")
    return rows


def _read_text(path: Path) -> str:
    most = limits.CURRENT.prompt_file_bytes
    if not path.is_file():  # a pipe or a device may never end
        kind = ': a pipe or a device is not read' if path.exists() and not path.is_dir() else ''
        raise UserError(f"There is no prompt file '{path}'{kind}.")
    try:
        with open(path, 'rb') as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise UserError(f"The prompt file '{path}' has more than {most} bytes; split it, or raise "
                            'limits.prompt_file_bytes.')
        text = data.decode('utf-8-sig')
    except OSError as error:
        raise UserError(f"The prompt file '{path}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(f"'{path}' is not in UTF-8 (line {line}: {error.reason}); save it as UTF-8.") from error
    # Only an editor's line ends; str.splitlines splits at six more characters.
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _row(number: int, content: dict[str, Any] | UserError, path: Path, defaults: Sequence[Mapping[str, Any]]) -> Row:
    """Build a row from the settings, or the error, of a reader."""
    try:
        if isinstance(content, UserError):
            raise content
        settings = {key: value for key, value in content.items() if value is not None}
        folder = Path(os.path.abspath(path.parent))
        for key in (*ROWS, 'conditions'):
            if key in settings:
                settings[key] = _absolute(key, settings[key], folder)
        request = Request.of(*defaults, settings)
        check_bounds(settings, 'a row')
        check_pixels(request, 'a row')
        return Row(number, request)
    except UserError as error:
        return Row(number, error=f"line {number} of '{path}': {error}")


def _absolute(key: str, value: Any, folder: Path) -> Any:
    """Return `value` with each path in it absolute.

    Raises:
        UserError: it is not a path, leads out of `folder`, or there is no such file.
    """
    if isinstance(value, Mapping):
        return {name: _absolute(f'{key}.{name}', part, folder) for name, part in value.items()}
    if isinstance(value, list) and (key in ROWS or key.startswith('conditions.')):
        return [_absolute(f'{key}.{i}', part, folder) for i, part in enumerate(value)]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{key}={value!r} must be a path or an http(s) URL.')
    if is_url(value):
        return value
    if '://' in value:
        raise UserError(f"{key}='{value}': only http and https URLs are fetched.")
    # By the text of the path, as datasets.image_files.ImageReader does: a prompt file may be untrusted, links in its
    # folder are not.
    absolute = Path(os.path.abspath(folder / value))
    if not absolute.is_relative_to(folder):
        raise UserError(f"{key}='{value}' leads out of the file's folder, '{folder}'.")
    if not absolute.is_file():
        raise UserError(f"{key}='{value}': there is no file '{absolute}'.")
    return str(absolute)


def _read_lines(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip() and not line.startswith('#'):
            yield number, {'prompt': line.strip()}


def _read_objects(text: str, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line, object_pairs_hook=_unique)
            yield number, content if isinstance(content, dict) else UserError(
                f'a {type(content).__name__} where an object {{"prompt": ...}} is expected.')
        except json.JSONDecodeError as error:
            yield number, UserError(f'not JSON: {error.msg} at column {error.colno}.')
        except (ValueError, RecursionError) as error:  # a repeated key, a number of 5000 digits, endless brackets
            yield number, UserError(str(error))


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise UserError(f"the key '{counts.most_common(1)[0][0]}' is repeated.")
    return dict(pairs)


def _read_table(text: str, path: str) -> Iterator[tuple[int, Any]]:
    lines = [f'{line}\n' for line in text.split('\n')]
    header: list[str] | None = None
    before, reader = 0, _csv_reader(lines)
    while True:
        number = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"The header of '{path}' cannot be read: {error}.") from error
            yield number, UserError(f'{error}. A cell that begins with a quote must end with one; '
                                    'double a quote in it.')
            # An unclosed quote has consumed lines that may be rows of their own.
            before, reader = number, _csv_reader(lines, number)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, path)
        elif len(cells) != len(header):
            yield number, UserError(f'{len(cells)} cells under {len(header)} columns; quote a text with a comma.')
        else:
            yield number, _settings(header, cells)


def _csv_reader(lines: Sequence[str], first: int = 0) -> Any:
    # strict: an unclosed quote is an error; otherwise the rest of the file would be one prompt.
    return csv.reader((lines[i] for i in range(first, len(lines))), strict=True, skipinitialspace=True)


def _check_header(header: Sequence[str], path: str) -> None:
    """Check the columns of a table.

    Raises:
        UserError: names the column.
    """
    if len(header) == 1 and (mark := next((m for m in ';\t' if m in header[0]), None)):
        raise UserError(f"The columns of '{path}' are separated by {mark!r}; use commas.")
    if len(header) > (most := limits.CURRENT.untrusted_entries):
        raise UserError(f"'{path}' has {len(header)} columns; at most {most} are read.")
    for column in header:
        key, dot, name = column.partition('.')
        if key not in SETTINGS or dot and key not in NESTED:
            raise UserError(f"Unknown column '{column}' in '{path}'.{did_you_mean(key, list(SETTINGS))} The first line "
                            'names the columns.')
        if dot and not name:
            raise UserError(f"Column '{column}' of '{path}' lacks a name after the dot.")
        if key == 'refiner' and name and name not in REFINER:
            raise UserError(f"Unknown refiner setting in column '{column}' of '{path}'."
                            f'{did_you_mean(name, REFINER)}')
        if header.count(column) > 1 or dot and key in header:
            raise UserError(f"Column '{column if header.count(column) > 1 else key}' of '{path}' repeats another; keep "
                            'one of them.')


def _settings(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | UserError:
    settings: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        if cell.strip():
            key, dot, name = column.partition('.')
            holder = settings.setdefault(key, {}) if dot else settings
            try:
                holder[name if dot else key] = _value(key, name, cell.strip())
            except UserError as error:
                return error
    return settings


def _value(key: str, name: str, cell: str) -> Any:
    """Return the value of a cell; one that cannot be parsed stays text, which `Request.of` refuses by its key."""
    if key in ROWS or key == 'conditions' and name and not cell.startswith('{'):
        parts = [part.strip() for part in cell.split('|')]
        return parts if len(parts) > 1 else cell
    kind = SETTINGS[name if key == 'refiner' and name else key].kind
    # A condition may be a dict of image and mask.
    form = kind.form if not name or key == 'refiner' or cell.startswith('{') else kind.inner
    return read_text(form, f'{key}.{name}' if name else key, cell)
