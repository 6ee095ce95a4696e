"""Read what a run left in its work_dir: whatever is missing, damaged or cut off is left out, and said."""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.literals import parse_literal
from diffengine_sdxl.pages.numbers import finite

#: Rows of a file with a line for each step that are read; of more, every second, third, ...
MAX_ROWS = 50_000


class WorkDir:
    """The files of a work_dir.

    Attributes:
        path: the folder, absolute.
        notes: sentences on files that could not be read, for the reader.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.notes: list[str] = []

    def inside(self, *parts: str) -> Path | None:
        """Return a file by its path in the folder; None if it is not there, or leads out of the folder."""
        try:
            path = self.path.joinpath(*parts).resolve()
            return path if path.is_relative_to(self.path) and path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # a name that is too long, has a NUL, or links in a circle
            return None

    def text(self, *parts: str, max_bytes: int | None = None) -> str | None:
        """Return a text file, or None if it is not there, larger than `limits.metadata_bytes`, or unreadable."""
        path = self.inside(*parts)
        if path is None:
            return None
        max_bytes = max_bytes or limits.CURRENT.metadata_bytes
        try:
            if path.stat().st_size > max_bytes:
                self.notes.append(f"'{'/'.join(parts)}' is larger than {max_bytes / 2**20:g} MiB and was not read.")
                return None
            return path.read_bytes().decode('utf-8', 'replace')
        except OSError as error:
            self.notes.append(f"'{'/'.join(parts)}' could not be read: {first_line(error)}.")
            return None

    def json(self, *parts: str) -> dict[str, Any]:
        """Return the object in a JSON file; {} if there is none."""
        text = self.text(*parts, max_bytes=limits.CURRENT.json_bytes)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"'{'/'.join(parts)}' is damaged: {first_line(error)}.")
            return {}
        return value if isinstance(value, dict) else {}

    def rows(self, *parts: str) -> tuple[list[dict[str, float]], int]:
        """Return the numbers of a jsonl file, by name, with 'step'; and n where only every n-th line was read."""
        lines = (self.text(*parts) or '').splitlines()
        stride = -(-len(lines) // MAX_ROWS) or 1
        found, damaged = [], 0
        for line in lines[::stride]:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                damaged += 1
                continue
            numbers = {str(name): number for name, value in row.items()
                       if (number := finite(value)) is not None} if isinstance(row, dict) else {}
            if 'step' in numbers:
                found.append(numbers)
        if damaged:
            self.notes.append(f"'{'/'.join(parts)}' has damaged lines ({damaged}), which are left out.")
        # A run that was killed and resumed may have written a step twice.
        return sorted({row['step']: row for row in found}.values(), key=lambda row: row['step']), stride

    def csv(self, *parts: str) -> list[dict[str, str]]:
        """Return the rows of a table with a head; [] if there is none."""
        text = self.text(*parts) or ''
        try:
            rows = [{str(k): v or '' for k, v in row.items() if k is not None} for row in csv.DictReader(
                io.StringIO(text.replace('\0', '')))]
        except csv.Error as error:
            self.notes.append(f"'{'/'.join(parts)}' is damaged: {first_line(error)}.")
            return []
        return rows

    def steps(self, pattern: str, folder: str = '.') -> dict[int, Path]:
        """Return step -> path of files and folders whose whole name is `pattern`, whose group is the step."""
        found = {}
        for path in self._entries(folder):
            if match := re.fullmatch(pattern, path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def dumped_config(self, folder: str = '.') -> Path | None:
        """Return the newest config that mmengine dumped into a folder."""
        configs = [path for path in self._entries(folder) if path.suffix == '.py' and path.is_file()]
        return max(configs, key=lambda path: path.stat().st_mtime, default=None)

    def _entries(self, folder: str) -> Iterator[Path]:
        try:
            yield from itertools.islice((self.path / folder).iterdir(), MAX_ROWS)
        except OSError:
            return


def read_settings(text: str) -> dict[str, Any]:
    """Return the settings of a dumped config that are literals, without running it."""
    found: dict[str, Any] = {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return found
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = parse_literal(ast.unparse(node.value), node.targets[0].id)
            except (UserError, RecursionError):
                continue
    return found


def at(settings: Any, *keys: str) -> Any:
    """Return the value at nested keys, or None."""
    for key in keys:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings
