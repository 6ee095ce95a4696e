"""What a class or function takes by its signature, and whether a value of a config fits an annotation."""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Annotation -> what a value must be, in words.
WORDS = {NoneType: 'None', bool: 'True or False', int: 'a whole number', float: 'a finite number', str: 'a text'}


class _Names(dict[str, Any]):
    """Names for an annotation; what only type checkers import stands for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


@cache
def accepted(cls: Any) -> dict[str, inspect.Parameter] | None:
    """Return the keyword arguments of a class or function, also of base classes that get **kwargs; None: takes any.

    Their annotations are types, not text.
    """
    if not inspect.isclass(cls):
        parameters, open_ended = _parameters(cls)
        return None if open_ended else parameters
    names: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        if base is object:
            return names
        parameters, open_ended = _parameters(vars(base)['__init__'])
        if parameters is None:
            return None
        names = {**parameters, **names}
        if not open_ended:
            break
    names.pop('self', None)
    return names


def _parameters(function: Any) -> tuple[dict[str, inspect.Parameter] | None, bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a builtin without a signature
        return None, False
    names = _Names({**vars(builtins), **getattr(inspect.unwrap(function), '__globals__', {})})
    named = {p.name: p.replace(annotation=_resolved(p.annotation, names)) for p in parameters
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _resolved(annotation: Any, names: _Names) -> Any:
    """Return an annotation as a type; Any if there is none, or if it is none that Python can read."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return get_type_hints(type('Holder', (), {'__annotations__': {'it': annotation}}), {}, names)['it']
    except Exception:  # an annotation of another package may be anything
        return Any


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value of a config may be passed where `hint` is annotated.

    A list stands for any sequence, a text for a path, 1 for a float, but 1.0 for no int; True and NaN are no numbers.
    What no config can hold (a class, a function) fits if it is of that class.
    """
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in arguments)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in arguments)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        # As torch's integers, of 64 bits; any text of JSON may hold larger ones.
        return number and (-2**63 <= int(value) < 2**63 if isinstance(value, Integral) else math.isfinite(value))
    if not isinstance(kind, type) or kind is Any or kind is object:
        return kind is not None or value is None
    if issubclass(kind, PurePath):
        return isinstance(value, str | PurePath)
    if issubclass(kind, Mapping) and isinstance(value, Mapping):
        keys, values = arguments or (Any, Any)
        return all(fits(key, keys) and fits(part, values) for key, part in value.items())
    if isinstance(value, list | tuple) and issubclass(kind, Iterable) and not issubclass(kind, str | Mapping):
        if kind is tuple and arguments[-1:] != (...,) and arguments:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(part, arguments[0]) for part in value) if arguments else True
    # A text is a sequence of characters to Python only.
    return isinstance(value, kind) and not (isinstance(value, str) and kind is not str)


def described(hint: Any) -> str:
    """Return in words what `fits` an annotation: 'a list of texts, or None'."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        text = ' or '.join(dict.fromkeys(filter(None, map(described, (a for a in arguments if a is not NoneType)))))
        return text + ('' if NoneType not in arguments else '; or None' if ', each' in text else ' or None')
    if kind is Literal:
        return ' or '.join(map(repr, arguments))
    if kind in WORDS:
        return WORDS[kind]
    if not isinstance(kind, type):
        return '' if kind is not None else 'None'
    if issubclass(kind, PurePath):
        return 'a path'
    if issubclass(kind, Mapping):
        inner = described(arguments[1]) if arguments else ''
        return f'a dict, each value {inner}' if inner else 'a dict'
    if issubclass(kind, Iterable):
        inner = described(arguments[0]) if arguments else ''
        return f'a list, each entry {inner}' if inner else 'a list'
    return ''


def is_scalar(hint: Any) -> bool:
    """Return whether `hint` is of None, numbers, texts and bool only."""
    if get_origin(hint) in (Union, UnionType):
        return all(map(is_scalar, get_args(hint)))
    return hint in WORDS
