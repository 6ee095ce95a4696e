"""The twelve named colours of the shapes world, and the nearest of them to a pixel."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Name -> sRGB in 0..255; any two lie at least 22 apart in Lab (a just noticeable difference is about 2.3).
COLOURS: dict[str, tuple[int, int, int]] = {
    'red': (210, 35, 45), 'orange': (245, 135, 25), 'yellow': (250, 225, 55), 'green': (45, 150, 60),
    'cyan': (70, 205, 215), 'blue': (40, 80, 210), 'purple': (125, 45, 160), 'pink': (250, 160, 200),
    'brown': (120, 75, 40), 'black': (22, 22, 26), 'white': (245, 245, 245), 'gray': (135, 135, 140)}
NAMES: tuple[str, ...] = tuple(COLOURS)


def to_lab(rgb: ArrayLike) -> Array:
    """Convert sRGB [..., 3] in 0..255 to CIE L*a*b* under D65, [..., 3].

    Source: IEC 61966-2-1 (sRGB), CIE 15 (Lab).
    """
    linear = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    cubic = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(cubic, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@cache
def _palette() -> Array:
    return to_lab(list(COLOURS.values()))


def nearest(lab: ArrayLike) -> NDArray[np.intp]:
    """Return the index in `NAMES` of the colour nearest to each Lab value [..., 3] (CIE76, Euclidean), [...]."""
    return np.linalg.norm(np.asarray(lab)[..., None, :] - _palette(), axis=-1).argmin(axis=-1)


def majority(lab: ArrayLike) -> str:
    """Return the colour that most of the Lab values [N, 3] are nearest to; of equals the first."""
    return NAMES[int(np.bincount(nearest(lab).ravel(), minlength=len(NAMES)).argmax())]


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the Lab distance of two sRGB colours in 0..255 (CIE76)."""
    return float(np.linalg.norm(to_lab(first) - to_lab(second)))


def accent(name: str) -> tuple[float, float, float]:
    """Return the second colour of a shape of this fill: a light fill darkened, a dark one lightened."""
    colour = np.asarray(COLOURS[name], dtype=np.float64)
    mixed = colour * 0.42 if to_lab(colour)[0] >= 45 else colour + (255 - colour) * 0.58
    return float(mixed[0]), float(mixed[1]), float(mixed[2])
