"""T2I-Adapters in a single file, with TencentARC's original names (`Adapter_XL`) or diffusers'.

Source: TencentARC/T2I-Adapter, Adapter/models/adapters.py and configs/inference/Adapter-XL-*.yaml (ksize 1, sk true,
use_conv false): `conv_in`, and residual blocks `body.<n>` numbered through all levels, the first of a level with an
`in_conv` where widths change. diffusers numbers them per level: `adapter.body.<level>.resnets.<n>`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.errors import UserError

#: The levels that may widen, with an `in_conv`; the last one never does.
WIDENING = (1, 2)


def is_file(source: str | Path) -> bool:
    """Whether `source` is a single file, not a folder or hub id."""
    return os.path.isfile(os.path.expanduser(source)) or Path(source).suffix in files.SUFFIXES


def has_blocks(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds the residual blocks of a T2I-Adapter, under either set of names."""
    return any(re.search(r'(^|\.)body\.\d+\.(resnets\.\d+\.)?block1\.weight$', key) for key in keys)


def read_t2i_adapter(source: str | Path, num_levels: int, downscale_factor: int,
                     revision: str | None = None, ignore_keys: Sequence[str] = ()
                     ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a T2I-Adapter's weights under diffusers' names, and the arguments of diffusers' `T2IAdapter` for them.

    Args:
        source: a .safetensors file or a pickle of tensors; also a link to one on the hub, at `revision`.
        num_levels: number of feature maps, 4 for SDXL.
        ignore_keys: see `files.read`.
        downscale_factor: size of the condition over that of the first feature map; a file does not show it.

    Raises:
        UserError: it cannot be read, or its keys are not a T2I-Adapter's.
    """
    path = files.find(source, revision=revision)
    tensors = files.read(path, ignore_keys=ignore_keys).tensors
    # Tools put prefixes before all names; diffusers does, too.
    prefixes = [k.removesuffix('conv_in.weight') for k in map(str, tensors) if k.endswith('conv_in.weight')]
    prefix = min(prefixes, key=len, default='')
    name_in_file = _as_diffusers if any('.resnets.' in str(k) for k in tensors) else _as_original
    num_blocks = max(1, sum(str(k).endswith('.block1.weight') for k in tensors) // num_levels)
    firsts = [tensors.get(f'{prefix}{name_in_file(level, 0, "block1", num_blocks)}.weight')
              for level in range(num_levels)]
    channels = tuple(len(first) if isinstance(first, Tensor) and first.dim() else 0 for first in firsts)
    layers = {'conv_in': 'conv_in', **{name_in_file(*layer, num_blocks): _as_diffusers(*layer, num_blocks)
                                       for layer in _layers(channels, num_blocks)}}
    names = {f'{prefix}{old}.{kind}': f'adapter.{new}.{kind}' for old, new in layers.items()
             for kind in ('weight', 'bias')}
    files.refuse(path, unknown=[str(k) for k, t in tensors.items() if k not in names or not isinstance(t, Tensor)],
                 missing=[k for k in names if k not in tensors])
    state = {new: tensors[old] for old, new in names.items()}
    files.refuse(path, not_convolutions=[k for k, t in state.items() if k.endswith('.weight') and t.dim() != 4])
    width = state['adapter.conv_in.weight'].shape[1]
    in_channels, rest = divmod(width, downscale_factor ** 2)
    if rest:
        raise UserError(f"'{path}' takes {width} channels after pixel unshuffle, not a multiple of "
                        f'{downscale_factor} x {downscale_factor} as the base requires; it was made for another base.')
    return state, {'in_channels': in_channels, 'channels': channels, 'num_res_blocks': num_blocks,
                   'downscale_factor': downscale_factor}


def _layers(channels: Sequence[int], num_blocks: int) -> Iterator[tuple[int, int, str]]:
    """Yield level, block and name of every layer with weights but `conv_in`."""
    for level in range(len(channels)):
        if level in WIDENING and channels[level - 1] != channels[level]:
            yield level, 0, 'in_conv'
        yield from ((level, block, layer) for block in range(num_blocks) for layer in ('block1', 'block2'))


def _as_original(level: int, block: int, layer: str, num_blocks: int) -> str:
    return f'body.{level * num_blocks + block}.{layer}'


def _as_diffusers(level: int, block: int, layer: str, num_blocks: int) -> str:
    return f'body.{level}.in_conv' if layer == 'in_conv' else f'body.{level}.resnets.{block}.{layer}'
