"""The table of settings in docs/inference.md, written from request.SETTINGS: python tests/settings_page.py."""

from dataclasses import fields
from pathlib import Path

from diffengine_sdxl.request import SETTINGS, Request

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'inference.md'
BEGIN, END = '<!-- from diffengine_sdxl/request.py: begin -->', '<!-- end -->'


def table() -> str:
    """Return the table: name, values, what it is."""
    defaults = {field.name: field.default for field in fields(Request)}
    rows = []
    for name, one in SETTINGS.items():
        default = defaults[name]
        text = one.help if default in (None, '') or not isinstance(default, int | str | tuple) else (
            f'{one.help}; default: {default}')
        rows.append(f'| `{name}` | {one.kind.values} | {text} |')
    return '\n'.join(['| setting | values | what |', '|---|---|---|', *rows])


def page(text: str) -> str:
    """Return the page `text` with the table as it is now."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f'{head}{BEGIN}\n\n{table()}\n\n{END}{tail}'


if __name__ == '__main__':
    PAGE.write_text(page(PAGE.read_text()))
