"""Rows of a metadata file: as `datasets`' imagefolder reads them, and refused by file and line."""

import io
import json
from pathlib import Path

import datasets as hf
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffengine_sdxl.datasets.image_rows import Tree, folder_tree, rows
from diffengine_sdxl.errors import UserError


def tree(name: str, content: str | bytes) -> Tree:
    """A metadata file beside two images."""
    data = content.encode() if isinstance(content, str) else content
    return Tree('D', [f'in/{name}', 'in/a.png', 'in/b/c.png'], lambda path: f'/D/{path}', lambda path: data)


ROWS = [dict(file_name='a.png', mask_file_name='b/c.png', text='x, "y"', n=1.5),
        dict(file_name='b/c.png', mask_file_name='a.png', text='é', n=2)]
COLUMNS = dict(image=['/D/in/a.png', '/D/in/b/c.png'], mask=['/D/in/b/c.png', '/D/in/a.png'], text=['x, "y"', 'é'],
               n=[1.5, 2])


def parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row, n=float(row['n'])) for row in ROWS]), buffer)
    return buffer.getvalue()


JSONL = '\r\n'.join(json.dumps(row, ensure_ascii=False) for row in ROWS)
CSV = 'file_name,mask_file_name,text,n\na.png,b/c.png,"x, ""y""",1.5\nb/c.png,a.png,é,2\n'


@pytest.mark.parametrize(('name', 'content'), [
    ('metadata.jsonl', JSONL), ('metadata.jsonl', JSONL.encode('utf-8-sig')), ('metadata.csv', CSV),
    ('metadata.csv', CSV.encode('utf-8-sig')), ('metadata.parquet', parquet())])
def test_metadata(name: str, content: str | bytes) -> None:
    used = tree(name, content)
    assert rows([used]) == COLUMNS and used.used == {f'in/{name}', 'in/a.png', 'in/b/c.png'}


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('metadata.jsonl', '{"file_name": "a.png"}\n{"file_name":', r"'D/in/metadata.jsonl', line 2 is no JSON: Expecting"),
    ('metadata.jsonl', '[' * 100000, 'line 1 is no JSON'), ('metadata.jsonl', '[1]', 'line 1 holds a list'),
    ('metadata.jsonl', '{"file_name": "a.png", "text": "x"}\n\n{"file_name": "a.png", "text": 3}',
     r"line 3: 'text' is 3, a number; in 'D/in/metadata.jsonl', line 1 it is a str"),
    ('metadata.jsonl', '{"file_name": 5}', 'line 1: 5 must be the path'),
    ('metadata.jsonl', '{"file_name": ["a.png"]}', 'must be the path'),
    ('metadata.jsonl', '{"text": "x"}', "no column 'file_name' names the images; it has 'text'"),
    ('metadata.jsonl', '{"file_name": "a.png", "image": "b"}', "another key are both the column 'image'"),
    ('metadata.jsonl', '{"file_name": "../../x.png"}', r"line 1 names '../../x.png', outside of 'D'"),
    ('metadata.jsonl', '{"file_name": "/etc/x.png"}', "outside of 'D'"),
    ('metadata.jsonl', '{"file_name": "http://a/b.png"}', "outside of 'D'"),
    ('metadata.jsonl', '{"file_name": "zip://a::../p.zip"}', "outside of 'D'"),
    ('metadata.jsonl', '{"file_name": "a.png", "n": 1%s}' % ('0' * 30), 'too large for a whole number of 64 bits'),
    ('metadata.jsonl', b'{"text": "\xe9"}', "'D/in/metadata.jsonl' cannot be read, or is no UTF-8"),
    ('metadata.csv', 'file_name,text\na.png,x, y\n', 'line 2 has 3 fields, and the header 2. Quote texts'),
    ('metadata.csv', 'file_name,text\na.png,"x\n', 'is no CSV: unexpected end'),
    ('metadata.parquet', b'PAR1 no', 'no parquet file, or is cut off')])
def test_metadata_that_is_refused(name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rows([tree(name, content)])
    assert '\n' not in str(error.value)


def test_folders_are_classes_as_in_datasets(tmp_path: Path) -> None:
    names = ['cat/1.png', 'cat/2.png', 'dog/1.png']
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (4, 4)).save(tmp_path / name)
    expected = hf.load_dataset('imagefolder', data_dir=str(tmp_path), split='train', cache_dir=str(tmp_path / 'cache'))
    assert rows([folder_tree(tmp_path, names)])['label'] == expected['label'][:] == [0, 0, 1]
