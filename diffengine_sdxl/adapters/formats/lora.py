"""LoRAs and their relatives in any format: detect the format, read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats import diffusers_lora, files, kohya, kohya_keys, peft_lora
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora_weights import MIXED, PARTS, LoRAWeights, weight_change
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.strict import log_loaded

NAMES = (diffusers_lora.WEIGHTS, 'pytorch_lora_weights.bin', peft_lora.WEIGHTS, 'adapter_model.bin')


def read_lora(source: str | Path, modules: Modules, subfolder: str | None = None, weight_name: str | None = None,
              revision: str | None = None, ignore_keys: Sequence[str] = (), alpha: float | None = None,
              rslora: bool | None = None) -> LoRAWeights:
    """Read diffusers' file, a peft folder (or one with a subfolder per part), or a kohya single file.

    Args:
        source, subfolder, weight_name, revision: see `files.find`. ignore_keys: see `files.read`.
        modules: part -> full name -> plain layer or norm of the live base, which gives every name and width.
        alpha, rslora: of a file that does not say, see `diffusers_lora.read`.

    Raises:
        UserError: there is no such file, keys are unknown or missing, or it was made for another base.
    """
    folder = files.parts_folder(source, (peft_lora.CONFIG, peft_lora.WEIGHTS), subfolder, revision)
    parts = [part for part in PARTS if (folder / part / peft_lora.CONFIG).is_file()]
    if parts and weight_name is None:
        weights = _join({part: _read_file(folder / part, modules, part=part, ignore_keys=ignore_keys)
                         for part in parts}, folder)
    else:
        weights = _read_file(source, modules, subfolder, weight_name, revision, None, ignore_keys, alpha, rslora)
    if weights.kind != MIXED:  # whose reader checks the widths
        for part, part_weights in weights.parts.items():
            for name, tensors in part_weights.by_layer().items():
                _check_widths(weights, f'{part}.{name}', tensors, modules[part][name])
    num_keys = sum(len(part_weights.tensors) for part_weights in weights.parts.values())
    zero = sum(alpha == 0 for own in weights.parts.values() for alpha in own.alpha.values())
    log_loaded(f'{weights.title()} of {", ".join(weights.parts)}'
               f'{f" ({zero} layers have alpha=0, which switches off their change)" if zero else ""}'
               f'{f" with the words {listed(sorted(weights.words))}" if weights.words else ""}', source, num_keys)
    return weights


def _read_file(source: str | Path, modules: Modules, subfolder: str | None = None, weight_name: str | None = None,
               revision: str | None = None, part: str | None = None, ignore_keys: Sequence[str] = (),
               alpha: float | None = None, rslora: bool | None = None) -> LoRAWeights:
    path = files.find(source, NAMES, subfolder, weight_name, revision)
    file = files.read(path, ignore_keys=ignore_keys)
    if others := [str(k) for k, t in file.tensors.items() if not isinstance(k, str) or not isinstance(t, Tensor)]:
        raise UserError(f"'{path}' holds more than named tensors ({listed(others)}); it is not a LoRA.")
    words, tensors = kohya_keys.split_words(file.tensors, path)
    if kohya.is_kohya(tensors):
        _check_other_settings(replace(file, tensors=tensors))
        return replace(kohya.read(tensors, modules, path), words=words)
    file = replace(file, tensors=tensors)
    layers = {part: {name: module for name, module in own.items() if isinstance(module, nn.Linear | nn.Conv2d)}
              for part, own in modules.items()}
    # On the hub the config is downloaded when it is read.
    on_hub = path.name.startswith('adapter_model.') and hub.local_path(str(source)) is None
    if on_hub or (path.parent / peft_lora.CONFIG).is_file():
        is_file = path == Path(source)
        return replace(peft_lora.read(file, layers, None if is_file else subfolder, path.parent if is_file else source,
                                      revision, part), words=words)
    return replace(diffusers_lora.read(file, layers, alpha, rslora), words=words)


def _check_other_settings(file: files.WeightFile) -> None:
    """Check that a file with some of kohya's keys has no settings of peft that its reader does not see.

    Raises:
        UserError: the base was changed with it, or its alphas would be taken for the ranks.
    """
    metadata = diffusers_lora.header(file)
    config_beside = (file.path.parent / peft_lora.CONFIG).is_file()
    names = {name for name, suffix in map(kohya_keys.split, file.tensors) if suffix == 'lora_A.weight'}
    without_alpha = [name for name in names if f'{name}.alpha' not in file.tensors]
    scaled = []
    for part in PARTS:
        config = {k.removeprefix(f'{part}.'): v for k, v in metadata.items() if k.startswith(f'{part}.')}
        peft_lora.check_init(config.get('init_lora_weights'), str(file.path))
        if config.get('use_rslora') or config.get('lora_alpha') != config.get('r') or config.get('alpha_pattern'):
            scaled.append(part)
    if without_alpha and (scaled or config_beside or any(peft_lora.PREFIX in name for name in without_alpha)):
        raise UserError(f"'{file.path}' has keys of kohya's layout beside layers of peft's without an alpha of their "
                        f'own ({listed(sorted(without_alpha), 3)}), so their scale is unknown. Ask for the files that '
                        'it was made of, or for one with all alphas.')


def _join(parts: Mapping[str, LoRAWeights], folder: Path) -> LoRAWeights:
    """Join the parts' folders into one adapter."""
    first = next(iter(parts.values()))
    for part, other in parts.items():
        if (other.kind, other.rslora) != (first.kind, first.rslora):
            raise UserError(f"'{folder}' holds a {first.kind} and, in '{part}', a {other.kind}"
                            f'{" with rslora" if other.rslora else ""}; all parts of an adapter must be of one kind.')
    return LoRAWeights(first.kind, {part: w.parts[part] for part, w in parts.items()}, first.rslora, str(folder),
                       first.options)


def _check_widths(weights: LoRAWeights, name: str, tensors: Mapping[str, Tensor], layer: nn.Module) -> None:
    """Compare the shape of a layer's change with that of its weight.

    Raises:
        UserError: they differ, or the tensors do not fit each other.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    num_out, num_in = weight.flatten(1).shape
    magnitude = tensors.get('lora_magnitude_vector')
    try:
        if weights.kind == 'oft':
            blocks, elements = tensors['oft_R.weight'].shape
            size = int((1 + (1 + 8 * elements) ** 0.5) / 2)
            change = torch.Size((num_out, num_in if blocks == 1 and num_in % size == 0 else blocks * size))
        else:
            meta = {k: t.to('meta', weight.dtype) for k, t in tensors.items()}
            change = weight_change(weights.kind, meta).shape
        fits = magnitude is None or magnitude.numel() == change[0]
    except (RuntimeError, IndexError, ValueError):
        fits = False
    if not fits:
        shapes = ', '.join(f'{k} {list(t.shape)}' for k, t in tensors.items())
        raise UserError(f"'{weights.source}': the tensors of '{name}' do not fit each other: {shapes}.")
    if change != (num_out, num_in):
        raise UserError(f"'{weights.source}' was made for another base: it changes '{name}' from {change[1]} to "
                        f'{change[0]} channels, and the layer goes from {num_in} to {num_out} (times the kernel size '
                        'of a convolution).')


def write_lora(folder: Path, weights: LoRAWeights, modules: Modules) -> str:
    """Write diffusers' file, a peft folder per part for what stock diffusers cannot load, or a kohya file for the rest.

    Returns:
        'diffusers', 'peft' or 'kohya'.
    """
    if not weights.only_in_kohya() and diffusers_lora.loads_in_stock(weights):
        diffusers_lora.write(folder, weights)
        return 'diffusers'
    if weights.kind == 'oft' or peft_lora.can_hold(weights, modules):
        peft_lora.write(folder, weights, modules)
        return 'peft'
    folder.mkdir(parents=True, exist_ok=True)
    kohya.write(folder / 'lora.safetensors', weights, modules)
    return 'kohya'
