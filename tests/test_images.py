"""Images of every mode to RGB; labelled grids by their pixels: each image complete in its place; loss curves."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import Curve, clip_pixels, labelled_grid, save_curves, to_pil, to_rgb

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 0, 250)]
LONG = 'a photograph of a very long prompt that goes on and on, '
Box = tuple[int, int, int, int]


def flat(index: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.new('RGB', size, COLOURS[index])


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> Box:
    """Where `colour` is; it must fill its box."""
    mask = (np.asarray(sheet) == colour).all(-1)
    ys, xs = np.nonzero(mask)
    left, top, right, bottom = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    assert mask[top:bottom, left:right].all()
    return left, top, right, bottom


def ink(sheet: Image.Image, without: Image.Image) -> Box:
    """The box in which two sheets of one size differ."""
    assert sheet.size == without.size
    changed = ImageChops.difference(sheet, without).getbbox()
    assert changed is not None
    return changed


def grid(labels: tuple[str, str] = ('x', 'x'), columns: tuple[str, str] = ('c', 'c'), title: str = 't',
         cell: int = 0) -> Image.Image:
    rows = [(labels[i], [flat(2 * i), flat(2 * i + 1)]) for i in range(2)]
    return labelled_grid(rows, columns, title, cell)


@pytest.mark.parametrize('cell', [0, 200])
@pytest.mark.parametrize('labels', [('x', 'x'), (LONG, 5 * LONG), ('x' * 300, '')])
def test_images_are_complete_and_in_rows_and_columns(labels: tuple[str, str], cell: int) -> None:
    sheet = grid(labels, (LONG, LONG), 3 * LONG, cell)
    boxes = [box(sheet, c) for c in COLOURS]
    side = cell or 128
    assert all((b[2] - b[0], b[3] - b[1]) == (side, side) for b in boxes)
    assert boxes[0][1] == boxes[1][1] < boxes[2][1] == boxes[3][1] and boxes[0][3] < boxes[2][1]
    assert boxes[0][0] == boxes[2][0] < boxes[1][0] == boxes[3][0] and boxes[0][2] < boxes[1][0]
    assert max(b[2] for b in boxes) <= sheet.width and max(b[3] for b in boxes) <= sheet.height


@pytest.mark.parametrize('cell', [0, 400])
@pytest.mark.parametrize('text', ['gjpq|', LONG, 'W' * 200, 'Ünïcode 東京'])
def test_labels_stay_in_their_place(text: str, cell: int) -> None:
    """A column's label over its column, a row's over its images, the title on top; none over another."""
    images = [box(grid(cell=cell), c) for c in COLOURS]
    sheet = grid(columns=(text, 'c'), cell=cell)
    first, second = images[0], images[1]
    left = ink(sheet, grid(columns=(' ', 'c'), cell=cell))
    assert first[0] <= left[0] and left[2] <= second[0] and left[3] <= first[1]
    right = ink(grid(columns=('c', text), cell=cell), grid(columns=('c', ' '), cell=cell))
    assert second[0] <= right[0] and right[2] <= sheet.width and right[3] <= second[1]
    # Row labels: drawn alone, they must not touch images, the other row, column labels or the margin.
    with_row = labelled_grid([(text, [flat(0), flat(1)]), ('x', [flat(2), flat(3)])], ['c', 'c'], 't', cell)
    blank = labelled_grid([(text, [flat(0), flat(1)]), ('x', [flat(2), flat(3)])], ['', ''], 't', cell)
    over = [box(with_row, c) for c in COLOURS]
    columns = ink(with_row, blank)
    dark = (np.asarray(blank).max(-1) < 120) & (np.asarray(blank).min(-1) > 5)
    rows = np.nonzero(dark.any(1))[0]
    below_columns = rows[(rows >= columns[3]) & (rows < over[0][1])]
    assert len(below_columns) > 3  # the label is there, between its column's labels and its images
    assert not dark[:, -4:].any() and not dark[over[0][3]:over[0][3] + 6].any()


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    """Enlarging adds no colours; shrinking smooths, also tall images that are narrower than a cell."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    sheet = np.asarray(labelled_grid([('', [Image.fromarray(noise)])], [''], cell=128))
    place = [(y, x) for y in range(sheet.shape[0] - 127) for x in range(sheet.shape[1] - 127)
             if (sheet[y:y + 128:8, x:x + 128:8] == noise).all()]
    assert len(place) >= 1
    y, x = place[0]
    assert (sheet[y:y + 128, x:x + 128] == noise.repeat(8, 0).repeat(8, 1)).all()
    stripes = np.zeros((600, 100, 3), dtype=np.uint8)
    stripes[::2] = 255
    smooth = np.asarray(labelled_grid([('', [Image.fromarray(stripes)])], [''], cell=128))
    assert ((smooth > 60) & (smooth < 200)).sum() > 1000  # gray, not a chance choice of black and white lines


def test_aspect_ratio_is_kept_and_missing_images_are_frames() -> None:
    sheet = labelled_grid([('', [flat(0, (64, 128)), None, flat(1, (256, 64))])], ['a', 'b', 'c'])
    tall, wide = box(sheet, COLOURS[0]), box(sheet, COLOURS[1])
    assert (tall[2] - tall[0], tall[3] - tall[1]) == (128, 256)
    assert (wide[2] - wide[0], wide[3] - wide[1]) == (256, 64)
    assert wide[0] - tall[0] == 2 * (256 + 6)
    assert labelled_grid([], ['a']).width > 0 and labelled_grid([('x', [None])], ['a']).width > 128


def test_the_cell_follows_the_largest_image() -> None:
    for side, expected in ((32, 128), (300, 300), (1024, 512)):
        left, _, right, _ = box(labelled_grid([('', [flat(0, (side, side))])], ['']), COLOURS[0])
        assert right - left == expected


def test_to_pil() -> None:
    """[C, H, W] in [0, 1] to RGB, rounded and clipped; gray images too."""
    image = np.zeros((3, 2, 4), dtype=np.float32)
    image[0, 1, 3], image[1, 0, 0], image[2] = 1.7, 0.5, -0.2
    got = np.asarray(to_pil(image))
    assert got.shape == (2, 4, 3) and tuple(got[1, 3]) == (255, 0, 0) and tuple(got[0, 0]) == (0, 128, 0)
    gray = to_pil(np.full((1, 2, 4), 0.5, dtype=np.float32))
    assert gray.mode == 'RGB' and gray.size == (4, 2) and gray.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize('num', [1, 5, 200])
def test_curves(tmp_path: Path, num: int) -> None:
    """A readable image with one panel per curve; also of one value, and of values that are not finite."""
    steps = list(range(1, num + 1))
    values = [1 / s for s in steps]
    save_curves(tmp_path / 'one.png', {'loss': {'loss': Curve(steps, values)}}, 'run')
    save_curves(tmp_path / 'two.png', {
        'loss': {'loss': Curve(steps, [*values[:-1], float('nan')], [0.0] * num, [*values[:-1], float('nan')], -1)},
        'lr': {'lr': Curve(steps, [1e-5] * num)}}, 'run')
    one, two = (Image.open(tmp_path / f'{n}.png') for n in ('one', 'two'))
    one.load()
    two.load()
    assert one.width == two.width and two.height == pytest.approx(2 * one.height, rel=0.02)
    if num > 1:
        pixels = np.asarray(one.convert('RGB')).astype(int)
        assert ((pixels[..., 2] - pixels[..., 0]) > 50).sum() > 100  # the curve, blue
        assert bool((((pixels[..., 0] - pixels[..., 2]) > 150)).sum() > 50) == (num >= 20)  # its mean, orange


def encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """Write an image to a file's bytes and read it with PIL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def values(image: Image.Image) -> Any:
    """The first row's pixels, or gray values."""
    pixels = np.asarray(to_rgb(image))[0]
    return pixels[:, 0].tolist() if (pixels == pixels[:, :1]).all() else pixels.tolist()


def test_modes_and_orientation() -> None:
    red = Image.new('RGBA', (2, 1), (255, 0, 0, 255))
    red.putpixel((1, 0), (0, 0, 0, 0))
    assert values(red) == [[255, 0, 0], [255, 255, 255]]
    palette = Image.new('P', (2, 1))
    palette.putpalette([9, 8, 7] * 256)
    assert values(encoded(palette, 'PNG')) == [[9, 8, 7]] * 2
    assert values(encoded(palette, 'PNG', transparency=0)) == [255, 255]
    assert values(Image.new('L', (1, 1), 7)) == [7] and values(encoded(Image.new('1', (1, 1), 1), 'PNG')) == [255]
    assert values(encoded(Image.new('CMYK', (1, 1), (0, 0, 0, 255)), 'TIFF')) == [0]
    wide = Image.new('RGB', (3, 2))
    wide.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees to the right
    upright = to_rgb(encoded(wide, 'PNG', exif=exif))
    assert upright.size == (2, 3) and upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize('kind', ['GIF', 'TIFF', 'PNG'])
def test_the_first_frame(kind: str) -> None:
    assert values(encoded(flat(0), kind, save_all=True, append_images=[flat(1)]))[0] == [250, 0, 0]


@pytest.mark.parametrize(('dtype', 'given', 'expected'), [
    (np.float32, [0, 0.25, 0.5, 1], [0, 64, 128, 255]), (np.int32, [0, 100, 255], [0, 100, 255]),
    (np.int32, [0, 25700, 65535], [0, 100, 255]), (np.uint16, [0, 200, 25700, 65535], [0, 1, 100, 255])])
def test_deep_values_are_scaled(dtype: Any, given: list[float], expected: list[int]) -> None:
    """Also in parts: an image of more than a million pixels has no seams."""
    array = np.array([given], dtype)
    assert values(encoded(Image.fromarray(array), 'TIFF')) == expected
    large = np.asarray(to_rgb(Image.fromarray(np.tile(array, (400, 1000)))))
    assert (large[..., 0] == np.tile(expected, (400, 1000))).all()


@pytest.mark.parametrize(('dtype', 'given', 'message'), [
    (np.float32, [0, 255], r'numbers from 0 to 255 in floating point; they must be in \[0, 1\]'),
    (np.float32, [-1, 1], 'numbers from -1 to 1'), (np.float32, [0, np.nan], 'NaN or Inf'),
    (np.float32, [0, np.inf], 'NaN or Inf'), (np.int32, [0, 70000], r'integers from 0 to 70000; .*\[0, 65535\]'),
    (np.int32, [-1, 1], 'integers from -1 to 1')])
def test_deep_values_out_of_range(dtype: Any, given: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_rgb(Image.fromarray(np.array([given], dtype)))


#: XYZ of D50 by linear R, G, B (columns): sRGB and Adobe RGB (1998), both adapted by Bradford. (brucelindbloom.com)
SRGB = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
                 [0.0139322, 0.0971045, 0.7141733]])
ADOBE = np.array([[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197],
                  [0.0194811, 0.0608902, 0.7448387]])


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b'mntr', pcs: bytes = b'XYZ ') -> bytes:
    """A profile of ICC.1:2001-04, with a white point of D50."""
    tags = {b'desc': b'desc' + struct.pack('>II', 0, 2) + b'x' + bytes(80), b'cprt': b'text' + bytes(5),
            b'wtpt': xyz([0.9642, 1, 0.8249]), **tags}
    table, data, at = struct.pack('>I', len(tags)), b'', 132 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack('>II', at + len(data), len(value))
        data += value
    header = struct.pack('>I4sI4s4s4s12s4s', at + len(data), b'', 0x02400000, kind, space, pcs, bytes(12), b'acsp')
    return header.ljust(68, b'\0') + xyz([0.9642, 1, 0.8249])[8:].ljust(60, b'\0') + table + data


def xyz(values: Any) -> bytes:
    return b'XYZ ' + bytes(4) + struct.pack('>iii', *(round(v * 65536) for v in values))


def gamma(exponent: float) -> bytes:
    return b'curv' + struct.pack('>IIH', 0, 1, round(exponent * 256))


def rgb_profile(matrix: Any, exponent: float) -> bytes:
    return icc(b'RGB ', {tag + what: value for i, tag in enumerate((b'r', b'g', b'b')) for what, value in (
        (b'XYZ', xyz(matrix[:, i])), (b'TRC', gamma(exponent)))})


def to_srgb(values: Any, matrix: Any, exponent: float) -> Any:
    """Levels of sRGB by the formulas of IEC 61966-2-1."""
    linear = np.linalg.inv(SRGB) @ matrix @ (np.array(values) / 255) ** exponent
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize('colour', [(255, 0, 0), (0, 128, 255), (40, 200, 90), (255, 255, 255), (7, 7, 7)])
def test_colour_profiles(colour: tuple[int, int, int]) -> None:
    """Those of an image, of a palette, below transparency; turned as Exif says."""
    profile, expected = rgb_profile(ADOBE, 2.19921875), to_srgb(colour, ADOBE, 2.19921875)
    exif = Image.Exif()
    exif[274] = 6
    image = encoded(Image.new('RGB', (3, 1), colour), 'PNG', icc_profile=profile, exif=exif)
    assert to_rgb(image).size == (1, 3)
    np.testing.assert_allclose(np.asarray(to_rgb(image))[2, 0], expected, atol=1)
    palette = Image.new('P', (2, 1))
    palette.putpalette([*colour] * 256)
    np.testing.assert_allclose(values(encoded(palette, 'PNG', icc_profile=profile))[0], expected, atol=1)
    half = encoded(Image.new('RGBA', (1, 1), (*colour, 51)), 'PNG', icc_profile=profile)
    np.testing.assert_allclose(np.asarray(to_rgb(half))[0, 0], 0.2 * expected + 0.8 * 255, atol=1.5)


def test_profiles_of_gray_and_of_ink() -> None:
    gray = icc(b'GRAY', {b'kTRC': gamma(1.0)})
    expected = to_srgb([10, 10, 10], SRGB, 1.0)[0]
    for mode in ('L', 'LA'):
        image = encoded(Image.new(mode, (1, 1), 10 if mode == 'L' else (10, 255)), 'PNG', icc_profile=gray)
        assert image.mode == mode and values(image) == pytest.approx([expected], abs=1)
    deep = encoded(Image.fromarray(np.array([[257 * 10]], np.uint16)), 'PNG', icc_profile=gray)
    assert values(deep) == [10]  # a depth, no colour
    # Two grid points for each ink: paper of L* 90, each ink takes 20 and adds a tint, black 60.
    nodes = [(90 - 20 * (c + m + y) / 1.5 - 30 * k, 20 * m - 20 * c, 20 * y)
             for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = bytes(range(256))
    lut = b'mft1' + bytes(4) + bytes((4, 3, 2, 0)) + xyz([1, 0, 0])[8:] + xyz([0, 1, 0])[8:] + xyz([0, 0, 1])[8:] + (
        4 * table + bytes(round(v) for L, a, b in nodes for v in (L * 2.55, a + 128, b + 128)) + 3 * table)
    ink = icc(b'CMYK', {b'A2B0': lut}, b'prtr', b'Lab ')
    image = encoded(Image.new('CMYK', (1, 1), (200, 30, 90, 10)), 'TIFF', icc_profile=ink)
    by_littlecms = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(ink)),
                                             ImageCms.createProfile('sRGB'), outputMode='RGB')
    assert by_littlecms is not None and values(image) == np.asarray(by_littlecms)[0].tolist()
    assert np.abs(np.asarray(to_rgb(image), int) - np.asarray(image.convert('RGB'), int)).max() > 20


def test_srgb_stays_as_it_is() -> None:
    """Also by another maker's table of its curve, whose rounding would move some colours by a level."""
    level = np.arange(1024) / 1023
    curve = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    table = b'curv' + struct.pack('>II1024H', 0, 1024, *(curve * 65535).round().astype(int).tolist())
    tags = {tag + what: value for i, tag in enumerate((b'r', b'g', b'b')) for what, value in (
        (b'XYZ', xyz(SRGB[:, i])), (b'TRC', table))}
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), icc(b'RGB ', tags), None):
        assert np.array_equal(to_rgb(encoded(pixels, 'PNG', icc_profile=profile)), pixels)


@pytest.mark.parametrize('profile', [b'no profile' * 20, icc(b'GRAY', {b'kTRC': gamma(1.0)}), icc(b'RGB ', {}),
                                     icc(b'CMYK', {}, b'prtr', b'Lab ')])
def test_profiles_that_do_not_fit(profile: bytes) -> None:
    with pytest.warns(UserWarning, match='colour profile of an image is damaged, or of another colour space'):
        assert values(encoded(Image.new('RGB', (1, 1), (9, 80, 200)), 'PNG', icc_profile=profile)) == [[9, 80, 200]]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert values(Image.new('RGB', (1, 1), (9, 80, 200))) == [[9, 80, 200]]


def test_image_prompts_of_any_aspect() -> None:
    assert clip_pixels(Image.new('RGB', (1, 800)), 32).shape == (3, 32, 32)
    with pytest.raises(UserError, match='An image prompt of 1000000 x 1, scaled .* limits.image_pixels is 67108864'):
        clip_pixels(Image.new('RGB', (1, 1000000)), 32)
