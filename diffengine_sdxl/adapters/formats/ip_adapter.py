"""IP-Adapter files: tencent-ailab/IP-Adapter's own layout, which diffusers' `load_ip_adapter` reads.

Two parts, nested dicts in a `.bin` and prefixes in a `.safetensors`: `image_proj`, the projector, and `ip_adapter`,
whose keys count the UNet's attentions: `1.to_k_ip.weight`, `1.to_v_ip.weight`, `3.to_k_ip.weight`, ... (even numbers
are the self-attentions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.adapters.formats.files import WeightFile, refuse

#: Of the file that is written, and of those that are looked for in a folder or on the hub.
NAME = 'ip_adapter.safetensors'
NAMES = (NAME, 'ip_adapter.bin')
PARTS = ('image_proj.', 'ip_adapter.')

#: What tells a kind that is not served by a key of it, and its name.
OTHERS = {
    'image_proj.perceiver_resampler.': 'FaceID plus (it reads face embeddings of insightface)',
    'image_proj.proj.3.': 'full face (it reads all hidden states through an MLP)',
    'image_proj.proj.0.': 'FaceID (it reads face embeddings of insightface)',
}

#: A block of the resampler in the file -> in diffusers' IPAdapterPlusImageProjection. `0.to_kv` is to_k and to_v.
BLOCK = {'0.norm1': 'ln0', '0.norm2': 'ln1', '0.to_q': 'attn.to_q', '0.to_kv': 'attn.to_kv',
         '0.to_out': 'attn.to_out.0', '1.0': 'ff.0', '1.1': 'ff.1.net.0.proj', '1.3': 'ff.1.net.2'}
BLOCK_BACK = {theirs: ours for ours, theirs in BLOCK.items()}


def flat(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a file by their keys in a `.safetensors`.

    Raises:
        ValueError: it holds something else, or an IP-Adapter of a kind that is not served (FaceID, full face).
    """
    tensors: dict[str, Tensor] = {}
    for key, value in file.tensors.items():
        tensors.update({f'{key}.{inner}': v for inner, v in value.items()} if isinstance(value, Mapping) else
                       {key: value})
    if not any(key.startswith(PARTS) for key in tensors):
        raise ValueError(f"'{file.path}' is no IP-Adapter: it has no 'image_proj' and no 'ip_adapter'.")
    for mark, kind in OTHERS.items():
        if any(key.startswith(mark) for key in tensors):
            raise ValueError(f"'{file.path}' is an IP-Adapter of the kind {kind}; base and plus are supported.")
    if loras := [key for key in tensors if '_lora.' in key]:
        raise ValueError(f"'{file.path}' is an IP-Adapter FaceID: it comes with LoRA layers ({loras[0]}, ...); base "
                         'and plus are supported.')
    refuse(file.path, unknown=[key for key, value in tensors.items()
                               if not key.startswith(PARTS) or not isinstance(value, Tensor)])
    return tensors


def settings(tensors: Mapping[str, Tensor], token_dim: int, dim_head: int) -> dict[str, Any]:
    """What a file says of its adapter: its variant, its numbers of tokens, blocks and heads, its widths.

    Only what the file tells; a key that is missing is named later, when all are compared.

    Args:
        tensors: by the file's keys. token_dim: the base's text width. dim_head: of the resampler, which no file tells.
    """
    found: dict[str, Any] = {}
    size = {key.removeprefix('image_proj.'): tuple(value.shape) for key, value in tensors.items()}
    if any(key.startswith('proj.') for key in size):
        width = size.get('norm.weight', (token_dim,))[0]
        found = {'variant': 'base', 'token_dim': width}
        if 'proj.weight' in size:
            found.update(embed_dim=size['proj.weight'][-1], num_tokens=size['proj.weight'][0] // width)
        return found
    if not any(key == 'latents' or key.startswith('layers.') for key in size):
        return found
    found['variant'] = 'plus'
    blocks = [int(m[1]) for key in size if (m := re.match(r'layers\.(\d+)\.', key))]
    if blocks:
        found['depth'] = max(blocks) + 1
    if 'latents' in size:
        found.update(num_tokens=size['latents'][1], hidden=size['latents'][2])
    if 'proj_in.weight' in size:
        found['embed_dim'] = size['proj_in.weight'][1]
    if 'proj_out.weight' in size:
        found['token_dim'] = size['proj_out.weight'][0]
    if 'layers.0.0.to_q.weight' in size:
        found['heads'] = size['layers.0.0.to_q.weight'][0] // dim_head
    if 'layers.0.1.1.weight' in size:
        found['ff_mult'] = size['layers.0.1.1.weight'][0] / size['layers.0.1.1.weight'][1]
    return found


def to_file(projector: Mapping[str, Tensor], to_k: list[Tensor], to_v: list[Tensor]) -> dict[str, Tensor]:
    """The file's keys and tensors of an adapter.

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
    """`to_file` back; all keys of `tensors` are known."""
    projector: dict[str, Tensor] = {}
    count = sum(key.endswith('.to_k_ip.weight') for key in tensors)
    for key, value in tensors.items():
        if not key.startswith('image_proj.'):
            continue
        key = re.sub('^proj\\.', 'image_embeds.', key.removeprefix('image_proj.'))
        if block := re.fullmatch(r'(layers\.\d+)\.(.+)\.(weight|bias)', key):
            key = f'{block[1]}.{BLOCK[block[2]]}.{block[3]}'
        if '.attn.to_kv.' in key:
            halves = value.chunk(2)
            projector.update({key.replace('to_kv', name): half for name, half in zip(('to_k', 'to_v'), halves,
                                                                                     strict=True)})
        else:
            projector[key] = value
    to_k, to_v = ([tensors[f'ip_adapter.{2 * i + 1}.{name}.weight'] for i in range(count)]
                  for name in ('to_k_ip', 'to_v_ip'))
    return projector, to_k, to_v


def check(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a file that is not, key by key and shape by shape, the adapter `own` (of `to_file`).

    Raises:
        ValueError: keys are unknown or missing, which; or shapes differ.
    """
    refuse(path, unknown=sorted(tensors.keys() - own.keys()), missing=sorted(own.keys() - tensors.keys()))
    refuse(path, of_another_shape=[f'{key} is {tuple(tensors[key].shape)} instead of {tuple(value.shape)}'
                                   for key, value in own.items() if tensors[key].shape != value.shape])
