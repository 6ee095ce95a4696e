"""An entry of the tables of names: what to type here for an option of another tool."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple


class Place(NamedTuple):
    """What to type here for an option of another tool.

    Attributes:
        ours: overrides of a config and settings of a request ('scales.NAME=0.8'), with blanks between, or a flag
            ('--work-dir <DIR>'). An example of the user's value is in angle brackets; NAME is the name of an adapter in
            the config. '': there is none.
        note: remarks. A hint says the first sentence; where there is no `ours` all of them: why, or what to do.
        values: value of the other tool, in lower case without blanks and '_' -> ours, where they differ.
    """

    ours: str
    note: str = ''
    values: Mapping[str, object] = {}

    def parts(self, value: object = None) -> list[str]:
        """Return the words of `ours` with the user's value; with the example for None, and for what nobody can type."""
        if isinstance(value, str):
            value = self.values.get(re.sub(r'[\s_]', '', value).lower(), value)
        text = _text(value)
        return [re.sub('<([^<>]+)>', lambda example: text or example[1], part) for part in self.ours.split()]


#: Topic -> names of one meaning, with blanks between -> place.
Topics = Mapping[str, Mapping[str, Place]]


def by_name(topics: Topics) -> dict[str, Place]:
    """Return name -> place."""
    return {name: place for rows in topics.values() for names, place in rows.items() for name in names.split()}


def _text(value: object) -> str:
    """Return `value` as overrides are written, '' for what nobody can type."""
    if isinstance(value, list | tuple) and value:
        texts = [json.dumps(item, ensure_ascii=False) if isinstance(item, str) else _text(item) for item in value]
        text = ','.join(texts)
        return '' if '' in texts else f'[{text}]' if isinstance(value, list) else f'({text})'
    return str(value) if isinstance(value, str | Real) else ''
