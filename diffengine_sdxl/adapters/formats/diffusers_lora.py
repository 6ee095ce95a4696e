"""diffusers' LoRA file, pytorch_lora_weights.safetensors: all parts in one, 'unet.<module>.lora_A.weight'.

The header's `lora_adapter_metadata` is JSON of peft's config, 'unet.r', 'unet.lora_alpha' (diffusers/loaders/
lora_base.py, write_lora_layers). Without it diffusers sets every alpha to the rank. We write peft's own keys: with
diffusers' older ones ('.lora.down.weight'), diffusers itself loads only some of the layers. peft's own file without its
adapter_config.json looks the same but for 'base_model.model.' before its keys, and nobody knows its alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.adapters.formats import peft_lora
from diffengine_sdxl.adapters.formats.files import WeightFile, refuse
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora_weights import PARTS, LoRAWeights
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.files import parse_json

WEIGHTS, METADATA = 'pytorch_lora_weights.safetensors', 'lora_adapter_metadata'
#: Suffix of an older key -> peft's; 'down' is A and 'up' is B.
_OLD = {f'{old}.{side}.weight': new for old in ('lora', 'lora_linear_layer')
        for side, new in (('down', 'lora_A.weight'), ('up', 'lora_B.weight'))}
_SUFFIXES = {**{suffix: suffix for suffix in peft_lora.SUFFIXES}, **_OLD,
             'lora_magnitude_vector.weight': 'lora_magnitude_vector',
             # As peft holds them in memory.
             'lora_A.default.weight': 'lora_A.weight', 'lora_B.default.weight': 'lora_B.weight',
             'lora_magnitude_vector.default.weight': 'lora_magnitude_vector'}
#: The oldest keys, of the attention's processor, also in text encoders.
_PROCESSOR = re.compile(r'\.(self_attn\.)?(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$')


def has_layers(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds layers of a LoRA or of its relatives; of peft too, which has the same."""
    return any(_suffix(_split(key)[1]) is not None for key in keys)


def read(file: WeightFile, modules: Modules, alpha: float | None = None, rslora: bool | None = None) -> LoRAWeights:
    """Read a file's tensors and settings. Keys without a part's name are the UNet's; peft's, of the part that has them.

    Args:
        modules: part -> full name -> plain layer of the live base.
        alpha, rslora: of a file that does not say; without them diffusers' convention holds, alpha = rank, but for
            peft's files.

    Raises:
        UserError: keys are unknown or missing, or the metadata is damaged or asks for what is not supported; or alpha
            is unknown.
    """
    entries, unknown, different = [], [], []
    alphas: dict[tuple[str, str | None], tuple[str, float]] = {}
    lone = _part_of_peft(file.tensors, modules)
    for key, tensor in file.tensors.items():
        part, name = _split(key)
        part = lone or part
        part_modules = modules.get(part, {})
        if name.endswith('.alpha') and tensor.numel() == 1:
            layer = part, peft_lora.in_memory(name.removesuffix('.alpha'), part_modules)
            other, value = alphas.setdefault(layer, (key, float(tensor)))
            if value != float(tensor):
                different.append(f'{other} and {key}')
            continue
        suffix = _suffix(name)
        if suffix is None:
            unknown.append(key)
            continue
        module = peft_lora.in_memory(name.removesuffix(f'.{suffix}'), part_modules)
        entries.append(peft_lora.Entry(key, part, module, _SUFFIXES[suffix], tensor))
    known = {(e.part, e.module) for e in entries if e.module is not None}
    unknown += [key for layer, (key, _) in alphas.items() if layer not in known]
    weights = peft_lora.gather(entries, unknown, file.path)
    refuse(file.path, given_under_two_names_with_different_values=different)
    metadata, is_peft = header(file), any(peft_lora.PREFIX in key for key in file.tensors)
    for part, part_weights in weights.parts.items():
        config = {k.removeprefix(f'{part}.'): v for k, v in metadata.items() if k.startswith(f'{part}.')}
        if config:
            peft_lora.apply_config(weights, part, config, modules[part], f'{part}.')
        elif weights.kind in ('loha', 'lokr') or {(part, m) for m in part_weights.rank} - alphas.keys():
            _assume_alpha(weights, part, is_peft, alpha, bool(rslora))
        part_weights.alpha |= {str(m): value for (p, m), (_, value) in alphas.items() if p == part}
    return weights


def _part_of_peft(keys: Iterable[str], modules: Modules) -> str | None:
    """Return the part of a file whose keys are all peft's, with 'base_model.model.' and no part's name; else None."""
    keys = list(keys)
    if not keys or not all(key.startswith(peft_lora.PREFIX) for key in keys):
        return None
    names = {key.removeprefix(peft_lora.PREFIX).removesuffix(f'.{_suffix(key)}') for key in keys}
    return peft_lora.part_of(names, modules)


def _assume_alpha(weights: LoRAWeights, part: str, is_peft: bool, alpha: float | None, rslora: bool) -> None:
    """Set the alphas of a part of which a file says none: the given one, or the rank as diffusers does.

    Args:
        is_peft: whether peft wrote the file.

    Raises:
        UserError: the convention is not known for this kind, or not for a file of peft.
    """
    own, source = weights.parts[part], weights.source
    if weights.kind not in ('lora', 'dora'):
        raise UserError(f"'{source}' holds a {weights.kind} of the {part} without {METADATA} or {peft_lora.CONFIG}, so "
                        'its rank and alpha are unknown. Ask for a peft folder or a kohya file.')
    if is_peft and alpha is None:
        raise UserError(f"'{source}' is a LoRA of peft without its {peft_lora.CONFIG}, so its alpha is unknown. Put "
                        'that file beside it, or set `alpha` of the adapter: lora_alpha of its training, with '
                        'rslora=True if it had use_rslora.')
    own.alpha = {name: float(rank if alpha is None else alpha) for name, rank in own.rank.items()}
    weights.rslora = rslora and alpha is not None
    print_log(f"'{source}' does not say the alpha of the {part}: " + (
        'it is taken as the rank, as diffusers does.' if alpha is None else f'alpha={alpha:g} of the config is used.'),
        logger='current')


def _suffix(name: str) -> str | None:
    return next((s for s in _SUFFIXES if name.endswith(f'.{s}')), None)


def _split(key: str) -> tuple[str, str]:
    """Return a key's part and the rest of it, with the oldest form turned into the older one."""
    part, _, name = key.partition('.')
    if part not in PARTS:
        part, name = 'unet', key
    return part, _PROCESSOR.sub(_newer, name.removeprefix(peft_lora.PREFIX))


def _newer(match: re.Match[str]) -> str:
    attention, name, side = match.groups()
    layer = f'{attention}{name}_proj' if attention else f'to_{name}{".0" if name == "out" else ""}'
    return f'.{layer}.lora.{side}.weight'


def header(file: WeightFile) -> Mapping[str, Any]:
    """Return peft's settings in the header of a file, by 'unet.lora_alpha' and the like; {} if it has none.

    Raises:
        UserError: they are damaged.
    """
    try:
        metadata = parse_json(file.metadata.get(METADATA, '{}'))
    except ValueError as error:
        raise UserError(f"The {METADATA} in the header of '{file.path}' is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"The {METADATA} in the header of '{file.path}' is a {type(metadata).__name__}, not a dict.")
    return metadata


def loads_in_stock(weights: LoRAWeights) -> bool:
    """Whether diffusers' `load_lora_weights` loads what `write` writes; it loads a DoRA of a text encoder wrong."""
    return weights.kind == 'lora' or weights.kind == 'dora' and list(weights.parts) == ['unet']


def write(folder: Path, weights: LoRAWeights) -> None:
    """Write `folder`/pytorch_lora_weights.safetensors, for diffusers' `load_lora_weights(folder)`."""
    assert loads_in_stock(weights), 'the caller writes a peft folder instead'
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, part_weights in weights.parts.items():
        # Files have this prefix for both encoders; transformers 5 has the first without it, and diffusers removes it.
        prefix = '' if part == 'unet' else 'text_model.'
        state |= {f'{part}.{prefix}{key.removeprefix(prefix)}': t.contiguous()
                  for key, t in part_weights.tensors.items()}
        metadata |= {f'{part}.{k}': v for k, v in peft_lora.settings(weights, part).items()}
    save_file(state, folder / WEIGHTS,
              metadata={'format': 'pt', METADATA: json.dumps(metadata, indent=2, sort_keys=True)})
