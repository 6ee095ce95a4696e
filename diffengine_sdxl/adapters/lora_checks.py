"""A LoRA's options as people write them: what is no list, and what is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_lists(**given: Any) -> None:
    """Refuse options that must be lists of at least one entry, or None.

    Raises:
        ValueError: one is a bare word, or empty.
    """
    for key, value in given.items():
        if isinstance(value, str) or value is not None and not len(value):
            example = value or ('unet' if key == 'parts' else 'to_q')
            raise ValueError(f"{key}={value!r} of a LoRA must be a list of at least one entry, as {key}=['{example}'].")


def check_numbers(alpha: Any, blocks: Mapping[str, Any] | None) -> None:
    """Refuse alphas that are not above 0 and scales that are no numbers.

    Raises:
        ValueError: which.
    """
    settings = [v for v in (blocks or {}).values() if isinstance(v, Mapping)]
    for key, value in [('alpha', alpha), *((k, v.get(k)) for v in settings for k in ('alpha', 'scale'))]:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and (not number or key == 'alpha' and value <= 0):
            raise ValueError(f'{key}={value!r} of a LoRA must be a number' + (' above 0.' if key == 'alpha' else '.'))
