"""Images of every mode to RGB; labelled grids by their pixels: each image complete in its place; loss curves."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import clip_pixels, labelled_grid, save_curves, to_pil, to_rgb

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
    save_curves(tmp_path / 'one.png', {'loss': (steps, values)}, 'run')
    save_curves(tmp_path / 'two.png', {'loss': (steps, [*values[:-1], float('nan')]), 'lr': (steps, [1e-5] * num)},
                'run')
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


def test_image_prompts_of_any_aspect() -> None:
    assert clip_pixels(Image.new('RGB', (1, 800)), 32).shape == (3, 32, 32)
    with pytest.raises(UserError, match='An image prompt of 1000000 x 1, scaled .* limits.image_pixels is 67108864'):
        clip_pixels(Image.new('RGB', (1, 1000000)), 32)
