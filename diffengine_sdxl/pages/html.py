"""Render the templates of HTML pages: one file each, without scripts, for any browser, light and dark."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffengine_sdxl.pages.numbers import format_number, format_p

if TYPE_CHECKING:
    from jinja2 import Environment

#: Characters that turn the direction of the text after them, and so could show it as another.
_TURNING = re.compile('[\u202a-\u202e\u2066-\u2069]')
#: In the head of every page.
MARK = '<meta name="generator" content="diffengine_sdxl">'


def render(template: str, **values: Any) -> str:
    """Return the text of a page; all values are escaped.

    Args:
        template: name of a file in `templates/`; it extends base.html, which needs `title`.
        values: what the template reads; a missing one is a bug and raises jinja2's UndefinedError.
    """
    return without_turns(_environment().get_template(template).render(mark=MARK, **values))


def without_turns(text: str) -> str:
    """Return a text without the control characters that turn its direction; letters have directions of their own."""
    return _TURNING.sub('', text)


def is_ours(path: Path) -> bool:
    """Return whether the file at `path` was written by `render`."""
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            return MARK in file.read(2048)
    except OSError:
        return False


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / 'templates'), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {'number': format_number, 'p': format_p}
    return environment
