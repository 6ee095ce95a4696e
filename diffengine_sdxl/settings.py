"""How a setting of a request is declared: its values, its help, and who reads it.

`request.Request` declares each setting once. The command line, `--set`, prompt files, Python, the settings in a PNG and
the table in docs/inference.md are made of these declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

from diffengine_sdxl.errors import UserError, checked_range, one_of, whole_number
from diffengine_sdxl.literals import parse_literal

Check = Callable[[str, Any], Any]


class Kind(NamedTuple):
    """The values that a setting takes.

    Attributes:
        check: (key, value) -> the value in the field's type; raises UserError.
        form: how it is typed: 'text' as it stands, 'file' a path or URL (or several), 'number', 'list' numbers
            separated by commas, 'dict' NAME=VALUE.
        values: the values in words.
        inner: the form of a dict's values.
    """

    check: Check
    form: str
    values: str
    inner: str = ''


@dataclass(frozen=True)
class Setting:
    """One setting of a Request; see `setting`."""

    kind: Kind
    help: str
    group: str
    refiner: str
    sampler: bool
    flags: tuple[str, ...]


def read_text(form: str, key: str, text: str) -> Any:
    """Return the value typed as `text`; what cannot be read stays text, which the check refuses by its key.

    Args:
        form: see `Kind`.

    Raises:
        UserError: brackets don't match.
    """
    if form in ('text', 'file'):
        return text
    if form == 'list' and ',' in text and text.strip()[:1] not in ('[', '('):
        text = f'[{text}]'
    return parse_literal(text, key)


def setting(kind: Kind, help: str, default: Any = None, *, group: str = '', refiner: str | None = None,
            sampler: bool = False, flags: tuple[str, ...] = ()) -> Any:
    """Declare one setting of a Request.

    Args:
        help: what it is, in a few words; for -h and the docs.
        group: 'text', 'size', 'score' (the refiner's time ids), 'steps' (a later one replaces all of them) or 'image'
            (may be one for each image of a prompt).
        refiner: what the refiner gets: 'own' what `refiner` sets, 'base' the base's, 'both' the base's unless `refiner`
            sets it, '' nothing; None: as usual in the group.
        sampler: `Sampler.changed` takes it; also the 'steps' do.
        flags: short options of the command besides the one of its name, such as '--steps'.
    """
    if refiner is None:
        refiner = 'own' if sampler else {'text': 'both', 'size': 'both', 'score': 'both', 'steps': 'own'}.get(group, '')
    metadata = {'setting': Setting(kind, help, group, refiner, sampler or group == 'steps', flags)}
    return field(default_factory=dict, metadata=metadata) if default is dict else field(
        default=default, metadata=metadata)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f'{key}={value!r} must be a text.')
    return value


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of more than 308 digits
        pass
    raise UserError(f'{key}={value!r} must be a number.')


def _fraction(key: str, value: Any) -> float:
    number = _number(key, value)
    if not 0 < number <= 1:
        raise UserError(f'{key}={number} must be above 0 and at most 1.')
    return number


def _size(key: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2:
        raise UserError(f'{key}={value!r} must be two whole numbers of pixels, vertical first.')
    return whole_number(f'{key}[0]', pair[0]), whole_number(f'{key}[1]', pair[1])


def check_custom_steps(name: str, values: Any) -> tuple[float, ...]:
    """Return custom timesteps (as ints) or sigmas (as floats); whether the model knows them is checked later.

    Raises:
        UserError: they are not numbers that fall strictly and end at 0 or above; names the entry.
    """
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f'{name}={values!r} must be a list of numbers.')
    checked = [(whole_number if name == 'timesteps' else _number)(f'{name}[{i}]', v) for i, v in enumerate(values)]
    for i, value in enumerate(checked):
        if value < 0:
            raise UserError(f'{name}[{i}]={values[i]!r} must not be below 0.')
        if i and value >= checked[i - 1]:
            raise UserError(f'{name}[{i}]={values[i]!r} must be below the one before it, {values[i - 1]}: {name} fall '
                            'from noise to image.')
    if name == 'sigmas' and len(checked) < 2:
        raise UserError(f'{name}={values!r} needs at least two numbers; the last one is where sampling ends.')
    return tuple(checked)


def whole(low: int) -> Kind:
    """Return the kind of whole numbers from `low` on."""
    return Kind(lambda key, value: whole_number(key, value, low), 'number', f'whole number from {low}')


def choice(*values: str) -> Kind:
    """Return the kind of one of `values`."""
    def check(key: str, value: Any) -> Any:
        one_of(key, value, values)
        return value
    return Kind(check, 'text', ' or '.join(f"'{value}'" for value in values))


def by_adapter(kind: Kind) -> Kind:
    """Return the kind of dicts from an adapter's name to a value of `kind`."""
    def check(key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise UserError(f'{key}={value!r} must be a dict: adapter name -> value.')
        return {str(name): kind.check(f'{key}.{name}', part) for name, part in value.items()}
    return Kind(check, 'dict', f'adapter -> {kind.values}', kind.form)


TEXT = Kind(_text, 'text', 'text')
NUMBER = Kind(_number, 'number', 'number')
FRACTION = Kind(_fraction, 'number', 'above 0, at most 1')
SIZE = Kind(_size, 'list', '(height, width) in pixels')
POSITION = Kind(_size, 'list', '(top, left) in pixels')
CUSTOM_STEPS = Kind(check_custom_steps, 'list', 'falling numbers')
RANGE = Kind(lambda key, value: checked_range(value, key), 'list', '(start, end) in 0 to 1')
#: Checked where it is read.
IMAGE = Kind(lambda key, value: value, 'file', 'image')
