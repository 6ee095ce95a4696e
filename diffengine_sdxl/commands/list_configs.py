"""List the installed configs, one line each."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from diffengine_sdxl.config_files import configs_folder, description, installed_configs
from diffengine_sdxl.errors import UserError


def run(args: Any, _: Any) -> None:
    """Print names and descriptions, by folder.

    Args:
        args: words; as `cli` parses them.

    Raises:
        UserError: no config has all of them.
    """
    rows = [(path.parent.name, path.stem, description(path)) for path in installed_configs()]
    rows = [row for row in rows if all(word.lower() in ' '.join(row).lower() for word in args.words)]
    if not rows:
        raise UserError(f"No installed config has {' and '.join(map(repr, args.words))} in its name or description.")
    width = max(len(name) for _, name, _ in rows)
    for folder, group in groupby(rows, key=lambda row: row[0]):
        print(f'{folder}/')
        for _, name, text in group:
            print(f'  {name:<{width}}  {text}')
    print(f'\n{len(rows)} configs in {configs_folder()}')
