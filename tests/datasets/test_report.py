"""The report on training data: counted by hand on a small folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from diffengine_sdxl.datasets import CaptionFolder, Shapes, report
from diffengine_sdxl.datasets.mixture import Mixture
from diffengine_sdxl.datasets.report import CaptionLimit, describe_data

TRANSFORMS: list[dict[str, Any]] = [dict(type='Resize', size=16), dict(type='Crop', size=16)]
WORDS = CaptionLimit(3, ('word', 'words'), lambda texts: [len(text.split()) for text in texts])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images: three square ones, two of them equal files; one of 4:3, one of 2:3 that is too narrow, one broken."""
    for name, size, caption in (('a', (32, 32), 'one'), ('b', (64, 66), 'one two three four'), ('d', (36, 27), ''),
                                ('e', (12, 18), 'line\nline')):
        Image.new('RGB', size, name_color(name)).save(tmp_path / f'{name}.png')
        (tmp_path / f'{name}.txt').write_text(caption)
    shutil.copy(tmp_path / 'a.png', tmp_path / 'c.png')
    (tmp_path / 'f.png').write_bytes((tmp_path / 'b.png').read_bytes()[:20])
    for name in 'cf':
        (tmp_path / f'{name}.txt').write_text('one')
    return tmp_path


def name_color(name: str) -> tuple[int, int, int]:
    return ord(name), 0, 0


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: pytest.fail('an image was decoded'))
    text = describe_data(CaptionFolder(folder, transforms=TRANSFORMS), WORDS)
    head, name, *lines = (line.strip() for line in text.splitlines())
    assert (head, name) == ('The training data:', f'{folder}: 6 rows')
    assert lines[0] == '6 captions, 4 different, 1 empty, the longest of 4 words'
    assert lines[1] == "1 is longer than the 3 words that are read: 'b.png' (4: 'one two three four')"
    assert lines[2] == '1 has several lines, read as one text; CaptionLine would choose one'
    assert lines[3].startswith('1 image cannot be read: ') and 'f.png' in lines[3]
    assert lines[4] == '5 images: from 18 x 12 to 66 x 64 (height x width)'
    assert lines[5] == "1 is smaller than 16 x 16, and will be enlarged: 'e.png' (18 x 12)"
    assert [line.split() for line in lines[6:10]] == [
        ['aspect', 'ratios', '(width', ':', 'height):'], ['2', ':', '3', '#' * 10, '1'], ['1', ':', '1', '#' * 30, '3'],
        ['4', ':', '3', '#' * 10, '1']]
    assert lines[10:] == ["1 image is an exact duplicate: 'a.png' = 'c.png'"]


def test_one_long_image_and_dropped_tags(tmp_path: Path) -> None:
    Image.new('RGB', (160, 10)).save(tmp_path / 'a.png')
    (tmp_path / 'a.txt').write_text('one')
    data = CaptionFolder(tmp_path, transforms=[dict(type='CaptionTagDrop', prob=1.0), *TRANSFORMS])
    assert list(data.captions()) == ['']
    assert [line.strip() for line in describe_data(data, WORDS).splitlines()[1:]] == [
        f'{tmp_path}: 1 row', '1 caption, 1 different, 0 empty, the longest of 1 word',
        '1 image: all 10 x 160 (height x width)', "1 is smaller than 16 x 16, and will be enlarged: 'a.png' (10 x 160)",
        'aspect ratios (width : height):', f'3 : 1  {"#" * 30} 1, up to 16 : 1']


def test_large_sets_are_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('MAX_CAPTIONS', 2), ('MAX_HEADERS', 3), ('MAX_FILES', 2), ('MAX_BYTES', 10)):
        monkeypatch.setattr(report, name, value)
    text = describe_data(CaptionFolder(folder))
    assert 'the first 2 captions' in text and '2 of the images, evenly spaced' in text
    assert 'duplicates were looked for among the first 2 files only' in text and 'cannot be read' in text
    monkeypatch.setattr(report, 'MAX_FILES', 6)
    assert 'among 0 MiB of files of equal sizes only' in describe_data(CaptionFolder(folder))


def test_several_sets(folder: Path) -> None:
    """Shares and loss weights; rows that are drawn by code; the sampler's own lines."""
    data = Mixture(dict(photos=CaptionFolder(folder), drawn=Shapes(length=6)), weights=dict(photos=3),
                   loss_weights=dict(drawn=0.5))

    class Sampler:
        def describe(self) -> str:
            return 'buckets: 2\nrare: 1'
    lines = describe_data(data, sampler=Sampler()).splitlines()
    assert '  photos: 6 rows, 9 of the 12 samples of an epoch, loss x 1' in lines
    assert lines[-4:] == ['  drawn: 6 rows, 3 of the 12 samples of an epoch, loss x 0.5',
                          '    images are drawn by code', '  buckets: 2', '  rare: 1']
    assert not any('longest' in line or 'enlarged' in line for line in lines)


def test_a_stream() -> None:
    class Stream:
        source = 'DATA'
    assert describe_data(Stream()).splitlines()[1] == '  DATA: a stream, which is not looked at'
