"""Kinds of adapters that are never read, recognized by their keys, so that they are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffengine_sdxl.errors import UserError

#: A key of such a file -> its kind, and what it would take. The first that matches counts.
_KEYS: tuple[tuple[str, str, str], ...] = (
    (r'lllite_', 'a ControlLLLite', 'its small networks inside the attention layers are not built here; ask for a '
                                   'ControlNet or T2I-Adapter'),
    (r'(id_adapter|id_adapter_attn_layers|pulid_encoder|pulid_ca)\b', 'a PuLID',
     'it reads face embeddings of insightface and EVA-CLIP; ask for an IP-Adapter (base or plus)'),
    (r'id_encoder\.', 'a PhotoMaker', 'it merges an ID encoder into the prompt; ask for an IP-Adapter (base or plus)'),
    (r'(.*[._])?(double_blocks|single_blocks|single_transformer_blocks)[._]\d', 'a Flux or an adapter of one',
     'it is no base here; ask for one made for SDXL'),
    (r'(.*[._])?joint_blocks[._]\d', 'a Stable Diffusion 3 or an adapter of one',
     'it is no base here; ask for one made for SDXL'),
    (r'(lora_)?transformer[._](transformer_)?(transformer_)?blocks[._]\d', 'an adapter of a '
     'transformer model (Stable Diffusion 3, Flux, PixArt)', 'it is no base here; ask for one made for SDXL'),
    (r'(.*\.)?(scale_weight|scaled_fp8|weight_scale|scale_input)$', 'stored in scaled fp8',
     'its numbers are multiplied by scales of their own; ask for a file in fp16, bf16, fp32 or plain fp8'),
    (r'.*\.ia3_l$', 'an IA3 of peft', 'LoRA, DoRA, LoHa, LoKr and OFT are read'),
    (r'.*\.boft_[RS]$', 'a BOFT of peft', 'LoRA, DoRA, LoHa, LoKr and OFT are read'),
    (r'.*\.hada_[A-Z]', 'a Hadamard adapter of an unknown tool', 'LoHa has hada_w1_a and the like'),
    (r'.*\.(vera_lambda_[bd]|fourierft_spectrum|bone_\w+|miss_\w+|hra_u|ln_tuning_\w+|randlora_\w+|c3a_kernel)\b',
     'an adapter of peft of another kind', 'LoRA, DoRA, LoHa, LoKr and OFT are read'))
#: Numbers of a face embedding of insightface, which InstantID's resampler reads.
_FACE = 512


def refuse_unsupported(path: Path, tensors: Mapping[Any, Any]) -> None:
    """Refuse a file of a kind that is never read.

    Args:
        tensors: of the file, at any depth and on any device.

    Raises:
        UserError: names the kind, and what to ask for instead.
    """
    keys = [*map(str, tensors), *(f'{outer}.{inner}' for outer, value in tensors.items() if isinstance(value, Mapping)
                                  for inner in value)]
    for pattern, kind, advice in _KEYS:
        matcher = re.compile(pattern)
        if key := next((key for key in keys if matcher.match(key)), None):
            raise UserError(f"'{path}' is {kind} (it has '{key}'), which is not supported: {advice}.")
    nested = tensors.get('image_proj')
    nested = nested if isinstance(nested, Mapping) else {}
    resampler = nested.get('proj_in.weight', tensors.get('image_proj.proj_in.weight'))
    if isinstance(resampler, Tensor) and resampler.dim() == 2 and resampler.shape[1] == _FACE:
        raise UserError(f"'{path}' is the IP-Adapter of InstantID (it reads {_FACE} numbers of a face), which is not "
                        'supported: it reads face embeddings of insightface; ask for an IP-Adapter of the kind plus.')
