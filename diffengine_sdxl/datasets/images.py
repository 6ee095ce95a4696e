"""From what a row holds (picture, bytes, path, URL) to an upright RGB picture, or an error that names it."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

TIMEOUT = (5.0, 30.0)
"""Seconds to connect to a server and between two of its answers."""


class BadImageError(ValueError):
    """A picture that is missing, unreadable or cut off: what `on_bad_image='skip'` passes over."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright (EXIF) and RGB: transparent parts turn white, 16-bit values are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        # PIL's own conversion would cut a 16-bit depth map off at 255 instead of scaling it.
        array = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(array / 257 + 0.5, 0, 255).astype(np.uint8))
    if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def decode(data: bytes, what: str) -> Image.Image:
    """The RGB picture in the bytes of an image file, decoded to its end.

    Args:
        what: words that name it in the error.

    Raises:
        BadImageError: the bytes are no image, or end too early.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library that switches it on would feed us half-gray pictures
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise BadImageError(f'{what} is not a readable image, or is cut off ({len(data)} bytes): {error}') from error


def is_url(value: str) -> bool:
    """Whether `value` is to be fetched by http or https."""
    return value.startswith(('http://', 'https://'))


def fetch(url: str, what: str) -> bytes:
    """The bytes behind an http(s) address, in three attempts.

    Raises:
        BadImageError: no answer, or another status than 200.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry
    retries = Retry(total=2, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504])
    try:
        # A session per fetch: a kept connection would be shared by the workers that are forked later.
        with requests.Session() as session:
            for scheme in ('http://', 'https://'):
                session.mount(scheme, HTTPAdapter(max_retries=retries))
            answer = session.get(url, timeout=TIMEOUT)
            answer.raise_for_status()
            return answer.content
    except requests.RequestException as error:
        raise BadImageError(f'{what} could not be fetched from {url}: {error}') from error


class ImageReader:
    """Reads whatever a row may hold as a picture.

    A path may come from a file that somebody else wrote, so it must stay inside the folder `root` (by its letters:
    `..` and absolute paths outside are refused, links inside are followed). A relative path begins at `root`.

    Args:
        root: the only folder that paths may name; None refuses all paths. '/' allows every absolute path.
        caches: more folders that may be read, but only for pictures that `datasets` itself has put there.
    """

    def __init__(self, root: str | Path | None, caches: Sequence[str | Path] = ()) -> None:
        self.root = None if root is None else _absolute(root)
        self.caches = [_absolute(cache) for cache in caches]

    def __call__(self, value: Any, what: str) -> Image.Image:
        """The RGB picture of `value`: a PIL image, bytes, {'bytes', 'path'}, a path or a URL.

        Args:
            what: words that name the place in errors, as "column 'image' of row 3 of data.parquet".

        Raises:
            BadImageError: it is missing, unreadable or cut off.
            ValueError: the path leads outside, or the value is nothing that can hold a picture.
        """
        if isinstance(value, Image.Image):
            try:
                value.load()
                return to_rgb(value)
            except Exception as error:  # as in `decode`
                raise BadImageError(f'{what} is not a readable image, or is cut off: {error}') from error
        if isinstance(value, bytes | bytearray):
            return decode(bytes(value), what)
        if isinstance(value, dict) and {'bytes', 'path'} & value.keys():
            if value.get('bytes') is not None:
                return decode(value['bytes'], what)
            if value.get('path') is not None:
                return decode(self._read(value['path'], what, self.caches), f"{what} ('{value['path']}')")
            value = None
        if isinstance(value, str | os.PathLike) and str(value):
            return decode(self._read(str(value), what, []), f"{what} ('{value}')")
        if value is None or value == '':
            raise BadImageError(f'{what} is empty.')
        raise ValueError(f'{what} holds a {type(value).__name__}; an image, its bytes, a path or a URL is expected.')

    def _read(self, path: str, what: str, caches: list[Path]) -> bytes:
        if is_url(path):
            return fetch(path, what)
        # Pictures that `datasets` streams: 'hf://...', or 'zip://a.png::' before the place of an archive.
        *chain, place = path.split('::')
        for link in chain:
            # Other file systems ignore what they stand in front of, and would lead out of the folder.
            if link.partition('://')[0] not in ('zip', 'tar', 'gzip', 'bz2', 'xz'):
                raise ValueError(f"{what} names '{path}': only archives may stand before '::'.")
        if place.startswith('hf://') or (place != path and is_url(place)):
            return self._read_remote(path, what)
        if '://' in place:
            raise ValueError(f"{what} names '{path}': only http and https addresses are fetched.")
        inside = self._inside(place, what, caches)
        if place != path:
            return self._read_remote(path, what)
        try:
            return inside.read_bytes()
        except OSError as error:
            raise BadImageError(f"{what} names '{path}', and {inside} cannot be read: {error.strerror}") from error

    def _inside(self, path: str, what: str, caches: list[Path]) -> Path:
        # `datasets` resolves links in the paths that it hands out, so a linked root has two names.
        folders = [*([] if self.root is None else [self.root, self.root.resolve()]), *caches]
        if self.root is None and not Path(path).is_absolute():
            raise ValueError(f"{what} is the path '{path}', and nothing says to which folder it belongs: "
                             'set image_root.')
        found = _absolute(path if self.root is None else self.root / path)
        if not any(found.is_relative_to(folder) for folder in folders):
            raise ValueError(f"{what} names '{path}', outside of {self.root or 'any folder that may be read'}. "
                             'Set image_root to a folder that holds all images, if you trust the data.')
        return found

    def _read_remote(self, path: str, what: str) -> bytes:
        import fsspec
        try:
            with fsspec.open(path, 'rb') as file:
                return file.read()  # type: ignore[no-any-return]
        except Exception as error:  # one per file system
            raise BadImageError(f'{what} could not be read from {path}: {error}') from error


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))
