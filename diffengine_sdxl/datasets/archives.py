"""Archives and compressed files: read one member, and refuse bombs, without unpacking them to the disk.

Both work within limits: `limits.image_bytes` for what is read into memory, `limits.unpacked_bytes` for what a library
would unpack.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError

#: What the readers raise for damaged, encrypted or foreign archives.
ERRORS = (OSError, LookupError, EOFError, ValueError, RuntimeError, NotImplementedError, tarfile.TarError,
          zipfile.BadZipFile, zlib.error, lzma.LZMAError)
#: A file that unpacks to less than this many times its size is no bomb.
BOMB_RATIO = 100
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}
#: Formats that `datasets` unpacks too, and whose size is not known before.
REFUSED = {b'\x28\xb5\x2f\xfd': 'zstd', b'\x04\x22\x4d\x18': 'lz4', b'Rar!': 'rar', b'7z\xbc\xaf\x27\x1c': '7z'}


def read_member(prefixes: Sequence[str], file: IO[bytes]) -> bytes:
    """Return one file of an archive.

    Args:
        prefixes: fsspec's, innermost first: ['zip://a.png', 'tar://b.zip'] is a.png of b.zip of the tar `file`.

    Raises:
        UserError: a prefix names another file system.
        OSError, LookupError, ... (`ERRORS`): an archive is damaged, a member is missing or too large.
    """
    readers = {'zip': _zip_member, 'tar': _tar_member, 'gzip': _decompress, 'bz2': _decompress, 'xz': _decompress}
    data = b''
    for prefix in reversed(prefixes):
        scheme, _, member = prefix.partition('://')
        if scheme not in readers:
            raise UserError(f"'{prefix}' is not an archive's; only {', '.join(f'{name}://' for name in readers)} may "
                            "stand before '::'.")
        data = readers[scheme](file, member)
        file = io.BytesIO(data)
    return data


def _bounded(file: IO[bytes], size: int = 0) -> bytes:
    """Return what is left of `file`, if this, and the `size` that is said to be, are within the limit."""
    most = int(limits.CURRENT.image_bytes)
    data = file.read(most + 1) if size <= most else bytes(0)
    if max(size, len(data)) > most:
        raise ValueError(f'it unpacks to more than {most} bytes (raise limits.image_bytes to read it)')
    return data


def _zip_member(file: IO[bytes], member: str) -> bytes:
    with zipfile.ZipFile(file) as archive, archive.open(member) as content:
        return _bounded(content, archive.getinfo(member).file_size)


def _tar_member(file: IO[bytes], member: str) -> bytes:
    head = file.read(8)
    file.seek(0)
    if any(head.startswith(magic) for magic in DECOMPRESSORS):  # as fsspec reads 'tar://a.png::b.tar.gz'
        file = io.BytesIO(_decompress(file))
    with tarfile.open(fileobj=file, mode='r:') as archive:
        info = archive.getmember(member)
        # Links are not followed: they may lead in circles.
        content = archive.extractfile(info) if info.isreg() else None
        if content is None:
            raise ValueError(f"'{member}' is not a regular file of the archive")
        return _bounded(content, info.size)


def _decompress(file: IO[bytes], member: str = '') -> bytes:
    head = file.read(8)
    file.seek(0)
    for magic, opener in DECOMPRESSORS.items():
        if head.startswith(magic):
            with opener(file) as content:
                return _bounded(content)
    raise ValueError('it is not compressed by gzip, bzip2 or xz')


def check_unpacked(path: str | Path) -> None:
    """Check that `datasets`, which unpacks by a file's first bytes, will not unpack a bomb.

    Raises:
        UserError: it would, or how much it unpacks to is not known; or the file is cut off.
    """
    try:
        packed = os.path.getsize(path)
        most = max(int(limits.CURRENT.unpacked_bytes), BOMB_RATIO * packed)
        with open(path, 'rb') as file:
            head = file.read(8)
            file.seek(0)
            if kind := next((kind for magic, kind in REFUSED.items() if head.startswith(magic)), None):
                raise UserError(f"'{path}' is compressed by {kind}, which is not read: unpack it, or compress it by "
                                'gzip.')
            size = 0
            if head.startswith(b'PK\3\4'):
                with zipfile.ZipFile(file) as archive:
                    size = sum(info.file_size for info in archive.infolist())
            for magic, opener in DECOMPRESSORS.items():
                if head.startswith(magic):
                    with opener(file) as content:
                        while size <= most and (block := content.read(2**20)):
                            size += len(block)
    except UserError:
        raise
    except ERRORS as error:
        raise UserError(f"'{path}' cannot be unpacked, or is cut off: {error}.") from error
    if size > most:
        raise UserError(f"'{path}' of {packed} bytes unpacks to more than {most} bytes. If you trust it, unpack it, or "
                        'raise limits.unpacked_bytes.')
