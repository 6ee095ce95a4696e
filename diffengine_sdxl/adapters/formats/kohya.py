"""The single files of kohya's sd-scripts, LyCORIS and ComfyUI: LoRA, LoCon, DoRA, LoHa and LoKr of an SDXL.

A key is '<layer>.<tensor>', e.g. 'lora_unet_input_blocks_4_1_proj_in.lora_down.weight'; see kohya_names for the layers.
A change is scaled by alpha / rank; where `alpha` is missing, by 1.

    LoRA   up [out, r(, 1, 1)] @ down [r, in(, k, k)]; with a Tucker core mid [r, r, k, k], down is [r, in, 1, 1]
    DoRA   a LoRA with dora_scale [out, 1(, 1, 1)]: the norms of the changed weight's rows
    LoHa   (w1_a [out, r] @ w1_b [r, in * k * k]) * (w2_a @ w2_b); with cores t1, t2 [r, r, k, k] w_a is [r, out]
    LoKr   kron(w1, w2), each whole or a product of two; where both are whole, `alpha` means nothing

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

from diffengine_sdxl.adapters.formats.files import refuse, shown
from diffengine_sdxl.adapters.formats.kohya_names import PREFIXES, Modules, file_names
from diffengine_sdxl.adapters.formats.weights import LoRAWeights, PartWeights

#: A tensor's name in a file -> its name in peft.
_LORA = {'lora_down.weight': 'lora_A.weight', 'lora_up.weight': 'lora_B.weight'}
_MAGNITUDE = {'dora_scale': 'lora_magnitude_vector'}
_MID = 'lora_mid.weight'
#: Kind -> the sets of tensors that a layer may have; LyCORIS and peft call them the same in LoHa and LoKr.
_HADA = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'lora': (tuple(_LORA), (*_LORA, _MID)),
    'loha': (_HADA, (*_HADA, 'hada_t1', 'hada_t2')),
    'lokr': tuple((*w1, *w2) for w1 in (('lokr_w1',), ('lokr_w1_a', 'lokr_w1_b')) for w2 in (
        ('lokr_w2',), ('lokr_w2_a', 'lokr_w2_b'), ('lokr_w2_a', 'lokr_w2_b', 'lokr_t2')))}
_KIND_OF = {name: kind for kind, forms in _FORMS.items() for form in forms for name in form}
_SHARED = ('alpha', *_MAGNITUDE)
#: What such files may also hold and peft has no exact place for.
_FOREIGN = {
    'diff': 'full differences', 'diff_b': 'full differences', 'w_norm': 'trained norms', 'b_norm': 'trained norms',
    'weight': 'IA3', 'on_input': 'IA3', 'a1.weight': 'GLoRA', 'a2.weight': 'GLoRA', 'b1.weight': 'GLoRA',
    'b2.weight': 'GLoRA', 'bm.weight': 'GLoRA', 'oft_blocks': 'OFT', 'oft_diag': 'OFT', 'rescale': 'OFT'}
_WHY = {'OFT': ' Each tool has a format of its own for it; ask for the peft folder.'}


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is one of sd-scripts, LyCORIS or ComfyUI."""
    return any(key.startswith((*PREFIXES.values(), 'lora_te_')) for key in keys)


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str], modules: Modules, source: str | Path) -> LoRAWeights:
    """What a file holds, in peft's terms; tensors keep their dtype.

    Args:
        tensors, metadata: the file's. The metadata says nothing that the tensors don't, and is not used.
        modules: part -> full name -> module of the live base, without wrappers.
        source: the file, for errors.

    Raises:
        ValueError: keys that are unknown, missing or of a kind that peft has no exact form of, several kinds in one
            file, or widths of another base; which.
    """
    layers = _layers(tensors, file_names(modules), source)
    kind = _kind(layers, source)
    parts: dict[str, PartWeights] = {}
    for (part, name), (files, own) in layers.items():
        held, weight = parts.setdefault(part, PartWeights()), _weight(modules[part][name])
        found = _fitted(kind, own, weight, f"'{source}': '{files}', which is '{name}' of the {part},")
        rank = _rank(found)
        held.tensors |= {f'{name}.{_LORA.get(k) or _MAGNITUDE.get(k) or k}': v for k, v in found.items()}
        held.rank[name] = rank
        # Where both factors are whole there is no rank, and LyCORIS and ComfyUI pass `alpha` over.
        given = 'alpha' in own and not _is_whole(found)
        held.alpha[name] = _alpha(own['alpha'], files, source) if given else float(rank)
    return LoRAWeights(kind, {part: parts[part] for part in PREFIXES if part in parts}, source=str(source))


def _layers(tensors: Mapping[str, Any], names: Mapping[str, Mapping[str, tuple[str, ...]]],
            source: str | Path) -> dict[tuple[str, str], tuple[str, dict[str, Tensor]]]:
    """(part, name in memory) -> (name in the file, its tensors); every key has its place."""
    table = {file: (part, name) for part, layers in names.items() for name, files in layers.items() for file in files}
    foreign: dict[str, list[str]] = {}
    unknown, twice = [], []
    found: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        file, _, suffix = key.partition('.')
        if suffix in _FOREIGN:
            foreign.setdefault(_FOREIGN[suffix], []).append(key)
        elif file not in table or suffix not in (*_KIND_OF, *_SHARED) or not isinstance(tensor, Tensor):
            unknown.append(key)
        elif found.setdefault(table[file], (file, {}))[0] != file:
            twice.append(key)
        else:
            found[table[file]][1][suffix] = tensor
    if foreign:
        kind, keys = next(iter(foreign.items()))
        raise ValueError(f"'{source}' holds {kind} in {len(keys)} keys ({shown(sorted(keys))}); of these files LoRA, "
                         f'LoCon, DoRA, LoHa and LoKr are read.{_WHY.get(kind, "")}')
    refuse(source, unknown=unknown, given_under_two_names=twice)
    return found


def _kind(layers: Mapping[tuple[str, str], tuple[str, Mapping[str, Tensor]]], source: str | Path) -> str:
    """The one kind of all layers."""
    kinds: dict[str, list[str]] = {}
    missing: list[str] = []
    for file, own in layers.values():
        form, present = '', {name for name in own if name not in _SHARED}
        for form in dict.fromkeys(_KIND_OF[name] for name in sorted(present)):
            decomposed = 'dora_scale' in own
            kinds.setdefault({'lora': 'dora'}.get(form, f'{form} with dora_scale') if decomposed else form, []).append(
                file)
        if present not in map(set, _FORMS.get(form, ())):
            nearest = min((set(f) - present for f in _FORMS.get(form, _FORMS['lora']) if set(f) > present), key=len,
                          default={'(other tensors: these do not go together)'})
            missing += [f'{file}.{name}' for name in nearest]
    if len(kinds) > 1:
        words = '; '.join(f'{kind} in {len(files)} layers ({shown(sorted(files))})' for kind, files in kinds.items())
        raise ValueError(f"'{source}' mixes kinds, and an adapter here is of one: {words}.")
    refuse(source, missing=missing)
    kind = next(iter(kinds))
    if kind.endswith('dora_scale'):
        files = [file for file, _ in layers.values()]
        raise ValueError(f"'{source}' holds {kind} in {len(files)} layers ({shown(sorted(files))}); peft decomposes "
                         'the weights of a LoRA only.')
    return kind


def _fitted(kind: str, own: Mapping[str, Tensor], weight: Tensor, what: str) -> dict[str, Tensor]:
    """The tensors of one layer in the shapes that peft gives them; a Tucker core of a LoRA is folded into `down`."""
    found = {k: v for k, v in own.items() if k != 'alpha'}
    try:
        if _MID in found:
            found['lora_down.weight'] = _folded(found.pop(_MID), found['lora_down.weight'])
        change = _change(kind, {k: v.to('meta', torch.float32) for k, v in found.items()})
    except (RuntimeError, IndexError) as error:
        shapes = ', '.join(f'{k} {list(v.shape)}' for k, v in own.items())
        raise ValueError(f'{what} has tensors that do not go together: {shapes}.') from error
    wanted = weight.flatten(1).shape
    if change.shape != wanted:
        raise ValueError(f'{what} changes a weight of {" x ".join(map(str, change.shape))}; the one of this base is '
                         f'{" x ".join(map(str, wanted))} ({list(weight.shape)}). It was made for another base.')
    if kind in ('lora', 'dora'):
        rank = _rank(found)
        # Also between a linear layer and a convolution of 1 x 1, which are the same.
        found['lora_down.weight'] = found['lora_down.weight'].reshape(rank, *weight.shape[1:])
        found['lora_up.weight'] = found['lora_up.weight'].reshape(len(weight), rank, *[1] * (weight.dim() - 2))
    if kind == 'dora':
        scale = found['dora_scale']
        if not len(scale) == scale.numel() == len(weight):
            reason = (f"for input channels (LyCORIS with wd_on_out=False); peft's DoRA has one for each of the "
                      f'{len(weight)} output channels.' if (len(scale), scale.numel()) == (1, weight.shape[1]) else
                      f'and the weight of this base {len(weight)} output channels. It was made for another base.')
            raise ValueError(f'{what} has magnitudes {list(scale.shape)} {reason}')
        found['dora_scale'] = scale.reshape(-1) if weight.dim() == 2 else scale.reshape(1, -1, 1, 1)
    return found


def _folded(mid: Tensor, down: Tensor) -> Tensor:
    """The one convolution [r, in, k, k] that `down` [r, in, 1, 1] and then `mid` [r, r, k, k] are; of equal rank."""
    full = torch.einsum('ijkl,jr->irkl', mid.double(), down.double().flatten(1))
    return full.to(torch.promote_types(down.dtype, torch.float32))


def _change(kind: str, t: Mapping[str, Tensor]) -> Tensor:
    """The change of the weight as a matrix [out, in * k * k], without alpha."""
    def product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
        return a @ b if core is None else torch.einsum('ij...,ip,jr->pr...', core, a, b).flatten(1)

    if kind in ('lora', 'dora'):
        return t['lora_up.weight'].flatten(1) @ t['lora_down.weight'].flatten(1)
    if kind == 'loha':
        return (product(t['hada_w1_a'], t['hada_w1_b'], t.get('hada_t1'))
                * product(t['hada_w2_a'], t['hada_w2_b'], t.get('hada_t2')))
    w1 = t['lokr_w1'] if 'lokr_w1' in t else t['lokr_w1_a'] @ t['lokr_w1_b']
    w2 = t['lokr_w2'].flatten(1) if 'lokr_w2' in t else product(t['lokr_w2_a'], t['lokr_w2_b'], t.get('lokr_t2'))
    return torch.kron(w1, w2)


def _is_whole(found: Mapping[str, Tensor]) -> bool:
    return 'lokr_w1' in found and 'lokr_w2' in found


def _rank(found: Mapping[str, Tensor]) -> int:
    """The number that alpha is divided by; for a LoKr of two whole factors the least that peft makes such a one of."""
    for name in ('lora_down.weight', 'hada_w1_b', 'lokr_w2_b', 'lokr_w1_b'):
        if name in found:
            return len(found[name])
    return math.ceil(max(found['lokr_w2'].shape[:2]) / 2)


def _alpha(alpha: Tensor, file: str, source: str | Path) -> float:
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"'{source}': '{file}.alpha' is {alpha.tolist()}; it must be a number above 0.")
    return value


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def write(path: str | Path, weights: LoRAWeights, modules: Modules, metadata: Mapping[str, str] | None = None) -> int:
    """Write one .safetensors file with the UNet's original names, as sd-scripts does; the number of its tensors.

    rslora's factor goes into alpha, alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank; see also `written_alphas`.

    Args:
        path: the file.
        weights: any kind but 'oft'.
        modules: see `read`.
        metadata: changes to what `header` says.

    Raises:
        ValueError: OFT, which each of these tools holds in another form.
    """
    if weights.kind == 'oft':
        raise ValueError('An OFT has no form that kohya, LyCORIS and ComfyUI share; write it as a peft folder.')
    names = file_names(modules)
    tensors: dict[str, Tensor] = {}
    count = 0
    alphas: list[float] = []
    for part, held in weights.parts.items():
        written = written_alphas(weights, part)
        for name, rank in held.rank.items():
            weight = _weight(modules[part][name])
            own = {k: held.tensors[key] for k in (*_LORA, *_MAGNITUDE, *_KIND_OF)
                   if (key := f'{name}.{_LORA.get(k) or _MAGNITUDE.get(k) or k}') in held.tensors}
            count += len(own)
            if 'dora_scale' in own:
                own['dora_scale'] = own['dora_scale'].reshape(-1, *[1] * (weight.dim() - 1))
            first = next(k for k in ('lora_up.weight', 'lokr_w1', 'lokr_w1_a', 'hada_w1_a') if k in own)
            alpha, factor = written[name], _alpha_of(weights, part, name) / written[name]
            if _is_whole(own):  # readers take no alpha here
                alpha, factor = float(rank), factor * alpha / rank
            dtype = torch.promote_types(own[first].dtype, torch.float32)
            if factor != 1:
                own[first] = (own[first].to(dtype) * factor).to(own[first].dtype)
            own['alpha'] = torch.tensor(alpha, dtype=dtype)
            alphas.append(alpha)
            tensors |= {f'{names[part][name][0]}.{k}': v.detach().cpu().contiguous() for k, v in own.items()}
    assert count == sum(len(held.tensors) for held in weights.parts.values()), 'every tensor has its name'
    digest = hashlib.sha256(_body(tensors)).hexdigest()
    save_file(tensors, path, metadata={**header(weights, alphas), 'modelspec.title': Path(path).stem,
                                       'modelspec.hash_sha256': f'0x{digest}', 'sshs_model_hash': digest,
                                       **(metadata or {})})
    return len(tensors)


def _body(tensors: dict[str, Tensor]) -> bytes:
    """What stands behind the header; tools know a file by its digest, as it stays when the metadata is edited."""
    data: bytes = save(tensors)
    return data[8 + int.from_bytes(data[:8], 'little'):]


def _alpha_of(weights: LoRAWeights, part: str, name: str) -> float:
    """Of a layer, for a change that is scaled by alpha / rank."""
    held = weights.parts[part]
    return held.alpha[name] * (math.sqrt(held.rank[name]) if weights.rslora else 1.0)


def written_alphas(weights: LoRAWeights, part: str) -> dict[str, float]:
    """The alphas of a part's layers as `write` gives them.

    Those of a LoRA are made one where that is exact, by powers of two in `lora_up`: where they differ, as they do with
    blocks of other ranks, diffusers 0.42 gives all attentions the most frequent one. The least one is taken, so that
    no half-precision weight underflows.
    """
    found = {name: _alpha_of(weights, part, name) for name in weights.parts[part].rank}
    least = min(found.values())
    exact = weights.kind == 'lora' and all(math.frexp(alpha / least)[0] == 0.5 for alpha in found.values())
    return dict.fromkeys(found, least) if exact else found


def header(weights: LoRAWeights, alphas: Iterable[float]) -> dict[str, str]:
    """The metadata that these tools show or read: modelspec 1.0.0 and sd-scripts' ss_ keys.

    Args:
        weights: what is written. alphas: of its layers, as they are written.

    Source: Stability-AI/ModelSpec; sd-scripts' library/sai_model_spec.py and train_network.py.
    """
    def common(values: Iterable[float]) -> str:
        found = set(values)
        return f'{found.pop():g}' if len(found) == 1 else 'Dynamic'

    ranks = [rank for held in weights.parts.values() for rank in held.rank.values()]
    plain = weights.kind == 'lora'
    arguments = {} if plain else {'algo': {'dora': 'lora'}.get(weights.kind, weights.kind)}
    return {'modelspec.sai_model_spec': '1.0.0', 'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
            'modelspec.implementation': 'https://github.com/Stability-AI/generative-models',
            'modelspec.resolution': '1024x1024', 'modelspec.date': time.strftime('%Y-%m-%dT%H:%M:%S'),
            'ss_base_model_version': 'sdxl_base_v1-0', 'ss_v2': 'False',
            'ss_network_module': 'networks.lora' if plain else 'lycoris.kohya',
            'ss_network_dim': common(ranks), 'ss_network_alpha': common(alphas),
            'ss_network_args': json.dumps(arguments | ({'dora_wd': 'True'} if weights.kind == 'dora' else {}))}
