"""Lab against published values and OpenCV; colours that cannot be taken for one another."""

import itertools

import cv2
import numpy as np
import pytest

from diffengine_sdxl.shapes import palette

#: sRGB and its L*a*b* under D65, as Lindbloom's calculator (brucelindbloom.com) and the CSS colour tables give them.
KNOWN = {(255, 0, 0): (53.2408, 80.0925, 67.2032), (0, 255, 0): (87.7347, -86.1827, 83.1793),
         (0, 0, 255): (32.2970, 79.1875, -107.8602), (255, 255, 0): (97.1393, -21.5537, 94.4780),
         (0, 255, 255): (91.1132, -48.0875, -14.1312), (255, 0, 255): (60.3242, 98.2343, -60.8249),
         (128, 128, 128): (53.5850, 0, 0), (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0)}


@pytest.mark.parametrize(('rgb', 'lab'), KNOWN.items())
def test_lab_of_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    np.testing.assert_allclose(palette.to_lab(rgb), lab, atol=0.01)


def test_lab_is_opencvs() -> None:
    """Also of dark colours, where both curves are straight lines, and of any shape."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rgb[:20] //= 16
    expected = cv2.cvtColor((rgb / 255).astype(np.float32), cv2.COLOR_RGB2Lab)
    found = palette.to_lab(rgb)
    # OpenCV looks it up in a coarse table.
    assert found.shape == rgb.shape and np.abs(found - expected).max() < 0.5
    np.testing.assert_array_equal(palette.to_lab(rgb[3, 4].tolist()), found[3, 4])


def test_grays_have_no_hue() -> None:
    """However the matrix was rounded."""
    grays = palette.to_lab(np.repeat(np.arange(256)[:, None], 3, axis=1))
    assert np.abs(grays[:, 1:]).max() < 1e-9 and (np.diff(grays[:, 0]) > 0).all()


def test_no_two_colours_are_alike() -> None:
    pairs = {pair: palette.distance(*(palette.COLOURS[name] for name in pair))
             for pair in itertools.combinations(palette.NAMES, 2)}
    assert len(palette.NAMES) == 12 and min(pairs.values()) >= 22, min(pairs, key=lambda pair: pairs[pair])
    first, second = (np.array(palette.COLOURS[name]) for name in ('red', 'cyan'))
    expected = np.linalg.norm(palette.to_lab(first) - palette.to_lab(second))
    assert palette.distance(first, second) == palette.distance(second, first) == pytest.approx(expected)


def test_each_name_is_nearest_to_its_colour_and_to_a_shade_of_it() -> None:
    for shade in (1.0, 0.96):
        lab = palette.to_lab(shade * np.array(list(palette.COLOURS.values())))
        assert [palette.NAMES[i] for i in palette.nearest(lab)] == list(palette.NAMES)
    assert palette.nearest(np.zeros((4, 5, 3))).shape == (4, 5)


def test_the_majority_wins_and_the_first_of_equals() -> None:
    def of(*names: str) -> str:
        return palette.majority(palette.to_lab([palette.COLOURS[name] for name in names]))
    assert of('pink', 'blue', 'pink', 'gray') == 'pink' and of('white') == 'white'
    assert of('gray', 'red') == of('red', 'gray') == 'red'


@pytest.mark.parametrize('name', palette.NAMES)
def test_an_accent_stands_out_of_its_fill(name: str) -> None:
    """Darker than a light colour, lighter than a dark one, and of the same hue where it has one."""
    colour, accent = palette.COLOURS[name], palette.accent(name)
    assert all(0 <= value <= 255 for value in accent) and palette.distance(colour, accent) > 25
    light = palette.to_lab(colour)[0] >= 45
    assert (palette.to_lab(accent)[0] < palette.to_lab(colour)[0]) == light
