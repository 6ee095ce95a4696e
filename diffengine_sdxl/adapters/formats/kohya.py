"""Single files of kohya's sd-scripts, LyCORIS and ComfyUI: LoRA, LoCon, DoRA, LoHa and LoKr of an SDXL.

A key is '<layer>.<tensor>', e.g. 'lora_unet_input_blocks_4_1_proj_in.lora_down.weight'; see layer_names for the layers.
A change is scaled by alpha / rank; without `alpha`, by 1.

    LoRA   up [out, r(, 1, 1)] @ down [r, in(, k, k)]; with a Tucker core mid [r, r, k, k], down is [r, in, 1, 1]
    DoRA   a LoRA with dora_scale [out, 1(, 1, 1)]: the norms of the changed weight's rows
    LoHa   (w1_a [out, r] @ w1_b [r, in * k * k]) * (w2_a @ w2_b); with cores t1, t2 [r, r, k, k] w_a is [r, out]
    LoKr   kron(w1, w2), each whole or a product of two; if both are whole, `alpha` is ignored

Sources: sd-scripts' networks/lora.py, LyCORIS' modules/{locon,loha,lokr}.py, ComfyUI's comfy/weight_adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats import lora_weights
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.layer_names import PREFIXES, Modules, file_names
from diffengine_sdxl.adapters.formats.lora_weights import LoRAWeights, PartWeights, weight_change
from diffengine_sdxl.errors import UserError, listed

#: A tensor's name in a file -> its name in peft; others are called the same.
_PEFT = {'lora_down.weight': 'lora_A.weight', 'lora_up.weight': 'lora_B.weight', 'dora_scale': 'lora_magnitude_vector'}
_LORA, _MID = ('lora_down.weight', 'lora_up.weight'), 'lora_mid.weight'
#: Kind -> the sets of tensors that a layer may have.
_FORMS = {'lora': (_LORA, (*_LORA, _MID)), **lora_weights.FORMS}
_KIND_OF = {name: kind for kind, forms in _FORMS.items() for form in forms for name in form}
_SHARED = ('alpha', 'dora_scale')
#: Tensors that such files may also hold and that peft cannot represent exactly.
_FOREIGN = {
    'diff': 'full differences', 'diff_b': 'full differences', 'w_norm': 'trained norms', 'b_norm': 'trained norms',
    'weight': 'IA3', 'on_input': 'IA3', 'a1.weight': 'GLoRA', 'a2.weight': 'GLoRA', 'b1.weight': 'GLoRA',
    'b2.weight': 'GLoRA', 'bm.weight': 'GLoRA', 'oft_blocks': 'OFT', 'oft_diag': 'OFT', 'rescale': 'OFT'}

#: (part, name in memory) -> (name in the file, its tensors).
Layers = Mapping[tuple[str, str], tuple[str, dict[str, Tensor]]]


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file with these keys was written by sd-scripts, LyCORIS or ComfyUI."""
    return any(key.startswith((*PREFIXES.values(), 'lora_te_')) for key in keys)


def read(tensors: Mapping[str, Any], modules: Modules, source: str | Path) -> LoRAWeights:
    """Read a file's tensors in peft's terms; they keep their dtype.

    Args:
        tensors: the file's. Its metadata adds nothing.
        modules: part -> full name -> module of the live base, without wrappers.
        source: the file, for errors.

    Raises:
        UserError: keys are unknown or missing, peft cannot represent their kind exactly, the file mixes kinds, or it
            was made for another base.
    """
    layers = _layers(tensors, file_names(modules), source)
    kind = _kind(layers, source)
    parts: dict[str, PartWeights] = {}
    for (part, name), (file_name, layer) in layers.items():
        where = f"'{source}': '{file_name}', which is '{name}' of the {part},"
        fitted = _fit(kind, layer, _weight(modules[part][name]), where)
        part_weights, rank = parts.setdefault(part, PartWeights()), _rank(fitted)
        part_weights.tensors |= {f'{name}.{key}': tensor for key, tensor in _in_peft(fitted).items()}
        part_weights.rank[name] = rank
        # Without a product there is no rank, and LyCORIS and ComfyUI ignore `alpha`.
        has_alpha = 'alpha' in layer and not _is_whole(fitted)
        part_weights.alpha[name] = _alpha(layer['alpha'], file_name, source) if has_alpha else float(rank)
    return LoRAWeights(kind, {part: parts[part] for part in PREFIXES if part in parts}, source=str(source))


def _in_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PEFT.get(key, key): tensor for key, tensor in tensors.items()}


def _layers(tensors: Mapping[str, Any], names: Mapping[str, Mapping[str, tuple[str, ...]]], source: str | Path
            ) -> Layers:
    """Assign every key to its layer."""
    table = {file: (part, name) for part, layers in names.items() for name, files in layers.items() for file in files}
    foreign: dict[str, list[str]] = {}
    unknown, duplicate = [], []
    layers: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        file_name, _, suffix = key.partition('.')
        if suffix in _FOREIGN:
            foreign.setdefault(_FOREIGN[suffix], []).append(key)
        elif file_name not in table or suffix not in (*_KIND_OF, *_SHARED) or not isinstance(tensor, Tensor):
            unknown.append(key)
        elif layers.setdefault(table[file_name], (file_name, {}))[0] != file_name:
            duplicate.append(key)
        else:
            layers[table[file_name]][1][suffix] = tensor
    if foreign:
        kind, keys = next(iter(foreign.items()))
        hint = ' Each tool has a format of its own for it; ask for the peft folder.' if kind == 'OFT' else ''
        raise UserError(f"'{source}' holds {kind} in {len(keys)} keys ({listed(sorted(keys))}); of these files LoRA, "
                        f'LoCon, DoRA, LoHa and LoKr are read.{hint}')
    refuse(source, unknown=unknown, given_under_two_names=duplicate)
    return layers


def _kind(layers: Layers, source: str | Path) -> str:
    """Return the one kind of all layers."""
    kinds: dict[str, list[str]] = {}
    missing: list[str] = []
    for file_name, layer in layers.values():
        form, present = '', {name for name in layer if name not in _SHARED}
        for form in dict.fromkeys(_KIND_OF[name] for name in sorted(present)):
            dora = 'dora' if form == 'lora' else f'{form} with dora_scale'
            kinds.setdefault(dora if 'dora_scale' in layer else form, []).append(file_name)
        if present not in map(set, _FORMS.get(form, ())):
            lacking = min((set(f) - present for f in _FORMS.get(form, _FORMS['lora']) if set(f) > present), key=len,
                          default={'(other tensors: these do not go together)'})
            missing += [f'{file_name}.{name}' for name in lacking]
    if len(kinds) > 1:
        counts = '; '.join(f'{kind} in {len(files)} layers ({listed(sorted(files))})' for kind, files in kinds.items())
        raise UserError(f"'{source}' mixes kinds, and an adapter must be of one: {counts}.")
    refuse(source, missing=missing)
    kind, files = next(iter(kinds.items()))
    if kind.endswith('dora_scale'):
        raise UserError(f"'{source}' holds {kind} in {len(files)} layers ({listed(sorted(files))}); peft decomposes "
                        'the weights of a LoRA only.')
    return kind


def _fit(kind: str, layer: Mapping[str, Tensor], weight: Tensor, where: str) -> dict[str, Tensor]:
    """Return one layer's tensors in peft's shapes; a Tucker core of a LoRA is folded into `down`."""
    fitted = {k: v for k, v in layer.items() if k != 'alpha'}
    try:
        if _MID in fitted:
            fitted['lora_down.weight'] = _fold(fitted.pop(_MID), fitted['lora_down.weight'])
        change = weight_change(kind, {k: v.to('meta', torch.float32) for k, v in _in_peft(fitted).items()})
    except (RuntimeError, IndexError) as error:
        shapes = ', '.join(f'{k} {list(v.shape)}' for k, v in layer.items())
        raise UserError(f'{where} has tensors that do not go together: {shapes}.') from error
    expected = weight.flatten(1).shape
    if change.shape != expected:
        raise UserError(f'{where} changes a weight of {" x ".join(map(str, change.shape))}; the one of this base is '
                        f'{" x ".join(map(str, expected))} ({list(weight.shape)}). It was made for another base.')
    if kind in ('lora', 'dora'):
        rank = _rank(fitted)
        # Also between a linear layer and a 1 x 1 convolution, which are the same.
        fitted['lora_down.weight'] = fitted['lora_down.weight'].reshape(rank, *weight.shape[1:])
        fitted['lora_up.weight'] = fitted['lora_up.weight'].reshape(len(weight), rank, *[1] * (weight.dim() - 2))
    if kind == 'dora':
        scale = fitted['dora_scale']
        if scale.dim() == 0 or not len(scale) == scale.numel() == len(weight):
            by_input = scale.dim() > 0 and (len(scale), scale.numel()) == (1, weight.shape[1])
            reason = (f"for input channels (LyCORIS with wd_on_out=False); peft's DoRA has one for each of the "
                      f'{len(weight)} output channels.' if by_input else
                      f'and the weight of this base {len(weight)} output channels. It was made for another base.')
            raise UserError(f'{where} has magnitudes {list(scale.shape)} {reason}')
        fitted['dora_scale'] = scale.reshape(-1) if weight.dim() == 2 else scale.reshape(1, -1, 1, 1)
    return fitted


def _fold(mid: Tensor, down: Tensor) -> Tensor:
    """Return the convolution [r, in, k, k] that equals `down` [r, in, 1, 1] followed by `mid` [r, r, k, k]."""
    full = torch.einsum('ijkl,jr->irkl', mid.double(), down.double().flatten(1))
    return full.to(torch.promote_types(down.dtype, torch.float32))


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    return 'lokr_w1' in tensors and 'lokr_w2' in tensors


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """Return the number that alpha is divided by; for a LoKr of whole factors the least rank that peft makes whole."""
    for name in ('lora_down.weight', 'hada_w1_b', 'lokr_w2_b', 'lokr_w1_b'):
        if name in tensors:
            return len(tensors[name])
    return math.ceil(max(tensors['lokr_w2'].shape[:2]) / 2)


def _alpha(alpha: Tensor, file_name: str, source: str | Path) -> float:
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise UserError(f"'{source}': '{file_name}.alpha' is {alpha.tolist()}; it must be a number above 0.")
    return value


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def write(path: str | Path, weights: LoRAWeights, modules: Modules, metadata: Mapping[str, str] | None = None) -> int:
    """Write one .safetensors file with the UNet's original names, as sd-scripts does; return the number of tensors.

    rslora's factor goes into alpha, alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank; see also `written_alphas`.

    Args:
        path: the file.
        weights: any kind but 'oft'.
        modules: see `read`.
        metadata: replaces parts of the default header.

    Raises:
        UserError: an OFT, which each of these tools stores differently.
    """
    if weights.kind == 'oft':
        raise UserError('An OFT has no format that kohya, LyCORIS and ComfyUI share; write it as a peft folder.')
    names = file_names(modules)
    tensors: dict[str, Tensor] = {}
    alphas: list[float] = []
    count = 0
    for part, part_weights in weights.parts.items():
        new_alphas = written_alphas(weights, part)
        for name, rank in part_weights.rank.items():
            layer = {k: part_weights.tensors[key] for k in (*_PEFT, *_KIND_OF)
                     if (key := f'{name}.{_PEFT.get(k, k)}') in part_weights.tensors}
            count += len(layer)
            if 'dora_scale' in layer:
                dim = _weight(modules[part][name]).dim()
                layer['dora_scale'] = layer['dora_scale'].reshape(-1, *[1] * (dim - 1))
            first = next(k for k in ('lora_up.weight', 'lokr_w1', 'lokr_w1_a', 'hada_w1_a') if k in layer)
            alpha, factor = new_alphas[name], _effective_alpha(weights, part, name) / new_alphas[name]
            if _is_whole(layer):  # readers ignore alpha here
                alpha, factor = float(rank), factor * alpha / rank
            dtype = torch.promote_types(layer[first].dtype, torch.float32)
            if factor != 1:
                layer[first] = (layer[first].to(dtype) * factor).to(layer[first].dtype)
            layer['alpha'] = torch.tensor(alpha, dtype=dtype)
            alphas.append(alpha)
            tensors |= {f'{names[part][name][0]}.{k}': v.detach().cpu().contiguous() for k, v in layer.items()}
    assert count == sum(len(p.tensors) for p in weights.parts.values()), 'every tensor must have a name'
    data: bytes = save(tensors)
    # Tools identify a file by the digest of its body, which stays when the metadata is edited.
    digest = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], 'little'):]).hexdigest()
    save_file(tensors, path, metadata={**_header(weights, alphas), 'modelspec.title': Path(path).stem,
                                       'modelspec.hash_sha256': f'0x{digest}', 'sshs_model_hash': digest,
                                       **(metadata or {})})
    return len(tensors)


def _effective_alpha(weights: LoRAWeights, part: str, name: str) -> float:
    """Return a layer's alpha for a change that is scaled by alpha / rank."""
    part_weights = weights.parts[part]
    return part_weights.alpha[name] * (math.sqrt(part_weights.rank[name]) if weights.rslora else 1.0)


def written_alphas(weights: LoRAWeights, part: str) -> dict[str, float]:
    """Return the alphas of a part's layers that `write` writes.

    A LoRA's are made equal if powers of two in `lora_up` do it exactly: where they differ, as with blocks of other
    ranks, diffusers 0.42 gives all attentions the most frequent one. They become the least one, so that no
    half-precision weight underflows.
    """
    alphas = {name: _effective_alpha(weights, part, name) for name in weights.parts[part].rank}
    least = min(alphas.values())
    exact = weights.kind == 'lora' and all(math.frexp(alpha / least)[0] == 0.5 for alpha in alphas.values())
    return dict.fromkeys(alphas, least) if exact else alphas


def _header(weights: LoRAWeights, alphas: Iterable[float]) -> dict[str, str]:
    """Return the metadata that these tools show or read: modelspec 1.0.0 and sd-scripts' ss_ keys.

    Source: Stability-AI/ModelSpec; sd-scripts' library/sai_model_spec.py and train_network.py.

    Args:
        alphas: of the layers, as written.
    """
    def common(values: Iterable[float]) -> str:
        distinct = set(values)
        return f'{distinct.pop():g}' if len(distinct) == 1 else 'Dynamic'

    ranks = [rank for part_weights in weights.parts.values() for rank in part_weights.rank.values()]
    plain = weights.kind == 'lora'
    arguments = {'lora': {}, 'dora': {'algo': 'lora', 'dora_wd': 'True'}}.get(weights.kind, {'algo': weights.kind})
    return {'modelspec.sai_model_spec': '1.0.0', 'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
            'modelspec.implementation': 'https://github.com/Stability-AI/generative-models',
            'modelspec.resolution': '1024x1024', 'modelspec.date': time.strftime('%Y-%m-%dT%H:%M:%S'),
            'ss_base_model_version': 'sdxl_base_v1-0', 'ss_v2': 'False',
            'ss_network_module': 'networks.lora' if plain else 'lycoris.kohya',
            'ss_network_dim': common(ranks), 'ss_network_alpha': common(alphas),
            'ss_network_args': json.dumps(arguments)}
