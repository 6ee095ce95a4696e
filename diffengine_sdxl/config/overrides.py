"""Parse overrides, `--cfg-options KEY=VALUE`, and refuse those whose path leads nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from diffengine_sdxl.errors import UserError, did_you_mean

#: Hooks that the runner adds; a config may change them, or remove one with None.
DEFAULT_HOOKS = {'runtime_info': 'RuntimeInfoHook', 'timer': 'IterTimerHook', 'logger': 'LoggerHook',
                 'param_scheduler': 'ParamSchedulerHook', 'checkpoint': 'CheckpointHook'}


def parse_overrides(items: Sequence[str], option: str = '--cfg-options') -> dict[str, Any]:
    """Parse ['a.b=1', 'c=[x,a y]'] into {'a.b': 1, 'c': ['x', 'a y']}.

    Python literals are read as such (numbers, True, None, quoted text, lists, tuples, dicts). In brackets, commas
    separate; anything else is text with its spaces and commas, which mmengine's parser would remove.

    Args:
        option: the command-line option they belong to, for errors.

    Raises:
        UserError: an item has no '=', or its brackets don't match.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition('=')
        if not equals or not key:
            raise UserError(f"{option} '{item}' must have the form KEY=VALUE.")
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
        raise UserError(f"{item}: the brackets don't match; put text with brackets into quotes.")
    return values if text[0] == '[' else tuple(values)


def _split(text: str, item: str) -> list[str]:
    """Split `text` at its commas, except those inside brackets or quotes."""
    parts, depth, quote = [''], 0, ''
    for character in text:
        if quote:
            quote = '' if character == quote else quote
        elif character in '"\'' and not parts[-1].strip():
            quote = character  # only at the start: an apostrophe inside a word is not a quote
        else:
            depth += (character in '[(') - (character in '])')
        if character == ',' and not depth and not quote:
            parts.append('')
        else:
            parts[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise UserError(f"{item}: the brackets or quotes don't match; put text with brackets into quotes.")
    return parts


def check_override(config: Config, key: str, options: Mapping[str, Any], known: set[str], read: set[str]) -> None:
    """Refuse an override whose path leads nowhere; whether a class knows a new last key is checked later."""
    parts = key.split('.')
    top = re.split(r'\[', parts[0])[0]
    if top not in known:
        if top in config and top in read:
            raise UserError(f"'{key}': '{top}' is a piece that the config has already used; override it where it was "
                            f'used{_where(config, top)}.')
        raise UserError(f"--cfg-options '{key}': the config has no key '{top}'.{did_you_mean(top, sorted(known))}")
    node: Any = config._cfg_dict
    for depth, part in enumerate(parts):
        here = '.'.join(parts[:depth]) or 'the config'
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"--cfg-options '{key}': {here} is a list of {len(node)}; '{part}' is not an index of "
                                'it.')
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise UserError(f"--cfg-options '{key}': {here} is {node!r} and has no '{part}'.")
        elif part not in node:
            _check_new(here, part, key, options, node)
            return
        else:
            if node[part] is None and depth < len(parts) - 1:
                node[part] = ConfigDict()  # mmengine cannot merge into None
            node = node[part]


def _check_new(here: str, name: str, key: str, options: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a new adapter or hook that no override gives a type: a misspelt name."""
    names = {*present, *(DEFAULT_HOOKS if here == 'default_hooks' else ())}
    new = isinstance(options[key], Mapping) or f'{here}.{name}.type' in options
    if here in ('model.adapters', 'default_hooks') and not new and name not in names:
        raise UserError(f"--cfg-options '{key}': {here} has no '{name}'.{did_you_mean(name, sorted(names))} A new one "
                        f'needs {here}.{name}.type.')


def _where(config: Config, piece: str) -> str:
    model = config.get('model') or {}
    parts = {**{f'model.adapters.{n}': v for n, v in (model.get('adapters') or {}).items()},
             **{f'model.{n}': v for n, v in model.items()}}
    places = [path for path, value in parts.items() if value == config[piece]]
    return f' ({", ".join(places)})' if places else ''
