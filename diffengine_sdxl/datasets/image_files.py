"""Read an image: the one place where training and inference turn a file, bytes or a URL into an RGB image.

`ImageReader` reads what a row's cell may hold, `decode` the bytes of a file, `fetch` a URL. An unreadable image is a
`BadImageError`, which names it.
"""

import io
import lzma
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.hub import hub_errors

TIMEOUT = (5.0, 30.0)
"""Seconds to connect to a server, and between two parts of its response."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
                 AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
"""What PIL's decoders raise for damaged files."""


class BadImageError(UserError):
    """An image is missing, unreadable or cut off; `base.SampleBuilder.handle_bad_image` decides what happens."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright (EXIF) and in RGB: transparency becomes white, 16-bit values are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        # PIL's conversion would clip a 16-bit depth map at 255 instead of scaling it.
        array = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(array / 257 + 0.5, 0, 255).astype(np.uint8))
    if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def decode(data: bytes, what: str) -> Image.Image:
    """Decode the bytes of an image file to its end; return it upright and in RGB.

    Args:
        what: how errors name the image.

    Raises:
        BadImageError: the bytes are not an image, or are cut off.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # if another library sets it, cut files decode to half-gray images
    with _decoding(what), Image.open(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(image)


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    try:
        yield
    except DECODE_ERRORS as error:
        # PIL's own text for this one ends with the address of a BytesIO.
        reason = 'unknown format' if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f'{what} is not a readable image, or is cut off: {reason}') from error


def is_url(value: str) -> bool:
    """Return whether `value` is an http or https URL."""
    return value.startswith(('http://', 'https://'))


def fetch(url: str, what: str) -> bytes:
    """Download an http(s) URL, in up to three attempts.

    Raises:
        BadImageError: no response, or an HTTP error.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry
    retries = Retry(total=2, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504])
    try:
        # A session per download: workers that are forked later would share an open connection.
        with requests.Session() as session:
            for scheme in ('http://', 'https://'):
                session.mount(scheme, HTTPAdapter(max_retries=retries))
            response = session.get(url, timeout=TIMEOUT)
            response.raise_for_status()
            return response.content
    except requests.RequestException as error:
        raise BadImageError(f'{what} could not be downloaded from {url}: {error}') from error


def remote_errors() -> tuple[type[Exception], ...]:
    """Return what fsspec raises for files on the hub, behind URLs and in archives."""
    aiohttp = sys.modules.get('aiohttp')  # fsspec's HTTP client, if it is installed
    return (*hub_errors(), LookupError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
            *([aiohttp.ClientError] if aiohttp else []))


class ImageReader:
    """Read what a row's cell may hold as an image.

    Paths may come from an untrusted file, so they must stay inside the folder `root`, as text: `..` and absolute paths
    outside are refused, links inside are followed. Relative paths begin at `root`.

    Args:
        root: the only folder that paths may name; None refuses all paths, '/' allows every absolute path.
        caches: more folders that may be read, but only for images that `datasets` itself put there.
    """

    def __init__(self, root: str | Path | None, caches: Sequence[str | Path] = ()) -> None:
        self.root = None if root is None else _absolute(root)
        self.caches = [_absolute(cache) for cache in caches]

    def __call__(self, value: Any, what: str) -> Image.Image:
        """Return the RGB image of a PIL image, bytes, {'bytes', 'path'}, a path or a URL.

        Args:
            what: how errors name it, for example "column 'image' of row 3 of data.parquet".

        Raises:
            BadImageError: it is missing, unreadable or cut off.
            UserError: the path leads outside, or the value has another type.
        """
        caches: list[Path] = []
        if isinstance(value, dict) and {'bytes', 'path'} & value.keys():  # as `datasets` stores images
            caches = self.caches
            value = value.get('path') if value.get('bytes') is None else value['bytes']
        if isinstance(value, Image.Image):
            with _decoding(what):
                value.load()
                return to_rgb(value)
        if isinstance(value, bytes | bytearray):
            return decode(bytes(value), what)
        if value is None or isinstance(value, str) and not value:
            raise BadImageError(f'{what} is empty.')
        if isinstance(value, str | os.PathLike):
            return decode(self._read(str(value), what, caches), f"{what} ('{value}')")
        raise UserError(f'{what} holds a {type(value).__name__}; an image, its bytes, a path or a URL is expected.')

    def _read(self, path: str, what: str, caches: list[Path]) -> bytes:
        if is_url(path):
            return fetch(path, what)
        # fsspec's paths, as `datasets` streams them: 'hf://...', or 'zip://a.png::' before an archive's path.
        *prefixes, target = path.split('::')
        for prefix in prefixes:
            # Other file systems ignore the target, and would lead out of the folder.
            if prefix.partition('://')[0] not in ('zip', 'tar', 'gzip', 'bz2', 'xz'):
                raise UserError(f"{what} names '{path}': only archives may stand before '::'.")
        if target.startswith('hf://') or (prefixes and is_url(target)):
            return self._read_remote(path, what)
        if '://' in target:
            raise UserError(f"{what} names '{path}': only http and https URLs are downloaded.")
        file = self._inside(target, what, caches)
        if prefixes:
            return self._read_remote(path, what)
        try:
            return file.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate in the path
            raise BadImageError(f"{what} names '{path}', and {file} cannot be read: "
                                f'{getattr(error, "strerror", None) or error}') from error

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

    def _read_remote(self, path: str, what: str) -> bytes:
        import fsspec
        try:
            with fsspec.open(path, 'rb') as file:
                return file.read()  # type: ignore[no-any-return]
        except remote_errors() as error:
            raise BadImageError(f'{what} could not be read from {path}: {error}') from error


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))
