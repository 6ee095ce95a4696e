"""peft's folders, adapter_config.json and adapter_model.safetensors, one per part; and peft's configs.

peft's keys are '<module>.lora_A.weight', with 'base_model.model.' before them in what PeftModel saves
(peft/utils/save_and_load.py). rank_pattern and alpha_pattern hold the ranks and alphas that differ from the most
frequent one, by regular expressions of module names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import lora_weights
from diffengine_sdxl.adapters.formats.files import WeightFile, find, refuse
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora_weights import PARTS, LoRAWeights, PartWeights
from diffengine_sdxl.adapters.untrusted_patterns import first_matches
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.loading.files import read_json

CONFIG, WEIGHTS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
_TYPES = ('LORA', 'LOHA', 'LOKR', 'OFT')
_AB = ('lora_A.weight', 'lora_B.weight')
#: Kind -> the sets of tensors that a layer may have.
FORMS = {'lora': (_AB, (*_AB, 'lora_B.bias')), 'dora': ((*_AB, 'lora_magnitude_vector'),), 'oft': (('oft_R.weight',),),
         **lora_weights.FORMS}
SUFFIXES = tuple(sorted({name for forms in FORMS.values() for form in forms for name in form}))
#: Settings of peft that change what a layer computes, are not shown by the tensors, and are not supported.
_UNSUPPORTED = ('alora_invocation_tokens', 'arrow_config', 'coft', 'fan_in_fan_out', 'kasa_config', 'layer_replication',
                'modules_to_save', 'monteclora_config', 'target_parameters', 'trainable_token_indices', 'use_bdlora',
                'use_qalora', 'velora_config')
#: Values of `init_lora_weights` that only choose where training began; and beginnings of those that take a part out of
#: the base's weights (peft/tuners/lora/layer.py, update_layer), so that the file alone is another adapter.
_INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')
_CHANGES_BASE = {'pissa': 'PiSSA', 'olora': 'OLoRA', 'corda': 'CorDA', 'loftq': 'LoftQ', 'lora_ga': 'LoRA-GA'}
#: A larger alpha than any float32 is none.
MAX_ALPHA = 3e38
#: OFT's rotation is the exact Cayley transform unless a file says that it was trained with peft's truncated series.
_EXACT = {'use_cayley_neumann': False, 'num_cayley_neumann_terms': 5}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its key, and what it is; `module` is None if the base has none of that name."""

    key: str
    part: str
    module: str | None
    suffix: str
    tensor: Tensor


def gather(entries: Iterable[Entry], unknown: Iterable[str], source: str | Path) -> LoRAWeights:
    """Group a file's tensors by layer and check that each layer is complete; set ranks, but no alphas.

    Raises:
        UserError: keys are unknown or missing, or the file mixes kinds.
    """
    entries, unknown = list(entries), list(unknown)
    unknown += [e.key for e in entries if e.module is None]
    entries = [e for e in entries if e.module is not None]
    prefixes = {e.suffix.split('_')[0] for e in entries}
    kind = next((k for k in ('loha', 'lokr', 'oft') if k.replace('loha', 'hada') in prefixes), 'lora')
    if any(e.suffix == 'lora_magnitude_vector' for e in entries):
        kind = 'dora'
    layers: dict[tuple[str, str], dict[str, Entry]] = {}
    different: list[str] = []
    for entry in entries:
        if any(entry.suffix in form for form in FORMS[kind]):
            # The same tensor under two names is taken once.
            other = layers.setdefault((entry.part, str(entry.module)), {}).setdefault(entry.suffix, entry)
            if other.tensor.shape != entry.tensor.shape or not torch.equal(other.tensor, entry.tensor):
                different.append(f'{other.key} and {entry.key}')
            elif not entry.tensor.numel() or entry.tensor.dim() < 2 and entry.suffix in _AB:
                raise UserError(f"'{source}': '{entry.key}' is of shape {list(entry.tensor.shape)}, so its layer has "
                                'no rank. Ask for a whole file, or leave the layer out with ignore_keys.')
        else:
            unknown.append(entry.key)
    missing = []
    for layer in layers.values():
        form = min(FORMS[kind], key=lambda form, layer=layer: len(layer.keys() ^ set(form)))  # type: ignore[misc]
        entry = next(iter(layer.values()))
        missing += [entry.key.removesuffix(entry.suffix) + suffix for suffix in form if suffix not in layer]
        unknown += [e.key for suffix, e in layer.items() if suffix not in form]
        if 'lora_B.bias' in layer and 'lora_B.weight' in layer and (
                layer['lora_B.bias'].tensor.shape != layer['lora_B.weight'].tensor.shape[:1]):
            raise UserError(f"'{source}': '{layer['lora_B.bias'].key}' is of shape "
                            f"{list(layer['lora_B.bias'].tensor.shape)}, and its lora_B has "
                            f"{list(layer['lora_B.weight'].tensor.shape)}.")
    refuse(source, unknown=unknown, missing=missing, given_under_two_names_with_different_values=different)
    if not layers:
        raise UserError(f"'{source}' holds no weights of a LoRA or of its relatives.")
    parts = {part: PartWeights() for part in PARTS if any(p == part for p, _ in layers)}
    for (part, module), layer in layers.items():
        parts[part].tensors |= {f'{module}.{suffix}': e.tensor for suffix, e in layer.items()}
        if kind in ('lora', 'dora'):
            parts[part].rank[module] = layer['lora_A.weight'].tensor.shape[0]
    return LoRAWeights(kind, parts, source=str(source))


def in_memory(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return a module's name in memory: transformers 5 has a CLIPTextModel without the prefix 'text_model.'."""
    return next((n for n in (name, name.removeprefix('text_model.'), f'text_model.{name}') if n in modules), None)


def settings(weights: LoRAWeights, part: str) -> dict[str, Any]:
    """Return ranks, alphas and targets of a part as fields of a peft config."""
    part_weights = weights.parts[part]
    if weights.kind == 'oft':
        return {'target_modules': layer_names(part_weights) or list(part_weights.rank)}
    fields: dict[str, Any] = {'target_modules': list(part_weights.rank)}
    for name, pattern, values in (('r', 'rank_pattern', part_weights.rank),
                                  (_alpha_field(weights), 'alpha_pattern', part_weights.alpha)):
        fields[name], fields[pattern] = _patterns(values)
    if weights.kind in ('lora', 'dora'):
        fields |= {'use_dora': weights.kind == 'dora', 'use_rslora': weights.rslora,
                   'lora_bias': _any(part_weights, 'lora_B.bias')}
    return fields


def _alpha_field(weights: LoRAWeights) -> str:
    return 'lora_alpha' if weights.kind in ('lora', 'dora') else 'alpha'


def split(key: str) -> tuple[str, str]:
    """Split '<module>.lora_A.weight' into '<module>' and 'lora_A.weight'."""
    suffix = next(suffix for suffix in SUFFIXES if key.endswith(f'.{suffix}'))
    return key.removesuffix(f'.{suffix}'), suffix


def layer_names(part_weights: PartWeights) -> list[str]:
    """Return the modules that a part's tensors belong to."""
    return list(dict.fromkeys(split(key)[0] for key in part_weights.tensors))


def _patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most frequent value, and a regular expression of module names for each other value."""
    whole = {name: int(v) if float(v).is_integer() else v for name, v in values.items()}
    usual = Counter(whole.values()).most_common(1)[0][0]
    groups: dict[float, list[str]] = {}
    for name, value in whole.items():
        if value != usual:
            groups.setdefault(value, []).append(re.escape(name.removeprefix('text_model.')))
    # One pattern per value, as peft tries each on every module; anchored, as peft also matches the ends of names.
    return usual, {rf'^(text_model\.)?({"|".join(names)})': value for value, names in groups.items()}


def _by_module(config: Mapping[str, Any], name: str, pattern: str, modules: Iterable[str], source: str
               ) -> dict[str, Any]:
    """Return each module's rank or alpha as peft finds it: by the first pattern that matches the end of its name."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, Mapping):
        raise UserError(f"The {pattern} of '{source}' must map regular expressions to numbers, not {patterns!r}.")
    values, modules = list(patterns.values()), list(modules)
    matches = first_matches([rf'(.*\.)?({k})$' for k in patterns], modules, source)
    return {module: config.get(name) if match is None else values[match]
            for module, match in zip(modules, matches, strict=True)}


def apply_config(weights: LoRAWeights, part: str, config: Mapping[str, Any], modules: Mapping[str, nn.Module],
                 prefix: str) -> None:
    """Set alphas and options of a part, which its tensors do not show, from a peft config or diffusers' metadata.

    Args:
        modules: the part's plain layers. prefix: of the file's keys.

    Raises:
        UserError: a setting is invalid or not supported, or a targeted layer has no tensors.
    """
    part_weights = weights.parts[part]
    names = layer_names(part_weights)
    check_init(config.get('init_lora_weights'), weights.source)
    if not any(config.get(k) for k in ('exclude_modules', 'layers_to_transform')):
        lacking = _targeted(config.get('target_modules'), modules, weights.source) - set(names)
        refuse(weights.source, missing=[f'{prefix}{name}.{FORMS[weights.kind][0][0]}' for name in lacking])
    unsupported = [k for k in _UNSUPPORTED if config.get(k)]
    if config.get('bias', 'none') != 'none':
        unsupported.append('bias')
    if unsupported:
        raise UserError(f"'{weights.source}' asks for {', '.join(f'{k}={config[k]!r}' for k in unsupported)}, which is "
                        'not supported here.')
    if config.get('lora_bias') and not _any(part_weights, 'lora_B.bias'):
        raise UserError(f"'{weights.source}' asks for lora_bias=True, and its tensors have no lora_B.bias.")
    if config.get('use_dora') and weights.kind != 'dora':
        raise UserError(f"'{weights.source}' asks for use_dora=True, and its tensors have no lora_magnitude_vector.")
    if weights.kind == 'oft':
        weights.options = {'use_cayley_neumann': True, 'num_cayley_neumann_terms': 5}
        weights.options |= {k: config[k] for k in weights.options if k in config}
        return
    ranks = _by_module(config, 'r', 'rank_pattern', names, weights.source)
    alphas = _by_module(config, _alpha_field(weights), 'alpha_pattern', names, weights.source)
    for name in names:
        rank, alpha, shown = ranks[name], alphas[name], part_weights.rank.get(name)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UserError(f"The config of '{weights.source}' gives '{name}' no rank: r={rank!r} must be a whole "
                            'number above 0.')
        if shown not in (None, rank):
            raise UserError(f"The config of '{weights.source}' gives '{name}' rank {rank}, and its tensors have "
                            f'{shown}.')
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MAX_ALPHA < alpha < MAX_ALPHA:
            raise UserError(f"The config of '{weights.source}' gives '{name}' no alpha: "
                            f'{_alpha_field(weights)}={alpha!r} must be a finite number.')
    part_weights.rank, part_weights.alpha = ranks, alphas
    weights.rslora = bool(config.get('use_rslora'))


def check_init(init: Any, source: str) -> None:
    """Refuse weights that were initialized in a way that also changed the base.

    Args:
        init: `init_lora_weights` of their config. source: the file.

    Raises:
        UserError: they were, or it is not known.
    """
    if isinstance(init, str):
        if (kind := next((_CHANGES_BASE[k] for k in _CHANGES_BASE if init.lower().startswith(k)), None)) is not None:
            raise UserError(f"'{source}' was initialized by {kind} (init_lora_weights='{init}'), which takes a part "
                            'out of the base, so these weights fit that changed base alone. Convert them to a plain '
                            'LoRA with peft, where it was trained: model.save_pretrained(FOLDER, '
                            'path_initial_model_for_weight_conversion=FIRST), FIRST being what was saved before the '
                            'first step; then load FOLDER.')
        init = init.lower()
    if not isinstance(init, str | bool | None) or init not in _INITS:
        raise UserError(f"'{source}' has init_lora_weights={init!r}, of which it is not known whether it changes the "
                        f'base; read are {", ".join(map(repr, _INITS))}.')


def _targeted(targets: Any, modules: Iterable[str], source: str) -> set[str]:
    """Return the modules that peft would choose (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    if isinstance(targets, str):
        names = list(modules)
        matches = first_matches([targets], names, source)
        return {name for name, match in zip(names, matches, strict=True) if match is not None}
    if not isinstance(targets, list | None):
        raise UserError(f"target_modules={targets!r} of '{source}' must be a list or a regular expression.")
    suffixes = tuple(f'.{target}' for target in targets or ())
    return {name for name in modules if f'.{name}'.endswith(suffixes)}


def config(weights: LoRAWeights, part: str, modules: Mapping[str, nn.Module], dropout: float = 0.0,
           init: bool | str = 'gaussian', block_size: int = 0) -> Any:
    """Return peft's config of a part, from which peft builds layers of the tensors' shapes wherever it can.

    Args:
        modules: the part's plain layers. dropout, init: for fresh weights. block_size: of a fresh OFT.
    """
    import peft
    part_weights, fields = weights.parts[part], settings(weights, part)
    if weights.kind in ('lora', 'dora'):
        # peft draws no fresh weights with a bias but its own.
        return peft.LoraConfig(**fields, lora_dropout=dropout, init_lora_weights=fields['lora_bias'] or init)
    if weights.kind == 'loha':
        return peft.LoHaConfig(**fields, rank_dropout=dropout, use_effective_conv2d=_any(part_weights, 'hada_t1'))
    if weights.kind == 'lokr':
        fields |= {'rank_dropout': dropout, 'use_effective_conv2d': _any(part_weights, 'lokr_t2'),
                   'decompose_both': _any(part_weights, 'lokr_w1_a')}
        sides = {side for key, t in part_weights.tensors.items() if key.endswith('.lokr_w1') for side in t.shape}
        return _first_fitting(lambda factor: peft.LoKrConfig(**fields, decompose_factor=factor), [-1, *sorted(sides)],
                              part_weights, modules)
    sizes = {key: (1 + math.isqrt(1 + 8 * t.shape[1])) // 2 for key, t in part_weights.tensors.items()}
    shared = any(t.shape[0] == 1 and sizes[key] < _width(modules[key.removesuffix('.oft_R.weight')])
                 for key, t in part_weights.tensors.items())
    fields |= {**_EXACT, **weights.options, 'r': 0, 'block_share': shared}
    return _first_fitting(lambda size: peft.OFTConfig(**fields, oft_block_size=size),
                          [block_size] if block_size else sorted(set(sizes.values())), part_weights, modules)


def _width(layer: Any) -> int:
    return int(layer.weight.shape[1])


def _any(part_weights: PartWeights, suffix: str) -> bool:
    return any(key.endswith(f'.{suffix}') for key in part_weights.tensors)


def _first_fitting(make: Callable[[int], Any], choices: list[int], part_weights: PartWeights,
                   modules: Mapping[str, nn.Module]) -> Any:
    """Return the config of the first choice from which peft builds the tensors' shapes; else of the first choice."""
    if not part_weights.tensors or len(choices) == 1:
        return make(choices[0])
    # A new config each time: peft shortens the targets of the one that it is given.
    return next((make(c) for c in choices if builds(make(c), part_weights, modules)), make(choices[0]))


def can_hold(weights: LoRAWeights, modules: Modules) -> bool:
    """Whether peft's folders can hold the weights: they are of one kind, and one config of peft makes all shapes."""
    return not weights.only_in_kohya() and all(builds(config(weights, part, modules[part]), own, modules[part])
                                               for part, own in weights.parts.items())


def builds(config: Any, part_weights: PartWeights, modules: Mapping[str, nn.Module]) -> bool:
    """Whether peft builds the tensors' shapes from a config; tried on layers without data."""
    skeleton = nn.Module()
    for name in layer_names(part_weights):
        parent = skeleton
        *path, leaf = name.split('.')
        for child in path:
            if child not in parent._modules:
                parent.add_module(child, nn.Module())
            parent = parent.get_submodule(child)
        parent.add_module(leaf, _empty(modules[name]))
    wrappers = lora_layers.inject(skeleton, config, 'adapter')
    shapes = {f'{name}.{key}': p.shape for name, wrapper in wrappers.items()
              for key, p in lora_layers.weights(wrapper, 'adapter').items()}
    return shapes == {key: t.shape for key, t in part_weights.tensors.items()}


def _empty(layer: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device='meta')
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                     groups=layer.groups, device='meta')


def read(file: WeightFile, modules: Modules, subfolder: str | None = None, source: str | Path = '',
         revision: str | None = None, part: str | None = None) -> LoRAWeights:
    """Read a peft folder.

    Args:
        file: its weights. modules: part -> full name -> plain layer of the live base.
        source, subfolder, revision: where the config is, as for `files.find`.
        part: the part that it belongs to; None to infer it from the layers' names.

    Raises:
        UserError: keys or settings are unknown, missing or not supported.
    """
    path = find(source, (CONFIG,), subfolder, CONFIG, revision)
    config = read_json(path)
    one_of(f"'{path}': peft_type", config.get('peft_type'), _TYPES)
    suffixes = {key: next((s for s in SUFFIXES if key.endswith(f'.{s}')), None) for key in file.tensors}
    unknown = [key for key, suffix in suffixes.items() if suffix is None]
    names = {key: (key.removeprefix(PREFIX).removesuffix(f'.{suffix}'), suffix)
             for key, suffix in suffixes.items() if suffix}
    part = part or part_of({name for name, _ in names.values()}, modules)
    entries = [Entry(key, part, in_memory(name, modules.get(part, {})), suffix, file.tensors[key])
               for key, (name, suffix) in names.items()]
    weights = gather(entries, unknown, file.path)
    apply_config(weights, part, config, modules[part], PREFIX if all(k.startswith(PREFIX) for k in names) else '')
    return weights


def part_of(names: set[str], modules: Modules) -> str:
    """Return the part that has most of the modules, exact names before those that differ by a prefix."""
    return max(modules, key=lambda part: (len(names & modules[part].keys()),
                                          sum(in_memory(name, modules[part]) is not None for name in names)))


def write(folder: Path, weights: LoRAWeights, modules: Modules) -> None:
    """Write `folder/<part>/adapter_config.json` and `adapter_model.safetensors` for each part, as peft does.

    Raises:
        UserError: no single config of peft makes the layers' shapes.
    """
    if not can_hold(weights, modules):
        raise UserError(f"A peft folder cannot hold {weights.only_in_kohya() or f'this {weights.title()}'}: no single "
                        'config of peft makes its layers. Write it as a kohya file.')
    for part, part_weights in weights.parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        peft_config = config(weights, part, modules[part])
        peft_config.inference_mode = True
        peft_config.save_pretrained(str(folder / part))
        save_file({PREFIX + key: t.contiguous() for key, t in part_weights.tensors.items()}, folder / part / WEIGHTS,
                  metadata={'format': 'pt'})
