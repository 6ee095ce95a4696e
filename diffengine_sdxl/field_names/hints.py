"""Sentences for those who type another tool's option."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Sequence
from typing import Any

from diffengine_sdxl.field_names.place import Place, by_name
from diffengine_sdxl.field_names.sampling import METHODS, SAMPLING
from diffengine_sdxl.field_names.training import TRAINING

_TRAINING, _SAMPLING = by_name(TRAINING), by_name(SAMPLING)
#: What sampling overrides in a config begins with; the rest are settings of a request.
OVERRIDES = ('model.', 'refiner.pretrained=', 'infer_cfg.', 'mixed_precision=', 'speed.')


def training_hint(name: str, value: object = None) -> str:
    """Return what stands for the training option `name` of another tool here, ' In this project ...'; '' if unknown.

    Args:
        name: in any case, with or without '--', with '-' or '_'.
        value: the user's, to put in.
    """
    place = _TRAINING.get(_folded(name))
    if place is None or not place.ours:
        return f' {place.note}' if place else ''
    parts = place.parts(value)
    return _hint(shlex.join(parts if place.ours.startswith('--') else ['--cfg-options', *parts]), place)


def sampling_hint(name: str, value: object = None, where: str = 'python') -> str:
    """Return what stands for the argument or option `name` of another image tool here; '' if unknown.

    Args:
        name, value: see `training_hint`.
        where: 'python' for a call of SDXLInferencer, 'command' for the infer command.
    """
    place = _SAMPLING.get(_folded(name))
    if place is None or not place.ours:
        return f' {place.note}' if place else ''
    if isinstance(value, list | tuple) and '.NAME' in place.ours:
        value = None  # one for each of several adapters
    parts = place.parts(value)
    if where == 'command':
        return _hint(shlex.join(_options(parts)), place)
    if place.ours.startswith('--'):
        return f' {place.note}'
    if place.ours.startswith(OVERRIDES):
        return _hint(f'SDXLInferencer(CONFIG, cfg_options={parts})', place)
    text = _arguments(parts)
    return _hint(f'SDXLInferencer(CONFIG, {text})' if place.ours.startswith('adapters.') else text, place)


def method_hint(name: str) -> str:
    """Return what stands for a method or attribute of diffusers' pipelines here; '' if unknown."""
    found = next((ours for names, ours in METHODS.items() if name in names.split()), None)
    return f' In this project it is `{found}`.' if found else ''


def _folded(name: str) -> str:
    return name.lstrip('-').replace('-', '_').lower()


def _hint(text: str, place: Place) -> str:
    whose = " NAME is the adapter's name." if re.search(r'\bNAME\b', text) else ''
    first = re.match(r'.+?\.(?= |$)', place.note)
    return f' In this project it is `{text}`.{whose}{f" {first[0]}" if first else ""}'


def _arguments(settings: Sequence[str]) -> str:
    """Return ['a.b=1', 'c=x'] as "a={'b': 1}, c='x'"."""
    arguments: dict[str, Any] = {}
    for item in settings:
        key, _, text = item.partition('=')
        *path, last = key.split('.')
        node = arguments
        for part in path:
            node = node.setdefault(part, {})
        node[last] = _Code(text)
    return ', '.join(f'{key}={value!r}' for key, value in arguments.items())


class _Code(str):
    """A value whose repr is Python code: of literals and placeholders themselves, of other text a string."""

    __slots__ = ()

    def __repr__(self) -> str:
        try:
            return repr(ast.literal_eval(self))
        except (ValueError, SyntaxError):
            return str(self) if self.isupper() else super().__repr__()


def _options(parts: Sequence[str]) -> list[str]:
    """Return the infer command's options for overrides, a flag, or settings such as 'scales.NAME=0.8'."""
    if parts[0].startswith('--'):
        return [*parts]
    if parts[0].startswith(OVERRIDES):
        return ['--cfg-options', *parts]
    words = []
    for part in parts:
        key, _, text = part.partition('=')
        top, _, rest = key.partition('.')
        flag = {'adapters': '--adapter', 'conditions': '--condition'}.get(top, f'--{top.replace("_", "-")}')
        words += [flag, f'{rest.removesuffix(".image")}={text}' if rest else text]
    return words
