"""Find a config file, read it, apply overrides, drop consumed pieces, and check it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from diffengine_sdxl.config.check import check
from diffengine_sdxl.config.overrides import check_override, parse_overrides
from diffengine_sdxl.config.references import references, resolve
from diffengine_sdxl.errors import UserError, did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]

#: Top-level keys that the runner and the inferencer read.
RUNNER_KEYS = (
    'runner_type', 'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
    'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
    'default_hooks', 'custom_hooks', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_processor', 'log_level',
    'visualizer', 'default_scope', 'randomness', 'experiment_name', 'custom_imports', 'find_unused_parameters',
    'infer_cfg', 'refiner')


def configs_folder() -> Path:
    """Return the folder of the installed configs, in a wheel or in a checkout."""
    return next(f for f in (PACKAGE / '.mim' / 'configs', PACKAGE.parent / 'configs') if f.is_dir())


def installed_configs() -> list[Path]:
    """Return all installed config files except the pieces in `_base_`."""
    return sorted(p for p in configs_folder().rglob('*.py') if '_base_' not in p.parts)


def find(name: str | Path) -> Path:
    """Return the config file at path `name`, or the installed one of that base name (with or without '.py').

    Raises:
        UserError: there is none; names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {p.name: p for p in installed_configs()}
    wanted = path.name if path.suffix == '.py' else f'{path.name}.py'
    if wanted in known and path.name == str(name):
        return known[wanted]
    raise UserError(f"There is no config file '{name}' and no installed config of that name."
                    f'{did_you_mean(wanted, list(known))}')


def load(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a config as `read` does, and check every key and type.

    Raises:
        UserError: see `read`; or a key or a type is unknown; names the nearest.
    """
    config = read(name, overrides)
    check(resolve(config))
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
    try:
        with _installed_bases():
            config = Config.fromfile(str(path))
    except Exception as error:  # a config is Python and may fail in any way
        raise UserError(f"The config '{path}' cannot be read: {type(error).__name__}: {error}") from error
    names_read = _names_read(path)
    options = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    known_before = _known_keys(config)
    for key in options:
        check_override(config, key, options, known_before, names_read)
    try:
        config.merge_from_dict(options)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'The overrides {", ".join(options)} contradict each other or the config: {error}') from error
    if any(key.split('.')[0] == 'custom_imports' for key in options):
        _import(config.custom_imports)
    known = _known_keys(config)
    for key in [k for k in config if k not in known]:
        if key not in names_read | known_before:
            raise UserError(f"'{path.name}' sets '{key}', which nothing reads.{did_you_mean(key, sorted(known))}")
        config.pop(key)
    return config


@contextmanager
def _installed_bases() -> Iterator[None]:
    """Let `_base_` name an installed config, as 'diffengine_sdxl::t2i_adapter/x.py', which mmengine does not know."""
    original = Config._get_cfg_path
    Config._get_cfg_path = staticmethod(lambda base, file: (str(_base_path(base, Path(file))), None))
    try:
        yield
    finally:
        Config._get_cfg_path = staticmethod(original)


def _base_path(base: str, path: Path) -> Path:
    """Return the file that the config at `path` refers to as `base`."""
    package, colons, rest = base.partition('::')
    return configs_folder() / rest if colons and package == PACKAGE.name else path.parent / base


def _import(custom_imports: Mapping[str, Any]) -> None:
    try:
        import_modules_from_strings(**custom_imports)
    except (ImportError, TypeError) as error:
        raise UserError(f'custom_imports: {error}') from error


def _known_keys(config: Config) -> set[str]:
    return set(RUNNER_KEYS) | set(references(config.to_dict()))


def _names_read(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Return the names that a config file or its bases read: variables, `_base_.name` and '$name'.

    Raises:
        UserError: a dict in one of them has a key twice.
    """
    seen = set() if seen is None else seen
    path = path.resolve()
    if path in seen or path.suffix != '.py':
        return set()
    seen.add(path)
    tree = ast.parse(path.read_text(encoding='utf-8'), str(path))
    read: set[str] = set()
    for node in ast.walk(tree):
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
        elif isinstance(node, ast.Assign) and any(getattr(t, 'id', None) == '_base_' for t in node.targets):
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                read |= _names_read(_base_path(base, path), seen)
    return read
