"""Files of a data set on this machine: list a folder, read one file of a bounded size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.logging import print_log
from PIL import Image

from diffengine_sdxl import limits
from diffengine_sdxl.datasets.image_formats import EXTRA, OF_EXTRA, has_plugin
from diffengine_sdxl.errors import UserError, listed

#: Image files of a folder: what is read where Pillow, or a plugin of it, has a decoder.
WANTED = ('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.dib', '.gif', '.tif', '.tiff', '.apng', '.avif',
          '.jp2', '.tga', '.ppm', '.pgm', '.pnm', '.qoi', '.heic', '.heif', '.jxl')
NOT_READ = ('.exr', '.hdr', '.psd', '.svg', '.dng', '.pfm')
SYSTEM_FILES = ('thumbs.db', 'desktop.ini', '__macosx', '@eadir')


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes, in lower case, of files that are read as images."""
    decoded = Image.registered_extensions()
    return tuple(suffix for suffix in WANTED if suffix in decoded or has_plugin(suffix))


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        folder: absolute.
        files: regular files in it and in its folders, none of them hidden, sorted by their path as text.
        passed_over: why -> names, relative to the folder.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def relative(self, path: Path) -> str:
        """Return the path in the folder, with '/'."""
        return path.relative_to(self.folder).as_posix()

    def images(self) -> list[Path]:
        """Return the images."""
        suffixes = image_suffixes()
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def pass_over(self, why: str, paths: Iterable[Path]) -> None:
        """Record files that are not used."""
        if names := [self.relative(path) for path in paths]:
            self.passed_over.setdefault(why, []).extend(names)

    def pass_over_rest(self, used: Iterable[Path]) -> None:
        """Record all files but the `used` ones."""
        rest = sorted({*self.files}.difference(used))
        unread = {*WANTED, *NOT_READ}.difference(image_suffixes())
        for why, suffixes in ((f'images that take `{EXTRA}`', unread.intersection(OF_EXTRA)),
                              ('images of a format that is not read', unread.difference(OF_EXTRA))):
            self.pass_over(why, (p for p in rest if p.suffix.lower() in suffixes))
        self.pass_over('other files', (p for p in rest if p.suffix.lower() not in unread))

    def log(self, num: int, what: str) -> None:
        """Log how much is used, and what is passed over and why, in one line; nothing if all is used."""
        left = sum(map(len, self.passed_over.values()))
        if left:
            print_log(f"'{self.folder}': {num} {what}, {left} files passed over{self.reasons()}", logger='current')

    def reasons(self) -> str:
        """Return why files are passed over, with the first names, in brackets; '' if none is."""
        why = '; '.join(f'{len(names)} {why}: {listed(sorted(names), 3)}' for why, names in self.passed_over.items())
        return f' ({why})' if why else ''


def list_folder(folder: Path) -> Listing:
    """List a folder; hidden files, links to folders and what is no regular file are passed over."""
    listing = Listing(folder)
    for root, folders, names in os.walk(folder):
        here = Path(root)
        hidden = [name for name in folders + names if name.startswith('.') or name.lower() in SYSTEM_FILES]
        listing.pass_over('hidden', (here / name for name in hidden))
        folders[:] = [name for name in folders if name not in hidden]  # os.walk enters these, but no links
        listing.pass_over('links to folders', (here / name for name in folders if (here / name).is_symlink()))
        paths = [here / name for name in names if name not in hidden]
        listing.pass_over('not regular files', (path for path in paths if not path.is_file()))
        listing.files += [path for path in paths if path.is_file()]
    # As text: the order must not depend on the file system.
    listing.files.sort(key=listing.relative)
    return listing


def read_regular(path: Path, limit: str = 'image_bytes') -> bytes:
    """Return the bytes of a regular file.

    Args:
        limit: the name of the limit on its size.

    Raises:
        OSError: it cannot be read, is a pipe, a device or a folder, or is larger than the limit.
    """
    check_regular(path)
    most = int(getattr(limits.CURRENT, limit))
    with path.open('rb') as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f'it is larger than {most} bytes (raise limits.{limit} to read it)')
    return data


def check_regular(path: Path) -> None:
    """Check, without opening it, that `path` is a regular file.

    Raises:
        OSError: it is not; a pipe would block, and a device may not end.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, 'it is a folder')
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, 'it is not a regular file')


def read_text(path: Path, what: str) -> str:
    """Return the text of a caption file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, is too large, or is no UTF-8.
    """
    try:
        return read_regular(path, 'caption_bytes').decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f"{what} '{path}' cannot be read as UTF-8 text: {error}. Save it as UTF-8 (from Windows-1252: "
                        f"`iconv -f WINDOWS-1252 -t UTF-8`).") from error
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror or error}.") from error
