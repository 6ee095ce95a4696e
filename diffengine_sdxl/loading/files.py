"""Names of weight files in diffusers and transformers, which of them are read, and what reading a file may raise."""

import json
import pickle
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError, first_line

#: Stems of weights in safetensors and in pickles, of model classes of diffusers and transformers.
STEMS = ('diffusion_pytorch_model', 'model')
BINS = ('diffusion_pytorch_model', 'pytorch_model')
_STEM, _SHARD = '|'.join(dict.fromkeys((*STEMS, *BINS))), r'-\d{5}-of-\d{5}'
#: A file of a model's weights; its group is the variant.
WEIGHTS = re.compile(rf'(?:{_STEM})(?:{_SHARD})?(?:\.([^.]+?))?(?:{_SHARD})?\.(?:safetensors|bin)')
_VARIANT = re.compile(rf'(?:{"|".join(STEMS)})'
                      rf'(?:\.([^.]+?)(?:{_SHARD})?\.safetensors|\.safetensors\.index\.([^.]+)\.json)')
#: Levels of lists and dicts in a file of settings.
MAX_DEPTH = 50
#: What `torch.load(weights_only=True)` raises for damaged files (found by flipping and cutting bytes).
TORCH_LOAD_ERRORS = (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError, LookupError, TypeError,
                     AttributeError, AssertionError, struct.error)


def weight_files(names: Collection[str], variant: str | None = None) -> list[str]:
    """Return the weights among the files of a model's folder, once: one file, or an index and its shards; or [].

    They are safetensors; only if there are none, pickles of tensors (.bin), which are read with `weights_only`.
    """
    suffix = f'.{variant}' if variant else ''
    for stems, extension in ((STEMS, 'safetensors'), (BINS, 'bin')):
        for stem in stems:
            if (whole := f'{stem}{suffix}.{extension}') in names:
                return [whole]
            if (index := f'{stem}.{extension}.index{suffix}.json') in names:
                part = re.escape(suffix)
                shards = re.compile(rf'{stem}({part}{_SHARD}|{_SHARD}{part})\.{extension}')
                return [index, *sorted(name for name in names if shards.fullmatch(name))]
        if in_safetensors(names):
            break
    return []


def variants(names: Collection[str]) -> list[str]:
    """Return the variants of a model's weights in safetensors, e.g. ['fp16']."""
    return sorted({match[1] or match[2] for name in names if (match := _VARIANT.fullmatch(name))})


def in_safetensors(names: Collection[str]) -> list[str]:
    """Return a model's weights of any variant; files with other names are not the model's."""
    return [name for name in names if name.startswith(STEMS) and name.endswith('.safetensors')
            and WEIGHTS.fullmatch(name)]


def check_size(path: Path) -> None:
    """Check that a file of settings is a file, not a device or a pipe, and not too large.

    Raises:
        UserError: it is missing or too large.
    """
    if not path.is_file():
        raise UserError(f"'{path}' cannot be read: it is missing or not a file.")
    if (size := path.stat().st_size) > limits.CURRENT.json_bytes:
        raise UserError(f"'{path}' has {size:,} bytes; settings of up to {limits.CURRENT.json_bytes:,} are read "
                        '(limits.json_bytes).')


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of settings.

    Raises:
        UserError: the file cannot be read, is too large, or holds something else, as NaN or what is nested without end.
    """
    check_size(path)
    try:
        content = parse_json(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' must hold a JSON object, not a {type(content).__name__}.")
    return content


def parse_json(text: str) -> Any:
    """Parse JSON without NaN, nested MAX_DEPTH deep at most.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        content = json.loads(text, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [part for value in level if isinstance(value, dict | list)
                 for part in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return content
    raise ValueError(f'it is nested more than {MAX_DEPTH} deep')


def _constant(name: str) -> float:
    if name == 'NaN':
        raise ValueError('it holds NaN, which is no number')
    return float(name)  # schedulers of diffusers have -Infinity for a missing lower bound


def read_index(folder: Path, source: str | None = None) -> dict[str, Any]:
    """Read the model_index.json of a diffusers folder, which errors call `source`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / 'model_index.json'
    if not path.is_file():
        raise UserError(f"'{source or folder}' has no model_index.json, so it is not a diffusers folder.")
    return read_json(path)


def has_component(index: dict[str, Any], name: str) -> bool:
    """Whether a model_index.json names a class for component `name`; a refiner's has [null, null] for some."""
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None
