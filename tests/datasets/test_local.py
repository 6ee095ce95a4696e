"""Which files of a folder are rows: all images of a plain one, none that is hidden, none outside of it."""

import gzip
import json
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as hf
import pytest
from PIL import Image

from diffengine_sdxl import limits
from diffengine_sdxl.datasets import CaptionFolder, HFDataset, HFStream
from diffengine_sdxl.errors import UserError

Open = Callable[..., HFDataset]


def draw(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (200, 0, 0)).save(path)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Open:
    """Open a source without a condition."""
    def build(source: Path | str, **options: Any) -> HFDataset:
        return HFDataset(source, cache_dir=tmp_path / 'cache', **{'conditioning_image_column': None,
                                                                  'caption_column': None, **options})
    return build


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the data sets log."""
    lines: list[str] = []
    for module in ('files', 'folder'):
        monkeypatch.setattr(f'diffengine_sdxl.datasets.{module}.print_log', lambda text, **_: lines.append(text))
    return lines


def test_all_images_of_a_plain_folder(rows: Open, tmp_path: Path, logged: list[str]) -> None:
    """Names are no splits; hidden files are never data; what is passed over is counted in one line."""
    data = tmp_path / 'data'
    draw(*(data / f'{name}.png' for name in ('a', 'b', 'steam train', 'test', 'val di fassa/dev', 'evaluation day')),
         data / 'c.PNG', data / 'd.avif', tmp_path / 'elsewhere/e.png')
    draw(data / '._a.png', data / '.ipynb_checkpoints/a.png', data / '__MACOSX/a.png')
    write(data / 'Thumbs.db', b'x')
    write(data / 'f.exr', b'x')
    write(data / 'notes.md', b'x')
    (data / 'link').symlink_to(tmp_path / 'elsewhere')
    os.mkfifo(data / 'pipe.png')
    for build in (lambda: rows(data), lambda: CaptionFolder(data, default_caption='')):
        assert len(build()) == 8
        line, = logged
        assert "data': 8 images, 8 files passed over (4 hidden: " in line and '._a.png' in line
        assert all(part in line for part in ('1 links to folders: link', '1 not regular files: pipe.png',
                                             'a format that is not read: f.exr', '1 other files: notes.md'))
        logged.clear()
    stream = HFStream(data, conditioning_image_column=None, caption_column=None, repeat=False, buffer_size=0)
    assert [sample['key'] for sample in stream] == [str(i) for i in range(8)]


@pytest.mark.parametrize('name', ['br[1]', 'a*b', 'a?b', '{x}', 'a::b', 'a:b', 'a#b', 'a%20b', ' a b', 'json', 'é'])
def test_names_are_no_patterns(rows: Open, tmp_path: Path, name: str) -> None:
    data = tmp_path / name
    draw(data / f'{name}.png')
    write(data / f'{name}.txt', 'caption')
    write(data / 'metadata.jsonl', json.dumps(dict(file_name=f'{name}.png', text='t')))
    assert [s['text'] for s in (rows(data, caption_column='text')[0], CaptionFolder(data)[0])] == ['t', 'caption']
    write(tmp_path / f'table {name}' / 'a.jsonl', json.dumps(dict(image=f'{name}.png', text='t')))
    if '::' in name:
        with pytest.raises(UserError, match="a.jsonl': `datasets` takes '::' in a path for an archive. Rename it"):
            rows(tmp_path / f'table {name}')
    else:
        assert rows(tmp_path / f'table {name}', image_root=data)[0]['img'].size == (8, 8)


def test_names_of_macos(rows: Open, tmp_path: Path) -> None:
    """A decomposed name of a file is the composed one of an editor, and the other way round."""
    nfc, nfd = (unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD'))
    draw(tmp_path / 'd' / f'{nfd}.png', tmp_path / 'c' / f'{nfc}.png')
    write(tmp_path / 'd' / f'{nfc}.txt', 'caption')
    write(tmp_path / 'd' / 'metadata.jsonl', json.dumps(dict(file_name=f'{nfc}.png')))
    assert rows(tmp_path / 'd')[0]['img'].size == (8, 8)
    assert CaptionFolder(tmp_path / 'd', tmp_path / 'c')[0]['text'] == 'caption'


def test_splits_where_folders_say_so(rows: Open, tmp_path: Path, logged: list[str]) -> None:
    for split, num in (('train', 3), ('val', 2), ('test', 1)):
        draw(*(tmp_path / 'd' / split / f'{i}.png' for i in range(num)))
    lengths = {split: len(rows(tmp_path / 'd', split=split)) for split in (
        'train', 'val', 'validation', 'test', 'train+test', 'all', 'train[:2]', 'train[50%:]')}
    assert lengths == {'train': 3, 'val': 2, 'validation': 2, 'test': 1, 'train+test': 4, 'all': 6, 'train[:2]': 2,
                       'train[50%:]': 1}
    assert '3 images, 3 files passed over (3 in other splits: test/0.png, val/0.png, val/1.png)' in logged[0]
    with pytest.raises(UserError, match="no split 'tset'; it has test, train, validation. Did you mean 'test'"):
        rows(tmp_path / 'd', split='tset')
    draw(tmp_path / 'meta/val/a.png')
    write(tmp_path / 'meta/metadata.jsonl', '{"file_name": "val/a.png"}')
    assert len(rows(tmp_path / 'meta')) == 1, 'metadata in the folder itself says what is a row'


def test_tables_have_splits_by_name(rows: Open, tmp_path: Path) -> None:
    for name in ('train-00000-of-00002', 'train-00001-of-00002', 'test-00000-of-00001', 'extra-00000-of-00001'):
        hf.Dataset.from_list([dict(text=name)]).to_parquet(write(tmp_path / f'd/data/{name}.parquet', ''))
    texts = {}
    for split in ('train', 'extra'):
        data = rows(tmp_path / 'd', split=split, image_column=None, caption_column='text')
        texts[split] = [data[i]['text'] for i in range(len(data))]
    assert texts == {'train': ['train-00000-of-00002', 'train-00001-of-00002'], 'extra': ['extra-00000-of-00001']}


def readme(folder: Path, config: str) -> None:
    write(folder / 'README.md', f'---\nconfigs:\n{config}\n---\n')


@pytest.mark.parametrize('pattern', [
    '../secret.jsonl', '{tmp}/secret.jsonl', 'x/../../secret.jsonl', 'hf://datasets/a/b/x.jsonl', 'file://{tmp}/*',
    'http://127.0.0.1:9/x.jsonl', 'zip://a::../x.zip'])
@pytest.mark.parametrize('key', ['data_files', 'data_dir'])
def test_a_readme_leads_nowhere_else(rows: Open, tmp_path: Path, pattern: str, key: str) -> None:
    write(tmp_path / 'secret.jsonl', '{"text": "secret"}')
    write(tmp_path / 'd/a.jsonl', '{"text": "a"}')
    readme(tmp_path / 'd', f'- config_name: default\n  {key}: "{pattern.format(tmp=tmp_path)}"')
    with pytest.raises(UserError, match="d': its README.md names '.*outside of the folder"):
        rows(tmp_path / 'd')


def test_configs_of_a_readme(rows: Open, tmp_path: Path) -> None:
    data = tmp_path / 'd'

    def text(**options: Any) -> str:
        return str(rows(data, image_column=None, caption_column='text', **options)[0]['text'])
    for name in 'abc':
        write(data / f'{name}/{name}.jsonl', json.dumps(dict(text=name)))
    readme(data, '- config_name: one\n  data_files:\n  - split: train\n    path: a/*.jsonl\n  - split: test\n'
                     '    path: ["c/**"]\n- config_name: two\n  data_dir: b\n')
    assert [text(name='one'), text(name='two'), text(name='one', split='test')] == ['a', 'b', 'c']
    assert text(data_files='c/*') == 'c'
    for options, message in ((dict(), "has the configs 'one', 'two'; set name"), (dict(name='x'), 'set name'),
                             (dict(data_files='../*.jsonl'), 'data_files names .* outside of the folder'),
                             (dict(data_files='d*'), 'which is no file of the folder')):
        with pytest.raises(UserError, match=message):
            text(**options)
    readme(data, '- [[[')
    with pytest.raises(UserError, match='README.md. cannot be read: while parsing') as error:
        text()
    assert '\n' not in str(error.value)
    write(data / 'README.md', 'no configs')
    write(data / '.huggingface.yaml', 'configs:\n- config_name: default\n  data_files: c/*\n')
    write(data / f'{data.name}.py', 'raise SystemExit')
    assert text() == 'a'
    with pytest.raises(UserError, match="name='one': the folder .* has no README.md with configs"):
        text(name='one')


def test_zip_archives(rows: Open, tmp_path: Path) -> None:
    """They are read where they are; a bomb is not unpacked."""
    draw(tmp_path / 'a.png')
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / 'a.png', 'in/a.png')
        archive.writestr('in/metadata.jsonl', '{"file_name": "a.png", "text": "zipped"}')
        archive.writestr('__MACOSX/._a.png', 'x')
    data = rows((tmp_path / 'z.zip').rename(write(tmp_path / 'd/z.zip', '')).parent, caption_column='text')
    assert len(data) == 1 and data[0]['text'] == 'zipped' and data[0]['img'].size == (8, 8)
    whole = (tmp_path / 'd/z.zip').read_bytes()
    write(tmp_path / 'd/z.zip', whole[:-30])
    with pytest.raises(UserError, match=r"The archive '.*z.zip' cannot be read, or is cut off"):
        rows(tmp_path / 'd')
    write(tmp_path / 'd/z.zip', whole.replace(b'in/metadata.jsonl', b'in/metadata.jsonx').replace(b'in/a', b'in/b'))
    assert [s['img'].size for s in rows(tmp_path / 'd')] == [(8, 8)]


def test_bombs_are_not_unpacked(rows: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.CURRENT, 'unpacked_bytes', 10**6)
    table = write(tmp_path / 'd/a.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 10**5))
    with zipfile.ZipFile(tmp_path / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.png', bytes(2 * 10**6))
    bomb = str(tmp_path / 'bomb.zip')
    for source, options in ((table, {}), (table.parent, {}), ('imagefolder', dict(data_files=bomb)),
                            ('json', dict(data_files=str(table)))):
        with pytest.raises(UserError, match=r'of \d+ bytes unpacks to more than 1000000 bytes.*limits.unpacked_bytes'):
            rows(source, **options)
    write(table, gzip.compress(b'{"text": "a"}\n')[:-5])
    with pytest.raises(UserError, match='cannot be unpacked, or is cut off'):
        rows(table)
    write(table, b'\x28\xb5\x2f\xfd123')
    with pytest.raises(UserError, match='is compressed by zstd, which is not read'):
        rows(table)
    write(table, gzip.compress(b'{"text": "a"}\n'))
    assert rows(table, image_column=None, caption_column='text')[0]['text'] == 'a'


@pytest.mark.parametrize(('files', 'message'), [
    ({'a.jsonl': '{"text": "a"}\n\n{"text": \n'}, r"a.jsonl', line 3 is no JSON: Expecting value at character"),
    ({'a.jsonl': '{"text": "a"}\n[1]\n{"text":'}, r"a.jsonl', line 2 holds a list"),
    ({'a.jsonl': '{"text": "caf\xe9"}'.encode('latin-1')}, r"a.jsonl', line 1 is no UTF-8"),
    ({'a.jsonl': '{"text": "a"}', 'b.jsonl': '{"txt": "b"}'}, r"b.jsonl' has the columns 'txt', and '.*a.jsonl' 'te"),
    ({'a.csv': 'text,b\na\nb,c,d\n'}, 'Expected 2 fields in line 3, saw 3'),
    ({'a.parquet': b'PAR1 no'}, r"a.parquet' is damaged or cut off"), ({'a.arrow': b'ARROW1'}, "cannot be read"),
    ({'x.exr': b'x'}, r"d' is empty: no images, tables or archives that are read \(1 images of a format .*x.exr"),
])
def test_tables_that_cannot_be_read(rows: Open, tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / 'd' / name, content)
    with pytest.raises(UserError, match=message) as error:
        rows(tmp_path / 'd', image_column=None, caption_column='text')[0]
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv'])
def test_tables_with_a_byte_order_mark(rows: Open, tmp_path: Path, name: str) -> None:
    text = '{"text": "a"}\n' if name == 'a.jsonl' else 'text,n\na,1\n'
    path = write(tmp_path / name, text.encode('utf-8-sig'))
    assert rows(path, image_column=None, caption_column='text')[0]['text'] == 'a'


def test_saved_data_names_nothing_outside(rows: Open, tmp_path: Path) -> None:
    hf.Dataset.from_list([dict(text='secret')]).save_to_disk(tmp_path / 'private')
    hf.Dataset.from_list([dict(text='a')]).save_to_disk(tmp_path / 'd')
    state = json.loads((tmp_path / 'd/state.json').read_text())
    state['_data_files'][0]['filename'] = f'../private/{state["_data_files"][0]["filename"]}'
    write(tmp_path / 'd/state.json', json.dumps(state))
    write(tmp_path / 'e/dataset_dict.json', '{"splits": ["train", "../private"]}')
    for name in 'de':
        with pytest.raises(UserError, match=r"names '\.\./private.*, which is not a file in it"):
            rows(tmp_path / name, image_column=None, caption_column='text')


def test_sources_that_are_no_files(rows: Open, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.jsonl')
    for source in (tmp_path / 'pipe.jsonl', '/dev/zero'):
        with pytest.raises(UserError, match='is neither a folder nor a regular file'):
            rows(source)


def test_captions(tmp_path: Path, logged: list[str]) -> None:
    draw(*(tmp_path / f'{name}.png' for name in 'abcd'))
    write(tmp_path / 'a.txt', 'with a mark\n'.encode('utf-8-sig'))
    write(tmp_path / 'b.caption', 'of sd-scripts')
    write(tmp_path / 'c.txt', '\ufeff \n')
    write(tmp_path / 'd.txt', 'from .txt')
    write(tmp_path / 'd.caption', 'not used')
    data = CaptionFolder(tmp_path)
    assert [data[i]['text'] for i in range(4)] == ['with a mark', 'of sd-scripts', '', 'from .txt']
    assert '1 captions are empty (c.txt)' in logged[0] and '1 other files: d.caption' in logged[1]
    write(tmp_path / 'd.txt', 'caf\xe9'.encode('cp1252'))
    with pytest.raises(UserError, match=r"The caption '.*d.txt' cannot be read as UTF-8 text.*iconv -f WINDOWS-1252"):
        CaptionFolder(tmp_path)
    write(tmp_path / 'd.txt', bytes(2**20 + 1))
    with pytest.raises(UserError, match=r"d.txt' cannot be read: it is larger than 1048576 bytes"):
        CaptionFolder(tmp_path)


def test_conditions_of_one_name(tmp_path: Path) -> None:
    draw(tmp_path / 'd/a.webp', tmp_path / 'c/a.png', tmp_path / 'c/a.jpg')
    with pytest.raises(UserError, match=r"conditions '.*a.jpg' and '.*a.png' are of one image"):
        CaptionFolder(tmp_path / 'd', tmp_path / 'c', default_caption='')
    draw(tmp_path / 'c/a.webp')
    assert CaptionFolder(tmp_path / 'd', tmp_path / 'c', default_caption='').condition_paths == [tmp_path / 'c/a.webp']


def test_absurd_metadata_ends_quickly(rows: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge files, values without end, patterns and references that expand are refused."""
    draw(tmp_path / 'many' / 'a.png')
    write(tmp_path / 'many' / 'metadata.jsonl', '{"file_name": "a.png", "text": "x"}\n' * 20_000)
    assert len(rows(tmp_path / 'many')) == 20_000
    pattern, aliases = '/'.join(['**'] * 20) + '/zzz', 'a0: &a0 [x]\n' + ''.join(
        f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, 10))
    draw(tmp_path.joinpath('deep', *'abcdefghijklmnopqrst', 'a.png'))
    for text, message in ((f'---\nconfigs:\n- config_name: default\n  data_files: "{pattern}"\n---', 'no file'),
                          (f'---\n{aliases}configs:\n- config_name: *a9\n---', 'must be texts; one is a list')):
        write(tmp_path / 'deep' / 'README.md', text)
        with pytest.raises(UserError, match=message):
            rows(tmp_path / 'deep')
    monkeypatch.setattr(limits.CURRENT, 'metadata_bytes', 2**12)
    with pytest.raises(UserError, match='limits.metadata_bytes'):
        rows(tmp_path / 'many')
    (tmp_path / 'many' / 'metadata.jsonl').unlink()
    hf.Dataset.from_dict({'file_name': ['a.png'] * 10_000}).to_parquet(tmp_path / 'many' / 'metadata.parquet')
    with pytest.raises(UserError, match='limits.metadata_bytes'):
        rows(tmp_path / 'many')
    write(tmp_path / 'nested.jsonl', '{"image": ' + '[' * 100_000 + ']' * 100_000 + '}\n')  # Arrow's parser crashes
    with pytest.raises(UserError, match='nested more than 5000 deep'):
        rows(tmp_path / 'nested.jsonl')


def test_names_that_are_too_long(rows: Open, tmp_path: Path) -> None:
    for build in (rows, CaptionFolder):
        with pytest.raises(UserError):
            build('a' * 300)
    write(tmp_path / 'a.jsonl', json.dumps({'image': '::'.join(['zip://a'] * 5000) + '::p.zip'}))
    with pytest.raises(UserError, match='cannot be read'):
        rows(tmp_path / 'a.jsonl')[0]


def test_a_strip_may_be_passed_over(tmp_path: Path) -> None:
    for name, size in (('a', (1, 800)), ('b', (8, 8))):
        Image.new('RGB', size).save(tmp_path / f'{name}.png')
    options: dict[str, Any] = dict(default_caption='', transforms=[dict(type='Resize', size=1024)])
    with pytest.raises(UserError, match=r"Sample 'a\.png': An image of 800 x 1, scaled"):
        CaptionFolder(tmp_path, **options)[0]
    assert CaptionFolder(tmp_path, on_bad_image='skip', **options)[0]['key'] == 'b.png'
