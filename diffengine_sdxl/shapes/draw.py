"""Draw scenes by signed distances, so that any size is exact and edges are antialiased."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffengine_sdxl.shapes import palette
from diffengine_sdxl.shapes.scene import Scene

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

#: Kinds of conditioning images.
CONDITIONS = ('outline', 'edge', 'mask', 'depth')


def _regular(points: int, outer: float, inner: float, lift: float = 0.0) -> Array:
    """Return the corners of a polygon with one at the top, alternating between two radii (a star)."""
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radii * np.sin(angles), lift - radii * np.cos(angles)], axis=-1)


# Corners around the origin, y down; areas are between 1.7 (star) and 2.8 (circle).
CORNERS = {'square': np.array([[-0.82, -0.82], [0.82, -0.82], [0.82, 0.82], [-0.82, 0.82]]),
           'triangle': _regular(3, 1.2, 0.6, lift=0.2), 'star': _regular(5, 1.12, 0.52, lift=0.05)}
CIRCLE_RADIUS = 0.95


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Return the distance to the outline, negative inside, in the units of x and y (the shape's radius is 1).

    Polygons: the least distance to an edge, with the sign by the even-odd rule.
    """
    if shape == 'circle':
        return np.hypot(x, y) - CIRCLE_RADIUS
    corners = CORNERS[shape]
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def _coordinates(scene: Scene, size: int) -> tuple[Array, Array]:
    """Return the pixel centres, relative to the shape's centre in units of its radius, [size, size] twice."""
    places = (np.arange(size) + 0.5) / size
    return np.meshgrid((places - scene.x) / scene.radius, (places - scene.y) / scene.radius)


def _cover(distance: Array, pixel: float) -> Array:
    """Return the part of each pixel that is inside, 0..1; `pixel` is its side in the units of `distance`."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _plain(x: Array, y: Array, d: Array, pixel: float) -> Array:
    return np.zeros_like(d)


def _outlined(x: Array, y: Array, d: Array, pixel: float) -> Array:
    return _cover(-0.14 - d, pixel)


def _striped(x: Array, y: Array, d: Array, pixel: float) -> Array:
    period = 0.62
    place = np.mod(y + 0.155, period)
    return _cover(np.abs(place - period / 2) - 0.12, pixel)


def _dotted(x: Array, y: Array, d: Array, pixel: float) -> Array:
    step = 0.9
    place = np.hypot(np.mod(x, step) - step / 2, np.mod(y, step) - step / 2)
    return _cover(place - 0.28, pixel)


def _ringed(x: Array, y: Array, d: Array, pixel: float) -> Array:
    return _cover(np.abs(d + 0.3) - 0.075, pixel)


#: Style -> part of the accent colour at each point of the shape.
PATTERNS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    'flat': _plain, 'outlined': _outlined, 'striped': _striped, 'glossy': _plain, 'dotted': _dotted,
    'ringed': _ringed}


def _shine(x: Array, y: Array) -> Array:
    """Return the highlight of a glossy shape, at the top left, 0..1."""
    return np.exp(-(((x + 0.26) / 0.3) ** 2 + ((y + 0.2) / 0.3) ** 2))


def paint(scene: Scene, size: int) -> Array:
    """Draw the image, [size, size, 3], sRGB in 0..255 before rounding."""
    x, y = _coordinates(scene, size)
    d, pixel = signed_distance(scene.shape, x, y), 1 / (size * scene.radius)
    ground = np.asarray(palette.COLOURS[scene.ground], dtype=np.float64) * _texture(scene.texture, size)[..., None]
    return np.clip(_mix(ground, surface(scene.style, scene.fill, x, y, d, pixel), _cover(d, pixel)), 0, 255)


def surface(style: str, fill: str, x: Array, y: Array, distance: Array, pixel: float) -> Array:
    """Return the colours of a shape at places in and around it, [..., 3], sRGB in 0..255.

    Args:
        x, y, distance: relative to the shape, in units of its radius, [...]; see `signed_distance`.
        pixel: side of a pixel in these units.
    """
    colour = np.asarray(palette.COLOURS[fill], dtype=np.float64)
    colours = _mix(colour, np.asarray(palette.accent(fill)), PATTERNS[style](x, y, distance, pixel))
    if style == 'glossy':
        colours = _mix(colours, np.full(3, 140.0 if fill == 'white' else 255.0), 0.9 * _shine(x, y))
    return colours


def render(scene: Scene, size: int) -> Pixels:
    """Draw the image, [size, size, 3], sRGB."""
    return np.round(paint(scene, size)).astype(np.uint8)


def _texture(texture: str, size: int) -> Array:
    """Return the factor of the ground's colour, [size, size]."""
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2)
    if texture == 'shaded':
        return 1.0 - 0.18 * y
    if texture == 'wavy':
        return 0.94 + 0.06 * np.sin(2 * np.pi * (4 * y + 0.6 * np.sin(2 * np.pi * x)))
    return np.ones((size, size))


def _mix(under: Array, over: Array, part: Array) -> Array:
    return under + (over - under) * part[..., None]


def mask(scene: Scene, size: int) -> Array:
    """Return the part of each pixel that the shape covers, [size, size], 0..1."""
    x, y = _coordinates(scene, size)
    return _cover(signed_distance(scene.shape, x, y), 1 / (size * scene.radius))


def condition(scene: Scene, size: int, kind: str) -> Pixels:
    """Draw a conditioning image, [size, size, 3].

    'outline': the shape's outline as a white line on black, as in fusing/fill50k. 'edge': all edges, also those of the
    pattern. 'mask': the filled shape, white on black. 'depth': near is light; the shape bulges out of a far ground.
    """
    x, y = _coordinates(scene, size)
    d, pixel = signed_distance(scene.shape, x, y), 1 / (size * scene.radius)
    if kind == 'mask':
        values = _cover(d, pixel)
    elif kind == 'outline':
        values = _cover(np.abs(d) - 0.75 * pixel * max(1.0, size / 64), pixel)
    elif kind == 'depth':
        values = np.where(d < 0, 0.55 + 0.45 * np.clip(-d / 0.8, 0, 1), 0.15)
    else:
        values = _edges(palette.to_lab(paint(scene, size)))
    return np.repeat(np.round(255 * values).astype(np.uint8)[..., None], 3, axis=-1)


def _edges(lab: Array) -> Array:
    """Return 1 where Lab changes by more than 12 between the pixels on both sides, else 0."""
    padded = np.pad(lab, ((1, 1), (1, 1), (0, 0)), mode='edge')
    across = np.linalg.norm(padded[1:-1, 2:] - padded[1:-1, :-2], axis=-1)
    down = np.linalg.norm(padded[2:, 1:-1] - padded[:-2, 1:-1], axis=-1)
    return (np.maximum(across, down) > 12).astype(np.float64)
