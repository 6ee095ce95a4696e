"""Single files of kohya's sd-scripts, LyCORIS, ComfyUI and OneTrainer: everything that they make of an SDXL's weights.

A key is '<layer>.<tensor>', e.g. 'lora_unet_input_blocks_4_1_proj_in.lora_down.weight'; see layer_names for the layers,
kohya_keys for the tensors. A change D is scaled by alpha / rank; without `alpha`, by 1.

    LoRA   up [out, r(, 1, 1)] @ down [r, in(, k, k)]; with a Tucker core mid [r, r, k, k], down is [r, in, 1, 1]
    LoHa   (w1_a [out, r] @ w1_b [r, in * k * k]) * (w2_a @ w2_b); with cores t1, t2 [r, r, k, k] w_a is [r, out]
    LoKr   kron(w1, w2), each whole or a product of two; if both are whole, `alpha` is ignored
    DoRA   any of these with dora_scale: the norms of the changed weight's rows, [out, 1(, 1, 1)], or of all that reads
           an input channel, [1, in(, 1, 1)] (OneTrainer's default)
    full   diff of the weight's shape, diff_b [out] of the bias (beside any of these too); w_norm, b_norm of norms

Sources: sd-scripts' networks/lora.py, LyCORIS' modules/{locon,loha,lokr,full,norms}.py, ComfyUI's comfy/lora.py and
comfy/weight_adapter, OneTrainer's module/LoRAModule.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats import kohya_keys as keys
from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.adapters.formats.kohya_keys import is_kohya
from diffengine_sdxl.adapters.formats.layer_names import PREFIXES, Modules, kohya_names
from diffengine_sdxl.adapters.formats.lora_weights import (
    MIXED,
    OTHER,
    LoRAWeights,
    PartWeights,
    layer_kind,
    product_kind,
    weight_change,
)
from diffengine_sdxl.errors import UserError

__all__ = ['is_kohya', 'read', 'write', 'written_alphas']


def read(tensors: Mapping[str, Any], modules: Modules, source: str | Path) -> LoRAWeights:
    """Read a file's tensors in peft's terms; they keep their dtype.

    Args:
        tensors: the file's, without words (`kohya_keys.split_words`). Its metadata adds nothing.
        modules: part -> full name -> module of the live base, without wrappers; norms too.
        source: the file, for errors.

    Raises:
        UserError: keys are unknown or missing, their kind is not read, or the file was made for another base.
    """
    layers = keys.assign(tensors, modules, source)
    keys.check_forms(layers, source)
    parts: dict[str, PartWeights] = {}
    faults: list[tuple[str, Any]] = []
    for (part, name), (file_name, layer) in layers.items():
        where = f"'{source}': '{file_name}', which is '{name}' of the {part},"
        module, own = modules[part][name], parts.setdefault(part, PartWeights())
        fitted = _fit_norm(layer, module, where) if keys.is_norm(module) else _fit(layer, _weight(module), where)
        own.tensors |= {f'{name}.{key}': tensor for key, tensor in fitted.items()}
        if rank := _rank(fitted):
            # Without a product there is no rank, and LyCORIS and ComfyUI ignore `alpha`.
            has_alpha = 'alpha' in layer and not _is_whole(fitted)
            own.rank[name], own.alpha[name] = rank, _alpha(layer['alpha']) if has_alpha else float(rank)
            if not math.isfinite(own.alpha[name]):
                faults.append((file_name, layer['alpha'].tolist()))
    keys.listed_alphas(faults, source)
    weights = LoRAWeights(MIXED, {part: parts[part] for part in PREFIXES if part in parts}, source=str(source))
    kinds = {layer_kind(layer) for own in weights.parts.values() for layer in own.by_layer().values()}
    if len(kinds) == 1 and OTHER not in kinds:
        weights.kind = kinds.pop()
    return weights


def _fit_norm(layer: Mapping[str, Tensor], module: nn.Module, where: str) -> dict[str, Tensor]:
    """Return a norm's tensors, [channels]."""
    width = len(_weight(module))
    if not layer.keys() <= set(keys.NORM) or any(t.numel() != width for t in layer.values()):
        raise UserError(f'{where} has tensors that do not go together: {keys.names_of(layer)}; a norm of {width} '
                        f'channels has w_norm and b_norm (or diff and diff_b) of [{width}].')
    return {name: tensor.reshape(-1) for name, tensor in layer.items()}


def _fit(layer: Mapping[str, Tensor], weight: Tensor, where: str) -> dict[str, Tensor]:
    """Return one layer's tensors in peft's shapes; a Tucker core of a LoRA is folded into `down`."""
    fitted, kind = {k: v for k, v in layer.items() if k != 'alpha'}, product_kind(layer)
    unfit = f'{where} has tensors that do not go together: {keys.names_of(layer)}'
    num_out = len(weight)
    if layer.keys() & set(keys.NORM):
        raise UserError(f'{unfit}; w_norm and b_norm are of a norm.')
    if 'diff_b' in fitted and fitted['diff_b'].shape != (num_out,):
        raise UserError(f'{unfit}; its bias has {num_out} channels. It was made for another base.')
    if not kind:
        return fitted
    try:
        if keys.MID in fitted:
            fitted['lora_A.weight'] = _fold(fitted.pop(keys.MID), fitted['lora_A.weight'])
        change = weight_change(kind, {k: v.to('meta', torch.float32) for k, v in fitted.items()})
    except (RuntimeError, IndexError) as error:
        raise UserError(f'{unfit}.') from error
    expected = weight.flatten(1).shape
    if change.shape != expected:
        raise UserError(f'{where} changes a weight of {" x ".join(map(str, change.shape))}; the one of this base is '
                        f'{" x ".join(map(str, expected))} ({list(weight.shape)}). It was made for another base.')
    if kind == 'lora':
        rank = _rank(fitted)
        # Also between a linear layer and a 1 x 1 convolution, which are the same.
        fitted['lora_A.weight'] = fitted['lora_A.weight'].reshape(rank, *weight.shape[1:])
        fitted['lora_B.weight'] = fitted['lora_B.weight'].reshape(num_out, rank, *[1] * (weight.dim() - 2))
    if kind == 'full':
        fitted['diff'] = fitted['diff'].reshape(weight.shape)
    if 'dora_scale' in fitted:
        scale, ones = fitted.pop('dora_scale'), [1] * (weight.dim() - 2)
        by_output = scale.dim() > 0 and len(scale) == scale.numel() == num_out
        # peft normalizes the rows of a LoRA's weight.
        if by_output and kind == 'lora' and 'diff_b' not in fitted:
            fitted['lora_magnitude_vector'] = scale.reshape(-1) if weight.dim() == 2 else scale.reshape(1, -1, 1, 1)
        elif by_output:
            fitted['dora_scale'] = scale.reshape(-1, 1, *ones)
        elif scale.dim() > 1 and (len(scale), scale.numel()) == (1, weight.shape[1]):
            fitted['dora_scale'] = scale.reshape(1, -1, *ones)
        else:
            raise UserError(f'{where} has magnitudes {list(scale.shape)}; the weight of this base has {num_out} output '
                            f'and {weight.shape[1]} input channels. It was made for another base.')
    return fitted


def _fold(mid: Tensor, down: Tensor) -> Tensor:
    """Return the convolution [r, in, k, k] that equals `down` [r, in, 1, 1] followed by `mid` [r, r, k, k]."""
    full = torch.einsum('ijkl,jr->irkl', mid.double(), down.double().flatten(1))
    return full.to(torch.promote_types(down.dtype, torch.float32))


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    return 'lokr_w1' in tensors and 'lokr_w2' in tensors


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """Return the number that alpha is divided by; for a LoKr of whole factors the least rank that peft makes whole.

    0 for what is not scaled by an alpha: full differences, biases, norms.
    """
    for name in ('lora_A.weight', 'hada_w1_b', 'lokr_w2_b', 'lokr_w1_b'):
        if name in tensors:
            return len(tensors[name])
    return math.ceil(max(tensors['lokr_w2'].shape[:2]) / 2) if 'lokr_w2' in tensors else 0


def _alpha(alpha: Tensor) -> float:
    return float(alpha) if alpha.numel() == 1 and not alpha.is_complex() else math.nan


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def write(path: str | Path, weights: LoRAWeights, modules: Modules, metadata: Mapping[str, str] | None = None) -> int:
    """Write one .safetensors file with the UNet's original names, as sd-scripts does; return the number of tensors.

    rslora's factor goes into alpha, alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank; see also `written_alphas`. Words
    for prompts are bundled as by OneTrainer.

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
    tensors: dict[str, Tensor] = {}
    alphas: list[float] = []
    for part, own in weights.parts.items():
        layers, new_alphas = own.by_layer(), written_alphas(weights, part)
        names = kohya_names(part, [*dict.fromkeys((*modules[part], *layers))])
        for name, layer in layers.items():
            dim = _weight(modules[part][name]).dim() if 'lora_magnitude_vector' in layer else 0
            written = _written(layer, dim, own.rank.get(name, 0), new_alphas.get(name, 0.0),
                               _effective_alpha(weights, part, name))
            alphas += [float(written['alpha'])] if 'alpha' in written else []
            tensors |= {f'{names[name][0]}.{k}': v.detach().cpu().contiguous() for k, v in written.items()}
    tensors |= {f'{keys.WORDS}{word}.{encoder}': vectors[part].detach().cpu().contiguous()
                for word, vectors in weights.words.items() for encoder, part in keys.WORD_PARTS.items()
                if part in vectors}
    save_file(tensors, path, metadata=_header(weights, alphas))
    modelspec.stamp(Path(path), {'modelspec.title': Path(path).stem, **(metadata or {})})
    return len(tensors)


def _written(layer: Mapping[str, Tensor], dim: int, rank: int, alpha: float, effective: float) -> dict[str, Tensor]:
    """Return a layer's tensors by their names in a file.

    Args:
        layer: by our names. dim: of the weight of a DoRA. rank: 0 if nothing is scaled by an alpha. alpha: to write.
        effective: the alpha for a change that is scaled by alpha / rank.
    """
    layer = dict(layer)
    if 'lora_magnitude_vector' in layer:
        layer['dora_scale'] = layer.pop('lora_magnitude_vector').reshape(-1, *[1] * (dim - 1))
    if 'lora_B.bias' in layer:
        layer['diff_b'] = layer.pop('lora_B.bias') * (effective / rank)
    if rank:
        first = next(k for k in ('lora_B.weight', 'lokr_w1', 'lokr_w1_a', 'hada_w1_a') if k in layer)
        factor = 1.0 if effective == alpha else effective / alpha
        if _is_whole(layer):  # readers ignore alpha here
            alpha, factor = float(rank), factor * alpha / rank
        dtype = torch.promote_types(layer[first].dtype, torch.float32)
        if factor != 1:
            layer[first] = (layer[first].to(dtype) * factor).to(layer[first].dtype)
        layer['alpha'] = torch.tensor(alpha, dtype=dtype)
    return {keys.WRITTEN.get(name, name): tensor for name, tensor in layer.items()}


def _effective_alpha(weights: LoRAWeights, part: str, name: str) -> float:
    """Return a layer's alpha for a change that is scaled by alpha / rank; 0 if it has none."""
    own = weights.parts[part]
    return own.alpha.get(name, 0.0) * (math.sqrt(own.rank[name]) if weights.rslora else 1.0)


def written_alphas(weights: LoRAWeights, part: str) -> dict[str, float]:
    """Return the alphas of a part's layers that `write` writes, of those that have one.

    A LoRA's are made equal if powers of two in `lora_up` do it exactly: where they differ, as with blocks of other
    ranks, diffusers 0.42 gives all attentions the most frequent one. They become the least one, so that no
    half-precision weight underflows.
    """
    alphas = {name: _effective_alpha(weights, part, name) for name in weights.parts[part].rank}
    least = min(alphas.values(), default=0.0)
    exact = weights.kind == 'lora' and least > 0 and all(
        math.frexp(alpha / least)[0] == 0.5 for alpha in alphas.values())
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
    arguments = {'lora': {}, 'mixed': {}, 'dora': {'algo': 'lora', 'dora_wd': 'True'}}.get(
        weights.kind, {'algo': weights.kind})
    return {'modelspec.sai_model_spec': '1.0.0', 'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
            'modelspec.implementation': 'https://github.com/Stability-AI/generative-models',
            'modelspec.resolution': '1024x1024', 'modelspec.date': time.strftime('%Y-%m-%dT%H:%M:%S'),
            'ss_base_model_version': 'sdxl_base_v1-0', 'ss_v2': 'False',
            'ss_network_module': 'networks.lora' if plain else 'lycoris.kohya',
            'ss_network_dim': common(ranks), 'ss_network_alpha': common(alphas),
            'ss_network_args': json.dumps(arguments)}
