"""docs/options.md, written from diffengine_sdxl.field_names: python tests/options/page.py."""

from pathlib import Path

from diffengine_sdxl.field_names import SAMPLING, TRAINING
from diffengine_sdxl.field_names.place import Place, Topics

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'options.md'
BEGIN, END = '<!-- from diffengine_sdxl/field_names: begin -->', '<!-- end -->'


def plain(place: Place) -> str:
    """Return `ours` with its examples, without the angle brackets."""
    return ' '.join(place.parts())


def tables(topics: Topics) -> str:
    """Return a section with a table for each topic."""
    sections = []
    for topic, rows in topics.items():
        lines = [f'### {topic}', '', '| option | here | remarks |', '|---|---|---|']
        for names, place in rows.items():
            cells = (', '.join(f'`{name}`' for name in names.split()), f'`{plain(place)}`' if place.ours else 'none',
                     place.note)
            lines.append(f'| {" | ".join(cells)} |'.replace('  |', ' |'))
        sections.append('\n'.join(lines))
    return '\n\n'.join(sections)


def page(text: str) -> str:
    """Return the page `text` with the tables as they are now."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    generated = f'## Training\n\n{tables(TRAINING)}\n\n## Making images\n\n{tables(SAMPLING)}'
    return f'{head}{BEGIN}\n\n{generated}\n\n{END}{tail}'


if __name__ == '__main__':
    PAGE.write_text(page(PAGE.read_text()))
