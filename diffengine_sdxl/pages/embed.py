"""Images as data: URLs, so that a page is one file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffengine_sdxl import limits

#: Formats of files that are opened; others could be of any kind of decoder.
FORMATS = ('PNG', 'JPEG', 'WEBP')
#: An image of at most this side is shown with sharp pixels.
TINY = 128


class Embedded(NamedTuple):
    """An image in a page: its data: URL, its width and height in pixels, and whether pixels stay sharp."""

    src: str
    width: int
    height: int
    tiny: bool


class Embedder:
    """Read images up to a number of bytes in all.

    Args:
        max_bytes: of all data: URLs together.

    Attributes:
        left_out: the files for which there was no room.
        unreadable: the files that are damaged, or are no image.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes_left = max_bytes
        self.left_out: list[Path] = []
        self.unreadable: list[Path] = []
        self._known: dict[tuple[Path, int], Embedded | None] = {}

    def __call__(self, path: Path, side: int) -> Embedded | None:
        """Return the image at `path`, scaled down to `side` pixels; None if there is no room or no image.

        Small files are taken as they are, others as WebP.
        """
        if (path, side) not in self._known:
            try:
                self._known[path, side] = _embed(path, side)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's, of a damaged file
                self._known[path, side] = None
                self.unreadable.append(path)
        image = self._known[path, side]
        if image is None:
            return None
        if len(image.src) > self.bytes_left:
            self.left_out += [path] if path not in self.left_out else []
            return None
        self.bytes_left -= len(image.src)
        return image


def _embed(path: Path, side: int) -> Embedded:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > limits.CURRENT.image_pixels:
            raise ValueError('more pixels than limits.image_pixels')
        image.load()
        kind = str(image.format).lower()
        tiny = max(image.size) <= TINY
        if max(image.size) <= side and path.stat().st_size <= side ** 2 // 8:
            data, size = path.read_bytes(), image.size
        else:
            small = image.convert('RGB')
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, 'WEBP', quality=85, method=2)
            kind, data, size = 'webp', buffer.getvalue(), small.size
    return Embedded(f'data:image/{kind};base64,{base64.b64encode(data).decode()}', *size, tiny)
