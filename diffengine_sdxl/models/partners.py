"""Partners: adapters that act on a part of the training samples only, at drawn scales.

What trains beside them learns to do its work with them and without them. Nothing is drawn outside of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.base import Range
from diffengine_sdxl.errors import UserError, did_you_mean, listed
from diffengine_sdxl.structures import Batch


@dataclass(frozen=True)
class Partner:
    """How often and how strongly one adapter acts in training.

    Attributes:
        prob: probability that it acts on a sample.
        scale: factor of its own scale, uniform in (low, high).
        start, end: of the part of sampling in which it acts, from noise (0) to image (1), each uniform in (low, high);
            its own `active_range` holds besides.
    """

    prob: float
    scale: Range
    start: Range
    end: Range


def check_partners(configs: Mapping[str, Any] | None, adapters: Mapping[str, Any]) -> dict[str, Partner]:
    """Return the partners by the names of their adapters.

    Args:
        configs: name -> dict with `prob`, `scale`, `start` and `end`; ranges are (low, high) or one number. None as a
            value removes a partner that a config inherited.
        adapters: name -> adapter; None for one that the config has taken out, whose partner is left out, too.

    Raises:
        UserError: one names no adapter, has an unknown key or an invalid value, or is of a kind that cannot be drawn.
    """
    partners = {}
    for name, config in (configs or {}).items():
        key = f'model.partners.{name}'
        if config is None:
            continue
        if name not in adapters:
            raise UserError(f"{key}: no adapter has this name; model.adapters has {listed(adapters) or 'none'}."
                            f'{did_you_mean(name, list(adapters))}')
        if adapters[name] is None:
            continue
        if not isinstance(config, Mapping):
            raise UserError(f'{key}={config!r} must be a dict such as dict(prob=0.5, scale=(0.5, 1.0)).')
        defaults = {'prob': 0.5, 'scale': 1.0, 'start': 0.0, 'end': 1.0}
        for unknown in config.keys() - defaults.keys():
            raise UserError(f"{key} has no setting '{unknown}'; it takes {listed(defaults)}."
                            f'{did_you_mean(str(unknown), list(defaults))}')
        values = {**defaults, **config}
        prob = values['prob']
        if isinstance(prob, bool) or not isinstance(prob, int | float) or not 0 <= prob <= 1:
            raise UserError(f'{key}.prob={prob!r} must be a number in [0, 1].')
        partner = Partner(float(prob), *(_range(f'{key}.{part}', values[part], 1.0 if part != 'scale' else None)
                                         for part in ('scale', 'start', 'end')))
        if partner.start[1] >= partner.end[0]:
            raise UserError(f'{key}: every start must come before every end; start={values["start"]!r} and '
                            f'end={values["end"]!r} overlap.')
        adapters[name].check_partner(partner.scale, partner.start, partner.end)
        partners[name] = partner
    return partners


def _range(key: str, value: Any, most: float | None) -> Range:
    """Return (low, high) of a number or a pair."""
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    numbers = [v for v in pair if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float('inf')]
    if len(pair) != 2 or len(numbers) != 2 or numbers[0] > numbers[1] or most is not None and numbers[1] > most:
        raise UserError(f'{key}={value!r} must be a number or (low, high), from 0{"" if most is None else " to 1"}.')
    return float(numbers[0]), float(numbers[1])


def draw_partners(partners: Mapping[str, Partner], batch: Batch, adapters: Mapping[str, Any]
                  ) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draw for B samples which partners act, how strongly and where; from (seed, key, epoch, name) of each sample.

    An adapter inside the base (`modifies_base`) has one draw for all of them, its first sample's.

    Returns:
        Name -> fp32 [B, 3] on the CPU: factor of its scale (0: it does not act), start and end of where it acts; and,
        for adapters inside the base, whose factor in that table is 0 or 1, name -> the factor itself.
    """
    draws = rng.Draws(batch.seed, batch.key, batch.epoch)
    strengths, factors = {}, {}
    for name, partner in partners.items():
        if name not in adapters:
            continue
        drawn = draws.uniform(f'partner {name}', (4,))
        inside = adapters[name].modifies_base
        if inside:
            drawn = drawn[:1].expand_as(drawn)
        low, high = (torch.tensor(side) for side in zip(partner.scale, partner.start, partner.end, strict=True))
        table = low + (high - low) * drawn[:, 1:]
        acts = drawn[:, 0] < partner.prob
        if inside:
            factors[name] = float(table[0, 0]) if bool(acts[0]) else 0.0
            table[:, 0] = float(factors[name] != 0)
        strengths[name] = torch.cat([table[:, :1] * acts[:, None], table[:, 1:]], dim=1)
    return strengths, factors
