"""The words that the shapes base was trained on: those of its captions, declared by its tokenizers and in the docs."""

import json
import re
from pathlib import Path

import pytest

from diffengine_sdxl.shapes import BASE, palette
from diffengine_sdxl.shapes.scene import BASE_STYLES, SHAPES, TEXTURES, WITHHELD_STYLES, WORDS, draw_scene

DOCS = Path(__file__).resolve().parents[2] / 'docs'


def words(text: str) -> set[str]:
    return set(re.findall(r'\w+', text))


def test_they_are_those_of_captions() -> None:
    captions = [draw_scene(0, index).caption for index in range(2000)]
    assert set().union(*map(words, captions)) == {*WORDS} and len(set(WORDS)) == len(WORDS)
    assert not {*WITHHELD_STYLES} & {*WORDS}


@pytest.mark.parametrize('name', ['tokenizer', 'tokenizer_2'])
def test_the_tokenizers_declare_them(name: str) -> None:
    assert json.loads((BASE / name / 'tokenizer_config.json').read_text())['closed_vocabulary'] == [*WORDS]


def table() -> str:
    """The table of docs/shapes.md."""
    groups = {'shapes': SHAPES, 'colours': palette.NAMES, 'styles': BASE_STYLES, 'textures of the ground': TEXTURES}
    listed = {word for group in groups.values() for word in group}
    groups['others'] = tuple(word for word in WORDS if word not in listed)
    rows = (f'| {name} | {", ".join(group)} |' for name, group in groups.items())
    return '\n'.join(['| | words |', '|---|---|', *rows])


def test_the_docs_list_them() -> None:
    assert f'\n\n{table()}\n\n' in (DOCS / 'shapes.md').read_text(), f'docs/shapes.md should list:\n{table()}'


def test_prompts_of_the_docs_for_this_base_are_in_its_words() -> None:
    """A reader's first image should not come with a warning."""
    page = (DOCS / 'shapes.md').read_text()
    prompts = re.findall(r"pipe\('([^']+)'", page)
    assert prompts and [word for prompt in prompts for word in words(prompt) - {*WORDS}] == []
