"""peft's folders, adapter_config.json and adapter_model.safetensors, one for each part; and its configs.

peft's keys are '<module>.lora_A.weight', with 'base_model.model.' before them in what PeftModel saves
(peft/utils/save_and_load.py). Ranks and alphas that differ from the most frequent one stand in rank_pattern and
alpha_pattern, regular expressions over module names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats.files import WeightFile, find, refuse
from diffengine_sdxl.adapters.formats.kohya_names import Modules
from diffengine_sdxl.adapters.formats.weights import PARTS, LoRAWeights, PartWeights
from diffengine_sdxl.weights import said

CONFIG, WEIGHTS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
_TYPES = {'LORA': 'lora', 'LOHA': 'loha', 'LOKR': 'lokr', 'OFT': 'oft'}
_AB, _HADA = ('lora_A.weight', 'lora_B.weight'), ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
#: Kind -> the sets of tensors that a layer may have.
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'lora': (_AB,), 'dora': ((*_AB, 'lora_magnitude_vector'),), 'oft': (('oft_R.weight',),),
    'loha': (_HADA, (*_HADA, 'hada_t1', 'hada_t2')),
    'lokr': tuple((*w1, *w2) for w1 in (('lokr_w1',), ('lokr_w1_a', 'lokr_w1_b')) for w2 in (
        ('lokr_w2',), ('lokr_w2_a', 'lokr_w2_b'), ('lokr_t2', 'lokr_w2_a', 'lokr_w2_b')))}
SUFFIXES = tuple(sorted({name for forms in FORMS.values() for form in forms for name in form}))
#: Settings of peft that change what a layer computes and that no tensor shows.
_FOREIGN = ('alora_invocation_tokens', 'arrow_config', 'coft', 'fan_in_fan_out', 'kasa_config', 'lora_bias',
            'modules_to_save', 'monteclora_config', 'trainable_token_indices', 'use_bdlora', 'velora_config')
#: OFT's rotation is the exact Cayley transform unless a file says that it was trained with peft's truncated series.
EXACT = {'use_cayley_neumann': False, 'num_cayley_neumann_terms': 5}


@dataclass
class PeftWeights(LoRAWeights):
    """LoRAWeights with those of peft's settings that its tensors don't show (OFT's `use_cayley_neumann`)."""

    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its key, and what it is; `module` is None where the base has none of that name."""

    key: str
    part: str
    module: str | None
    suffix: str
    tensor: Tensor


def gather(entries: Iterable[Entry], unknown: Iterable[str], source: str | Path) -> PeftWeights:
    """Put the tensors of a file together, each complete; ranks are the tensors', alphas left out.

    Raises:
        ValueError: unknown keys, missing ones, or several kinds of adapters in one file.
    """
    entries, unknown = list(entries), list(unknown)
    unknown += [e.key for e in entries if e.module is None]
    entries = [e for e in entries if e.module is not None]
    found = {e.suffix.split('_')[0] for e in entries}
    kind = next((k for k in ('loha', 'lokr', 'oft') if k.replace('loha', 'hada') in found), 'lora')
    if any(e.suffix == 'lora_magnitude_vector' for e in entries):
        kind = 'dora'
    layers: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        if any(entry.suffix in form for form in FORMS[kind]):
            layers.setdefault((entry.part, str(entry.module)), {})[entry.suffix] = entry
        else:
            unknown.append(entry.key)
    missing = []
    for own in layers.values():
        form = min(FORMS[kind], key=lambda form, own=own: len(own.keys() ^ set(form)))  # type: ignore[misc]
        some = next(iter(own.values()))
        missing += [some.key.removesuffix(some.suffix) + suffix for suffix in form if suffix not in own]
        unknown += [e.key for suffix, e in own.items() if suffix not in form]
    refuse(source, unknown=unknown, missing=missing)
    if not layers:
        raise ValueError(f"'{source}' holds no weights of a LoRA or of its relatives.")
    parts = {part: PartWeights() for part in PARTS if any(p == part for p, _ in layers)}
    for (part, module), own in layers.items():
        parts[part].tensors |= {f'{module}.{suffix}': e.tensor for suffix, e in own.items()}
        if kind in ('lora', 'dora'):
            parts[part].rank[module] = own['lora_A.weight'].tensor.shape[0]
    return PeftWeights(kind, parts, source=str(source))


def in_memory(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """A module's name in memory: transformers 5 has a CLIPTextModel without the prefix 'text_model.'."""
    return next((n for n in (name, name.removeprefix('text_model.'), f'text_model.{name}') if n in modules), None)


def settings(weights: LoRAWeights, part: str) -> dict[str, Any]:
    """Ranks, alphas and targets of a part as fields of a peft config."""
    held = weights.parts[part]
    if weights.kind == 'oft':
        return {'target_modules': layer_names(held) or list(held.rank)}
    found: dict[str, Any] = {'target_modules': list(held.rank)}
    alpha = 'lora_alpha' if weights.kind in ('lora', 'dora') else 'alpha'
    for name, pattern, values in (('r', 'rank_pattern', held.rank), (alpha, 'alpha_pattern', held.alpha)):
        found[name], found[pattern] = _patterns(values)
    if weights.kind in ('lora', 'dora'):
        found |= {'use_dora': weights.kind == 'dora', 'use_rslora': weights.rslora}
    return found


def split(key: str) -> tuple[str, str]:
    """'<module>.lora_A.weight' -> '<module>' and 'lora_A.weight'."""
    suffix = next(suffix for suffix in SUFFIXES if key.endswith(f'.{suffix}'))
    return key.removesuffix(f'.{suffix}'), suffix


def layer_names(held: PartWeights) -> list[str]:
    """The modules that a part's tensors are of."""
    return list(dict.fromkeys(split(key)[0] for key in held.tensors))


def _patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and for every other a regular expression of the modules that have it."""
    whole = {name: int(v) if float(v).is_integer() else v for name, v in values.items()}
    usual = Counter(whole.values()).most_common(1)[0][0]
    groups: dict[float, list[str]] = {}
    for name, value in whole.items():
        if value != usual:
            groups.setdefault(value, []).append(re.escape(name.removeprefix('text_model.')))
    # One pattern a value: peft tries each on every module. Anchored, as it also takes the ends of names.
    return usual, {rf'^(text_model\.)?({"|".join(names)})': value for value, names in groups.items()}


def _described(config: Mapping[str, Any], name: str, pattern: str, modules: Iterable[str]) -> dict[str, Any]:
    """The other way: a module's rank or alpha as peft finds it, by the first pattern that fits the end of its name."""
    patterns = config.get(pattern) or {}
    return {module: next((v for k, v in patterns.items() if re.match(rf'(.*\.)?({k})$', module)), config.get(name))
            for module in modules}


def describe(weights: PeftWeights, part: str, config: Mapping[str, Any], modules: Mapping[str, nn.Module],
             prefix: str) -> None:
    """Take alphas (and what else the tensors of a part don't show) from a peft config, or from diffusers' metadata.

    Args:
        modules: the part's plain layers. prefix: of the file's keys.

    Raises:
        ValueError: it asks for what peft can do and we cannot, or targets layers that have no tensors.
    """
    held = weights.parts[part]
    if not any(config.get(k) for k in ('exclude_modules', 'layers_to_transform')):
        lost = _targeted(config.get('target_modules'), modules) - set(layer_names(held))
        refuse(weights.source, missing=[f'{prefix}{name}.{FORMS[weights.kind][0][0]}' for name in lost])
    foreign = [f'{k}={config[k]!r}' for k in _FOREIGN if config.get(k)]
    if config.get('bias', 'none') != 'none' or foreign:
        foreign += [f'bias={config["bias"]!r}'] if config.get('bias', 'none') != 'none' else []
        raise ValueError(f"'{weights.source}' asks for {', '.join(foreign)}, which is not supported here.")
    if weights.kind == 'oft':
        weights.options = {k: config.get(k, v) for k, v in (('use_cayley_neumann', True),
                                                            ('num_cayley_neumann_terms', 5))}
        return
    alpha = 'lora_alpha' if weights.kind in ('lora', 'dora') else 'alpha'
    names = layer_names(held)
    held.rank = held.rank or _described(config, 'r', 'rank_pattern', names)
    held.alpha = _described(config, alpha, 'alpha_pattern', names)
    weights.rslora = bool(config.get('use_rslora'))
    if unset := [m for m in names if not isinstance(held.alpha[m], int | float)
                 or not isinstance(held.rank[m], int)]:
        raise ValueError(f"The config of '{weights.source}' gives '{unset[0]}' no rank or alpha.")


def _targeted(targets: Any, modules: Iterable[str]) -> set[str]:
    """The modules that peft would choose (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    ends = tuple(f'.{target}' for target in targets or ())
    return {name for name in modules if f'.{name}'.endswith(ends)}


def config(weights: LoRAWeights, part: str, modules: Mapping[str, nn.Module], dropout: float = 0.0,
           init: bool | str = 'gaussian', block_size: int = 0) -> Any:
    """peft's config of a part, from which peft builds layers of the tensors' forms wherever it can.

    Args:
        modules: the part's plain layers. dropout, init: for fresh weights. block_size: of a fresh OFT.
    """
    import peft
    held, own = weights.parts[part], settings(weights, part)
    if weights.kind in ('lora', 'dora'):
        return peft.LoraConfig(**own, lora_dropout=dropout, init_lora_weights=init)
    if weights.kind == 'loha':
        return peft.LoHaConfig(**own, rank_dropout=dropout, use_effective_conv2d=_any(held, 'hada_t1'))
    if weights.kind == 'lokr':
        own |= {'rank_dropout': dropout, 'use_effective_conv2d': _any(held, 'lokr_t2'),
                'decompose_both': _any(held, 'lokr_w1_a')}
        sides = {side for key, t in held.tensors.items() if key.endswith('.lokr_w1') for side in t.shape}
        return _fitting(lambda factor: peft.LoKrConfig(**own, decompose_factor=factor), [-1, *sorted(sides)], held,
                        modules)
    sizes = {key: (1 + math.isqrt(1 + 8 * t.shape[1])) // 2 for key, t in held.tensors.items()}
    shared = any(t.shape[0] == 1 and sizes[key] < _width(modules[key.removesuffix('.oft_R.weight')])
                 for key, t in held.tensors.items())
    own |= {**EXACT, **getattr(weights, 'options', {}), 'r': 0, 'block_share': shared}
    return _fitting(lambda size: peft.OFTConfig(**own, oft_block_size=size),
                    [block_size] if block_size else sorted(set(sizes.values())), held, modules)


def _width(layer: Any) -> int:
    return int(layer.weight.shape[1])


def _any(held: PartWeights, suffix: str) -> bool:
    return any(key.endswith(f'.{suffix}') for key in held.tensors)


def _fitting(make: Callable[[int], Any], choices: Iterable[int], held: PartWeights,
             modules: Mapping[str, nn.Module]) -> Any:
    """The config of the first choice from which peft builds the tensors' shapes; of the first one if none does."""
    choices = list(choices)
    if not held.tensors or len(choices) == 1:
        return make(choices[0])
    # Made anew for each: peft shortens the targets of the config that it is given.
    return next((make(c) for c in choices if builds(make(c), held, modules)), make(choices[0]))


def builds(config: Any, held: PartWeights, modules: Mapping[str, nn.Module]) -> bool:
    """Whether peft builds the tensors' shapes from a config; tried on layers without data."""
    skeleton = nn.Module()
    for name in layer_names(held):
        parent = skeleton
        *path, leaf = name.split('.')
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(leaf, _empty(modules[name]))
    found = lora_layers.inject(skeleton, config, 'adapter')
    shapes = {f'{name}.{key}': p.shape for name, wrapper in found.items()
              for key, p in lora_layers.weights(wrapper, 'adapter').items()}
    return shapes == {key: t.shape for key, t in held.tensors.items()}


def _empty(layer: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device='meta')
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                     groups=layer.groups, device='meta')


def read(file: WeightFile, modules: Modules, subfolder: str | None = None, source: str | Path = '',
         revision: str | None = None, part: str | None = None) -> PeftWeights:
    """What a peft folder holds.

    Args:
        file: its weights. modules: part -> full name -> plain layer of the live base.
        source, subfolder, revision: where the config is, as for `files.find`.
        part: whose it is; None where its folder doesn't say.

    Raises:
        ValueError: keys or settings that are unknown, missing or not supported.
    """
    place = find(source, (CONFIG,), subfolder, CONFIG, revision)
    described = said(str(place), lambda: json.loads(place.read_text()))
    kind = described.get('peft_type')
    if kind not in _TYPES:
        raise ValueError(f"'{place}' is of peft's type {kind}; {', '.join(_TYPES)} can be read.")
    found = [(key, next((s for s in SUFFIXES if key.endswith(f'.{s}')), None)) for key in file.tensors]
    unknown = [key for key, suffix in found if suffix is None]
    names = {key: (key.removeprefix(PREFIX).removesuffix(f'.{suffix}'), suffix) for key, suffix in found if suffix}
    part = part or _part_of({name for name, _ in names.values()}, modules)
    entries = [Entry(key, part, in_memory(name, modules.get(part, {})), suffix, file.tensors[key])
               for key, (name, suffix) in names.items()]
    weights = gather(entries, unknown, file.path)
    describe(weights, part, described, modules[part], PREFIX if all(k.startswith(PREFIX) for k in names) else '')
    return weights


def _part_of(names: set[str], modules: Modules) -> str:
    """The part that has most of the modules, exactly so called before those that only differ by a prefix."""
    return max(modules, key=lambda part: (len(names & modules[part].keys()),
                                          sum(in_memory(name, modules[part]) is not None for name in names)))


def write(folder: Path, weights: LoRAWeights, modules: Modules) -> None:
    """Write `folder/<part>/adapter_config.json` and `adapter_model.safetensors` for each part, as peft does.

    Raises:
        ValueError: layers of forms for which peft has no config.
    """
    for part, held in weights.parts.items():
        made = config(weights, part, modules[part])
        if not builds(config(weights, part, modules[part]), held, modules[part]):
            raise ValueError(f'The {weights.kind} of the {part} has layers of forms that no single config of peft '
                             'makes, so a peft folder cannot hold it; write it as a kohya file.')
        (folder / part).mkdir(parents=True, exist_ok=True)
        made.inference_mode = True
        made.save_pretrained(str(folder / part))
        save_file({PREFIX + key: t.contiguous() for key, t in held.tensors.items()}, folder / part / WEIGHTS,
                  metadata={'format': 'pt'})
