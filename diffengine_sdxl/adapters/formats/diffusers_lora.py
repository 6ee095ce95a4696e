"""diffusers' LoRA file, pytorch_lora_weights.safetensors: all parts in one, 'unet.<module>.lora_A.weight'.

The header's `lora_adapter_metadata` is JSON of peft's config, 'unet.r', 'unet.lora_alpha' (diffusers/loaders/
lora_base.py, write_lora_layers). Without it diffusers takes every alpha to be the rank. Written are peft's own keys:
of a file with diffusers' older ones ('.lora.down.weight'), diffusers finds only some of the layers again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.adapters.formats.files import WeightFile
from diffengine_sdxl.adapters.formats.kohya_names import Modules
from diffengine_sdxl.adapters.formats.peft_lora import (
    PREFIX,
    SUFFIXES,
    Entry,
    PeftWeights,
    describe,
    gather,
    in_memory,
    settings,
)
from diffengine_sdxl.adapters.formats.weights import PARTS, LoRAWeights

WEIGHTS, METADATA = 'pytorch_lora_weights.safetensors', 'lora_adapter_metadata'
#: The ends of older keys -> peft's; 'down' is A and 'up' is B.
_OLD = {f'{old}.{side}.weight': new for old in ('lora', 'lora_linear_layer')
        for side, new in (('down', 'lora_A.weight'), ('up', 'lora_B.weight'))}
_ENDS = {**{suffix: suffix for suffix in SUFFIXES}, **_OLD, 'lora_magnitude_vector.weight': 'lora_magnitude_vector'}
#: The oldest: in the attention's processor.
_PROCESSOR = re.compile(r'\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$')


def read(file: WeightFile, modules: Modules) -> PeftWeights:
    """What a file holds. Keys without a part's name are the UNet's.

    Args:
        modules: part -> full name -> plain layer of the live base.

    Raises:
        ValueError: keys that are unknown or missing, metadata that is damaged or asks for what is not supported.
    """
    entries, unknown, alphas = [], [], {}
    for key, tensor in file.tensors.items():
        part, name = _split(key)
        part_modules = modules.get(part, {})
        if name.endswith('.alpha') and tensor.numel() == 1:
            alphas[part, in_memory(name.removesuffix('.alpha'), part_modules)] = (key, float(tensor))
            continue
        end = next((e for e in _ENDS if name.endswith(f'.{e}')), None)
        if end is None:
            unknown.append(key)
            continue
        entries.append(Entry(key, part, in_memory(name.removesuffix(f'.{end}'), part_modules), _ENDS[end], tensor))
    known = {(e.part, e.module) for e in entries if e.module is not None}
    unknown += [key for place, (key, _) in alphas.items() if place not in known]
    weights = gather(entries, unknown, file.path)
    metadata = _metadata(file)
    for part, held in weights.parts.items():
        own = {k.removeprefix(f'{part}.'): v for k, v in metadata.items() if k.startswith(f'{part}.')}
        if own:
            describe(weights, part, own, modules[part], f'{part}.')
        elif weights.kind in ('lora', 'dora'):
            held.alpha = {m: float(rank) for m, rank in held.rank.items()}
        else:
            raise ValueError(f"'{file.path}' holds a {weights.kind} of the {part} without {METADATA}, so its rank and "
                             'alpha are not known. Ask for a peft folder or a kohya file.')
        held.alpha |= {str(m): value for (p, m), (_, value) in alphas.items() if p == part}
    return weights


def _split(key: str) -> tuple[str, str]:
    """A key's part and the rest of it, the oldest forms turned into older ones."""
    part, _, name = key.partition('.')
    if part not in PARTS:
        part, name = 'unet', key
    name = name.removeprefix(PREFIX)
    return part, _PROCESSOR.sub(lambda m: f'.to_{m[1]}{".0" if m[1] == "out" else ""}.lora.{m[2]}.weight', name)


def _metadata(file: WeightFile) -> Mapping[str, Any]:
    try:
        found = json.loads(file.metadata.get(METADATA, '{}'))
    except json.JSONDecodeError as error:
        raise ValueError(f"The {METADATA} in the header of '{file.path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"The {METADATA} in the header of '{file.path}' is a {type(found).__name__}, not a dict.")
    return found


def loads_in_stock(weights: LoRAWeights) -> bool:
    """Whether diffusers' `load_lora_weights` can load what `write` writes: it loads a DoRA of a text encoder wrong."""
    return weights.kind == 'lora' or weights.kind == 'dora' and list(weights.parts) == ['unet']


def write(folder: Path, weights: LoRAWeights) -> None:
    """Write `folder`/pytorch_lora_weights.safetensors, which diffusers' `load_lora_weights(folder)` loads."""
    assert loads_in_stock(weights), 'the caller writes a peft folder instead'
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, held in weights.parts.items():
        # As all tools know it; transformers 5 has the first encoder without it in memory, and diffusers takes it off.
        prefix = '' if part == 'unet' else 'text_model.'
        state |= {f'{part}.{prefix}{key.removeprefix(prefix)}': t.contiguous() for key, t in held.tensors.items()}
        metadata |= {f'{part}.{k}': v for k, v in settings(weights, part).items()}
    save_file(state, folder / WEIGHTS,
              metadata={'format': 'pt', METADATA: json.dumps(metadata, indent=2, sort_keys=True)})
