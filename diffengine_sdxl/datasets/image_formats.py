"""Formats that Pillow reads with a plugin, of the extra `formats`: HEIC and JPEG XL. A file that needs one loads it."""

import struct
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from PIL import Image

EXTRA = "pip install 'diffengine_sdxl[formats]'"
#: Suffix -> the module that decodes it. AVIF is Pillow's own, since 11.3, which the extra asks for.
PLUGINS = {'.heic': 'pillow_heif', '.heif': 'pillow_heif', '.jxl': 'pillow_jxl'}
#: Suffixes of the formats that the extra reads.
OF_EXTRA = ('.avif', *PLUGINS)
#: What stands behind 'ftyp' in a file.
_BRANDS = {**dict.fromkeys((b'avif', b'avis'), 'AVIF'), **dict.fromkeys(
    (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'hevm', b'hevs', b'mif1', b'msf1'), 'HEIF')}
#: Sides of an image of JPEG XL: bits of the number, by the selector before it; width : height, by the ratio behind it.
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def has_plugin(suffix: str) -> bool:
    """Return whether files of `suffix` are decoded by a plugin that is installed."""
    return suffix in PLUGINS and find_spec(PLUGINS[suffix]) is not None


def format_name(head: bytes) -> str | None:
    """Return 'JPEG XL', 'HEIF' or 'AVIF' if a file that begins with `head`, 12 bytes, is one of these, else None."""
    if head.startswith((b'\xff\x0a', b'\0\0\0\x0cJXL ')):
        return 'JPEG XL'
    return _BRANDS.get(head[8:12]) if head[4:8] == b'ftyp' else None


def can_decode(name: str | None) -> bool:
    """Return whether Pillow decodes the format `name` of `format_name`; load the plugin that does."""
    if name == 'HEIF' and has_plugin('.heic'):
        if 'HEIF' not in Image.OPEN:
            import_module('pillow_heif').register_heif_opener()
        return True
    if name == 'JPEG XL' and has_plugin('.jxl'):
        import_module('pillow_jxl')  # registers itself
        return True
    return name == 'AVIF' and '.avif' in Image.registered_extensions()


def jxl_codestream(data: bytes) -> bytes:
    """Return the codestream of a JPEG XL file, which holds all that the pixels depend on.

    By the standard its orientation and its profile count, not those of Exif. What else lies in the container may be
    compressed and unpack to any size. Source: ISO/IEC 18181-2, 9 (boxes).

    Raises:
        ValueError: there is none.
    """
    if data.startswith(b'\xff\x0a'):
        return data
    parts = [content if kind == b'jxlc' else content[4:] for kind, content in _boxes(data)
             if kind in (b'jxlc', b'jxlp')]
    if not parts:
        raise ValueError('it holds no codestream')
    return b''.join(parts)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each box."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from('>I4s', data, at)
        header = 8
        if size == 1 and at + 16 <= len(data):
            size, header = struct.unpack_from('>Q', data, at + 8)[0], 16
        end = len(data) if size == 0 else at + size
        if end < at + header:
            raise ValueError('the size of a box is wrong')
        yield kind, data[at + header:end]
        at = end


def jxl_size(codestream: bytes) -> tuple[int, int]:
    """Return (width, height) of an image of JPEG XL as it is stored, before it is turned upright.

    Its plugin decodes the whole image to learn it. Source: ISO/IEC 18181-1, annex D.2 (SizeHeader).
    """
    bits = int.from_bytes(codestream[2:16], 'little')

    def read(num: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << num) - 1, bits >> num
        return value

    def side(small: bool) -> int:
        return 8 * (1 + read(5)) if small else 1 + read(_SIDE_BITS[read(2)])
    small = bool(read(1))
    height, ratio = side(small), read(3)
    if ratio == 0:
        return side(small), height
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator, height
