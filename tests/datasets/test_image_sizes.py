"""Sizes from headers are those of the decoded images."""

import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl.datasets import CaptionFolder, Draw, HFDataset, Shapes, image_files, image_sizes
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.image_sizes import image_size, read_sizes
from diffengine_sdxl.errors import UserError


def write_images(folder):
    """Images of several formats, each 20 x 30 (height x width) as stored, turned by half of their EXIF."""
    folder.mkdir(parents=True)
    for i, suffix in enumerate(('jpg', 'png', 'webp', 'tiff', 'gif', 'bmp')):
        for orientation in (1, 6, 8) if suffix in ('jpg', 'png', 'webp', 'tiff') else (1,):
            exif = Image.Exif()
            exif[0x0112] = orientation
            image = Image.new('RGB', (30 + i, 20))
            image.save(folder / f'{i}{orientation}.{suffix}', **({'exif': exif} if orientation > 1 else {}))
    return folder


def decoded(dataset):
    images = [dataset.load(i, Draw(i, 0, 0))['img'] for i in range(len(dataset))]
    return np.array([(image.height, image.width) for image in images])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('sizes') / 'images')


def test_a_folder(folder, monkeypatch):
    dataset = CaptionFolder(folder, default_caption='')
    expected = decoded(dataset)
    assert {tuple(size) for size in expected.tolist()} >= {(20, 30), (30, 20), (33, 20), (20, 33)}
    monkeypatch.setattr(Image.Image, 'transpose', None)  # nothing is decoded and turned
    monkeypatch.setattr(image_files, 'decode', None)
    monkeypatch.setattr(image_sizes, 'CHUNK', 3)
    sizes, errors = read_sizes(dataset)
    np.testing.assert_array_equal(sizes, expected)
    assert sizes.dtype == np.int32 and not errors
    np.testing.assert_array_equal(read_sizes(dataset, [4, 1])[0], expected[[4, 1]])


@pytest.mark.parametrize('kind', ['bytes', 'paths', 'zip'])
def test_rows_of_a_table(folder, tmp_path, kind):
    paths = sorted(folder.iterdir())
    if kind == 'zip':
        with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
            for path in paths:
                archive.write(path, path.name)
    else:
        cells = [{'bytes': path.read_bytes(), 'path': None} if kind == 'bytes' else str(path) for path in paths]
        datasets.Dataset.from_dict({'image': cells}).to_parquet(tmp_path / 'rows.parquet')
    dataset = HFDataset(tmp_path if kind == 'zip' else tmp_path / 'rows.parquet', caption_column=None,
                        conditioning_image_column=None, image_root=folder if kind == 'paths' else None)
    np.testing.assert_array_equal(read_sizes(dataset)[0], decoded(dataset))


def test_rows_that_code_draws():
    dataset = Shapes(length=3, size=16)
    assert read_sizes(dataset)[0].tolist() == [[16, 16]] * 3


def test_unreadable_images_are_told_apart(tmp_path):
    for name in ('a', 'b', 'c'):
        Image.new('RGB', (8, 9)).save(tmp_path / f'{name}.png')
    (tmp_path / 'b.png').write_bytes(b'no image')
    dataset = CaptionFolder(tmp_path, default_caption='')
    sizes, errors = read_sizes(dataset)
    assert sizes.tolist() == [[9, 8], [0, 0], [9, 8]] and list(errors) == [1]
    assert "The image of row b.png of" in str(errors[1])
    with pytest.raises(BadImageError, match='b.png'):
        image_size(dataset, 1)


@pytest.mark.parametrize('cell, message', [('https://example.org/a.png', 'Download the images'),
                                           ('/etc/a.png', 'outside of')])
def test_what_is_not_read(tmp_path, cell, message):
    datasets.Dataset.from_dict({'image': [cell]}).to_parquet(tmp_path / 'rows.parquet')
    dataset = HFDataset(tmp_path / 'rows.parquet', caption_column=None, conditioning_image_column=None)
    with pytest.raises(UserError, match=message):
        read_sizes(dataset)


def test_progress_is_logged(folder, monkeypatch):
    lines = []
    monkeypatch.setattr(image_sizes, 'print_log', lambda text, **_: lines.append(text))
    monkeypatch.setattr(image_sizes, 'INTERVAL', -1)
    monkeypatch.setattr(image_sizes, 'CHUNK', 7)
    read_sizes(CaptionFolder(folder, default_caption=''))
    assert lines == [f"'{folder}': read the sizes of {n} of 14 images" for n in (7, 14)]
