"""Read an image: the one place where training and inference turn a file, bytes or a URL into an RGB image.

`ImageReader` reads what a row's cell may hold, `decode` the bytes of a file, `image_size` its header, `fetch` a URL. An
unreadable image is a `BadImageError`, which names it.
"""

import io
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from diffengine_sdxl import limits
from diffengine_sdxl.datasets import archives, image_formats
from diffengine_sdxl.datasets.files import check_regular, read_regular
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import to_rgb, upright_size
from diffengine_sdxl.loading.hub import hub_errors

TIMEOUT = (5.0, 30.0)
"""Seconds to connect to a server, and between two parts of its response."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
                 AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
"""What PIL's decoders raise for damaged files."""
#: Formats whose decoders run other programs or read other files.
UNSAFE_FORMATS = ('EPS', 'WMF', 'FITS', 'HDF5', 'GRIB', 'BUFR')
#: The first bytes of formats that have no decoder here -> their names.
NO_DECODER = {b'\x76\x2f\x31\x01': 'OpenEXR', b'#?RADIANCE': 'Radiance HDR', b'#?RGBE': 'Radiance HDR',
              **dict.fromkeys((b'II*\0', b'MM\0*'), 'a TIFF of such pixels (RGB in floating point is one)')}


class BadImageError(UserError):
    """An image is missing, unreadable or cut off; `base.SampleBuilder.handle_bad_image` decides what happens."""


def decode(data: bytes, what: str) -> Image.Image:
    """Decode the bytes of an image file to its end; return it upright and in RGB.

    Args:
        what: how errors name the image.

    Raises:
        BadImageError: the bytes are not an image, or are cut off.
    """
    with _decoding(what, data), _opened(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(image)


def image_size(source: bytes | Path, what: str) -> tuple[int, int]:
    """Return (height, width) of an image as `decode` returns it, from its header (JPEG XL: from its pixels).

    Args:
        source: the bytes of an image file, or the path of one.
        what: how errors name the image.

    Raises:
        BadImageError: it is not an image, is larger than `limits.image_pixels`, or cannot be read.
    """
    try:
        # Unbuffered: a walk over the chunks of a PNG would fill the buffer anew for each.
        file = io.BytesIO(source) if isinstance(source, bytes) else _open(source, what, buffering=0)
    except OSError as error:
        raise BadImageError(f'{what} cannot be read: {error.strerror or error}.') from error
    with file, _decoding(what, file.read(12)):
        return _size(file)


def _size(file: IO[bytes]) -> tuple[int, int]:
    with _opened(file) as image:
        if image.format == 'PNG' and _has_late_exif(file):
            image.load()
        return upright_size(image)


def _has_late_exif(file: IO[bytes]) -> bool:
    """Return whether a PNG's orientation may stand behind its pixels, where Pillow finds it once they are decoded."""
    pixels = found = False
    file.seek(8)
    while not found and len(head := file.read(8)) == 8:
        end = file.tell() + int.from_bytes(head[:4], 'big') + 4
        pixels |= head[4:] == b'IDAT'
        # Text without these keywords is common there: ImageMagick writes its dates.
        found = pixels and (head[4:] == b'eXIf' or head[5:] in (b'EXt', b'TXt') and file.read(24).startswith(
            (b'Raw profile type exif\0', b'XML:com.adobe.xmp\0')))
        file.seek(end)
    return found


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open an image file, within the limits; only JPEG XL is decoded.

    Raises:
        UserError: its format or its size is refused.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # if another library sets it, cut files decode to half-gray images
    if Image.MAX_IMAGE_PIXELS is not None:  # PIL's own limit, if ours was raised above it
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.CURRENT.image_pixels)
    file.seek(0)
    name = image_formats.format_name(file.read(12))
    file.seek(0)
    if image_formats.can_decode(name) and name == 'JPEG XL':
        codestream = image_formats.jxl_codestream(_whole(file))
        _check_pixels(*image_formats.jxl_size(codestream))
        file = io.BytesIO(codestream)
    with Image.open(file) as image:
        if image.format in UNSAFE_FORMATS:
            raise UserError(f'is of the format {image.format}, which is not read. Convert it to PNG.')
        _check_pixels(image.width, image.height)
        yield image


def _check_pixels(width: int, height: int) -> None:
    if width * height > limits.CURRENT.image_pixels:
        raise UserError(f'has {width} x {height} pixels, more than {limits.CURRENT.image_pixels}. '
                        'Scale it down, or raise limits.image_pixels.')


@contextmanager
def _decoding(what: str, data: bytes = b'') -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise BadImageError(f'{what} {error}') from error
    except DECODE_ERRORS as error:
        # PIL's own text for this one ends with the address of a BytesIO; JPEG XL's says how to build its plugin.
        own = isinstance(error, UnidentifiedImageError) or 'libjxl' in str(error)
        reason = _unknown_format(data) if own else error
        raise BadImageError(f'{what} is not a readable image, or is cut off: {reason}') from error


def _unknown_format(data: bytes) -> str:
    """Name the format of a file that PIL does not know."""
    name = image_formats.format_name(data[:12])
    if name is not None:
        return f'it is no whole {name}' if image_formats.can_decode(name) else (
            f'{name} is not read here; `{image_formats.EXTRA}`, or convert it to PNG')
    name = next((name for magic, name in NO_DECODER.items() if data.startswith(magic)), None)
    return f'{name} is not read; convert it to PNG, or depth maps to 16-bit PNG' if name else 'unknown format'


def is_url(value: str) -> bool:
    """Return whether `value` is an http or https URL."""
    return value.startswith(('http://', 'https://'))


def fetch(url: str, what: str) -> bytes:
    """Download an http(s) URL, in up to three attempts, within `limits.download_bytes` and `download_seconds`.

    Raises:
        BadImageError: no response, an HTTP error, or a limit is reached.
    """
    seconds, answers = limits.CURRENT.download_seconds, list[bytes | BadImageError]()
    # In a thread, since a server that sends a byte now and then keeps within every timeout of a socket.
    thread = threading.Thread(target=_download, args=(url, what, time.monotonic() + seconds, answers), daemon=True)
    thread.start()
    thread.join(seconds)
    answer = answers[0] if answers else BadImageError(f'{what} could not be downloaded from {url}: it was not complete '
                                                      f'after {seconds:g} s (limits.download_seconds).')
    if isinstance(answer, BadImageError):
        raise answer
    return answer


def _download(url: str, what: str, deadline: float, answers: list[bytes | BadImageError]) -> None:
    """Append the content of `url`, or an error, to `answers`."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError
    from urllib3.util import Retry
    retries, most = Retry(total=2, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504]), limits.CURRENT
    try:
        # A session per download: workers that are forked later would share an open connection.
        with requests.Session() as session:
            for scheme in ('http://', 'https://'):
                session.mount(scheme, HTTPAdapter(max_retries=retries))
            with session.get(url, timeout=TIMEOUT, stream=True) as response:
                response.raise_for_status()
                content = bytearray()
                for block in response.iter_content(2**16):
                    content += block
                    if len(content) > most.download_bytes:
                        raise OSError(f'it is larger than {most.download_bytes} bytes (limits.download_bytes)')
                    if time.monotonic() > deadline:
                        return
                answers.append(bytes(content))
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        answers.append(BadImageError(f'{what} could not be downloaded from {url}: {error}'))


def remote_errors() -> tuple[type[Exception], ...]:
    """Return what fsspec raises for files on the hub, behind URLs and in archives."""
    aiohttp = sys.modules.get('aiohttp')  # fsspec's HTTP client, if it is installed
    return (*hub_errors(), *archives.ERRORS, *([aiohttp.ClientError] if aiohttp else []))


class Member(NamedTuple):
    """A file of an archive on this machine; `prefixes` are fsspec's, the innermost first, as 'zip://a.png'."""

    archive: Path
    prefixes: tuple[str, ...]


Cell = Image.Image | bytes | Path | Member | str
"""What a row holds of an image; a str is behind a URL or on the hub, maybe with prefixes."""


class ImageReader:
    """Read what a row's cell may hold as an image.

    Paths may come from an untrusted file, so they must stay inside the folder `root`, as text: `..` and absolute paths
    outside are refused, links inside are followed. Relative paths begin at `root`, those of archives too
    ('zip://a.png::pictures.zip').

    Args:
        root: the only folder that paths may name; None refuses all paths, '/' allows every absolute path.
        caches: more folders that may be read, but only for images that `datasets` itself put there.
        hub_id: the one data set of the hub that 'hf://' paths may name, 'user/name'.
    """

    def __init__(self, root: str | Path | None, caches: Sequence[str | Path] = (), hub_id: str | None = None) -> None:
        self.root = None if root is None else _absolute(root)
        self.caches = [_absolute(cache) for cache in caches]
        self.hub_id = hub_id

    def __call__(self, value: Any, what: str) -> Image.Image:
        """Return the RGB image of a PIL image, bytes, {'bytes', 'path'}, a path or a URL.

        Args:
            what: how errors name it, for example "column 'image' of row 3 of data.parquet".

        Raises:
            BadImageError: it is missing, unreadable or cut off.
            UserError: the path leads outside, or the value has another type.
        """
        cell = self.locate(value, what)
        if isinstance(cell, Image.Image):
            with _decoding(what):
                cell.load()
                return to_rgb(cell)
        if isinstance(cell, bytes):
            return decode(cell, what)
        path = str(_content(value)[0])
        return decode(self._read(cell, path, what), f"{what} ('{path}')")

    def size(self, value: Any, what: str) -> tuple[int, int]:
        """Return (height, width) of the image that a call returns; of a file only the header is read.

        Raises:
            BadImageError, UserError: as a call; UserError also for what must be downloaded.
        """
        cell = self.locate(value, what)
        if isinstance(cell, Image.Image):
            with _decoding(what):
                return upright_size(cell)
        path = '' if isinstance(cell, bytes) else str(_content(value)[0])
        if isinstance(cell, str):
            raise UserError(f"{what} names '{path}', and sizes of images are needed before training. Download the "
                            'images first.')
        return image_size(self._read(cell, path, what) if isinstance(cell, Member) else cell,
                          f"{what} ('{path}')" if path else what)

    def locate(self, value: Any, what: str) -> Cell:
        """Return what a call would decode, without reading it.

        Raises:
            BadImageError: it is empty.
            UserError: the path leads outside, or the value has another type.
        """
        value, stored = _content(value)
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if value is None or isinstance(value, str) and not value:
            raise BadImageError(f'{what} is empty.')
        if not isinstance(value, str | os.PathLike):
            raise UserError(f'{what} holds a {type(value).__name__}; an image, its bytes, a path or a URL is expected.')
        path = str(value)
        # fsspec's paths, as `datasets` streams them: 'hf://...', or 'zip://a.png::' before an archive's path.
        *prefixes, target = [path] if is_url(path) or self._is_file(path) else path.split('::')
        if '://' in target:
            self._check_remote(target, f"{what} names '{path}'")
            return path
        file = self._inside(target, what, self.caches if stored else [])
        return Member(file, tuple(prefixes)) if prefixes else file

    def _check_remote(self, target: str, what: str) -> None:
        if is_url(target):
            return
        if not target.startswith('hf://'):
            raise UserError(f'{what}: only http and https URLs are downloaded.')
        named, own = target.removeprefix('hf://datasets/').partition('@')[0].lower(), str(self.hub_id).lower()
        if named != own and named.partition('/')[2] != own:  # old ids have no user
            raise UserError(f"{what}: of the hub only the data set that is the config's source is read. Set source to "
                            f"'{named}' if you trust it.")

    def _read(self, cell: Path | Member | str, path: str, what: str) -> bytes:
        """Return the bytes of what `locate` found by `path`."""
        if isinstance(cell, str) and is_url(cell):
            return fetch(cell, what)
        target: Path | str
        if isinstance(cell, str):
            *prefixes, target = cell.split('::')
        else:
            prefixes, target = (list(cell.prefixes), cell.archive) if isinstance(cell, Member) else ([], cell)
        try:
            if isinstance(target, Path) and not prefixes:
                return read_regular(target)
            with _open(target, what) as content:
                return archives.read_member(prefixes, content) if prefixes else _whole(content)
        except UserError as error:
            raise error if isinstance(error, BadImageError) else UserError(f"{what} names '{path}': {error}") from error
        except remote_errors() as error:  # ValueError: a null byte or a lone surrogate in the path
            raise BadImageError(f"{what} names '{path}', and {target} cannot be read: "
                                f'{getattr(error, "strerror", None) or error}') from error

    def _is_file(self, path: str) -> bool:
        """Return whether a path with '::' is that of a file in the root, whose name has these letters."""
        try:
            return '::' in path and self.root is not None and (self.root / path).is_file()
        except (OSError, ValueError):
            return False

    def _inside(self, path: str, what: str, caches: list[Path]) -> Path:
        """Return the absolute path; refuse one outside of the root and `caches`."""
        if self.root is None and not Path(path).is_absolute():
            raise UserError(f"{what} is the relative path '{path}' without a folder to begin at: set image_root.")
        # `datasets` resolves links in the paths that it returns, so a linked root has two names.
        folders = [*([] if self.root is None else [self.root, self.root.resolve()]), *caches]
        absolute = _absolute(path if self.root is None else self.root / path)
        if not any(absolute.is_relative_to(folder) for folder in folders):
            raise UserError(f"{what} names '{path}', outside of {self.root or 'any folder that may be read'}. "
                             'Set image_root to a folder that holds all images, if you trust the data.')
        return absolute


def _content(value: Any) -> tuple[Any, bool]:
    """Return what a cell holds, and whether `datasets` stored it, as {'bytes', 'path'}."""
    if isinstance(value, dict) and {'bytes', 'path'} & value.keys():
        return value.get('path') if value.get('bytes') is None else value['bytes'], True
    return value, False


def _open(target: str | Path, what: str, buffering: int = -1) -> IO[bytes]:
    """Open what a path names behind its prefixes."""
    if isinstance(target, Path):
        check_regular(target)
        return open(target, 'rb', buffering)
    if is_url(target):
        return io.BytesIO(fetch(target, what))
    import fsspec
    return fsspec.open(target, 'rb').open()  # type: ignore[no-any-return]


def _whole(file: IO[bytes]) -> bytes:
    """Return all of a remote file."""
    data = file.read(int(limits.CURRENT.image_bytes) + 1)
    if len(data) > limits.CURRENT.image_bytes:
        raise ValueError(f'it is larger than {limits.CURRENT.image_bytes} bytes (limits.image_bytes)')
    return data


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))
