"""Checks of a LoRA's arguments, alone and against the weights that it loads; and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffengine_sdxl.adapters.formats import peft_lora
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora_weights import KINDS, PARTS, LoRAWeights, PartWeights
from diffengine_sdxl.errors import UserError, did_you_mean, listed, one_of


def check_arguments(kind: str, init: bool | str, rank: Any, alpha: Any, dropout: Any, parts: Sequence[str] | None,
                    targets: Sequence[str] | None, blocks: Any) -> None:
    """Check the arguments that don't depend on the base.

    Raises:
        UserError: an argument is invalid; which one.
    """
    for key, names in (('parts', parts), ('targets', targets)):
        if isinstance(names, str) or names is not None and not len(names):
            example = names or ('unet' if key == 'parts' else 'to_q')
            raise UserError(f"{key}={names!r} of a LoRA must be a list of at least one entry, as {key}=['{example}'].")
    one_of('kind', kind, KINDS)
    one_of('init', init, ('gaussian', True))
    for part in parts or ():
        one_of('parts', part, PARTS)
    if not isinstance(blocks, Mapping | None) or any(
            not isinstance(block, Mapping | None) or block and block.keys() - {'rank', 'alpha', 'scale'}
            for block in (blocks or {}).values()):
        raise UserError(f'blocks={blocks} must map beginnings of layer names to None or to a dict with rank, alpha, '
                        'scale.')
    block_settings = [(key, value) for block in (blocks or {}).values() if block for key, value in block.items()]
    for key, value in [('rank', rank), ('alpha', alpha), ('dropout', dropout), *block_settings]:
        # In a block, alpha=None stands for the block's rank.
        optional = key == 'alpha' or (key, value) not in block_settings
        if not (value is None and optional) and (allowed := _violated(key, value)):
            raise UserError(f'{key}={value!r} of a LoRA must be {allowed}.')
    if kind == 'oft' and (alpha is not None or dropout or any(key != 'scale' for key, _ in block_settings)):
        raise UserError("kind='oft' has no alpha, no dropout (peft ignores it) and one rank for all blocks; leave them "
                        'out.')


def _violated(key: str, value: Any) -> str | None:
    """Return what `value` must be, if it is not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    valid, allowed = {
        'rank': (isinstance(value, int) and is_number and value > 0, 'a whole number above 0'),
        'alpha': (is_number and value > 0, 'a number above 0'),
        'dropout': (is_number and 0 <= value < 1, 'a number in [0, 1)'),
        'scale': (is_number, 'a number')}[key]
    return None if valid else allowed


def check_loaded(requested: Mapping[str, Any], loaded: LoRAWeights, modules: Modules, adapter: str,
                 block: Callable[[str, str], Mapping[str, Any] | None]) -> None:
    """Refuse weights that contradict a LoRA's arguments.

    Args:
        requested: kind, rslora, parts, rank, alpha as given; None where they are not.
        modules: part -> name -> plain layer of the base. adapter: its name.
        block: returns the entry of `blocks` for a layer (part, name).

    Raises:
        UserError: what differs, and what the file has.
    """
    def compare(what: str, wanted: Any, actual: Any) -> None:
        if wanted is not None and wanted != actual:
            raise UserError(f"Adapter '{adapter}' has {what}={wanted!r}, but '{loaded.source}' has {actual!r}; leave "
                            'it out to use that of the file.')

    compare('kind', requested['kind'], loaded.kind if loaded.kind in KINDS else loaded.title())
    compare('rslora', requested['rslora'], loaded.rslora)
    compare('parts', requested['parts'], tuple(p for p in PARTS if p in loaded.parts))
    for part, own in loaded.parts.items():
        for name in own.by_layer():
            settings = block(part, name)
            if settings is None:
                raise UserError(f"The blocks of adapter '{adapter}' leave out '{part}.{name}', which '{loaded.source}' "
                                'changes; use a block with scale=0 to disable it.')
            for key, values in (('rank', own.rank), ('alpha', own.alpha)):
                if loaded.kind != 'oft' and name in values:
                    compare(f'{key} of {part}.{name}', settings.get(key, requested[key]), values[name])
        if loaded.kind == 'oft' and (size := requested['rank']) is not None:
            config = peft_lora.config(loaded, part, modules[part], block_size=size)
            if not peft_lora.builds(config, own, modules[part]):
                compare('rank', size, 'blocks of another size')


def check_targets(targets: Mapping[str, Iterable[str]], loaded: LoRAWeights, never_read: Callable[[str, str], bool],
                  whose: str) -> None:
    """Check that the targets, part -> layers, are the layers of a file.

    Raises:
        UserError: they differ, in more than layers that are never read, which a fresh adapter leaves out.
    """
    for part, names in targets.items():
        differing = {*names} ^ {*loaded.parts[part].by_layer()}
        if differing := {name for name in differing if not never_read(part, f'{name}.')}:
            raise UserError(f"The targets {whose} differ in {len(differing)} layers of {part}, as '{min(differing)}'. "
                            'Leave them out to use those of the file.')


def check_blocks(blocks: Iterable[str], modules: Modules, adapter: str) -> None:
    """Refuse keys of `blocks` that are not the beginning of a layer's full name.

    Raises:
        UserError: which one, and what is close.
    """
    names = [f'{part}.{name}.' for part, layers in modules.items() for name in layers]
    for block in blocks:
        if not any(name.startswith(f'{block}.') for name in names):
            starts = {'.'.join(name.split('.')[:n]) for name in names for n in range(2, 7)}
            raise UserError(f"blocks['{block}'] of adapter '{adapter}' is not the beginning of a layer's name."
                            f'{did_you_mean(block, sorted(starts))}')


def check_factors(loaded: LoRAWeights, ranks: Mapping[str, PartWeights], rslora: bool, source: object, adapter: str
                  ) -> None:
    """Refuse weights whose alpha / rank is not that of the layers attached, `ranks`.

    Raises:
        UserError: which layer's.
    """
    theirs, ours = ({f'{part}.{name}': own.alpha[name] / (math.sqrt(rank) if root else rank)
                     for part, own in parts.items() for name, rank in own.rank.items()}
                    for parts, root in ((loaded.parts, loaded.rslora), (ranks, rslora)))
    if differing := [name for name in ours if not math.isclose(ours[name], theirs[name], rel_tol=1e-6)]:
        name = differing[0]
        raise UserError(f"'{source}' scales '{name}' ({len(differing)} in all) by alpha / rank = "
                        f"{theirs[name]:g}; adapter '{adapter}' by {ours[name]:g}. Set the file's alpha.")


def check_draws(adapter: str, kind: str, scales: tuple[float, float], words: Iterable[str]) -> None:
    """Check that a training may draw factors of its scale in `scales` (low, high).

    Raises:
        UserError: it is a rotation, or brings words.
    """
    if kind == 'oft' and scales[0] != scales[1]:
        raise UserError(f'model.partners.{adapter}.scale={scales}: an OFT, a rotation, has one scale, 1 or 0.')
    if words := listed(words):
        raise UserError(f'model.partners.{adapter}: the words of its file ({words}) act where a caption has them, and '
                        'cannot be drawn.')


def describe(wrappers: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, PartWeights], rslora: bool) -> str:
    """Return how many layers a LoRA changes and by which alpha / rank, if not 1: '560 layers of unet, x 0.25-1'."""
    factors = [own.alpha[name] / (math.sqrt(rank) if rslora else rank)
               for own in ranks.values() for name, rank in own.rank.items() if name in own.alpha]
    limits = [f'{factor:.3g}' for factor in dict.fromkeys((min(factors), max(factors)))] if factors else ['1']
    text = f'{sum(map(len, wrappers.values()))} layers of {", ".join(wrappers)}'
    return text if limits == ['1'] else f'{text}, x {"-".join(limits)}'
