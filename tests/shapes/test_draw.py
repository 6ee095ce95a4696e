"""Pixels against brute force: distances, coverage, sizes; conditioning images against the images they are of."""

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest

from diffengine_sdxl.shapes import draw, palette
from diffengine_sdxl.shapes.scene import SHAPES, STYLES, Scene, draw_scene

FLAT = Scene('star', 'flat', 'red', 'green', 'plain', 0.55, 0.45, 0.3)
SIZES = pytest.mark.parametrize('size', [64, 97, 192])
every_shape = pytest.mark.parametrize('shape', SHAPES)


def outline(shape: str) -> np.ndarray:
    """Points on a shape's outline of radius 1, less than 0.0015 apart, [N, 2]."""
    if shape == 'circle':
        angles = np.linspace(0, 2 * np.pi, 6000)
        return draw.CIRCLE_RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    corners = draw.CORNERS[shape]
    along = np.linspace(0, 1, 1600)[:, None]
    return np.concatenate([a + along * (b - a) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)])


def winds(shape: str, points: np.ndarray) -> np.ndarray:
    """Whether the outline goes around each point, [N]: the sum of the angles under which its parts are seen."""
    path = outline(shape)[::20] if shape == 'circle' else draw.CORNERS[shape]
    spokes = np.arctan2(*(path[None] - points[:, None]).transpose(2, 0, 1)[::-1])
    turns = np.diff(np.append(spokes, spokes[:, :1], axis=1), axis=1)
    return np.abs(((turns + np.pi) % (2 * np.pi) - np.pi).sum(axis=1)) > np.pi


@every_shape
def test_signed_distance_is_that_to_the_nearest_point_of_the_outline(shape: str) -> None:
    draws = np.random.default_rng(1)
    points = draws.uniform(-1.6, 1.6, (200, 2))
    if shape != 'circle':  # a ray through a corner, and places on the same height
        points[:10, 1] = np.resize(draw.CORNERS[shape][:, 1], 10)
    brute = np.linalg.norm(points[:, None] - outline(shape)[None], axis=-1).min(axis=1)
    found = draw.signed_distance(shape, points[:, 0].reshape(20, 10), points[:, 1].reshape(20, 10)).ravel()
    np.testing.assert_allclose(np.abs(found), brute, atol=1e-3)
    sure = brute > 2e-3
    np.testing.assert_array_equal(found[sure] < 0, winds(shape, points)[sure])
    assert 0.1 < (found < 0).mean() < 0.6


def area(shape: str) -> float:
    """Of radius 1, by Gauss's shoelace formula."""
    x, y = (np.append(c, c[0]) for c in (outline(shape)[:-1] if shape == 'circle' else draw.CORNERS[shape]).T)
    return abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())) / 2


def test_the_shapes_are_what_they_are_called() -> None:
    """Regular, upright, and none so small that it would be known by its size."""
    areas = {shape: area(shape) for shape in SHAPES}
    assert max(areas.values()) < 1.7 * min(areas.values()), areas
    for shape, corners in (('square', 4), ('triangle', 3), ('star', 10)):
        points = draw.CORNERS[shape][::2] if shape == 'triangle' else draw.CORNERS[shape]
        assert len(points) == corners
        edges = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1)
        np.testing.assert_allclose(edges, edges[0])
    # The triangle is drawn with a point in the middle of each edge, which is none of its corners.
    for before, between, after in ((0, 1, 2), (2, 3, 4), (4, 5, 0)):
        np.testing.assert_allclose(*(draw.CORNERS['triangle'][between],
                                     draw.CORNERS['triangle'][[before, after]].mean(axis=0)), atol=1e-12)
    assert all(draw.CORNERS[s][:, 1].argmin() == 0 and abs(draw.CORNERS[s][0, 0]) < 1e-9 for s in ('triangle', 'star'))


@every_shape
def test_a_mask_is_how_much_of_each_pixel_is_covered(shape: str) -> None:
    """Against 8 x 8 points in each pixel; its sum is the shape's area."""
    scene, size = replace(FLAT, shape=shape), 64
    found = draw.mask(scene, size)
    places = (np.arange(8 * size) + 0.5) / (8 * size)
    x, y = np.meshgrid((places - scene.x) / scene.radius, (places - scene.y) / scene.radius)
    brute = (draw.signed_distance(shape, x, y) < 0).reshape(size, 8, size, 8).mean(axis=(1, 3))
    off = np.abs(found - brute)
    assert off.max() < 0.4 and off.mean() < 0.6 / size and (off > 0.15).mean() < 0.004
    assert found.sum() / size ** 2 == pytest.approx(area(shape) * scene.radius ** 2, rel=0.01)


def test_any_size_shows_the_same_scene() -> None:
    """Pixels of 4 x 4 at 256 are those at 64, but for parts that are thinner than a pixel."""
    for number, (style, shape) in enumerate(itertools.product(STYLES, SHAPES)):
        scene = replace(draw_scene(0, number), style=style, shape=shape)
        small = draw.paint(scene, 64)
        large = draw.paint(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        off = np.abs(small - large).max(axis=-1)
        assert off.mean() < 0.6 and (off > 16).mean() < 0.006, (scene, off.mean(), (off > 16).mean())
        moved = replace(scene, x=scene.x + 1 / 64)
        assert np.abs(draw.paint(moved, 64) - large).max(axis=-1).mean() > 1.2
    assert draw.render(FLAT, 33).shape == (33, 33, 3) and draw.render(FLAT, 33).dtype == np.uint8


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('style', STYLES)
def test_an_image_has_the_colours_of_its_scene_where_its_mask_is(shape: str, style: str) -> None:
    """Ground outside; inside fill, and the accent as the style says."""
    scene = replace(FLAT, shape=shape, style=style)
    image, cover = draw.render(scene, 128).astype(int), draw.mask(scene, 128)
    assert (image[cover == 0] == palette.COLOURS['green']).all() and (cover == 0).sum() > 10000
    inside = image[cover == 1]
    filled = (inside == palette.COLOURS['red']).all(axis=-1).mean()
    accented = (np.abs(inside - palette.accent('red')).max(axis=-1) < 1).mean()
    if style == 'flat':
        assert filled == 1
    elif style == 'glossy':
        bright = inside.sum(axis=-1) > sum(palette.COLOURS['red']) + 150
        down, across = (axis[cover == 1][bright].mean() / 128 for axis in np.indices(cover.shape))
        assert 0.03 < bright.mean() < 0.3 and down < scene.y and across < scene.x and accented < 0.01
    else:
        assert filled > 0.35 and 0.1 < accented < 0.6, (filled, accented)


def test_styles_differ_everywhere_they_should() -> None:
    """No two styles of one shape give nearly the same image."""
    for shape in SHAPES:
        images = {style: draw.render(replace(FLAT, shape=shape, style=style), 64).astype(float) for style in STYLES}
        cover = draw.mask(replace(FLAT, shape=shape), 64) == 1
        for one, other in itertools.combinations(STYLES, 2):
            assert (np.abs(images[one] - images[other])[cover].max(axis=-1) > 40).mean() > 0.08, (shape, one, other)


def test_textures_darken_the_ground_as_they_say() -> None:
    """'shaded' from the top down to 0.82, 'wavy' between 0.88 and 1; the shape itself is not touched."""
    found = {t: draw.paint(replace(FLAT, texture=t), 64) for t in ('plain', 'shaded', 'wavy')}
    cover = draw.mask(FLAT, 64)
    parts = {t: (p / palette.COLOURS['green'])[..., 1] for t, p in found.items()}
    assert (parts['plain'][cover == 0] == 1).all()
    np.testing.assert_allclose(parts['shaded'][:, 0], 1 - 0.18 * (np.arange(64) + 0.5) / 64)
    waves = parts['wavy'][cover == 0]
    assert 0.88 <= waves.min() < 0.885 and 0.995 < waves.max() <= 1
    assert ((np.diff(parts['wavy'][:, 0]) > 0).astype(int) @ np.ones(63)) > 25  # up and down again
    for image in found.values():
        np.testing.assert_allclose(image[cover == 1], np.tile(palette.COLOURS['red'], (int((cover == 1).sum()), 1)))


@pytest.mark.parametrize('shape', SHAPES)
@SIZES
def test_conditions_lie_on_the_shape_of_the_image(shape: str, size: int) -> None:
    scene = replace(FLAT, shape=shape, style='flat')
    found = {kind: draw.condition(scene, size, kind) for kind in draw.CONDITIONS}
    for image in found.values():
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and (image == image[..., :1]).all()
    gray = {kind: image[..., 0].astype(int) for kind, image in found.items()}
    # What is not of the ground's colour in the image, which is drawn by `paint` alone.
    drawn = (np.abs(draw.render(scene, size).astype(int) - palette.COLOURS['green']).max(axis=-1) > 0)
    np.testing.assert_array_equal(gray['mask'] > 2, drawn & (gray['mask'] > 2))
    assert (drawn & (gray['mask'] <= 2)).sum() <= 0.02 * drawn.sum()
    np.testing.assert_array_equal(gray['mask'], np.round(255 * draw.mask(scene, size)))
    full, none = gray['mask'] == 255, gray['mask'] == 0
    border = ~full & ~none
    thick = 0.75 * max(1.0, size / 64)
    distance = distance_to(border)
    assert (gray['outline'][border] > 90).mean() > 0.95 and (gray['outline'][distance > thick + 1.5] == 0).all()
    assert (gray['edge'][border] == 255).mean() > 0.95 and (gray['edge'][distance > 2.5] == 0).all()
    assert (gray['depth'][none] == round(0.15 * 255)).all() and gray['depth'][full].min() >= round(0.55 * 255)
    top = np.unravel_index(gray['depth'].argmax(), gray['depth'].shape)
    assert np.hypot(top[0] / size - scene.y, top[1] / size - scene.x) < 0.35 * scene.radius
    deep = distance > 0.2 * scene.radius * size
    assert gray['depth'][full & deep].mean() > gray['depth'][full & ~deep].mean() + 20


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Pixels to the nearest pixel of the mask, [H, W]."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def test_an_edge_map_shows_the_pattern_and_an_outline_does_not() -> None:
    scenes = [replace(FLAT, shape='square', style=style) for style in ('flat', 'striped')]
    cover = draw.mask(scenes[0], 64)
    inside = (cover == 1) & (distance_to(cover < 1) > 3)
    edges = [draw.condition(scene, 64, 'edge')[..., 0][inside] for scene in scenes]
    assert not edges[0].any() and (edges[1] == 255).mean() > 0.2
    for kind in ('outline', 'mask', 'depth'):
        np.testing.assert_array_equal(*(draw.condition(scene, 64, kind) for scene in scenes))


def test_dots_are_larger_than_a_latent() -> None:
    """A latent is 4 pixels wide: an adapter cannot learn what the VAE cannot hold."""
    image = draw.render(replace(FLAT, shape='square', style='dotted', radius=0.22), 64).astype(float)
    accent = np.asarray(palette.accent('red'))
    count, _, boxes, _ = cv2.connectedComponentsWithStats((np.abs(image - accent).max(axis=-1) < 60).astype(np.uint8))
    assert count == 1 + 4 and (boxes[1:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]] >= 7).all()


#: Of `render(scene, 64)`: mean, and mean weighted by the row and by the column.
FROZEN = {'flat': (87.9780, 43.1527, 43.4507), 'outlined': (77.6064, 36.9735, 38.2113),
          'striped': (78.9174, 38.8469, 38.7941), 'glossy': (89.9500, 43.8966, 44.2995),
          'dotted': (77.1040, 36.7581, 37.9370), 'ringed': (80.8372, 39.8239, 39.8329)}


@pytest.mark.parametrize('style', STYLES)
def test_pixels_are_those_that_the_base_was_trained_on(style: str) -> None:
    """The shipped weights know these images: other ones need other weights."""
    shape, texture = SHAPES[STYLES.index(style) % 4], ('plain', 'shaded', 'wavy')[STYLES.index(style) % 3]
    image = draw.render(replace(FLAT, style=style, shape=shape, texture=texture), 64).astype(float)
    places = np.arange(64) / 64
    found = image.mean(), (image * places[:, None, None]).mean(), (image * places[None, :, None]).mean()
    np.testing.assert_allclose(found, FROZEN[style], atol=1e-3)
