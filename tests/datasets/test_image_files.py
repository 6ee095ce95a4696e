"""What a row may name is opened, within limits, and nothing else; damaged and hostile files end in a sentence."""

import gzip
import io
import os
import socket
import socketserver
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, features

from diffengine_sdxl import limits
from diffengine_sdxl.datasets import BadImageError, image_formats
from diffengine_sdxl.datasets.files import list_folder
from diffengine_sdxl.datasets.image_files import ImageReader, Member, decode, fetch, image_size
from diffengine_sdxl.errors import UserError


def png(colour: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new('RGB', (2, 2), (colour, 0, 0)).save(buffer, 'PNG')
    return buffer.getvalue()


def write_zip(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with private files, and a data folder in it."""
    home = tmp_path_factory.mktemp('home')
    data = home / 'data'
    data.mkdir()
    write_zip(home / 'private.zip', 'a.png', png())
    (home / 'private.png').write_bytes(png())
    write_zip(data / 'pictures.zip', 'x.png', png(7))
    with tarfile.open(data / 'all.tar.gz', 'w:gz') as archive:
        archive.add(data / 'pictures.zip', 'in/pictures.zip')
    (data / 'x.png.gz').write_bytes(gzip.compress(png(7)))
    (data / 'x::y#1%20[z].png').write_bytes(png(7))
    os.mkfifo(data / 'fifo')
    (data / 'zero').symlink_to('/dev/zero')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(data / 'socket'))
    with (data / 'huge.png').open('wb') as file:
        file.truncate(2**40)
    write_zip(data / 'bomb.zip', 'x.png', bytes(2**22))
    (data / 'bomb.gz').write_bytes(gzip.compress(bytes(2**22)))
    return home


@pytest.mark.parametrize('path', [
    'zip://x.png::pictures.zip', 'zip://x.png::./pictures.zip', 'zip://x.png::{data}/pictures.zip',
    'zip://x.png::tar://in/pictures.zip::all.tar.gz', 'gzip://x.png::x.png.gz', 'x::y#1%20[z].png'])
def test_what_lies_in_the_folder_is_read(home: Path, path: str) -> None:
    image = ImageReader(home / 'data')(path.format(data=home / 'data'), 'it')
    assert image.getpixel((0, 0)) == (7, 0, 0)


def test_cells_are_located_without_reading(home: Path) -> None:
    """As a call finds them; whether a file is there is not asked."""
    reader, data = ImageReader(home / 'data'), home / 'data'
    image = Image.new('L', (1, 1))
    assert reader.locate(image, 'it') is image and reader.locate({'bytes': b'x', 'path': 'y'}, 'it') == b'x'
    assert reader.locate('none.png', 'it') == data / 'none.png'
    assert reader.locate('x::y#1%20[z].png', 'it') == data / 'x::y#1%20[z].png'
    assert reader.locate('zip://x.png::tar://in/pictures.zip::all.tar.gz', 'it') == Member(
        data / 'all.tar.gz', ('zip://x.png', 'tar://in/pictures.zip'))
    assert reader.locate('https://a/b::c.png', 'it') == 'https://a/b::c.png'


@pytest.mark.parametrize('path', [
    'zip://a.png::~/private.zip', 'zip://a.png::../private.zip', 'zip://a.png::{home}/private.zip', '~/private.png',
    'zip://a.png::zip://b::../private.zip', '../private.png', 'x/../../private.png', 'file://{home}/private.png',
    'zip://a.png::file://{home}/private.zip', 'file://{home}/private.png::pictures.zip', 'local://{home}/private.png',
    'hf://datasets/a/b@main/x.png', 'zip://x.png::hf://datasets/a/b@main/x.zip', 's3://a/b.png',
    {'bytes': None, 'path': '../private.png'}, {'path': '{home}/private.png'}])
def test_nothing_outside_of_the_folder_is_read(home: Path, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setattr('fsspec.open', lambda *args, **options: pytest.fail('opened by fsspec'))
    value = {key: v and v.format(home=home) for key, v in path.items()} if isinstance(path, dict) else \
        path.format(home=home)
    with pytest.raises(UserError, match=r"^it names '"):
        ImageReader(home / 'data')(value, 'it')


def test_paths_of_the_hub_are_those_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        def open(self) -> io.BytesIO:
            return io.BytesIO(png(5))
    monkeypatch.setattr('fsspec.open', lambda path, mode: Remote())
    reader = ImageReader(None, hub_id='User/name')
    assert reader('hf://datasets/User/name@abc/x.png', 'it').getpixel((0, 0)) == (5, 0, 0)
    with pytest.raises(UserError, match="Set source to 'user/name2' if you trust it"):
        reader('hf://datasets/user/name2@abc/x.png', 'it')


@pytest.mark.parametrize(('path', 'message'), [
    ('fifo', 'not a regular file'), ('zero', 'not a regular file'), ('socket', 'not a regular file'),
    ('.', 'it is a folder'), ('huge.png', 'larger than 1000000 bytes .raise limits.image_bytes'),
    ('tar://a::zero', 'not a regular file'), ('zip://x.png::bomb.zip', 'unpacks to more than 1000000 bytes'),
    ('gzip://x.png::bomb.gz', 'unpacks to more than 1000000 bytes'), ('gzip://x::huge.png', 'not compressed by gzip'),
    ('zip://none.png::pictures.zip', 'no item named'), ('zip://x.png::huge.png', 'not a zip file'),
    ('a\0.png', 'null byte'), ('a\ud800.png', 'surrogates'), ('none.png', 'No such file')])
def test_hostile_paths_end_at_once(home: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.CURRENT, 'image_bytes', 10**6)
    start = time.monotonic()
    with pytest.raises(BadImageError, match=f'^it names .* cannot be read: .*{message}'):
        ImageReader(home / 'data')(path, 'it')
    assert time.monotonic() - start < 2


@pytest.mark.parametrize('value', [[1], {'a': 1}, 5, 1.5, True, {'path': 5}, [['a.png']], float('nan')])
def test_cells_of_another_type(value: Any) -> None:
    with pytest.raises(UserError, match='^it holds a '):
        ImageReader('/')(value, 'it')


@pytest.mark.parametrize(('kind', 'options'), [('JPEG', {}), ('JPEG', dict(progressive=True)), ('PNG', {}),
                                               ('WEBP', {})])
def test_any_cut_is_detected_or_harmless(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)  # another library may have set it
    buffer = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(buffer, kind, **options)
    data = buffer.getvalue()
    whole, longest_cut = np.asarray(decode(data, 'it')), 0
    for cut in range(0, len(data), 7):
        try:
            np.testing.assert_array_equal(np.asarray(decode(data[:cut], 'it')), whole)
        except BadImageError as error:
            assert str(error).startswith('it is not a readable image, or is cut off')
            longest_cut = cut
    assert longest_cut > len(data) - 40


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def raw_png(width: int, height: int, extra: bytes = b'') -> bytes:
    """A PNG whose pixels are missing: what is refused by its header or its other chunks needs none."""
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + extra + chunk(
        b'IDAT', zlib.compress(b'\0abc')) + chunk(b'IEND', b'')


ZEROS = zlib.compress(bytes(2**26), 1)


@pytest.mark.parametrize(('data', 'message'), [
    (raw_png(9000, 9000), r'has 9000 x 9000 pixels, more than 67108864\. .*raise limits.image_pixels'),
    (raw_png(1, 1, chunk(b'iCCP', b'x\0\0' + ZEROS)), 'too large'),
    (raw_png(1, 1, chunk(b'zTXt', b'x\0\0' + ZEROS)), 'too large'),
    (b'GIF89a' + struct.pack('<HHBBB', 60000, 60000, 0x80, 0, 0) + bytes(6) + b',' + bytes(9) + b';', 'exceeds limit'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n%%EOF', 'format EPS, which is not read'),
    (b'\x76\x2f\x31\x01' + bytes(9), 'OpenEXR is not read; convert it'), (b'#?RADIANCE\n', 'Radiance HDR is not read'),
    (b'\0\0\0\x18ftypheic' + bytes(9), r"HEIF is not read here; `pip install 'diffengine_sdxl\[formats\]'`"),
    (b'\xff\x0a' + bytes(9), 'JPEG XL is not read here; `pip install'),
    (b'II*\0' + bytes(9), 'a TIFF of such pixels .RGB in floating point is one. is not read'),
    (b'<html>', 'unknown format')])
def test_files_that_are_not_decoded(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_formats, 'find_spec', lambda name: None)
    Image.init()  # or what it loads would be lost with the list
    monkeypatch.setattr(Image, 'ID', [name for name in Image.ID if name not in ('HEIF', 'JXL')])
    with pytest.raises(BadImageError, match=f'^it .*{message}'):
        decode(data, 'it')


def coloured(shape: tuple[int, int] = (20, 28)) -> Image.Image:
    """Smooth, so that codecs that lose something lose little; no two corners alike."""
    y, x = np.mgrid[:shape[0], :shape[1]]
    return Image.fromarray(np.stack([8 * x, 10 * y, 255 - 4 * x - 4 * y], axis=-1).clip(0, 255).astype(np.uint8))


def encode(kind: str, image: Image.Image, **options: Any) -> bytes:
    """In formats with plugins, after the test has asked for the plugin."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plugin(kind: str) -> None:
    """Load the plugin of a format, which a user may lack; AVIF came to Pillow with 11.3."""
    if kind == 'AVIF' and not features.check('avif'):
        pytest.skip('this Pillow has no AVIF')
    if kind in ('HEIF', 'JXL'):
        module = pytest.importorskip('pillow_heif' if kind == 'HEIF' else 'pillow_jxl', reason='without extra formats')
        if kind == 'HEIF':
            module.register_heif_opener()


@pytest.mark.parametrize(('kind', 'options', 'most'), [
    ('AVIF', dict(quality=100, subsampling='4:4:4'), 4), ('HEIF', dict(quality=-1, chroma=444), 4),
    ('JXL', dict(lossless=True), 0)])
def test_formats_of_plugins(kind: str, options: dict[str, Any], most: int, tmp_path: Path) -> None:
    """By bytes and as files of a folder; a plugin is loaded by the first file that needs it."""
    plugin(kind)
    path = tmp_path / {'AVIF': 'a.avif', 'HEIF': 'a.heic', 'JXL': 'a.jxl'}[kind]
    path.write_bytes(encode(kind, coloured(), **options))
    if kind == 'HEIF':  # as if nothing had registered it
        Image.ID.remove('HEIF')
        Image.OPEN.pop('HEIF')
    assert list_folder(tmp_path).images() == [path]
    got = ImageReader(tmp_path)(path.name, 'it')
    assert np.abs(np.asarray(got, int) - np.asarray(coloured(), int)).max() <= most
    assert ImageReader(tmp_path).size(path.name, 'it') == image_size(path.read_bytes(), 'it') == (20, 28)


def test_formats_without_their_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extensions = {k: v for k, v in Image.registered_extensions().items() if k not in ('.heic', '.heif', '.jxl')}
    monkeypatch.setattr(image_formats, 'find_spec', lambda name: None)
    monkeypatch.setattr(Image, 'registered_extensions', lambda: extensions)
    for name in ('a.heic', 'b.jxl', 'c.exr', 'd.png', 'e.txt'):
        (tmp_path / name).write_bytes(png())
    listing = list_folder(tmp_path)
    assert listing.images() == [tmp_path / 'd.png']
    listing.pass_over_rest(listing.images())
    assert listing.reasons() == (" (2 images that take `pip install 'diffengine_sdxl[formats]'`: a.heic, b.jxl; "
                                 '1 images of a format that is not read: c.exr; 1 other files: e.txt)')


def test_jpeg_xl_is_its_codestream() -> None:
    """Other boxes may unpack to any size and are not looked at; its size is known before it is decoded."""
    plugin('JXL')
    exif = Image.Exif()
    exif[274] = 6
    data = encode('JXL', coloured(), lossless=True, exif=exif.tobytes())
    assert data[4:8] == b'JXL '
    stream = image_formats.jxl_codestream(data)
    bomb = struct.pack('>I4s4s', 2012, b'brob', b'Exif') + bytes(2000)
    parts = b''.join(struct.pack('>I4sI', 12 + len(part), b'jxlp', i) + part for i, part in enumerate(
        (stream[:3], stream[3:])))
    for boxes in (data[:32] + bomb + data[32:], data[:32] + bomb + parts, stream):
        assert np.array_equal(decode(boxes, 'it'), coloured())
    for sides in ((1, 1), (256, 256), (257, 256), (1920, 1080), (300, 2000), (9, 9001)):
        image = Image.new('L', sides)
        assert image_formats.jxl_size(encode('JXL', image, effort=1)) == sides
    huge = b'\xff\x0a' + (3 << 1 | 99_999 << 3 | 0 << 33 | 3 << 36 | 99_999 << 38).to_bytes(12, 'little')
    with pytest.raises(BadImageError, match='^it has 100000 x 100000 pixels, more than'):
        decode(huge, 'it')
    for cut, message in ((data[:32] + bomb, 'it holds no codestream'), (stream[:-9], 'it is no whole JPEG XL')):
        with pytest.raises(BadImageError, match=f'^it is not a readable image, or is cut off: {message}'):
            decode(cut, 'it')


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'AVIF', 'HEIF'])
def test_sizes_from_headers(kind: str, tmp_path: Path) -> None:
    """As the image is, whatever its orientation, by its path and by its bytes."""
    plugin(kind)
    for orientation in (1, 3, 5, 6, 7, 8):
        exif = Image.Exif()
        exif[274] = orientation
        data = encode(kind, coloured(), exif=exif.tobytes())
        path = tmp_path / f'{orientation}.{kind}'
        path.write_bytes(data)
        sides = decode(data, 'it').size[::-1]
        assert sides == ((20, 28) if orientation < 5 else (28, 20))
        assert image_size(path, 'it') == image_size(data, 'it') == sides
        assert ImageReader(None).size({'bytes': data, 'path': None}, 'it') == sides


def test_what_stands_behind_the_pixels_of_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orientation counts; other text costs no decoding."""
    exif = Image.Exif()
    exif[274] = 6
    plain = encode('PNG', coloured())
    end = plain[:-12] + chunk(b'eXIf', exif.tobytes()[6:]) + plain[-12:]
    assert decode(end, 'it').size == (20, 28) and image_size(end, 'it') == (28, 20)
    dated = plain[:-12] + chunk(b'tEXt', b'date:create\0' + b'2026') + plain[-12:]
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', lambda self: pytest.fail('decoded'))
    assert image_size(dated, 'it') == (20, 28)


def test_sizes_that_cannot_be_known(home: Path) -> None:
    reader = ImageReader(home / 'data')
    assert reader.size('zip://x.png::pictures.zip', 'it') == reader.size(Image.new('L', (2, 2)), 'it') == (2, 2)
    for value, message in (('https://a/b.png', "it names 'https://a/b.png', and sizes .* Download"),
                           ('none.png', "it .'none.png'. cannot be read: No such file"), ('fifo', 'not a regular file'),
                           ('../private.png', "it names '../private.png', outside"), (b'<html>', 'unknown format'),
                           (raw_png(9000, 9000), 'has 9000 x 9000 pixels')):
        with pytest.raises(UserError, match=message):
            reader.size(value, 'it')


def test_16_bits_a_channel() -> None:
    """Pillow drops the lower byte of three channels: within a level."""
    deep = (np.arange(3 * 256).reshape(1, 256, 3) * 85).astype(np.uint16)
    for suffix in ('.png', '.tiff'):
        got = np.asarray(decode(cv2.imencode(suffix, deep)[1].tobytes(), 'it'))[..., ::-1]
        assert np.abs(got - deep / 257).max() < 1


class Hostile(socketserver.StreamRequestHandler):
    """Answers that never end, or lead elsewhere."""

    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode()
        head = b'HTTP/1.1 200 OK\r\n'
        answers = {'/file': b'HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n',
                   '/retry': b'HTTP/1.1 503 X\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n',
                   '/to': b'HTTP/1.1 302 F\r\nLocation: /drip\r\nContent-Length: 0\r\n\r\n',
                   '/short': head + b'Content-Length: 100\r\n\r\nabc', '/good': head + b'Content-Length: 3\r\n\r\nabc'}
        try:
            if path in answers:
                self.wfile.write(answers[path])
                return
            self.wfile.write(head if path == '/head' else head + b'\r\n')
            part, pause = {'/head': (b'X: y\r\n', 0.1), '/drip': (b'x', 0.1)}.get(path, (bytes(2**16), 0.0))
            while True:
                self.wfile.write(part)
                time.sleep(pause)
        except OSError:  # the client has left
            pass


@pytest.fixture(scope='module')
def server() -> Iterator[str]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
    with Server(('127.0.0.1', 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()


@pytest.mark.parametrize(('path', 'message'), [
    ('drip', 'not complete after 0.4 s .limits.download_seconds'), ('head', 'not complete after 0.4 s'),
    ('to', 'not complete after 0.4 s'), ('retry', 'not complete after 0.4 s'),
    ('endless', 'larger than 100000 bytes .limits.download_bytes'), ('file', "No connection adapters .*'file:///etc"),
    ('short', 'IncompleteRead')])
def test_downloads_end(server: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.CURRENT, 'download_seconds', 0.4)
    monkeypatch.setattr(limits.CURRENT, 'download_bytes', 10**5)
    start = time.monotonic()
    with pytest.raises(BadImageError, match=f'^it could not be downloaded from {server}/{path}: .*{message}'):
        fetch(f'{server}/{path}', 'it')
    assert time.monotonic() - start < 2


def test_a_download(server: str) -> None:
    assert fetch(f'{server}/good', 'it') == b'abc'
