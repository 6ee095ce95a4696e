"""Measure an image of the shapes world by rules: foreground, colours, shape and style."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diffengine_sdxl.shapes import draw, palette
from diffengine_sdxl.shapes.scene import MIN_CONTRAST, SHAPES, STYLES

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Place = tuple[float, float, float]

#: A connected piece smaller than this part of the image is a speck: the smallest shape of the world covers 0.09.
MIN_AREA = 0.005
#: A foreground larger than this part is not a figure: the largest shape of the world covers 0.41.
MAX_AREA = 0.7
#: A pixel at least this far from the ground in Lab is not ground. Shapes are MIN_CONTRAST away and more; decoded
#: latents need some tolerance.
CONTRAST = 0.9 * MIN_CONTRAST
#: Minimal IoU of a foreground with a shape's template. True shapes reach 0.9 under a blur of 0.7 pixels with
#: noise of 5/255; a half disc reaches 0.75, a triangle turned by 10 degrees 0.78, a star turned by 36 degrees 0.68. A
#: square on its corner (a circle of 0.84) and an ellipse of 4:5 (0.88) pass, as they would to the eye at a few pixels.
FLOOR = 0.8


@dataclass(frozen=True)
class Observation:
    """What one image shows.

    Attributes:
        mask: the foreground, [H, W].
        ground: name of the ground's colour.
        fill: name of the foreground's colour; None without a foreground.
        shape: of scene.SHAPES; None if the foreground fits none of them.
        style: of scene.STYLES; None without a shape.
        fit: IoU of the mask with the best template, 0..1, even if that is too low for a shape.
        place: x, y and radius of the best template as fractions of the image's longer side; None without a foreground.
    """

    mask: Bools
    ground: str
    fill: str | None = None
    shape: str | None = None
    style: str | None = None
    fit: float = 0.0
    place: Place | None = None


def observe(image: Pixels) -> Observation:
    """Measure an image [H, W, 3] (sRGB) of any size and content; takes about 20 ms at 64 x 64.

    Raises:
        ValueError: the image is not uint8 of [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f'The image must be uint8 of [H, W, 3], not {image.dtype} of {list(image.shape)}; convert '
                         'floats in 0..1 with round(255 * x).')
    lab, mask = palette.to_lab(image), foreground(image)
    inner, outer = mask, mask
    for _ in range(_pixels(mask)):
        # Edges are mixtures of colours: exclude them from the votes for fill and ground.
        inner, outer = ~_dilated(~inner), _dilated(outer)
    ground = palette.majority(lab[_frame(*mask.shape)] if outer.all() else lab[~outer])
    if not mask.any():
        return Observation(mask, ground)
    inner = inner if inner.any() else mask
    fill = palette.majority(lab[inner])
    window, side = _window(mask), max(mask.shape)
    shape, (x, y, radius), fit = _fitted(mask[window])
    place = ((x + window[1].start) / side, (y + window[0].start) / side, radius / side)
    if fit < FLOOR:
        return Observation(mask, ground, fill, None, None, fit, place)
    style = _style(lab[inner], inner[window], shape, fill, (x, y, radius), 4 * _pixels(mask))
    return Observation(mask, ground, fill, shape, style, fit, place)


def iou(first: Bools, second: Bools) -> float:
    """Return intersection over union of two masks of one size, 0..1; 1 for two empty masks.

    Raises:
        ValueError: their sizes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f'Masks of {list(first.shape)} and {list(second.shape)} differ in size.')
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def foreground(image: Pixels) -> Bools:
    """Segment what is not ground, [H, W], without specks and with holes filled; empty if that is not a figure.

    A pixel is ground if its colour is near the ground's (see `_differs`), or closer to it than half of the strongest
    difference around it: then an edge lies at half coverage, whether it is sharp or blurred. Only pixels connected to
    the image's border are ground; the others are holes, such as a highlight in the ground's colour.
    """
    rgb, lab = image.astype(np.float64), palette.to_lab(image)
    around = _ground(rgb)
    strength = np.linalg.norm(rgb - around, axis=-1)
    # 3 x 3, as in a larger window a narrow outline would count as an edge of the fill inside it. A pixel of ground must
    # be next to it, or a dim stripe would count as an edge of bright ones along it.
    most, least = _highest(strength), -_highest(-strength)
    edge = (strength < 0.5 * most) & (least < 0.25 * most)
    low = ~_differs(lab, np.linalg.norm(lab - palette.to_lab(around), axis=-1)) | edge
    labels = components(low, diagonals=False)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    mask = ~np.isin(labels, border[border >= 0])
    pieces = components(mask, diagonals=True)
    # Keep every larger piece: a second figure must lower the fit of the first.
    mask &= (np.bincount(pieces[mask], minlength=mask.size) >= MIN_AREA * mask.size)[pieces]
    sides = (mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any())
    if mask.mean() > MAX_AREA or all(sides):
        return np.zeros_like(mask)
    return mask


def _differs(lab: Array, distance: Array) -> Bools:
    """Return where Lab colours [H, W, 3] with this distance [H, W] from the ground's are not ground, [H, W].

    A distance of CONTRAST or more is not ground. Nor is a smaller one if the colour is closer to that of such a pixel
    within 2 pixels than to the ground: it is part of an edge, while others are noise of the ground, as decoders make.
    """
    far = distance >= CONTRAST
    # Below half of CONTRAST the ground is always nearer (triangle inequality).
    rows, columns = np.nonzero((distance < CONTRAST) & (distance >= CONTRAST / 2))
    down, across = np.indices((5, 5)).reshape(2, 1, 25)
    i, j = rows[:, None] + down, columns[:, None] + across
    away = np.linalg.norm(np.pad(lab, ((2, 2), (2, 2), (0, 0)))[i, j] - lab[rows, columns][:, None], axis=-1)
    nearest = np.where(np.pad(far, 2)[i, j], away, np.inf).min(axis=1)
    differs = far.copy()
    differs[rows, columns] = nearest < distance[rows, columns]
    return differs


def components(mask: Bools, diagonals: bool) -> NDArray[np.intp]:
    """Label connected pieces: for each pixel of the mask [H, W] the smallest index in its piece, elsewhere -1, [H, W].

    Args:
        diagonals: connect pixels that touch at a corner.

    Source: hooking and pointer jumping after Shiloach and Vishkin, An O(log n) Parallel Connectivity Algorithm (1982).
    """
    index = np.arange(mask.size).reshape(mask.shape)
    whole, head, tail = slice(None), slice(None, -1), slice(1, None)
    pairs = [((whole, head), (whole, tail)), ((head, whole), (tail, whole))]
    pairs += [((head, head), (tail, tail)), ((head, tail), (tail, head))] if diagonals else []
    first, second = (np.concatenate([index[pair[k]][mask[pair[0]] & mask[pair[1]]] for pair in pairs]) for k in (0, 1))
    parent = index.ravel()
    while (parent[first] != parent[second]).any():
        one, two = parent[first], parent[second]
        np.minimum.at(parent, np.maximum(one, two), np.minimum(one, two))
        while (parent[parent] != parent).any():
            parent = parent[parent]
    return np.where(mask, parent.reshape(mask.shape), -1)


def _pixels(image: NDArray) -> int:
    """Return the side of one pixel of 64 x 64 in pixels of this image."""
    return max(1, round(max(image.shape[:2]) / 64))


def _frame(height: int, width: int) -> Bools:
    """Return the border of an image, 2 pixels wide at 64 x 64; shapes of the world do not reach it."""
    wide = max(1, round(min(height, width) / 32))
    frame = np.ones((height, width), dtype=bool)
    frame[wide:-wide, wide:-wide] = False
    return frame


def _ground(rgb: Array) -> Array:
    """Estimate the ground's colour everywhere, [H, W, 3]: a plane for each channel through the frame's pixels.

    Robust to a figure that touches less than half of the frame. Source: iteratively reweighted least squares with
    Tukey's biweight and the scale from the median (Huber and Ronchetti, Robust Statistics, 2009, ch. 7).
    """
    height, width = rgb.shape[:2]
    down, across = np.meshgrid(np.arange(height) / height - 0.5, np.arange(width) / width - 0.5, indexing='ij')
    plane = np.stack([np.ones_like(down), down, across], axis=-1)
    frame = _frame(height, width)
    known, values = plane[frame], rgb[frame]
    guess = np.broadcast_to(np.median(values, axis=0), values.shape)
    for _ in range(6):
        off = np.linalg.norm(values - guess, axis=-1)
        # At least 3 levels, as the scale of a uniform ground would be 0.
        weight = np.maximum(1 - (off / (4.685 * max(1.4826 * float(np.median(off)), 3.0))) ** 2, 0)
        slopes = np.linalg.lstsq(known * weight[:, None], values * weight[:, None], rcond=None)[0]
        guess = known @ slopes
    return np.clip(plane @ slopes, 0, 255)


def _highest(values: Array) -> Array:
    """Return the largest of the 9 values around each pixel, [H, W]."""
    padded = np.pad(values, 1, constant_values=-np.inf)
    across = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:])


def _dilated(mask: Bools) -> Bools:
    """Dilate the mask by one pixel, corners included, [H, W]."""
    return _highest(mask.astype(np.float64)) > 0


#: Resolution of the unit shapes' tables in steps per radius, and their extent in radii.
STEPS, REACH = 64, 2.0


@cache
def _unit(shape: str) -> tuple[NDArray[np.float32], Array, tuple[float, float, float]]:
    """Tabulate a shape of radius 1: cover [2 * REACH * STEPS] twice, box (left, top, right, bottom), (x, y, area).

    x and y are those of the centroid.
    """
    places = (np.arange(int(2 * REACH * STEPS)) + 0.5) / STEPS - REACH
    x, y = np.meshgrid(places, places)
    inside = draw.signed_distance(shape, x, y) <= 0
    box = np.array([x[inside].min(), y[inside].min(), x[inside].max(), y[inside].max()])
    area = float(inside.sum()) / STEPS ** 2
    return inside.astype(np.float32), box, (float(x[inside].mean()), float(y[inside].mean()), area)


def _window(mask: Bools) -> tuple[slice, slice]:
    """Return the rows and columns around the mask's bounding box, with a margin for templates that are too large."""
    spans = []
    for axis in (1, 0):
        used = np.flatnonzero(mask.any(axis=axis))
        reach = 4 + int(0.3 * max(mask.any(axis=1).sum(), mask.any(axis=0).sum()))
        spans.append(slice(int(max(used[0] - reach, 0)), int(min(used[-1] + reach + 1, mask.shape[1 - axis]))))
    return spans[0], spans[1]


def _fitted(mask: Bools) -> tuple[str, Place, float]:
    """Return the shape that fits the mask best, its place (x, y, radius in pixels), and its IoU there."""
    fits = {shape: _searched(shape, mask, _starts(shape, mask), (0.12, 0.06)) for shape in SHAPES}
    best = max(score for _, score in fits.values())
    # Finer steps gain a few hundredths, which cannot help shapes that are further behind.
    fits = {shape: _searched(shape, mask, place[None], (0.06, 0.03, 0.015))
            for shape, (place, score) in fits.items() if score > best - 0.1}
    shape = max(fits, key=lambda shape: fits[shape][1])
    place, score = fits[shape]
    return shape, (float(place[0]), float(place[1]), float(place[2])), score


def _starts(shape: str, mask: Bools) -> Array:
    """Return two initial places, from the mask's centroid and area and from its bounding box, [2, 3]."""
    down, across = np.nonzero(mask)
    (left, top, right, bottom), (x, y, area) = _unit(shape)[1:]
    radius = np.sqrt(len(down) / area)
    size = (np.ptp(across) + np.ptp(down) + 2) / (right - left + bottom - top)
    return np.array([(across.mean() + 0.5 - x * radius, down.mean() + 0.5 - y * radius, radius),
                     ((across.min() + across.max() + 1 - (left + right) * size) / 2,
                      (down.min() + down.max() + 1 - (top + bottom) * size) / 2, size)])


def _searched(shape: str, mask: Bools, places: Array, steps: tuple[float, ...]) -> tuple[Array, float]:
    """Search the best place [3] near the best of `places` [N, 3], with its IoU: pattern search with steps in radii."""
    moves = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3), axis=-1).reshape(-1, 3)
    best, score = places[0], -1.0
    for step in (*steps, 0.0):
        scores = _overlaps(shape, mask, places)
        if scores.max() > score:
            best, score = places[scores.argmax()], float(scores.max())
        places = best + step * best[2] * moves
    return best, score


def _overlaps(shape: str, mask: Bools, places: Array) -> Array:
    """Return the IoU of the mask with the shape at each of N places (x, y, radius) in pixels, [N]."""
    table = _unit(shape)[0]
    x, y, radius = (value[:, None] for value in places.T)
    rows, columns = (np.clip(((np.arange(length) + 0.5 - centre) / radius + REACH) * STEPS, 0, len(table) - 1)
                     .astype(np.intp) for length, centre in zip(mask.shape, (y, x), strict=True))
    covered = table[rows[:, :, None], columns[:, None, :]].reshape(len(places), -1)
    flat = mask.ravel().astype(np.float32)
    both = covered @ flat
    return both / (covered.sum(axis=1) + flat.sum() - both)


def _style(seen: Array, inner: Bools, shape: str, fill: str, place: Place, slack: int) -> str:
    """Return the style closest to the image, by mean Lab distance inside the shape.

    A pattern may be shifted: its least distance over all shifts counts.

    Args:
        seen: Lab of the N pixels inside.
        inner: which pixels those are, [H, W].
        place: x, y and radius in pixels of `inner`.
        slack: largest shift of a pattern across and down, in pixels.
    """
    x, y, radius = place
    rows, columns = np.nonzero(inner)
    # Draw the pattern beyond the shape, so that every shift has a colour for each pixel.
    right, below = np.meshgrid(*[(np.arange(-slack, length + slack) + 0.5 - centre) / radius
                                 for length, centre in zip(inner.shape[::-1], (x, y), strict=True)])
    distance = draw.signed_distance(shape, right, below)
    shifts = np.unique(np.linspace(-slack, slack, 5).astype(np.intp))
    down, across = (grid.reshape(-1, 1) + slack for grid in np.meshgrid(shifts, shifts))
    off = {}
    for style in STYLES:
        drawn = palette.to_lab(draw.surface(style, fill, right, below, distance, 1 / radius)).astype(np.float32)
        away = drawn[rows + down, columns + across] - seen.astype(np.float32)
        off[style] = float(np.sqrt((away ** 2).sum(axis=-1)).mean(axis=-1).min())
    return min(off, key=lambda style: off[style])
