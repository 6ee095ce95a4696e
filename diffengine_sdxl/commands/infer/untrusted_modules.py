"""Modules of one's own that an image is made with: recorded in its PNG, and found again before anything of them runs.

What a PNG says is untrusted, and so is the folder that it was downloaded to. So it names a module and its SHA-256, and
no path: the module must lie where its user put it, among the installed packages or on PYTHONPATH, and be the same.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffengine_sdxl import registry
from diffengine_sdxl.commands.infer.digests import sha256
from diffengine_sdxl.errors import UserError, first_line, listed

#: Registries of what makes an image.
REGISTRIES = (registry.MODELS, registry.ADAPTERS, registry.SAMPLERS, registry.GUIDANCES)
#: Characters of a module's name that an error quotes; digits of a digest, likewise.
MAX_NAME, SHORT = 60, 12


def modules_of(config: Any) -> list[dict[str, Any]]:
    """Return the modules outside this package whose classes the `type`s in `config` name: `name` and `sha256`."""
    names = sorted({cls.__module__ for kind in types_in(config) for one in REGISTRIES
                    if (cls := one.module_dict.get(kind)) is not None and not _is_ours(cls)})
    files = [getattr(sys.modules[name], '__file__', None) for name in names]
    return [{'name': name, 'sha256': sha256(file) if file else ''} for name, file in zip(names, files, strict=True)]


def types_in(node: Any) -> Iterator[str]:
    """Yield all values of `type` in a config."""
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    if isinstance(node, Mapping) and isinstance(node.get('type'), str):
        yield node['type']
    for child in children:
        yield from types_in(child)


def _is_ours(cls: Any) -> bool:
    return str(cls.__module__).partition('.')[0] == registry.SCOPE


def known_types() -> set[str]:
    """Return the types that this package registers, without those of the user's modules."""
    for one in REGISTRIES:
        one.import_from_location()
    return {name for one in REGISTRIES for name, cls in one.module_dict.items() if _is_ours(cls)}


def find_modules(recorded: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Path, set[str]]]:
    """Return the file of each module that a PNG records, and the types that it registers; nothing is imported.

    Args:
        recorded: `name` and `sha256` of each, as strings.

    Raises:
        UserError: a module is not installed or is another one; says what to do.
    """
    found = {}
    for module in recorded:
        name, digest = module['name'], module['sha256']
        made_with = f'The image was made with parts of {name[:MAX_NAME]!r} (SHA-256 {digest[:SHORT]})'
        if not name.isidentifier() or len(name) > MAX_NAME:
            raise UserError(f'{made_with}, which is not a module of one file; make it again from its config.')
        files = [Path(folder, f'{name}.py') for folder in _trusted_folders()]
        digests = {file: sha256(file) for file in files if file.is_file()}
        path = next((file for file, theirs in digests.items() if theirs == digest), None)
        if path is None:
            others = (f'; {listed(map(str, digests), 3)} {"are others" if len(digests) > 1 else "is another one"}'
                      if digests else '')
            raise UserError(f'{made_with}{others}. Read that module, as it is code, and put its folder on PYTHONPATH '
                            '(not the current folder).')
        found[name] = (path, _registered(path))
    return found


def _trusted_folders() -> list[str]:
    """Return the folders of `sys.path` that the user chose: not the current one, nor that of the running script.

    An archive may hold an image, a module, and even a script beside them.
    """
    script = getattr(sys.modules['__main__'], '__file__', None)
    excluded = {os.path.realpath(os.curdir), *([os.path.dirname(os.path.realpath(script))] if script else [])}
    return [folder for folder in dict.fromkeys(sys.path) if os.path.isabs(folder)
            and os.path.realpath(folder) not in excluded]


def _registered(path: Path) -> set[str]:
    """Return the types that a module registers with `@ADAPTERS.register_module()` and the like, by its source."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    registries = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                  and node.module == registry.__name__ for alias in node.names}
    types = set()
    for node in tree.body:
        for call in getattr(node, 'decorator_list', ()):
            if (isinstance(node, ast.ClassDef) and isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                    and call.func.attr == 'register_module' and getattr(call.func.value, 'id', None) in registries):
                name = next((keyword.value for keyword in call.keywords if keyword.arg == 'name'), None)
                types.add(str(name.value) if isinstance(name, ast.Constant) else node.name)
    return types


def import_modules(found: Mapping[str, tuple[Path, set[str]]]) -> None:
    """Import what `find_modules` returned, from these files and no others.

    Raises:
        UserError: another module of that name is imported already, or a module cannot be imported.
    """
    for name, (path, _) in found.items():
        if name in sys.modules:
            if not path.samefile(getattr(sys.modules[name], '__file__', None) or os.devnull):
                raise UserError(f"'{path}' cannot be imported: another module '{name}' is.")
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:  # a module may fail in any way
            del sys.modules[name]
            raise UserError(f"'{path}' cannot be imported: {type(error).__name__}: {first_line(error)}") from error
