"""Digests: the address of an entry."""

import ast
import hashlib
import importlib
from functools import cache
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """Return BLAKE2b of `parts`, 32 hexadecimal digits, which depends on the value, type and order of each.

    Args:
        parts: strings, bytes, numbers, None, and lists, tuples and dicts of these.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, parts)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    """Feed a value with its type and length, so that no two values feed the same bytes."""
    if isinstance(value, dict):
        value = sorted(value.items())
        state.update(b'dict')
    if isinstance(value, list | tuple):
        state.update(b'list%d:' % len(value))
        for part in value:
            _feed(state, part)
        return
    assert value is None or isinstance(value, str | bytes | bool | int | float), type(value)
    data = value if isinstance(value, bytes) else str(value).encode('utf-8', 'surrogatepass')
    state.update(f'{type(value).__name__}{len(data)}:'.encode())
    state.update(data)


@cache
def code_digest(*modules: str) -> str:
    """Return the digest of the code of modules; comments, docstrings and layout don't count."""
    trees = [ast.parse(Path(str(importlib.import_module(name).__file__)).read_bytes()) for name in modules]
    for node in (node for tree in trees for node in ast.walk(tree)):
        match getattr(node, 'body', None):
            case [ast.Expr(value=ast.Constant()), *_] as body:
                del body[0]
    return digest([ast.dump(tree) for tree in trees])
