"""T2I-Adapters in one file: TencentARC's original names (`Adapter_XL`) or diffusers', to diffusers'.

Source: TencentARC/T2I-Adapter, Adapter/models/adapters.py and configs/inference/Adapter-XL-*.yaml (ksize 1, sk true,
use_conv false): `conv_in`, and residual blocks `body.<n>` counted through all levels, the first of a level with an
`in_conv` where widths change. diffusers counts them level by level: `adapter.body.<level>.resnets.<n>`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffengine_sdxl.adapters.formats import files

#: Where a level may begin with other widths than the one before ends with; the last level never does.
WIDENING = (1, 2)


def is_file(source: str | Path) -> bool:
    """Whether `source` stands for one file, not for a folder or hub id."""
    return os.path.isfile(os.path.expanduser(source)) or Path(source).suffix in files.SUFFIXES


def read_t2i_adapter(source: str | Path, num_levels: int, downscale_factor: int,
                     revision: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A T2I-Adapter's weights under diffusers' names, and the arguments of diffusers' `T2IAdapter` that they need.

    Args:
        source: a .safetensors file or a pickle of tensors; also a link to one on the hub, of that `revision`.
        num_levels: feature maps that it gives, 4 for SDXL.
        downscale_factor: control image over first feature map; a file does not say.

    Raises:
        ValueError: it cannot be read, or holds other keys than such a network has.
    """
    path = files.find(source, revision=revision)
    tensors = files.read(path).tensors
    # What a tool has put before all names; diffusers' own is such a one.
    starts = [k.removesuffix('conv_in.weight') for k in map(str, tensors) if k.endswith('conv_in.weight')]
    start = min(starts, key=len, default='')
    spell = _as_diffusers if any('.resnets.' in str(k) for k in tensors) else _as_original
    num_blocks = max(1, sum(str(k).endswith('.block1.weight') for k in tensors) // num_levels)
    firsts = [tensors.get(f'{start}{spell(level, 0, "block1", num_blocks)}.weight') for level in range(num_levels)]
    channels = tuple(0 if first is None else len(first) for first in firsts)
    layers = {'conv_in': 'conv_in', **{spell(*place, num_blocks): _as_diffusers(*place, num_blocks)
                                       for place in _places(channels, num_blocks)}}
    names = {f'{start}{old}.{kind}': f'adapter.{new}.{kind}' for old, new in layers.items()
             for kind in ('weight', 'bias')}
    files.refuse(path, unknown=[str(k) for k in tensors if k not in names],
                 missing=[k for k in names if k not in tensors])
    state = {new: tensors[old] for old, new in names.items()}
    width = state['adapter.conv_in.weight'].shape[1]
    in_channels, rest = divmod(width, downscale_factor ** 2)
    if rest:
        raise ValueError(f"'{path}' reads {width} numbers a place, which is no number of channels in squares of "
                         f'{downscale_factor} x {downscale_factor} pixels, as the base asks for. It was made for '
                         'another base.')
    return state, {'in_channels': in_channels, 'channels': channels, 'num_res_blocks': num_blocks,
                   'downscale_factor': downscale_factor}


def _places(channels: Sequence[int], num_blocks: int) -> Iterator[tuple[int, int, str]]:
    """Level, block and name of every layer with weights, but for the first."""
    for level in range(len(channels)):
        if level in WIDENING and channels[level - 1] != channels[level]:
            yield level, 0, 'in_conv'
        yield from ((level, block, layer) for block in range(num_blocks) for layer in ('block1', 'block2'))


def _as_original(level: int, block: int, layer: str, num_blocks: int) -> str:
    return f'body.{level * num_blocks + block}.{layer}'


def _as_diffusers(level: int, block: int, layer: str, num_blocks: int) -> str:
    return f'body.{level}.in_conv' if layer == 'in_conv' else f'body.{level}.resnets.{block}.{layer}'
