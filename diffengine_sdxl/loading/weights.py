"""Tensors of weight files: pickles are opened without running code, and every value must be a finite number."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffengine_sdxl.errors import UserError, did_you_mean, first_line, is_out_of_memory, listed
from diffengine_sdxl.loading.files import TORCH_LOAD_ERRORS

#: Ends of names of pickles; all other weight files are safetensors.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
#: What weights are stored in. fp8 is read as fp16, which holds all its values.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_FP8 = DTYPES[-2:]
_SAFETENSORS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
                'F8_E4M3': torch.float8_e4m3fn, 'F8_E5M2': torch.float8_e5m2, 'I64': torch.int64, 'I32': torch.int32,
                'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
                'C64': torch.complex64}
#: Ends of keys that may hold whole numbers: buffers that a model computes itself, and a LoRA's alpha.
_INTEGERS = re.compile(r'(^|\.)(position_ids|num_batches_tracked|relative_position_index|token_type_ids|alpha)$')
#: A pickle of more bytes may honestly need more memory than there is.
_LARGE = 2**28


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor; a dtype that torch doesn't have is text."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


def read_pickle(path: Path, mmap: bool = False) -> Any:
    """Read a pickle of tensors without running code in it.

    Args:
        path: the file. mmap: leave the tensors' data on the disk, if the file is one of torch's zips.

    Raises:
        UserError: it is damaged, holds more than tensors, or is larger once unpacked.
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                size, stored = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
            if size > stored:  # torch never compresses
                raise UserError(f"'{path}' is a compressed archive of {size:,} bytes in {stored:,}, which torch does "
                                'not write; it was not opened. Ask for a .safetensors file.')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and is_zip)
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, *TORCH_LOAD_ERRORS) as error:
        if is_out_of_memory(error) and path.stat().st_size > _LARGE:
            raise
        raise UserError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """Return the sentence for a weight file that cannot be read; never torch's own, which advises to run its code."""
    with path.open('rb') as file:
        start = file.read(40)
    if start.startswith(b'version https://git-lfs'):
        return f"'{path}' is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder."
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r'(?:GLOBAL|class) (\S+)', str(error))
        reason = f"would run code ('{code[1]}')" if code else 'is truncated or of another kind'
        return (f"'{path}' is a pickle that {reason}: it holds more than tensors, so it was not opened and no code in "
                'it was run. Ask for a .safetensors file.')
    text = first_line(error).split('. ')[0][:200]  # torch goes on with advice
    text = type(error).__name__ if re.search('weights_only|safe_globals', text) else text.rstrip('.')
    return (f"'{path}' cannot be read; it is truncated or not a {path.suffix} file ({path.stat().st_size:,} bytes): "
            f'{text}.')


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return name -> dtype and shape of a weight file's tensors, without reading their data where the format allows it.

    Raises:
        UserError: it cannot be read.
    """
    if path.suffix not in PICKLES:
        try:
            with safe_open(path, framework='pt') as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                return {key: TensorInfo(_SAFETENSORS.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                        for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(unreadable(path, error)) from error
    return {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in named(read_pickle(path, mmap=True))}


def named(content: Any, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a pickle's nested dicts by dotted names, without the ids of a textual inversion's token."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield f'{prefix}{key}', value
        elif key != 'string_to_token':
            yield from named(value, f'{prefix}{key}.')


def check_dtypes(header: Iterable[tuple[str, torch.dtype | str]], source: str | Path) -> None:
    """Check that all tensors are of dtypes that weights have.

    Args:
        header: name and dtype of each tensor. source: the file, for errors.

    Raises:
        UserError: names the dtypes and the first keys.
    """
    wrong: dict[str, list[str]] = {}
    for key, dtype in header:
        is_integer = isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex
                                                             or dtype == torch.bool)
        if dtype not in DTYPES and not (is_integer and _INTEGERS.search(key)):
            wrong.setdefault(str(dtype).removeprefix('torch.'), []).append(key)
    if wrong:
        kinds = '; '.join(f'{len(keys)} of {dtype} ({listed(sorted(keys), 5)})' for dtype, keys in wrong.items())
        raise UserError(f"'{source}' holds tensors that are no floating-point weights: {kinds}. Quantized files are "
                        'not read; ask for one in fp16, bf16 or fp32.')


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str | Path, loaded_as: torch.dtype | None = None
                 ) -> None:
    """Check that no weight is NaN or infinite; one pass over the data, without a copy.

    Args:
        tensors: name and value of each; what is not floating, empty or on the meta device is passed over.
        source: the file, for errors. loaded_as: the dtype that they were converted to.

    Raises:
        UserError: names how many tensors are not finite, and the first.
    """
    wrong = []
    for key, tensor in tensors:
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
            continue
        tensor = tensor.half() if tensor.dtype in _FP8 else tensor
        # The least and the largest are NaN if any value is.
        if not all(bool(torch.isfinite(value)) for value in torch.aminmax(tensor)):
            wrong.append(key)
    if wrong:
        hint = ('If they are finite in the file, its numbers are beyond the range of float16: load it in bfloat16 or '
                'float32 (model.dtype). Else download' if loaded_as == torch.float16 else 'Download')
        raise UserError(f"'{source}': {len(wrong)} tensors hold NaN or infinite numbers ({listed(wrong, 5)}). {hint} "
                        'it again, or ask its author for another.')


def checked(tensors: Mapping[str, Any], source: str | Path) -> None:
    """Check a file's tensors, nested ones too: dtypes, values, and that none is larger than its storage.

    Raises:
        UserError: see `check_dtypes` and `check_finite`.
    """
    flat = list(named(tensors))
    check_dtypes(((key, tensor.dtype) for key, tensor in flat), source)
    if repeated := [key for key, tensor in flat if not tensor.is_meta
                    and tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()]:
        raise UserError(f"'{source}' holds tensors that repeat fewer numbers than they have ({listed(repeated, 5)}), "
                        'which no tool writes for weights; it may be malicious.')
    check_finite(flat, source)


def upcast_fp8(content: Any) -> Any:
    """Return tensors, also in nested dicts, with those in fp8 as fp16, which holds all their values."""
    if isinstance(content, Tensor):
        return content.half() if content.dtype in _FP8 else content
    if isinstance(content, dict):
        return {key: upcast_fp8(value) for key, value in content.items()}
    return content


def keys_to_ignore(keys: Collection[Any], patterns: Sequence[str], source: str | Path, log: bool = True) -> set[Any]:
    """Return the keys of a file that match a pattern, and log how many they are.

    Raises:
        UserError: a pattern matches none.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"ignore_keys={patterns!r} must be a list of patterns, as ['*.bias'].")
    matches = {pattern: {key for key in keys if fnmatchcase(str(key), pattern)} for pattern in patterns}
    if idle := [pattern for pattern, found in matches.items() if not found]:
        raise UserError(f"ignore_keys: '{idle[0]}' matches no key of '{source}'."
                        f'{did_you_mean(idle[0], [str(key) for key in keys])}')
    ignored = set().union(*matches.values())
    if ignored and log:
        print_log(f"'{source}': {len(ignored)} of {len(keys)} keys are left out by ignore_keys "
                  f'({listed(sorted(ignored), 3)}).', logger='current')
    return ignored
