"""Find a config file, read it, apply overrides, drop consumed pieces, and check it."""

from __future__ import annotations

import ast
import linecache
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from diffengine_sdxl.config.check import check
from diffengine_sdxl.config.custom_modules import import_custom_modules
from diffengine_sdxl.config.overrides import apply_overrides, check_override, parse_overrides
from diffengine_sdxl.config.references import REFERENCE, references, resolve
from diffengine_sdxl.config_files import PACKAGE, configs_folder, find
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.field_names import training_hint
from diffengine_sdxl.limits import set_limits

#: Top-level keys that the runner and the inferencer read.
RUNNER_KEYS = (
    'runner_type', 'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
    'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
    'default_hooks', 'custom_hooks', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_processor', 'log_level',
    'visualizer', 'default_scope', 'randomness', 'experiment_name', 'custom_imports', 'find_unused_parameters',
    'infer_cfg', 'refiner', 'custom_imports_folders', 'limits', 'speed', 'cache')


def load(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a config as `read` does, check every key, type and value, and put its `limits` in force.

    Raises:
        UserError: see `read` and `check`.
    """
    config = read(name, overrides)
    resolved = resolve(config)
    check(resolved)
    set_limits(resolved.get('limits') or {})
    return config


def read(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a config, apply overrides and drop consumed pieces; the caller checks the result.

    Args:
        name: path or base name.
        overrides: as on the command line ('model.adapters.style.scale=0.5'), or a dict of dotted keys.

    Raises:
        UserError: the file cannot be read, or an override is unknown; names the nearest.
    """
    path = find(name)
    config, files = _from_file(path)
    for key in [key for key, value in config.items() if callable(value)]:
        config.pop(key)  # classes that the file imports; mmengine drops functions and modules
    names_read, known_before = _names_read(files), _known_keys(config)
    if (pieces := config.keys() - known_before - names_read) and len(files) == 1 and _is_dumped(config, path):
        for key in pieces:
            # mim gridsearch writes what it searches into the name.
            if re.search(rf'(^|_){key}[._]', path.stem.partition('_search_')[2]):
                check_override(config, key, {}, known_before, pieces)
        names_read |= pieces
    options = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    apply_overrides(config, options, known_before, names_read)
    _drop_delete_keys(config._cfg_dict)
    if config.get('custom_imports'):
        folders = [*(file.resolve().parent for file in files), *map(Path, config.get('custom_imports_folders', ()))]
        own = [folder for folder in folders if not folder.is_relative_to(configs_folder().resolve())]
        try:
            config.custom_imports_folders = import_custom_modules(config.custom_imports, own)
        except UserError as error:
            raise UserError(f"The config '{path}': {error}") from error
    known = _known_keys(config)
    for key in [k for k in config if k not in known]:
        if key not in names_read | known_before:
            hint = training_hint(key, config[key]) or did_you_mean(key, sorted(known))
            raise UserError(f"'{path.name}' sets '{key}', which nothing reads.{hint}")
        config.pop(key)
    return config


def _from_file(path: Path) -> tuple[Config, list[Path]]:
    """Read a config file; return it, and all files that were read, itself first.

    Raises:
        UserError: it is not valid.
    """
    files = [path]
    heirs: dict[Path, Path] = {}

    def base_path(base: str, file: str) -> tuple[str, None]:
        # Beside what mmengine knows, `_base_` may name an installed config, as 'diffengine_sdxl::t2i_adapter/x.py'.
        package, colons, rest = base.partition('::')
        files.append(configs_folder() / rest if colons and package == PACKAGE.name else Path(file).parent / base)
        heir: Path | None = Path(file).resolve()
        inherited = files[-1].resolve()
        heirs[inherited] = Path(file).resolve()
        while heir is not None and heir != inherited:
            heir = heirs.get(heir)
        if heir is not None:
            raise UserError(f"'{file}' names '{base}' in _base_, which inherits from it.")
        return str(files[-1]), None

    original = Config._get_cfg_path
    Config._get_cfg_path = staticmethod(base_path)
    try:
        # Not lazily: mmengine takes a config that imports anything before `_base_` for one of its other dialect.
        return Config.fromfile(str(path), import_custom_modules=False, lazy_import=False), files
    except UserError as error:
        raise UserError(f"The config '{path}' cannot be read: {error}") from error
    except Exception as error:  # a config is Python and may fail in any way
        hint = (' `read_base` is not supported: name the inherited files in _base_.'
                if 'read_base' in path.read_text(encoding='utf-8', errors='replace') else '')
        raise UserError(f"The config '{path}' cannot be read: {_describe(error, files)}{hint}") from error
    finally:
        Config._get_cfg_path = staticmethod(original)


def _describe(error: Exception, files: Sequence[Path]) -> str:
    """Return Python's error in one of the config files, with file, line and source line, if it arose there."""
    message = f'{type(error).__name__}: {error}'
    if isinstance(error, SyntaxError):  # mmengine's names a temporary copy
        for file in files:
            try:
                ast.parse(file.read_text(encoding='utf-8'))
            except SyntaxError as own:
                return f"'{file}', line {own.lineno} (`{(own.text or '').strip()}`): SyntaxError: {own.msg}"
    names = {str(file.absolute()) for file in files}
    frames = [(frame, place) for (frame, _), place in zip(
        traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True)
        if place.filename in names]
    if not frames:
        return message
    frame, place = frames[-1]
    first = place.lineno or 1
    lines = linecache.getlines(place.filename)[first - 1:place.end_lineno or first]
    return f"'{place.filename}', line {first} (`{lines[0].strip() if lines else ''}`): {message}" + _of_references(
        ''.join(lines), frame.f_globals.get('_base_'))


def _of_references(source: str, base: Any) -> str:
    """Return a sentence if `source` reads a '$key' of its base, which is a text until all files are read; else ''."""
    for name in re.findall(r'_base_((?:\.\w+)+)', source):
        node = base
        for key in name[1:].split('.'):
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
            return f". `_base_{name}` is the text '{node}'; write `_base_.{match[1]}` to read what it stands for."
    return ''


def _drop_delete_keys(node: Any) -> None:
    """Drop the `_delete_` that mmengine leaves in dicts that no base has, so that they may say it nevertheless."""
    if isinstance(node, dict):
        node.pop('_delete_', None)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        _drop_delete_keys(child)


def _is_dumped(config: Config, path: Path) -> bool:
    """Return whether mmengine wrote the file, with all that was inherited: its pieces have been used already."""
    return path.suffix == '.py' and config.pretty_text == path.read_text(encoding='utf-8')


def _known_keys(config: Config) -> set[str]:
    return set(RUNNER_KEYS) | set(references(config.to_dict()))


def _names_read(files: Sequence[Path]) -> set[str]:
    """Return the names that config files read: variables, `_base_.name` and '$name'.

    Raises:
        UserError: a dict in one of them has a key twice.
    """
    read: set[str] = set()
    for path in {file for file in files if file.suffix == '.py'}:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'), str(path))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == '_base_':
                read.add(node.attr)
            elif isinstance(node, ast.Constant):
                read.update(references(node.value))
            elif isinstance(node, ast.Dict):
                # Python silently takes the last, and an adapter would be lost.
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                    raise UserError(f"'{path}', line {node.lineno}: the dict has the key {twice[0]!r} twice.")
    return read
