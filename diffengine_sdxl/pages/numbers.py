"""How reports write numbers."""

from __future__ import annotations

import math
from typing import Any


def format_number(value: float | int | None) -> str:
    """Format with four decimals, or four digits if it is very small or large; 'none' for None."""
    if value is None:
        return 'none'
    return f'{value:.4f}' if 1e-3 <= abs(value) < 1e5 or value == 0 else f'{value:.4g}'


def format_p(p: float) -> str:
    """Format what follows 'p' of a difference: '= 0.0312', or '< 0.0001', as smaller ones say no more."""
    return f'= {p:.4f}' if p >= 1e-4 else '< 0.0001'


def finite(value: Any) -> float | None:
    """Return a number of a file as a float; None if it is none, NaN, infinite, or beyond what can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return number if math.isfinite(number) and abs(number) < 1e100 else None
