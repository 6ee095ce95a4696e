"""Read values that people type: Python literals, lists and dicts without quotes, else text as it stands."""

from __future__ import annotations

import ast
from typing import Any

from diffengine_sdxl.errors import UserError

#: Opening bracket -> closing one.
BRACKETS = {'[': ']', '(': ')', '{': '}'}
#: Limit on brackets inside brackets, far above what a config needs; each level is read again with the levels in it.
MAX_DEPTH = 20


def parse_literal(text: str, item: str, depth: int = 0) -> Any:
    """Read 0.5, None, true, 'quoted', [a red circle,2], (0,0.5), dict(type=EMAHook,decay=0.9); anything else is text.

    Args:
        item: the place of `text`, for errors.
        depth: the number of brackets around `text`.

    Raises:
        UserError: brackets or quotes don't match, an entry of dict(...) has no '=', or there are too many brackets
            inside brackets.
    """
    if depth > MAX_DEPTH:
        raise UserError(f'{item}: more than {MAX_DEPTH} brackets inside each other.')
    text = text.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: {[]: 1}
        pass
    if text in ('true', 'false'):
        return text == 'true'
    if text.startswith('dict('):
        return _parse_dict(text, item, depth)
    if text[:1] not in ('[', '('):
        return text
    values = [parse_literal(part, item, depth + 1) for part in _split(_inside(text, item), item) if part.strip()]
    return values if text[0] == '[' else tuple(values)


def _parse_dict(text: str, item: str, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in _split(_inside(text.removeprefix('dict'), item), item):
        key, equals, value = part.partition('=')
        if not part.strip():
            continue
        if not equals or not key.strip().isidentifier() or key.strip() in values:
            raise UserError(f"{item}: '{part.strip()}' in dict(...) must have the form KEY=VALUE, each key once.")
        values[key.strip()] = parse_literal(value, item, depth + 1)
    return values


def _inside(text: str, item: str) -> str:
    """Return the text between the brackets at its ends."""
    if len(text) < 2 or text[-1] != BRACKETS[text[0]]:
        raise UserError(f"{item}: the brackets don't match; put text with brackets into quotes.")
    return text[1:-1]


def _split(text: str, item: str) -> list[str]:
    """Split `text` at its commas, except those inside brackets or quotes."""
    parts, start, closing = [], 0, ['']
    quote, escaped, before = '', False, ','
    for i, character in enumerate(text):
        if quote:
            quote = '' if character == quote and not escaped else quote
            escaped = character == '\\' and not escaped
        elif character in '"\'' and before in (',', '=', ':', *BRACKETS):
            quote = character  # only where a value begins: an apostrophe inside a word is not a quote
        elif character in BRACKETS:
            closing.append(BRACKETS[character])
        elif character in BRACKETS.values() and character != closing.pop():
            closing = []
            break
        elif character == ',' and len(closing) == 1:
            parts.append(text[start:i])
            start = i + 1
        before = before if character.isspace() else character
    if len(closing) != 1 or quote:
        raise UserError(f"{item}: the brackets or quotes don't match; put text with brackets into quotes.")
    return [*parts, text[start:]]
