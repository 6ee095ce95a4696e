"""Render templates of Markdown, as GitHub and the hub read it (CommonMark with tables); all values are escaped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""


def render_markdown(template: str, **values: Any) -> str:
    """Return the text of a page.

    Args:
        template: name of a file in `templates/`.
        values: what the template reads; a missing one is a bug and raises jinja2's UndefinedError.
    """
    text = _environment().get_template(template).render(**values)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def escaped(value: object) -> Markdown:
    """Return a value as text of one line that shows as it is."""
    if isinstance(value, Markdown):
        return value
    text = re.sub(r'[\\`*_\[\]<>|~&$]', r'\\\g<0>', re.sub(r'\s+', ' ', str(value)))
    # At the start of a line: headings, also underlined ones, lists and rules; no signs of numbers.
    return Markdown(re.sub(r'^ ?(?:\d{1,9}(?=[.)](?: |$))|(?=[#=]|[-+](?![\d.])))', r'\g<0>\\', text))


def code(value: object) -> Markdown:
    """Return a value as a code span, outside of tables."""
    text = ' '.join(str(value).split())
    fence = '`' * (max(map(len, re.findall('`+', text)), default=0) + 1)
    space = ' ' if text.startswith('`') or text.endswith('`') else ''
    return Markdown(f'{fence}{space}{text}{space}{fence}') if text else Markdown('')


def cell(value: object) -> Markdown:
    """Return a value as a code span in a cell of a table."""
    return Markdown(code(value).replace('|', r'\|'))


def fenced(text: str, language: str) -> Markdown:
    """Return a block of code."""
    fence = '`' * max(3, max(map(len, re.findall('`+', text)), default=0) + 1)
    return Markdown(f'{fence}{language}\n{text}\n{fence}')


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / 'templates'), finalize=escaped,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {'code': code, 'cell': cell, 'fenced': fenced, 'markdown': Markdown}
    return environment
