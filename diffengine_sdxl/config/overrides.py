"""Parse overrides, `--cfg-options KEY=VALUE`, and refuse those whose path leads nowhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from diffengine_sdxl.errors import UserError, did_you_mean, listed
from diffengine_sdxl.field_names import training_hint
from diffengine_sdxl.literals import parse_literal

#: Hooks that the runner adds; a config may change them, or remove one with None.
DEFAULT_HOOKS = {'runtime_info': 'RuntimeInfoHook', 'timer': 'IterTimerHook', 'logger': 'LoggerHook',
                 'param_scheduler': 'ParamSchedulerHook', 'checkpoint': 'CheckpointHook',
                 'first_steps': 'FirstStepsHook', 'report': 'ReportHook'}


def parse_overrides(items: Sequence[str], option: str = '--cfg-options') -> dict[str, Any]:
    """Parse ['a.b=1', 'c=[x,a y]', 'd+=dict(type=X)'] into {'a.b': 1, 'c': ['x', 'a y'], 'd+': [{'type': 'X'}]}.

    Values are read by `literals.parse_literal`; mmengine's parser would remove the spaces and commas of a text.
    'KEY+=VALUE' appends to a list: a value, or each entry of a list.

    Args:
        option: the command-line option they belong to, for errors.

    Raises:
        UserError: an item has no '=', or its brackets don't match.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition('=')
        if not equals or not key.rstrip('+'):
            raise UserError(f"{option} '{item}' must have the form KEY=VALUE.")
        value = parse_literal(text, f"{option} '{item}'")
        if key.endswith('+'):
            value = [*options.pop(key, ()), *(value if isinstance(value, list) else [value])]
        options[key] = value
    return options


def apply_overrides(config: Config, options: Mapping[str, Any], known: set[str], read: set[str]) -> None:
    """Change `config`, one override after the other. A dict is merged, unless it has `_delete_=True`; None takes an
    entry out of a list.

    Args:
        options: as `parse_overrides` returns them; an entry of a list may be named by its type:
            'transforms.ComputeTimeIds.crops_coords_top_left'.
        known: top-level keys that something reads.
        read: names that the config's files read.

    Raises:
        UserError: a path leads nowhere; whether a class knows a new last key is checked later.
    """
    for key, value in options.items():
        top, *path = check_override(config, key.removesuffix('+'), options, known, read).split('.')
        if key.endswith('+'):
            before = _at(config, [top, *path])
            if not isinstance(before, list | tuple):
                raise UserError(f"--cfg-options '{key}=...' appends to a list, and {'.'.join([top, *path])} is "
                                f'{before!r}.')
            value = [*before, *(value if isinstance(value, list) else [value])]
        config[top] = _changed(config._cfg_dict.get(top), path, value)


def _at(config: Config, path: Sequence[str]) -> Any:
    """Return what is at a checked path, [] if nothing is there yet."""
    node: Any = config._cfg_dict
    for part in path:
        node = node[int(part)] if isinstance(node, list | tuple) else (node or {}).get(part)
    return [] if node is None else node


def _changed(node: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of `node` with `value` at a checked path. (mmengine merges into no None, no tuple, and sets no
    entry of a list.)"""
    if not path:
        merged = {'value': node if isinstance(node, Mapping) else {}}
        # A copy, as mmengine takes `_delete_` out of the dicts that it merges.
        return Config._merge_a_into_b({'value': copy.deepcopy(value)}, merged)['value']
    first, *rest = path
    if isinstance(node, list | tuple):
        i = int(first)
        entries = [_changed(node[i], rest, value)] if rest or value is not None else []
        return type(node)([*node[:i], *entries, *node[i + 1:]])
    return ConfigDict({**(node or {}), first: _changed((node or {}).get(first), rest, value)})


def check_override(config: Config, key: str, options: Mapping[str, Any], known: set[str], read: set[str]) -> str:
    """Return the path of an override, with list entries by number; refuse one that leads nowhere."""
    parts = key.split('.')
    top = re.split(r'\[', parts[0])[0]
    if top not in known:
        if top in config and top in read:
            raise UserError(f"'{key}': '{top}' is a piece that the config has already used; override it where it was "
                            f'used{_where(config, top)}.')
        hint = training_hint(key, options.get(key)) or did_you_mean(top, sorted(known))
        raise UserError(f"--cfg-options '{key}': the config has no key '{top}'.{hint}")
    node: Any = config._cfg_dict
    for depth, part in enumerate(parts):
        here = '.'.join(parts[:depth]) or 'the config'
        if isinstance(node, list | tuple):
            parts[depth] = str(_entry(node, part, key, here))
            node = node[int(parts[depth])]
        elif not isinstance(node, dict):
            raise UserError(f"--cfg-options '{key}': {here} is {node!r} and has no '{part}'.")
        elif part not in node:
            _check_new(here, part, key, options, node)
            break
        else:
            node = {} if node[part] is None else node[part]
    return '.'.join(parts)


def _entry(entries: Sequence[Any], name: str, key: str, here: str) -> int:
    """Return the number of an entry of a list, given by it or by the entry's type.

    Raises:
        UserError: there is none, or several are of that type.
    """
    types = [entry.get('type') if isinstance(entry, Mapping) else None for entry in entries]
    if name.isdecimal() and int(name) < len(entries):
        return int(name)
    if types.count(name) == 1:
        return types.index(name)
    held = f'{here} is a list of {len(entries)}' + (f' ({listed(map(str, types))})' if any(types) else '')
    fault = (f"{types.count(name)} of them are '{name}'; name one by its number, from 0." if name in types
             else f"'{name}' is neither an index of it nor a type in it.{did_you_mean(name, {t for t in types if t})}")
    raise UserError(f"--cfg-options '{key}': {held}; {fault}")


def _check_new(here: str, name: str, key: str, options: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a new adapter or hook that no override gives a type: a misspelt name."""
    names = {*present, *(DEFAULT_HOOKS if here == 'default_hooks' else ())}
    new = isinstance(options.get(key), Mapping) or f'{here}.{name}.type' in options
    if here in ('model.adapters', 'default_hooks') and not new and name not in names:
        raise UserError(f"--cfg-options '{key}': {here} has no '{name}'.{did_you_mean(name, sorted(names))} A new one "
                        f'needs {here}.{name}.type.')


def _where(config: Config, piece: str) -> str:
    model = config.get('model') or {}
    parts = {**{f'model.adapters.{n}': v for n, v in (model.get('adapters') or {}).items()},
             **{f'model.{n}': v for n, v in model.items()}}
    places = [path for path, value in parts.items() if value == config[piece]]
    return f' ({", ".join(places)})' if places else ''
