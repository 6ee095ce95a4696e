"""IP-Adapter files in tencent-ailab/IP-Adapter's layout, which diffusers' `load_ip_adapter` reads.

A file has two parts, nested dicts in a `.bin` and prefixes in a `.safetensors`: `image_proj`, the projector, and
`ip_adapter`, keyed by the number of the UNet's attention: `1.to_k_ip.weight`, `1.to_v_ip.weight`, `3.to_k_ip.weight`,
... (even numbers are the self-attentions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.adapters.formats.files import WeightFile, refuse
from diffengine_sdxl.errors import UserError

#: Name of the file that is written, and names to look for in a folder or on the hub.
NAME = 'ip_adapter.safetensors'
NAMES = (NAME, 'ip_adapter.bin')
PARTS = ('image_proj.', 'ip_adapter.')

#: Prefix of a key -> name of the unsupported kind that has it.
UNSUPPORTED = {
    'image_proj.perceiver_resampler.': 'FaceID plus (it reads face embeddings of insightface)',
    'image_proj.proj.3.': 'full face (it reads all hidden states through an MLP)',
    'image_proj.proj.0.': 'FaceID (it reads face embeddings of insightface)',
}

#: A block of the resampler in the file -> in diffusers' IPAdapterPlusImageProjection. `0.to_kv` is to_k and to_v.
BLOCK = {'0.norm1': 'ln0', '0.norm2': 'ln1', '0.to_q': 'attn.to_q', '0.to_kv': 'attn.to_kv',
         '0.to_out': 'attn.to_out.0', '1.0': 'ff.0', '1.1': 'ff.1.net.0.proj', '1.3': 'ff.1.net.2'}
BLOCK_BACK = {theirs: ours for ours, theirs in BLOCK.items()}


def is_ip_adapter(file: WeightFile) -> bool:
    """Whether a file has one of an IP-Adapter's parts, of any kind."""
    return any(key.startswith(PARTS) for key in _unnested(file))


def _unnested(file: WeightFile) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for key, value in file.tensors.items():
        tensors |= {f'{key}.{k}': v for k, v in value.items()} if isinstance(value, Mapping) else {str(key): value}
    return tensors


def flat(file: WeightFile) -> dict[str, Tensor]:
    """Return a file's tensors by their keys in a `.safetensors`.

    Raises:
        UserError: it holds something else, or an IP-Adapter of an unsupported kind (FaceID, full face).
    """
    tensors = _unnested(file)
    if not is_ip_adapter(file):
        raise UserError(f"'{file.path}' is not an IP-Adapter: it has no 'image_proj' and no 'ip_adapter'.")
    for prefix, kind in UNSUPPORTED.items():
        if any(key.startswith(prefix) for key in tensors):
            raise UserError(f"'{file.path}' is an IP-Adapter of the kind {kind}; base and plus are supported.")
    if loras := [key for key in tensors if '_lora.' in key]:
        raise UserError(f"'{file.path}' is an IP-Adapter FaceID: it has LoRA layers ({loras[0]}, ...); base and "
                        'plus are supported.')
    refuse(file.path, unknown=[key for key, value in tensors.items()
                               if not key.startswith(PARTS) or not isinstance(value, Tensor)])
    return tensors


def settings(tensors: Mapping[str, Tensor], token_dim: int, dim_head: int) -> dict[str, Any]:
    """Return what a file shows of its adapter: its architecture, numbers of tokens, blocks and heads, and widths.

    Missing keys and wrong shapes are reported later, when all are compared.

    Args:
        tensors: by the file's keys. token_dim: the base's text width. dim_head: of the resampler; no file shows it.
    """
    shapes = {key.removeprefix('image_proj.'): tuple(value.shape) for key, value in tensors.items()}

    def size(name: str, dim: int, num_dims: int = 2) -> int:
        """Return a size; 0 if the tensor is missing or has another number of dimensions."""
        return shapes[name][dim] if len(shapes.get(name, ())) == num_dims else 0

    if any(key.startswith('proj.') for key in shapes):
        width = size('norm.weight', 0, 1) or token_dim
        return {'architecture': 'base', 'token_dim': width, **_nonzero(
            embed_dim=size('proj.weight', 1), num_tokens=size('proj.weight', 0) // width)}
    if not any(key == 'latents' or key.startswith('layers.') for key in shapes):
        return {}
    blocks = [int(m[1]) for key in shapes if (m := re.match(r'layers\.(\d{1,4})\.', key))]
    return {'architecture': 'plus', **_nonzero(
        depth=max(blocks, default=-1) + 1, num_tokens=size('latents', 1, 3), hidden=size('latents', 2, 3),
        embed_dim=size('proj_in.weight', 1), token_dim=size('proj_out.weight', 0),
        heads=size('layers.0.0.to_q.weight', 0) // dim_head,
        ff_mult=size('layers.0.1.1.weight', 0) / (size('layers.0.1.1.weight', 1) or 1))}


def _nonzero(**sizes: float) -> dict[str, float]:
    return {name: size for name, size in sizes.items() if size}


def to_file(projector: Mapping[str, Tensor], to_k: list[Tensor], to_v: list[Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors by the file's keys.

    Args:
        projector: state dict of diffusers' ImageProjection or IPAdapterPlusImageProjection.
        to_k, to_v: for each cross-attention, in the order of `cross_attention_names`.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in projector.items():
        if '.attn.to_v.' in key:
            continue
        if '.attn.to_k.' in key:
            value = torch.cat([value, projector[key.replace('.to_k.', '.to_v.')]])
            key = key.replace('.to_k.', '.to_kv.')
        if block := re.fullmatch(r'(layers\.\d+)\.(.+)\.(weight|bias)', key):
            key = f'{block[1]}.{BLOCK_BACK[block[2]]}.{block[3]}'
        tensors[f'image_proj.{re.sub("^image_embeds", "proj", key)}'] = value
    for i, (key_weight, value_weight) in enumerate(zip(to_k, to_v, strict=True)):
        tensors[f'ip_adapter.{2 * i + 1}.to_k_ip.weight'] = key_weight
        tensors[f'ip_adapter.{2 * i + 1}.to_v_ip.weight'] = value_weight
    return tensors


def from_file(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Undo `to_file`; all keys of `tensors` must be known."""
    projector: dict[str, Tensor] = {}
    count = sum(key.endswith('.to_k_ip.weight') for key in tensors)
    for key, value in tensors.items():
        if not key.startswith('image_proj.'):
            continue
        key = re.sub('^proj\\.', 'image_embeds.', key.removeprefix('image_proj.'))
        if block := re.fullmatch(r'(layers\.\d+)\.(.+)\.(weight|bias)', key):
            key = f'{block[1]}.{BLOCK[block[2]]}.{block[3]}'
        if '.attn.to_kv.' in key:
            projector |= {key.replace('to_kv', name): half
                          for name, half in zip(('to_k', 'to_v'), value.chunk(2), strict=True)}
        else:
            projector[key] = value
    to_k, to_v = ([tensors[f'ip_adapter.{2 * i + 1}.{name}.weight'] for i in range(count)]
                  for name in ('to_k_ip', 'to_v_ip'))
    return projector, to_k, to_v


def check(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a file has the keys and shapes of `expected` (from `to_file`).

    Raises:
        UserError: keys are unknown or missing, or shapes differ.
    """
    refuse(path, unknown=[*tensors.keys() - expected.keys()], missing=[*expected.keys() - tensors.keys()])
    refuse(path, of_another_shape=[f'{key} is {tuple(tensors[key].shape)} instead of {tuple(value.shape)}'
                                   for key, value in expected.items() if tensors[key].shape != value.shape])
