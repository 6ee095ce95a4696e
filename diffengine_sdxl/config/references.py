"""Resolve the `'$key'` references of a config, convert configs to plain values, and compare them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from diffengine_sdxl.errors import UserError, did_you_mean

REFERENCE = re.compile(r'\$([A-Za-z_]\w*(?:\.\w+)*)')


def resolve(config: Config) -> Config:
    """Return a copy in which every '$key' (or '$key.sub') is replaced by the value of that top-level key.

    Raises:
        UserError: there is no such key, or it refers to itself.
    """
    plain = config.to_dict()

    def value_of(reference: str, trail: tuple[str, ...] = ()) -> Any:
        if reference in trail:
            raise UserError(f"'${reference}' refers to itself.")
        node: Any = plain
        for part in reference.split('.'):
            if not isinstance(node, Mapping) or part not in node:
                raise UserError(f"The config refers to '${reference}', but has no such key."
                                 f'{did_you_mean(reference, [str(k) for k in plain])}')
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
    """Yield the top-level keys that '$key' strings in `node` refer to."""
    if isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
        yield match[1].split('.')[0]
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    for child in children:
        yield from references(child)


def to_plain(node: Any) -> Any:
    """Convert ConfigDicts and tuples to dicts and lists, for JSON."""
    if isinstance(node, Config):
        node = node.to_dict()
    if isinstance(node, Mapping):
        return {str(k): to_plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [to_plain(v) for v in node]
    return node if isinstance(node, str | int | float | bool | None) else str(node)


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """List each place where two plain configs differ: 'model.vae was None, is now "x"'."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [line for key in {**old, **new}
                for line in differences(old.get(key), new.get(key), f'{path}.{key}' if path else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f'{path}.{i}')]
    return [] if old == new else [f'{path} was {old!r}, is now {new!r}']
