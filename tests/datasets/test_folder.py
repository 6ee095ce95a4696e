"""CaptionFolder's kinds of captions; its listing of files is tested in test_local.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffengine_sdxl.datasets import CaptionFolder, Draw
from diffengine_sdxl.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new('RGB', (8, 6)).save(tmp_path / 'a.png')
    return tmp_path


def test_cells_and_texts(folder: Path) -> None:
    """What a row is made of, without reading an image."""
    (folder / 'a.png').rename(folder / 'b.png')
    (folder / 'b.png').write_bytes(b'no image')
    (folder / 'b.txt').write_text(' one\ntwo \n')
    data = CaptionFolder(folder)
    assert data.cells(0) == {'img': folder / 'b.png'} and data.texts(0, Draw(0, 0, 0)) == {'text': 'one\ntwo'}


@pytest.mark.parametrize(('content', 'caption'), [
    ({'caption': ' a cat '}, 'a cat'), ({'text': 'b', 'caption': 'a'}, 'a'), ({'prompt': ['a', 'b']}, 'a\nb'),
    ({'tags': ['a', 'b (c)']}, 'a, b (c)'), ({'tags': 'a, b', 'score': 1}, 'a, b'), ({'caption': ''}, '')])
def test_json(folder: Path, content: Any, caption: str) -> None:
    (folder / 'a.json').write_text(json.dumps(content))
    assert CaptionFolder(folder)[0]['text'] == caption
    (folder / 'a.caption').write_text('goes before')
    assert CaptionFolder(folder)[0]['text'] == 'goes before'


@pytest.mark.parametrize(('content', 'message'), [
    ('{"caption": ', r"The caption '.*a.json' is no JSON"), ('[' * 100_000, r"a.json' is no JSON"),
    ('{"caption": 3}', r"a.json' has 'caption': 3; it must be a text or a list of texts"),
    ('{"tags": ["a", 1]}', r"has 'tags': \['a', 1\]"), ('{"score": 1}', 'has no caption: write .*a.txt'),
    ('[1]', 'has no caption')])
def test_bad_json(folder: Path, content: str, message: str) -> None:
    (folder / 'a.json').write_text(content)
    with pytest.raises(UserError, match=message):
        CaptionFolder(folder)


def test_json_of_something_else(folder: Path) -> None:
    """Beside images there may be settings of other tools."""
    (folder / 'a.json').write_text('{"score": 1}')
    assert CaptionFolder(folder, default_caption='plain')[0]['text'] == 'plain'
