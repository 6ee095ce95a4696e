"""Import the modules that a config names in `custom_imports`: those beside it, and installed ones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from diffengine_sdxl.errors import UserError, did_you_mean, first_line, listed

#: Folders that were appended to `sys.path` for a config; another config must not find its modules there.
_appended: set[Path] = set()


def import_custom_modules(custom_imports: Any, folders: Sequence[Path]) -> list[str]:
    """Import what `custom_imports` names; return the folders in which a module lies.

    Such a folder is appended to `sys.path`, behind Python's own and the installed modules, so that nothing in it
    replaces them; workers of a data loader find it there.

    Args:
        custom_imports: dict of `imports`, a name or a list of names, and `allow_failed_imports`, as in mmengine.
        folders: of the config and of those that it inherits from, in which to look first.

    Raises:
        UserError: a module is missing or cannot be imported; or Python has another one of that name.
    """
    keys = {'imports', 'allow_failed_imports'}
    if not isinstance(custom_imports, Mapping) or custom_imports.keys() - keys:
        raise UserError(f'custom_imports={custom_imports!r} must be a dict of {", ".join(sorted(keys))}.')
    imports = custom_imports.get('imports') or []
    if not isinstance(imports, str | list | tuple):
        raise UserError(f'custom_imports.imports={imports!r} must be the name of a module, or a list of names.')
    found = []
    for name in [imports] if isinstance(imports, str) else imports:
        try:
            folder = _import(name, list(dict.fromkeys(folders)))
        except UserError as error:
            if not custom_imports.get('allow_failed_imports'):
                raise
            print_log(f'{error} Going on without it (allow_failed_imports).', logger='current', level=30)
            continue
        found += [str(folder)] if folder is not None else []
    return list(dict.fromkeys(found))


def _import(name: Any, folders: Sequence[Path]) -> Path | None:
    """Import one module; return the one of `folders` in which it lies, None for an installed module."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split('.')):
        raise UserError(f"custom_imports: {name!r} is not the name of a module, such as 'my_parts' for my_parts.py.")
    path = Path(*name.split('.'))
    beside = [(file, folder) for folder in folders
              for file in (folder / path.with_suffix('.py'), folder / path / '__init__.py') if file.is_file()]
    if len(beside) > 1:
        raise UserError(f"custom_imports: '{name}' is '{beside[0][0]}' and '{beside[1][0]}'; rename one of them.")
    file, folder = beside[0] if beside else (None, None)
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
        _appended.add(folder)
    importlib.invalidate_caches()
    origin = _origin(name)
    if file is not None and (origin is None or not file.samefile(origin)):
        raise UserError(f"custom_imports: '{name}' is '{file}', but Python takes '{origin or name}' for it. Rename the "
                        "file beside the config, or use configs whose modules have equal names in processes of their "
                        'own.')
    if file is None and (origin is None or _appended & {*origin.parents} - {*folders}):
        known = sorted(file.stem for folder in folders for file in folder.glob('*.py'))
        searched = f'in {listed(map(repr, map(str, folders)))}' if folders else 'beside the config'
        raise UserError(f"custom_imports: there is no module '{name}' {searched}, and none is installed."
                        f'{did_you_mean(name, known)}')
    try:
        importlib.import_module(name)
    except Exception as error:  # a module may fail in any way
        raise UserError(f"custom_imports: '{name}' ('{origin}') cannot be imported: {type(error).__name__}: "
                        f'{first_line(error)}') from error
    return folder


def _origin(name: str) -> Path | None:
    """Return the file that Python takes for a module; None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no such parent; a module without a spec, such as '__main__'
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)
