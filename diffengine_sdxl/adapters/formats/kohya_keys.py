"""Keys of kohya's, LyCORIS', ComfyUI's and OneTrainer's files: which layer and which of its tensors a key names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats import lora_weights
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.layer_names import ONLY_ENCODER, PREFIXES, Modules, spellings
from diffengine_sdxl.errors import UserError, listed

AB, MID = ('lora_A.weight', 'lora_B.weight'), 'lora_mid.weight'
#: Our name of a tensor (see lora_weights.PartWeights) -> its names in files, the one that is written first.
_ALIASES = {
    'lora_A.weight': ('lora_down.weight', 'lora_A.weight', 'lora.down.weight', 'lora_linear_layer.down.weight',
                      'lora_A.default.weight'),
    'lora_B.weight': ('lora_up.weight', 'lora_B.weight', 'lora.up.weight', 'lora_linear_layer.up.weight',
                      'lora_B.default.weight'),
    'dora_scale': ('dora_scale', 'lora_magnitude_vector', 'lora_magnitude_vector.weight')}
WRITTEN = {own: files[0] for own, files in _ALIASES.items()}
#: Kind -> the sets of tensors that make a change of a weight. 'full' is the change itself.
FORMS = {'lora': (AB, (*AB, MID)), **lora_weights.FORMS, 'full': (('diff',),)}
#: What a layer may have besides.
BESIDE = ('alpha', 'dora_scale', 'diff_b')
NORM = ('w_norm', 'b_norm')
#: ComfyUI calls a norm's tensors as those of other layers.
_OF_NORM = {'diff': 'w_norm', 'diff_b': 'b_norm'}
#: Tensors of kinds that are not read -> the kind.
_FOREIGN = {'weight': 'IA3', 'on_input': 'IA3', 'a1.weight': 'GLoRA', 'a2.weight': 'GLoRA', 'b1.weight': 'GLoRA',
            'b2.weight': 'GLoRA', 'bm.weight': 'GLoRA', 'oft_blocks': 'diag-OFT', 'oft_diag': 'diag-OFT',
            'rescale': 'diag-OFT', 'oft_R.weight': "OneTrainer's OFT", 'oft_R.scaled_oft': "OneTrainer's OFT"}
#: Such a kind -> what is missing for it here.
_MISSING = {
    'IA3': 'factors of inputs and outputs', 'GLoRA': "a change that depends on the base's weight, W A + B",
    'diag-OFT': "a rotation of the outputs; peft's OFT rotates the inputs: ask for its folder",
    'BOFT': "a product of rotations of the outputs; peft's OFT rotates the inputs: ask for the peft folder of one",
    "OneTrainer's OFT": "its scale and series; peft's OFT is read: ask for its peft folder"}
_SUFFIXES = {**{name: name for forms in FORMS.values() for form in forms for name in form},
             **{name: name for name in (*BESIDE, *NORM, *_FOREIGN)},
             **{file: own for own, files in _ALIASES.items() for file in files}}
#: Suffixes that only these tools write, whatever a layer's name.
_OWN_SUFFIXES = ('lora_down.weight', 'lora_up.weight', MID, 'dora_scale', 'diff', 'diff_b', *NORM)
_FLAT = (*PREFIXES.values(), ONLY_ENCODER, 'lycoris_')
_DOTTED = ('diffusion_model.', 'model.diffusion_model.', 'text_encoders.', 'clip_l.', 'clip_g.', 'input_blocks.',
           'middle_block.', 'output_blocks.')
#: Where OneTrainer and A1111 bundle a new word's vectors: 'bundle_emb.<word>.clip_l'.
WORDS = 'bundle_emb.'
WORD_PARTS = {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'}

#: (part, name in memory) -> (name in the file, its tensors by our names).
Layers = Mapping[tuple[str, str], tuple[str, dict[str, Tensor]]]


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file with these keys was written by sd-scripts, LyCORIS, ComfyUI or OneTrainer.

    Their own names of layers or of tensors show it; or a LoHa's or LoKr's factors with an alpha, unlike peft's.
    """
    keys = [key for key in keys if not key.startswith(WORDS)]
    factors = any('.hada_' in key or '.lokr_' in key for key in keys)
    return any(key.startswith(_FLAT) or key.endswith(tuple(f'.{suffix}' for suffix in _OWN_SUFFIXES))
               or key.startswith(_DOTTED) and split(key)[1] or factors and key.endswith('.alpha') for key in keys)


def split(key: str) -> tuple[str, str]:
    """Split a key into the layer's name in the file and our name of the tensor, '' if that is unknown."""
    parts = key.split('.')
    for length in (3, 2, 1):
        suffix = '.'.join(parts[-length:])
        # A dotted name before 'weight' is that of a model's own weight.
        if suffix in _SUFFIXES and (suffix != 'weight' or len(parts) == 2):
            return '.'.join(parts[:-length]), _SUFFIXES[suffix]
    return key, ''


def is_norm(module: nn.Module) -> bool:
    """Whether a module of `Modules` is a norm; the others are layers that peft can wrap."""
    return not isinstance(module, nn.Linear | nn.Conv2d)


def assign(tensors: Mapping[str, Any], modules: Modules, source: str | Path) -> Layers:
    """Assign every key to its layer. The same tensor under two names is taken once.

    Args:
        tensors: the file's. modules: part -> full name -> module of the live base. source: the file, for errors.

    Raises:
        UserError: keys are unknown, their kind is not read, one layer has two different tensors under two names, or the
            text encoder may be another model's.
    """
    table = spellings(modules)
    foreign: dict[str, list[str]] = {}
    unknown, different = [], []
    layers: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    keys: dict[tuple[tuple[str, str], str], str] = {}
    for key, tensor in tensors.items():
        file_name, suffix = split(key)
        layer = table.get(file_name)
        if layer is not None and suffix in _OF_NORM and is_norm(modules[layer[0]][layer[1]]):
            suffix = _OF_NORM[suffix]
        if 'lora_magnitude_vector' in key and isinstance(tensor, Tensor):
            tensor = tensor.reshape(-1)  # peft's [1, out, 1, 1] would be taken for the inputs'
        if suffix in _FOREIGN:
            is_boft = suffix == 'oft_blocks' and getattr(tensor, 'ndim', 0) == 4
            foreign.setdefault('BOFT' if is_boft else _FOREIGN[suffix], []).append(key)
        elif layer is None or not suffix or not isinstance(tensor, Tensor):
            unknown.append(key)
        elif suffix not in (own := layers.setdefault(layer, (file_name, {}))[1]):
            own[suffix], keys[layer, suffix] = tensor, key
        elif own[suffix].shape != tensor.shape or not torch.equal(own[suffix], tensor):
            different.append(f'{keys[layer, suffix]} and {key}')
    if foreign:
        kind, found = next(iter(foreign.items()))
        raise UserError(f"'{source}' holds {kind} in {len(found)} keys ({listed(sorted(found))}), which is not "
                        f'supported ({_MISSING[kind]}). Of these files LoRA, LoCon, DoRA, LoHa, LoKr, full differences '
                        'and norms are read.')
    refuse(source, unknown=unknown, given_under_two_names_with_different_values=different)
    only = [key for key in tensors if key.startswith(ONLY_ENCODER)]
    if only and not any(part == 'unet' for part, _ in layers):
        raise UserError(f"'{source}' has layers of a text encoder ({listed(only, 3)}), named as Stable Diffusion 1.x's "
                        "and 2.x's, and none of a UNet, which would show whose they are. SDXL's are lora_te1_* and "
                        'lora_te2_*.')
    return layers


def split_words(tensors: Mapping[str, Any], source: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return a file's new words (word -> part -> vectors [n, D]), and its other entries.

    Raises:
        UserError: a word's tensors are of another kind.
    """
    words: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key in [key for key in tensors if isinstance(key, str) and key.startswith(WORDS)]:
        word, _, encoder = key.removeprefix(WORDS).rpartition('.')
        tensor = tensors[key]
        if word and encoder in WORD_PARTS and isinstance(tensor, Tensor) and tensor.dim() in (1, 2):
            words.setdefault(word, {})[WORD_PARTS[encoder]] = tensor.reshape(-1, tensor.shape[-1])
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"'{source}' holds words for prompts in a form that is not read: {listed(sorted(unknown))}. "
                        f"Read are {WORDS}<word>.clip_l and .clip_g, vectors [n, D] of SDXL's text encoders; not those "
                        "of their outputs (OneTrainer's *_out), nor Stable Diffusion 1.x's string_to_param. Leave them "
                        f"out with ignore_keys=['{WORDS}*'].")
    return words, {key: tensor for key, tensor in tensors.items() if not str(key).startswith(WORDS)}


def check_forms(layers: Layers, source: str | Path) -> None:
    """Check that each layer's tensors go together.

    Raises:
        UserError: some are missing, or have no number in them.
    """
    missing: list[str] = []
    for file_name, layer in layers.values():
        if empty := [f'{WRITTEN.get(k, k)} {list(t.shape)}' for k, t in layer.items() if not t.numel()]:
            raise UserError(f"'{source}': '{file_name}' has rank 0 ({listed(empty)}), so it is no LoRA. Ask for a "
                            f"whole file, or leave the layer out with ignore_keys=['{file_name}.*'].")
        present = {name for name in layer if name not in BESIDE}
        forms: Sequence[Sequence[str]] = (('w_norm',), ('b_norm',), NORM) if present & set(NORM) else (
            FORMS.get(lora_weights.product_kind(present), FORMS['lora']))
        if present in map(set, forms) or not present and 'diff_b' in layer and 'dora_scale' not in layer:
            continue
        lacking = min((set(f) - present for f in forms if set(f) > present), key=len,
                      default={'(other tensors: these do not go together)'})
        missing += [f'{file_name}.{WRITTEN.get(name, name)}' for name in lacking]
    refuse(source, missing=missing)


def names_of(layer: Mapping[str, Tensor]) -> str:
    """Return a layer's tensors by their names in files, with shapes, for errors."""
    return ', '.join(f'{WRITTEN.get(name, name)} {list(tensor.shape)}' for name, tensor in layer.items())


def listed_alphas(faults: Sequence[tuple[str, Any]], source: str | Path) -> None:
    """Refuse alphas that are no finite numbers.

    Raises:
        UserError: there are `faults`, (name of a layer, its alpha).
    """
    if faults:
        (name, value), *_ = faults
        raise UserError(f"'{source}': '{name}.alpha' is {value}; it must be a finite number ({len(faults)} such layers:"
                        f' {listed(sorted(name for name, _ in faults))}).')
