"""Measuring images: against known scenes, and against images without a shape."""

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from diffengine_sdxl.shapes import draw, measure, palette
from diffengine_sdxl.shapes.measure import Observation, observe
from diffengine_sdxl.shapes.scene import SHAPES, STYLES, Scene, draw_scene

WORDS = ('shape', 'fill', 'ground', 'style')
SCENE = Scene('star', 'flat', 'red', 'green', 'plain', 0.55, 0.45, 0.3)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of [H, W, C], borders repeated."""
    reach = int(4 * sigma) + 1
    kernel = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * sigma ** 2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image.astype(float), [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode='edge')
        image = sum(k * np.take(padded, range(i, i + image.shape[axis]), axis) for i, k in enumerate(kernel))
    return image


def degraded(image: np.ndarray, seed: int, sigma: float = 0.7, noise: float = 5.0) -> np.ndarray:
    """Blur and add noise, roughly as a VAE does."""
    noisy = blurred(image, sigma) + np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)


@cache
def scenes(num: int) -> list[Scene]:
    return [draw_scene(7, i, STYLES, 'all', 'measure') for i in range(num)]


@cache
def observations(num: int, size: int, worse: bool) -> list[Observation]:
    images = [draw.render(scene, size) for scene in scenes(num)]
    return [observe(degraded(image, i) if worse else image) for i, image in enumerate(images)]


def accuracy(seen: list[Observation], true: list[Scene], word: str) -> float:
    return float(np.mean([getattr(o, word) == getattr(s, word) for o, s in zip(seen, true, strict=True)]))


CASES = [(300, 64, False, 0.995, 0.99), (120, 64, True, 0.97, 0.975), (20, 96, True, 0.97, 0.985),
         (12, 128, False, 0.995, 0.995)]


@pytest.mark.parametrize(('num', 'size', 'worse', 'least', 'least_iou'), CASES)
def test_true_images_are_measured_right(num: int, size: int, worse: bool, least: float, least_iou: float) -> None:
    seen, true = observations(num, size, worse), scenes(num)
    assert {word: a for word in WORDS if (a := accuracy(seen, true, word)) < least} == {}
    ious = [measure.iou(o.mask, draw.mask(s, size) >= 0.5) for o, s in zip(seen, true, strict=True)]
    assert np.mean(ious) >= least_iou and min(ious) >= 0.85
    assert min(o.fit for o in seen) >= 0.85
    places = np.array([o.place for o in seen]) - [(s.x, s.y, s.radius) for s in true]
    assert np.quantile(abs(places), 0.99) < 1 / size


@pytest.mark.parametrize('word', WORDS)
def test_other_images_are_right_by_chance_only(word: str) -> None:
    """Each image against the scene after it, which is independent of it."""
    seen, true = observations(300, 64, False), scenes(300)
    known = {'shape': SHAPES, 'style': STYLES}.get(word, palette.NAMES)
    shares = np.array([np.mean([getattr(scene, word) == name for scene in true]) for name in known])
    chance = float((shares ** 2).sum())
    share = accuracy(seen, true[1:] + true[:1], word)
    assert abs(chance - 1 / len(known)) < 0.03
    assert abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / len(seen))


def test_masks_of_other_images_hardly_overlap() -> None:
    seen, true = observations(300, 64, False), scenes(300)
    ious = [measure.iou(o.mask, draw.mask(s, 64) >= 0.5) for o, s in zip(seen, true[1:] + true[:1], strict=True)]
    assert np.mean(ious) < 0.4


X, Y = np.meshgrid(*[(np.arange(64) + 0.5) / 64 - 0.5] * 2)


def two_colours(mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], palette.COLOURS['red'], palette.COLOURS['green']).astype(np.uint8)


def turned(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.radians(degrees)
    return X * np.cos(angle) + Y * np.sin(angle), Y * np.cos(angle) - X * np.sin(angle)


def polygon(shape: str, degrees: float) -> np.ndarray:
    x, y = turned(degrees)
    return draw.signed_distance(shape, x / 0.32, y / 0.32) < 0


NO_SHAPE: dict[str, Callable[[], np.ndarray]] = {
    'half disc': lambda: (np.hypot(X, Y) < 0.33) & (X < 0),
    'lower half disc': lambda: (np.hypot(X, Y) < 0.33) & (Y < 0),
    'three quarters of a disc': lambda: (np.hypot(X, Y) < 0.33) & ~((X > 0) & (Y < 0)),
    'flat ellipse': lambda: np.hypot(X, Y / 0.6) < 0.33, 'flat rectangle': lambda: (abs(X) < 0.3) & (abs(Y) < 0.2),
    'bar': lambda: (abs(X) < 0.05) & (abs(Y) < 0.35),
    'cross': lambda: (np.minimum(abs(X), abs(Y)) < 0.1) & (np.maximum(abs(X), abs(Y)) < 0.32),
    'L': lambda: (np.maximum(abs(X), abs(Y)) < 0.28) & ~((X > -0.05) & (Y < 0.05)),
    'flower': lambda: np.hypot(X, Y) < 0.28 * (1 + 0.35 * np.cos(6 * np.arctan2(Y, X))),
    'triangle on its head': lambda: polygon('triangle', 180), 'turned triangle': lambda: polygon('triangle', 15),
    'star on its head': lambda: polygon('star', 180), 'turned star': lambda: polygon('star', 10),
    'two discs': lambda: (np.hypot(X + 0.22, Y) < 0.18) | (np.hypot(X - 0.22, Y) < 0.18),
    'a disc and a smaller one': lambda: (np.hypot(X + 0.22, Y) < 0.2) | (np.hypot(X - 0.25, Y) < 0.11),
    'a square grown into a disc': lambda: (np.maximum(abs(X + 0.1), abs(Y)) < 0.2) | (np.hypot(X - 0.2, Y) < 0.2)}


@pytest.mark.parametrize('name', NO_SHAPE)
def test_other_figures_are_not_a_shape(name: str) -> None:
    mask = NO_SHAPE[name]()
    seen = observe(two_colours(mask))
    assert (seen.shape, seen.style, seen.fill, seen.ground) == (None, None, 'red', 'green')
    assert measure.iou(seen.mask, mask) > 0.97 and 0 < seen.fit < measure.FLOOR


@pytest.mark.parametrize('name', ['half disc', 'three quarters of a disc', 'L', 'flat ellipse', 'turned triangle',
                                  'flower', 'a square grown into a disc'])
def test_no_place_nearby_fits_much_better(name: str) -> None:
    """The search against all places of a grid, for figures that fit no shape."""
    mask = NO_SHAPE[name]()
    fit = measure._fitted(mask)[2]
    for shape in SHAPES:
        start = measure._starts(shape, mask)[0]
        x, y, radius = (start[i] + reach * np.linspace(-1, 1, 17) for i, reach in enumerate((5, 5, 0.25 * start[2])))
        grid = np.stack(np.meshgrid(x, y, radius), axis=-1).reshape(17, -1, 3)
        assert max(measure._overlaps(shape, mask, places).max() for places in grid) < fit + 0.008


def noise(sigma: float, seed: int) -> np.ndarray:
    field = np.random.default_rng(seed).normal(size=(64, 64, 3))
    field = blurred(field, sigma) if sigma else field
    return np.clip(128 + 60 * field / field.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('sigma', [0.0, 1.0, 3.0, 6.0])
def test_noise_shows_no_shape(sigma: float) -> None:
    assert [observe(noise(sigma, seed)).shape for seed in range(15)] == [None] * 15


@pytest.mark.parametrize('colour', palette.NAMES)
@pytest.mark.parametrize('texture', ['plain', 'shaded', 'wavy'])
def test_ground_without_a_shape(colour: str, texture: str) -> None:
    image = np.asarray(palette.COLOURS[colour]) * draw._texture(texture, 64)[..., None]
    seen = observe(degraded(image, 0, noise=3))
    assert not seen.mask.any() and seen.mask.shape == (64, 64)
    assert (seen.ground, seen.fill, seen.shape, seen.style, seen.fit, seen.place) == (colour, *[None] * 3, 0.0, None)


def test_specks_are_ignored_and_larger_pieces_are_not() -> None:
    disc = np.hypot(X + 0.15, Y + 0.1) < 0.28
    for radius, stays in ((0.03, False), (0.1, True)):
        spot = np.hypot(X - 0.35, Y - 0.35) < radius
        seen = observe(two_colours(disc | spot))
        assert seen.shape == 'circle' and seen.mask[spot].all() == stays == seen.mask[spot].any()


def test_a_thin_slanted_line_is_one_piece() -> None:
    line = (np.indices((64, 64))[0] == np.indices((64, 64))[1]) & (abs(X) < 0.35)
    seen = observe(two_colours(line))
    assert (seen.mask == line).all() and seen.fill == 'red' and seen.shape is None


def test_a_thin_slanted_outline_is_closed() -> None:
    away = sum(abs(index - 32) for index in np.indices((64, 64)))
    assert (observe(two_colours(away == 20)).mask == (away <= 20)).all()


def test_a_shape_on_a_blotchy_ground() -> None:
    """Noise of 8/255 over a few pixels, in each channel: far more than textures have."""
    true, seen = scenes(40), []
    for seed, scene in enumerate(true):
        blotches = blurred(np.random.default_rng(seed).normal(size=(64, 64, 3)), 2)
        image = draw.render(scene, 64) + 8 * blotches / blotches.std()
        seen.append(observe(np.clip(image.round(), 0, 255).astype(np.uint8)))
    assert min(accuracy(seen, true, word) for word in WORDS) >= 0.97
    assert np.mean([measure.iou(o.mask, draw.mask(s, 64) >= 0.5) for o, s in zip(seen, true, strict=True)]) > 0.97


def test_a_highlight_in_the_grounds_colour_is_no_hole() -> None:
    disc, hole = np.hypot(X, Y) < 0.3, np.hypot(X + 0.1, Y + 0.1) < 0.06
    seen = observe(two_colours(disc & ~hole))
    assert seen.shape == 'circle' and measure.iou(seen.mask, disc) > 0.98


@pytest.mark.parametrize('texture', ['plain', 'shaded', 'wavy'])
def test_the_ground_with_a_figure_on_much_of_the_frame(texture: str) -> None:
    band = (X < -0.25) & (Y < 0.3)
    ground = np.asarray(palette.COLOURS['cyan']) * draw._texture(texture, 64)[..., None]
    seen = observe(np.where(band[..., None], palette.COLOURS['red'], ground).astype(np.uint8))
    assert (seen.ground, seen.fill) == ('cyan', 'red') and measure.iou(seen.mask, band) > 0.99


def test_a_shape_may_reach_over_the_border() -> None:
    disc = np.hypot(X - 0.38, Y) < 0.3
    seen = observe(two_colours(disc))
    assert seen.shape == 'circle' and measure.iou(seen.mask, disc) > 0.98


def test_nearly_everything_or_nearly_nothing_is_not_a_figure() -> None:
    for mask in (np.maximum(abs(X), abs(Y)) < 0.45, np.hypot(X, Y) < 0.03, np.minimum(abs(X), abs(Y)) < 0.1):
        seen = observe(two_colours(mask))
        assert seen.shape is None and not seen.mask.any()


@pytest.mark.parametrize('style', ['striped', 'dotted', 'ringed'])
@pytest.mark.parametrize('shift', [(0.2, 0.0), (0.0, -0.2), (-0.14, 0.14)])
def test_a_pattern_may_be_shifted(style: str, shift: tuple[float, float]) -> None:
    scene = Scene('circle', style, 'blue', 'yellow', 'plain', 0.5, 0.5, 0.3)
    x, y = (where - by for where, by in zip(draw._coordinates(scene, 64), shift, strict=True))
    accent = draw.PATTERNS[style](x, y, draw.signed_distance('circle', x, y), 1 / (64 * 0.3))
    colours = draw._mix(np.full((64, 64, 3), palette.COLOURS['blue']), np.array(palette.accent('blue')), accent)
    image = draw._mix(np.full((64, 64, 3), palette.COLOURS['yellow']), colours, draw.mask(scene, 64))
    seen = observe(degraded(image, 0))
    assert (seen.shape, seen.style, seen.fill) == ('circle', style, 'blue')


def test_a_faint_halo_is_ground() -> None:
    """Decoders leave a band around a shape that is closer to the ground than to the shape."""
    disc, band = np.hypot(X, Y) < 0.25, abs(np.hypot(X, Y) - 0.33) < 0.04
    for fill, ground in (('blue', 'orange'), ('cyan', 'brown'), ('red', 'gray')):
        rgb = np.array([palette.COLOURS[ground], palette.COLOURS[fill]], dtype=float)
        halo = rgb[0] + (rgb[1] - rgb[0]) * np.linspace(0, 1, 200)[:, None]
        # As far from the ground as possible without a colour of its own.
        off = np.linalg.norm(palette.to_lab(halo) - palette.to_lab(rgb[0]), axis=-1)
        halo = halo[off < 0.95 * measure.CONTRAST][-1]
        image = np.where(disc[..., None], rgb[1], np.where(band[..., None], halo, rgb[0])).round().astype(np.uint8)
        seen = observe(image)
        assert seen.shape == 'circle' and measure.iou(seen.mask, disc) > 0.97


def test_an_outline_near_the_grounds_colour_is_part_of_the_shape() -> None:
    """Dark green on black: in sRGB a mixture of fill and ground, as on an edge, of which less than half is fill."""
    scene = Scene('square', 'outlined', 'green', 'black', 'plain', 0.5, 0.5, 0.3)
    accent, ground, fill = map(np.array, (palette.accent('green'), palette.COLOURS['black'], palette.COLOURS['green']))
    assert np.linalg.norm(accent - ground) < 0.4 * np.linalg.norm(fill - ground)
    seen = observe(draw.render(scene, 64))
    assert seen.style == 'outlined' and measure.iou(seen.mask, draw.mask(scene, 64) >= 0.5) > 0.98


def test_images_need_not_be_square() -> None:
    wide = np.concatenate([draw.render(SCENE, 64), two_colours(np.zeros((64, 40), dtype=bool))], axis=1)
    for image in (wide, np.swapaxes(wide, 0, 1)):
        seen = observe(image)
        assert seen.mask.shape == image.shape[:2] and (seen.fill, seen.ground) == ('red', 'green')
    seen = observe(wide)
    assert (seen.shape, seen.style) == ('star', 'flat')
    assert seen.place == pytest.approx([64 * v / 104 for v in (0.55, 0.45, 0.3)], abs=0.005)


def test_the_input_is_unchanged_and_the_result_repeatable() -> None:
    image = draw.render(SCENE, 64)
    before, first, second = image.copy(), observe(image), observe(image)
    assert (image == before).all() and (first.mask == second.mask).all()
    assert first.__dict__.keys() == second.__dict__.keys()
    assert [first.__dict__[k] for k in first.__dict__ if k != 'mask'] == [second.__dict__[k] for k in first.__dict__
                                                                        if k != 'mask']


SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (8, 8), (8, 64), (300, 4), (17, 33), (64, 64)]


def images(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Make images of one colour, noise, blocks, stripes, a chess board, a gradient, few colours, one other pixel."""
    draws = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    flat = np.broadcast_to(draws.integers(0, 256, 3), (*size, 3))
    other = draws.integers(0, 256, 3)
    masks = [rows > draws.integers(0, size[0] + 1), columns % 2 == 0, (rows + columns) % 2 == 0,
             (rows // 3 + columns // 3) % 2 == 0, (rows == size[0] // 2) & (columns == size[1] // 2),
             np.maximum(abs(rows - size[0] // 2), abs(columns - size[1] // 2)) < max(size) // 4,
             draws.random(size) < draws.random()]
    gradient = rows[..., None] * draws.normal(size=3) * 9 + columns[..., None] * draws.normal(size=3) * 9 + 128
    made = [flat, np.zeros((*size, 3)), np.full((*size, 3), 255), draws.integers(0, 256, (*size, 3)),
            draws.integers(0, 2, (*size, 3)) * 255, gradient, *(np.where(mask[..., None], other, flat)
                                                                for mask in masks)]
    return [np.clip(image, 0, 255).astype(np.uint8) for image in made]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.filterwarnings('error')
def test_no_image_is_refused(size: tuple[int, int]) -> None:
    for image in [p for seed in range(3) for p in images(size, seed)]:
        seen = observe(image)
        assert seen.mask.shape == size and seen.mask.dtype == bool and 0 <= seen.fit <= 1
        assert seen.ground in palette.NAMES and (seen.fill in palette.NAMES) == seen.mask.any()
        assert (seen.shape is None) == (seen.style is None) and seen.shape in (None, *SHAPES)


@pytest.mark.parametrize('bad', [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8),
                                 np.zeros((0, 8, 3), np.uint8)])
def test_invalid_images_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r'uint8 of \[H, W, 3\]'):
        observe(bad)


def test_iou_by_hand() -> None:
    one = np.array([[True, True, False, False]])
    assert measure.iou(one, np.array([[False, True, True, False]])) == pytest.approx(1 / 3)
    assert measure.iou(one, one) == 1 and measure.iou(one, ~one) == 0
    assert measure.iou(one & False, one & False) == 1 and measure.iou(one, one & False) == 0
    with pytest.raises(ValueError, match='differ in size'):
        measure.iou(one, one.T)


def walked(mask: np.ndarray, diagonals: bool) -> np.ndarray:
    """Components by breadth-first search."""
    labels = np.full(mask.shape, -1)
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i or j) and (diagonals or not (i and j))]
    for start in np.argwhere(mask):
        if labels[tuple(start)] >= 0:
            continue
        label = start[0] * mask.shape[1] + start[1]
        labels[tuple(start)] = label
        queue = deque([tuple(start)])
        while queue:
            r, c = queue.popleft()
            for i, j in steps:
                at = (r + i, c + j)
                if 0 <= at[0] < mask.shape[0] and 0 <= at[1] < mask.shape[1] and mask[at] and labels[at] < 0:
                    labels[at] = label
                    queue.append(at)
    return labels


def spiral(size: int) -> np.ndarray:
    """One long path."""
    mask = np.zeros((size, size), dtype=bool)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    while top <= bottom and left <= right:
        mask[top, left:right + 1] = mask[top:bottom + 1, right] = mask[bottom, left:right + 1] = True
        mask[top + 2:bottom + 1, left] = True
        mask[min(top + 2, size - 1), left:left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return mask


@pytest.mark.parametrize('diagonals', [False, True])
def test_components_against_a_search(diagonals: bool) -> None:
    draws = np.random.default_rng(0)
    masks = [draws.random((20, 31)) < part for part in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)]
    for mask in [*masks, spiral(33), np.indices((9, 9)).sum(0) % 2 == 0, np.ones((1, 5), dtype=bool)]:
        assert (measure.components(mask, diagonals) == walked(mask, diagonals)).all()
