"""LoRAs and their relatives in any file that people have: which format it is, and one way to read and to write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffengine_sdxl.adapters.formats import diffusers_lora, files, peft_lora
from diffengine_sdxl.adapters.formats.kohya_names import Modules
from diffengine_sdxl.adapters.formats.peft_lora import PeftWeights
from diffengine_sdxl.adapters.formats.weights import PARTS, LoRAWeights
from diffengine_sdxl.weights import told

NAMES = (diffusers_lora.WEIGHTS, 'pytorch_lora_weights.bin', peft_lora.WEIGHTS, 'adapter_model.bin')


def read_lora(source: str | Path, modules: Modules, subfolder: str | None = None, weight_name: str | None = None,
              revision: str | None = None) -> LoRAWeights:
    """Read diffusers' file, a peft folder (also one with a folder for each part), or a kohya single file.

    Args:
        source, subfolder, weight_name, revision: see `files.find`.
        modules: part -> full name -> plain layer of the live base, which gives every name and width.

    Raises:
        ValueError: there is no such file, keys are unknown or missing, or it was made for another base.
    """
    folder = files.parts_folder(source, (peft_lora.CONFIG, peft_lora.WEIGHTS), subfolder, revision)
    parts = [part for part in PARTS if (folder / part / peft_lora.CONFIG).is_file()]
    if parts and weight_name is None:
        found: LoRAWeights = _joined({part: _read_file(folder / part, modules, part=part) for part in parts}, folder)
    else:
        found = _read_file(source, modules, subfolder, weight_name, revision)
    _check_widths(found, modules)
    told(f'A {found.kind} of {", ".join(found.parts)}', source, sum(len(p.tensors) for p in found.parts.values()))
    return found


def _read_file(source: str | Path, modules: Modules, subfolder: str | None = None, weight_name: str | None = None,
               revision: str | None = None, part: str | None = None) -> LoRAWeights:
    path = files.find(source, NAMES, subfolder, weight_name, revision)
    file = files.read(path)
    if odd := [str(k) for k, t in file.tensors.items() if not isinstance(t, Tensor)]:
        raise ValueError(f"'{path}' holds more than named tensors ({files.shown(odd)}); it is no LoRA's file.")
    from diffengine_sdxl.adapters.formats import kohya
    if kohya.is_kohya(file.tensors):
        return kohya.read(file.tensors, file.metadata, modules, path)
    if path.name.startswith('adapter_model.') or (path.parent / peft_lora.CONFIG).is_file():
        return peft_lora.read(file, modules, None if path == Path(source) else subfolder,
                              path.parent if path == Path(source) else source, revision, part)
    return diffusers_lora.read(file, modules)


def _joined(parts: Mapping[str, LoRAWeights], folder: Path) -> PeftWeights:
    """One adapter of a folder for each part."""
    one = next(iter(parts.values()))
    for part, other in parts.items():
        if (other.kind, other.rslora) != (one.kind, one.rslora):
            raise ValueError(f"'{folder}' holds a {one.kind} and, in '{part}', a {other.kind}"
                             f'{" with rslora" if other.rslora else ""}; an adapter is of one kind.')
    return PeftWeights(one.kind, {part: w.parts[part] for part, w in parts.items()}, one.rslora, str(folder),
                       getattr(one, 'options', {}))


def _check_widths(weights: LoRAWeights, modules: Modules) -> None:
    """Compare what each module's change needs with what the live layer has.

    Raises:
        ValueError: names the module and both.
    """
    for part, held in weights.parts.items():
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in held.tensors.items():
            name, suffix = peft_lora.split(key)
            layers.setdefault(name, {})[suffix] = tensor
        for name, own in layers.items():
            weight = modules[part][name].weight
            assert isinstance(weight, Tensor)
            there = (weight.shape[0], weight[0].numel())
            if (asked := _widths(weights.kind, own, there)) != there:
                raise ValueError(f"'{weights.source}' was made for another base: it changes '{part}.{name}' from "
                                 f'{asked[1]} to {asked[0]} channels, and there it goes from {there[1]} to {there[0]} '
                                 '(times the size of a kernel, where there is one).')


def _widths(kind: str, own: Mapping[str, Tensor], there: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs (times kernel) of a weight that these tensors change."""
    def rows(name: str) -> int:
        return own[name].shape[0] if name in own else own[f'{name}_a'].shape[int('lokr_t2' in own and '2' in name)]

    def columns(name: str) -> int:
        return own[name][0].numel() if name in own else own[f'{name}_b'][0].numel()
    if kind in ('lora', 'dora'):
        a, b = own['lora_A.weight'], own['lora_B.weight']
        inner = a.shape[0] == b.shape[1] and own.get('lora_magnitude_vector', b[:, 0]).numel() == b[:, 0].numel()
        return (b.shape[0] if inner else -1, a[0].numel())
    if kind == 'oft':
        blocks, elements = own['oft_R.weight'].shape
        size = int((1 + (1 + 8 * elements) ** 0.5) / 2)
        return there[0], there[1] if blocks == 1 and there[1] % size == 0 else blocks * size
    kernel = next((t[0, 0].numel() for k, t in own.items() if k in ('hada_t1', 'lokr_t2')), 1)
    if kind == 'loha':
        return own['hada_w1_a'].shape[int('hada_t1' in own)], own['hada_w1_b'].shape[1] * kernel
    return rows('lokr_w1') * rows('lokr_w2'), columns('lokr_w1') * columns('lokr_w2') * kernel


def write_lora(folder: Path, weights: LoRAWeights, modules: Modules) -> bool:
    """Write diffusers' file, or, for what stock diffusers cannot load, a peft folder for each part.

    Returns:
        whether stock diffusers can load it.
    """
    if diffusers_lora.loads_in_stock(weights):
        diffusers_lora.write(folder, weights)
        return True
    peft_lora.write(folder, weights, modules)
    return False
