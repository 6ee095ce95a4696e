"""Shards: safetensors files of entries, written whole, read entry by entry and checked at each read."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from diffengine_sdxl.atomic_files import replacing
from diffengine_sdxl.errors import UserError

#: The layout of shards and index; a change that an older package could not read gets another number.
VERSION = 1
FORMAT = f'diffengine_sdxl cache {VERSION}'
#: '<host>-<pid>-<random>-<number>.safetensors'
NAME = re.compile(r'[\w.-]+-\d+-[0-9a-f]{8}-\d{5,}\.safetensors')
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
          'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: As in safetensors.
MAX_HEADER = 100_000_000
#: Bytes of an entry: far above those of any sample.
MAX_ENTRY = 2**30


class DamagedError(Exception):
    """A shard is not what was written."""


class NewEntry(NamedTuple):
    """An entry to write: its kind, what computed it, and contiguous tensors on the CPU."""

    kind: str
    device: str
    tensors: Mapping[str, Tensor]


class Entry(NamedTuple):
    """An entry in a shard.

    Attributes:
        checksum: CRC-32 of key, names, dtypes, shapes and bytes.
        layout: JSON: for each tensor, by name, its name, dtype, shape and first byte in the file.
    """

    key: str
    kind: str
    device: str
    checksum: int
    layout: str


def write(path: Path, entries: Mapping[str, NewEntry]) -> None:
    """Write entries to a new file, whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    metadata = {key: json.dumps([entry.kind, entry.device, _checksum(key, entry.tensors)])
                for key, entry in entries.items()}
    tensors = {f'{key}.{name}': tensor for key, entry in entries.items() for name, tensor in entry.tensors.items()}
    with replacing(path) as temporary:
        # Not `save_file`, whose file only its owner may read, and which leaves one of another name if it is killed.
        temporary.write_bytes(save(tensors, metadata={'format': FORMAT, **metadata}))


def read_header(path: Path) -> list[Entry]:
    """Return the entries of a file; their tensors' bytes are not read.

    Raises:
        DamagedError: it is not a whole shard.
        UserError: it was written by another version of this package.
        OSError: it cannot be read.
    """
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), 'little')
        if length > min(size, MAX_HEADER):
            raise DamagedError('its header is cut off')
        data = file.read(length)
    try:
        header = json.loads(data)
        metadata = header.pop('__metadata__')
        found_format = metadata.pop('format')
        tensors: dict[str, list[tuple[str, str, list[int], int]]] = {key: [] for key in metadata}
        sizes: dict[str, int] = {}
        for full_name, one in header.items():
            key, _, name = full_name.partition('.')
            begin, end = one['data_offsets']
            num_bytes = math.prod(one['shape']) * DTYPES[one['dtype']].itemsize
            if not 0 <= begin <= end <= size - 8 - length or end - begin != num_bytes:
                raise DamagedError('it is cut off')
            tensors[key].append((name, one['dtype'], one['shape'], 8 + length + begin))
            sizes[key] = sizes.get(key, 0) + num_bytes
        entries = [Entry(key, str(kind), str(device), int(checksum), json.dumps(sorted(tensors[key])))
                   for key, (kind, device, checksum) in ((key, json.loads(text)) for key, text in metadata.items())]
        if any(not 0 <= entry.checksum < 2**32 or len(bytes.fromhex(entry.key)) != 16 for entry in entries) or max(
                sizes.values(), default=0) > MAX_ENTRY:
            raise DamagedError('its header is damaged')
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, ArithmeticError) as error:
        raise DamagedError(f'its header is damaged ({type(error).__name__})') from error
    if found_format != FORMAT:
        raise UserError(f"'{path}' was written by another version of this package ({found_format}, not {FORMAT}). Name "
                        'another folder in `cache`, or delete this one: it is filled anew.')
    return entries


def read(file: int, key: str, checksum: int, layout: str) -> dict[str, Tensor]:
    """Return the tensors of an entry of the open file descriptor `file`, in memory of their own.

    Raises:
        DamagedError: they are not what was written.
        OSError: they cannot be read.
    """
    try:
        tensors = {}
        parts = json.loads(layout)
        if sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape, _ in parts) > MAX_ENTRY:
            raise DamagedError('an entry of it is too large')
        for name, dtype, shape, begin in parts:
            tensor = tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
            if tensor.numel() and os.preadv(file, [_bytes(tensor)], begin) != tensor.nbytes:
                raise DamagedError('it is cut off')
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:  # of a damaged index
        raise DamagedError(f'its index is damaged ({type(error).__name__})') from error
    if _checksum(key, tensors) != checksum:
        raise DamagedError('its checksum differs')
    return tensors


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU; one from CUDA is complete when the stream has come to this place."""
    if tensor.is_cuda:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
    return tensor.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)


def device_name(device: torch.device) -> str:
    """Return what computes on a device: its type, and what decides which kernels it takes."""
    if device.type == 'cuda':
        return f'cuda {torch.cuda.get_device_name(device)}'
    return f'{device.type} {torch.backends.cpu.get_cpu_capability()}'


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f'{key}.{name} {NAMES[tensor.dtype]} {list(tensor.shape)}'.encode(), value)
        value = zlib.crc32(_bytes(tensor), value) if tensor.numel() else value
    return value


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    memory: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(memory)
