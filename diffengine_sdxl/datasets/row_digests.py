"""What the images of a sample are made of, as digests, told without decoding one.

Files and bytes by their content, transforms by their settings, their code and what they draw, packages by their
versions, URLs by their names.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.cache.keys import code_digest, digest
from diffengine_sdxl.datasets.image_files import ImageReader, Member
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import to_rgb
from diffengine_sdxl.registry import SCOPE

FileDigest = Callable[[Path], str]
#: Besides its own, the modules whose code decides the pixels that a transform makes.
SHARED_CODE = tuple(f'{SCOPE}.{name}' for name in (
    'rng', 'structures', 'images', 'datasets.image_files', 'datasets.image_formats', 'datasets.transforms.geometry'))


def is_ours(part: Any) -> bool:
    """Return whether a transform or a data set is of this package, not a user's own."""
    return type(part).__module__.startswith(f'{SCOPE}.')


def content_digest(cell: Any, reader: ImageReader | None, what: str, file_digest: FileDigest) -> list[Any]:
    """Return what tells the image of a cell from others, without decoding it.

    Args:
        cell: what a row holds; see `MapDataset.cells`.
        reader: finds paths within the folders that may be read; None: paths are read as they are.
        what: how errors name the cell.

    Raises:
        OSError: a file cannot be read, or is too large.
        UserError: the cell is empty or leads outside.
    """
    found = cell if reader is None else reader.locate(cell, what)
    if isinstance(found, Path):
        if found.stat().st_size > limits.CURRENT.image_bytes:
            raise OSError('it is larger than limits.image_bytes')  # reading the image says so
        return ['file', file_digest(found)]
    if isinstance(found, Member):
        return ['member', file_digest(found.archive), found.prefixes]
    if isinstance(found, Image.Image):
        rgb = to_rgb(found)  # as reading it does: palette and profile count
        return ['pixels', rgb.size, digest(rgb.tobytes())]
    if isinstance(found, bytes | bytearray):
        return ['bytes', digest(bytes(found))]
    if isinstance(found, str):
        return ['url', found]
    raise UserError(f'{what} holds a {type(found).__name__}, which is no image.')


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's values, shape and dtype."""
    array = tensor.detach().cpu().contiguous()
    return digest(str(array.dtype), list(array.shape), array.flatten().view(torch.uint8).numpy().tobytes())


def describe(transform: Any, file_digest: FileDigest) -> list[Any]:
    """Return the type, code, settings and files of a transform of this package; what it draws comes on top."""
    kind, settings = type(transform), {k: v for k, v in vars(transform).items() if not k.startswith('_')}
    made_of = transform.made_of(file_digest) if hasattr(transform, 'made_of') else None
    code = code_digest(kind.__module__, *SHARED_CODE)
    readers = [PIL.__version__, *map(package_digest, ('pillow_heif', 'pillow_jxl'))]
    return [kind.__module__, kind.__qualname__, code, readers, plain(settings), plain(made_of)]


def plain(value: Any) -> Any:
    """Return a value as `cache.keys.digest` takes it: numbers, strings, None, lists and dicts of these."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # an enum's too
    return value if value is None or isinstance(value, str | bytes | bool | float) else repr(value)


@cache
def package_digest(module: str) -> str:
    """Return the digest of the versions of the packages that `module` belongs to; of its files, if it has none."""
    top = module.partition('.')[0]
    if names := _packages().get(top):
        return digest(top, [[name, importlib.metadata.version(name)] for name in sorted({*names})])
    spec = importlib.util.find_spec(top)
    file = Path(str(spec.origin if spec else ''))
    files = sorted(file.parent.rglob('*.py')) if file.name == '__init__.py' else [file] if file.is_file() else []
    return digest(top, [[path.name, path.read_bytes()] for path in files])


@cache
def _packages() -> Mapping[str, list[str]]:
    """Return module -> the packages that bring it; to look takes 0.2 s."""
    return importlib.metadata.packages_distributions()
