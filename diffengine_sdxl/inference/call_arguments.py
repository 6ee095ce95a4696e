"""Read the arguments of a call in Python: one dict of settings per prompt, seeds of generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.request import ROWS, of_form


def seeds_of(generator: Any, call: Mapping[str, Any]) -> list[int] | None:
    """Return the seed of each generator, one per image: an image's noise is drawn on the CPU, from its own seed.

    Raises:
        UserError: it is not a torch.Generator, has been used, or contradicts `seed`.
    """
    if generator is None:
        return None
    if 'seed' in call:
        raise UserError('Give seed or generator, not both.')
    return [_seed_of(one) for one in (generator if isinstance(generator, list | tuple) else [generator])]


def _seed_of(generator: Any) -> int:
    if not isinstance(generator, torch.Generator):
        raise UserError(f'generator={generator!r} must be a torch.Generator, or a list of them.')
    seed = generator.initial_seed()
    if not torch.equal(generator.get_state(), torch.Generator(generator.device).manual_seed(seed).get_state()):
        raise UserError('The generator has been used already, and an image is made of a seed; give a fresh one '
                        f'(torch.Generator().manual_seed({seed})) for each call, or `seed`.')
    if seed >= 2 ** 63:
        raise UserError(f"The generator's seed, {seed}, is too large; seeds end below 2 ** 63.")
    return seed


def split_prompts(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one dict of settings for each prompt.

    Raises:
        UserError: a list has another length than `prompt`.
    """
    prompts = call.get('prompt')
    if prompts is None or isinstance(prompts, str):
        return [dict(call)]
    if not isinstance(prompts, list | tuple):
        raise UserError(f'prompt={prompts!r} must be a text, or a list of texts.')
    num = len(prompts)
    if num == 0:
        raise UserError('prompt=[] holds no prompt.')

    def at(name: str, value: Any, i: int) -> Any:
        if name in of_form('dict') and isinstance(value, Mapping):
            return {k: at('', v, i) if name == 'conditions' else v for k, v in value.items()}
        if name in ROWS and (isinstance(value, list | tuple) or getattr(value, 'ndim', 0) == 4):
            each, rest = divmod(len(value), num)
            if not rest and each:  # one per prompt, or one per image of a prompt
                return value[i] if each == 1 else value[i * each:(i + 1) * each]
        if not isinstance(value, list | tuple) or name in of_form('list') and not _holds_lists(value):
            return value
        if len(value) != num:
            raise UserError(f'There are {num} prompts and {len(value)} of {name or "an adapter"!r}; give one per '
                            'prompt.')
        return value[i]
    return [{name: value for name, values in call.items() if (value := at(name, values, i)) is not None}
            for i in range(num)]


def _holds_lists(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, list | tuple) for value in values)
