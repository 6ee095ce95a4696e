"""Config files: found by path or base name, overridden, freed of consumed pieces, checked, resolved."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings

from diffengine_sdxl.registry import nearest

PACKAGE = Path(__file__).resolve().parents[1]

#: What the runner itself reads.
RUNNER_KEYS = (
    'runner_type', 'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
    'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
    'default_hooks', 'custom_hooks', 'load_from', 'resume', 'launcher', 'env_cfg', 'log_processor', 'log_level',
    'visualizer', 'default_scope', 'randomness', 'experiment_name', 'custom_imports', 'find_unused_parameters',
    'infer_cfg', 'refiner')
#: Hooks that the runner adds by itself; a config may change them, or take one out with None.
DEFAULT_HOOKS = {'runtime_info': 'RuntimeInfoHook', 'timer': 'IterTimerHook', 'logger': 'LoggerHook',
                 'param_scheduler': 'ParamSchedulerHook', 'checkpoint': 'CheckpointHook'}
REFERENCE = re.compile(r'\$([A-Za-z_]\w*(?:\.\w+)*)')


def configs_folder() -> Path:
    """The folder of the configs that came with the package, that of a checkout or that of a wheel."""
    return next(f for f in (PACKAGE / '.mim' / 'configs', PACKAGE.parent / 'configs') if f.is_dir())


def installed_configs() -> list[Path]:
    """All config files that came with the package, without their base pieces."""
    return sorted(p for p in configs_folder().rglob('*.py') if '_base_' not in p.parts)


def find(name: str | Path) -> Path:
    """The config file at path `name`, or the installed one of that base name (with or without '.py').

    Raises:
        ValueError: there is none; the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {p.name: p for p in installed_configs()}
    wanted = path.name if path.suffix == '.py' else f'{path.name}.py'
    if wanted in known and path.name == str(name):
        return known[wanted]
    raise ValueError(f"There is no config file '{name}' and no installed config of that name."
                     f'{nearest(wanted, list(known))}')


def load(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a config, apply overrides, drop the pieces that it consumed, and check every key and name in it.

    Args:
        name: path or base name.
        overrides: as on the command line ('model.adapters.style.scale=0.5'), or a dict of dotted keys.

    Raises:
        ValueError: the file cannot be read, or a key, a name or an override is unknown; with the nearest known one.
    """
    path = find(name)
    try:
        with _own_bases():
            config = Config.fromfile(str(path))
    except Exception as error:  # a config is Python and may fail in any way
        raise ValueError(f"The config '{path}' cannot be read: {type(error).__name__}: {error}") from error
    read = _names_read(path)
    options = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    written = _known_keys(config)
    for key in options:
        _check_override(config, key, options, written, read)
    try:
        config.merge_from_dict(options)
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f'The overrides {", ".join(options)} contradict each other or the config: {error}') from error
    if any(key.split('.')[0] == 'custom_imports' for key in options):
        _import(config.custom_imports)
    known = _known_keys(config)
    for key in [k for k in config if k not in known]:
        if key not in read | written:
            raise ValueError(f"'{path.name}' sets '{key}', which nothing reads.{nearest(key, sorted(known))}")
        config.pop(key)
    from diffengine_sdxl.engine.config_check import check
    check(resolve(config))
    return config


@contextmanager
def _own_bases() -> Iterator[None]:
    """Let `_base_` name an installed config, as 'diffengine_sdxl::t2i_adapter/x.py'; mmengine knows its own only."""
    stock = Config._get_cfg_path
    Config._get_cfg_path = staticmethod(lambda base, file: (str(_base_path(base, Path(file))), None))
    try:
        yield
    finally:
        Config._get_cfg_path = staticmethod(stock)


def _base_path(base: str, path: Path) -> Path:
    """The file that the config at `path` calls `base`."""
    package, colons, rest = base.partition('::')
    return configs_folder() / rest if colons and package == PACKAGE.name else path.parent / base


def _import(custom_imports: Mapping[str, Any]) -> None:
    try:
        import_modules_from_strings(**custom_imports)
    except (ImportError, TypeError) as error:
        raise ValueError(f'custom_imports: {error}') from error


def parse_overrides(items: Sequence[str], option: str = '--cfg-options') -> dict[str, Any]:
    """['a.b=1', 'c=[x,a y]'] as {'a.b': 1, 'c': ['x', 'a y']}.

    A Python literal is read as one (numbers, True, None, quoted text, lists, tuples, dicts). In brackets, commas
    separate; all else is text, with its blanks and commas. (mmengine's own reader takes the blanks out.)

    Args:
        option: that they stand behind, for errors.

    Raises:
        ValueError: an item has no '=', or its brackets don't match.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition('=')
        if not equals or not key:
            raise ValueError(f"{option} takes KEY=VALUE; '{item}' is not of that form.")
        options[key] = _value(value, f"{option} '{item}'")
    return options


def _value(text: str, item: str) -> Any:
    text = text.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text in ('true', 'false'):
        return text == 'true'
    if text[:1] not in ('[', '('):
        return text
    values = [_value(part, item) for part in _split(text[1:-1], item) if part.strip()]
    if text[-1] != {'[': ']', '(': ')'}[text[0]]:
        raise ValueError(f"{item}: the brackets don't match; put text with brackets into quotes.")
    return values if text[0] == '[' else tuple(values)


def _split(text: str, item: str) -> list[str]:
    """`text` at its commas, but not at those inside brackets or quotes."""
    parts, depth, quote = [''], 0, ''
    for character in text:
        if quote:
            quote = '' if character == quote else quote
        elif character in '"\'' and not parts[-1].strip():
            quote = character  # an apostrophe inside a word is none
        else:
            depth += (character in '[(') - (character in '])')
        if character == ',' and not depth and not quote:
            parts.append('')
        else:
            parts[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise ValueError(f"{item}: the brackets or quotes don't match; put text that holds some into quotes.")
    return parts


def resolve(config: Config) -> Config:
    """A copy in which every '$key' (or '$key.sub') is the value of that top-level key.

    Raises:
        ValueError: there is no such key.
    """
    plain = config.to_dict()

    def value_of(reference: str, trail: tuple[str, ...] = ()) -> Any:
        if reference in trail:
            raise ValueError(f"'${reference}' refers to itself.")
        node: Any = plain
        for part in reference.split('.'):
            if not isinstance(node, Mapping) or part not in node:
                raise ValueError(f"The config refers to '${reference}', but has no such key."
                                 f'{nearest(reference, [str(k) for k in plain])}')
            node = node[part]
        return walk(node, (*trail, reference))

    def walk(node: Any, trail: tuple[str, ...] = ()) -> Any:
        if isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
            return value_of(match[1], trail)
        if isinstance(node, Mapping):
            return {k: walk(v, trail) for k, v in node.items()}
        return type(node)(walk(v, trail) for v in node) if isinstance(node, list | tuple) else node

    return Config(walk(plain), filename=config.filename)


def references(node: Any) -> Iterator[str]:
    """The top-level keys that '$key' strings in `node` refer to."""
    if isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
        yield match[1].split('.')[0]
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    for child in children:
        yield from references(child)


def _known_keys(config: Config) -> set[str]:
    return set(RUNNER_KEYS) | set(references(config.to_dict()))


def _check_override(config: Config, key: str, options: Mapping[str, Any], known: set[str], read: set[str]) -> None:
    """Refuse an override whose path leads nowhere; whether a class knows a new last key is checked afterwards."""
    parts = key.split('.')
    top = re.split(r'\[', parts[0])[0]
    if top not in known:
        if top in config and top in read:
            raise ValueError(f"'{key}': '{top}' is a piece that the config has put into place already; override it "
                             f'where it went{_where(config, top)}.')
        raise ValueError(f"--cfg-options '{key}': the config has no key '{top}'.{nearest(top, sorted(known))}")
    node: Any = config._cfg_dict
    for depth, part in enumerate(parts):
        here = '.'.join(parts[:depth]) or 'the config'
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"--cfg-options '{key}': {here} is a list of {len(node)}; '{part}' is no place in it.")
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise ValueError(f"--cfg-options '{key}': {here} is {node!r} and has no '{part}'.")
        elif part not in node:
            _check_new(here, part, key, options, node)
            return
        else:
            if node[part] is None and depth < len(parts) - 1:
                node[part] = ConfigDict()  # mmengine merges nothing into None
            node = node[part]


def _check_new(here: str, name: str, key: str, options: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a new member of a collection of named parts that no override gives a type: a misspelt name."""
    names = {*present, *(DEFAULT_HOOKS if here == 'default_hooks' else ())}
    new = isinstance(options[key], Mapping) or f'{here}.{name}.type' in options
    if here in ('model.adapters', 'default_hooks') and not new and name not in names:
        raise ValueError(f"--cfg-options '{key}': {here} has no '{name}'.{nearest(name, sorted(names))} A new one "
                         f'needs {here}.{name}.type.')


def _where(config: Config, piece: str) -> str:
    value = config[piece]
    found = [f'model.adapters.{n}' for n, v in ((config.get('model') or {}).get('adapters') or {}).items()
             if v == value]
    found += [f'model.{n}' for n, v in (config.get('model') or {}).items() if v == value]
    return f' ({", ".join(found)})' if found else ''


def _names_read(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Names that a config file or its bases read: variables, `_base_.name` and '$name'.

    Raises:
        ValueError: a dict in one of them has a key twice.
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
            # Python takes the last in silence, and an adapter is gone.
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ValueError(f"'{path}', line {node.lineno}: the dict has the key {twice[0]!r} twice.")
        elif isinstance(node, ast.Assign) and any(getattr(t, 'id', None) == '_base_' for t in node.targets):
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                read |= _names_read(_base_path(base, path), seen)
    return read


def to_plain(node: Any) -> Any:
    """ConfigDicts and tuples as dicts and lists, for JSON."""
    if isinstance(node, Config):
        node = node.to_dict()
    if isinstance(node, ConfigDict | Mapping):
        return {str(k): to_plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [to_plain(v) for v in node]
    return node if isinstance(node, str | int | float | bool | None) else str(node)
