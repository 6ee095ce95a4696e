"""Images to RGB, labelled grids of images, loss curves, text of PNGs, and pixels for image encoders."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError

PAPER, INK, SOFT, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120), (200, 200, 200)


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert floats [3, H, W], or gray [1, H, W], in [0, 1] to an RGB image."""
    if len(image) == 1:
        image = image.repeat(3, axis=0)
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright (EXIF) and in sRGB: transparency becomes white, deep values are scaled to 8 bits.

    Colours of 8 bits a channel are converted from the file's ICC profile, with the perceptual intent; without one they
    are taken for sRGB. 16-bit values are divided by 257; 32-bit integers are taken for 8 bits if none is above 255,
    else for 16; floats are multiplied by 255.

    Raises:
        UserError: floats are not in [0, 1], or 32-bit integers not in [0, 65535].
    """
    sixteen = image.mode.startswith('I;') or image.format == 'PNG'  # older versions of PIL open such PNGs in mode I
    profile = image.info.get('icc_profile')
    image = ImageOps.exif_transpose(image)
    convert: Callable[[Image.Image], Image.Image] = _plain
    if image.mode == 'F':
        low, high = _value_range(image)
        if not (low >= 0 and high <= 1):  # NaN too
            values = 'NaN or Inf' if low != low else f'numbers from {low:g} to {high:g}'
            raise UserError(f'holds {values} in floating point; they must be in [0, 1], black to white. Scale it, or '
                            'save it with 8 or 16 bits.')
        convert = _scaled(255.0)
    elif image.mode.startswith('I'):
        # PIL's conversion would clip a 16-bit depth map at 255 instead of scaling it.
        low, high = (0, 65535) if sixteen else _value_range(image)
        if not 0 <= low <= high <= 65535:
            raise UserError(f'holds 32-bit integers from {low:g} to {high:g}; they must be in [0, 65535]. Scale it, or '
                            'save it with 8 or 16 bits.')
        convert = _scaled(1.0 if high <= 255 else 1 / 257)
    else:
        colours = _from_profile(profile, image.mode) if profile else None
        if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
            convert = _on_white(colours or _plain)
        elif colours is not None:
            convert = colours
        elif image.mode == 'RGB':
            return image
    result = Image.new('RGB', image.size)
    for box in _strips(image):  # in parts: a large image would need several times its memory
        result.paste(convert(image.crop(box)), box)
    return result


#: PIL's modes of 8 bits -> the mode in which their colours are converted.
_COLOURS = {**dict.fromkeys(('L', 'LA', 'La'), 'L'), 'CMYK': 'CMYK',
            **dict.fromkeys(('RGB', 'RGBA', 'RGBa', 'RGBX', 'P', 'PA'), 'RGB')}
#: ICC's names of colour spaces -> the same.
_SPACES = {'GRAY': 'L', 'CMYK': 'CMYK', 'RGB': 'RGB'}


def _from_profile(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return the conversion of an image of `mode` from its ICC profile to sRGB; None: its colours stay as they are."""
    try:
        space, transform = _transform(profile)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        space, transform = '', None
    if space != _COLOURS.get(mode):
        warnings.warn('The colour profile of an image is damaged, or of another colour space than the image, '
                      'which is read as sRGB.')
        return None
    if transform is None:
        return None
    return lambda image: transform.apply(image if image.mode == space else image.convert(space))


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, Any]:
    """Return the mode that an ICC profile is for and its transform to sRGB, None if this changes nothing.

    A profile of sRGB itself would change the last bit, by its rounding.

    Raises:
        PyCMSError, OSError: it is damaged.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = _SPACES.get(source.profile.xcolor_space.strip(), '')
    if not space:
        return space, None
    transform = ImageCms.buildTransform(source, ImageCms.createProfile('sRGB'), space, 'RGB',
                                        ImageCms.Intent.PERCEPTUAL)
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    colours = Image.fromarray(probe).convert(space)
    change = np.asarray(transform.apply(colours), dtype=int) - np.asarray(colours.convert('RGB'), dtype=int)
    return space, transform if np.abs(change).max() > 1 else None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the height and width of an opened image as `to_rgb` returns it, without decoding it.

    What stands behind a PNG's pixels is not seen, unless the image is loaded.
    """
    # Not PNG's own `getexif`, which loads the image to look behind its pixels.
    # An opened TIFF has the size of the image that is turned when it is decoded.
    turned = image.format != 'TIFF' and Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of about a million pixels that cover an image."""
    rows = max(1, 2**20 // max(1, image.width))
    return ((0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows))


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Return the lowest and the highest value of an image of one channel; NaN if one is not finite."""
    low, high = np.inf, -np.inf
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        if not np.isfinite(values).all():
            return np.nan, np.nan
        low, high = min(low, values.min()), max(high, values.max())
    return float(low), float(high)


def _plain(image: Image.Image) -> Image.Image:
    return image.convert('RGB')


def _scaled(factor: float) -> Callable[[Image.Image], Image.Image]:
    def convert(image: Image.Image) -> Image.Image:
        values = np.asarray(image).astype(np.float64) * factor
        return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).convert('RGB')
    return convert


def _on_white(colours: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    def convert(image: Image.Image) -> Image.Image:
        image = image.convert('RGBA')
        if colours is not _plain:
            alpha = image.getchannel('A')
            image = colours(image)
            image.putalpha(alpha)
        return Image.alpha_composite(Image.new('RGBA', image.size, (255, 255, 255, 255)), image).convert('RGB')
    return convert


def check_pixels(height: int, width: int, what: str) -> None:
    """Check that an image to be made in memory is within `limits.image_pixels`.

    Raises:
        UserError: it is not.
    """
    if height * width > limits.CURRENT.image_pixels:
        raise UserError(f'{what} would be {height} x {width} pixels (height x width), and limits.image_pixels is '
                        f'{limits.CURRENT.image_pixels}. Crop or remove the image, or raise that.')


def clip_pixels(image: Image.Image, size: int, resample: str = 'bicubic', short_edge: int | None = None,
                stretch: bool = False) -> Tensor:
    """Resize and center-crop an image for CLIP's image encoder, without normalising: float32 [3, size, size] in [0, 1].

    Source: transformers' CLIPImageProcessorPil, bitwise; the version on torchvision filters differently.

    Args:
        image: of any mode.
        size: side of the encoder's input in pixels.
        resample: a filter of PIL, in lower case.
        short_edge: short edge before the crop in pixels, if it is not `size` (DINOv2: 256 for 224).
        stretch: scale both edges to `size` and ignore the aspect ratio (SigLIP).
    """
    image = image if image.mode == 'RGB' else image.convert('RGB')
    short, width, height = short_edge or size, image.width, image.height
    if stretch:
        scaled = (size, size)
    elif width <= height:
        scaled = (short, int(short * height / width))
    else:
        scaled = (int(short * width / height), short)
    check_pixels(scaled[1], scaled[0], f'An image prompt of {height} x {width}, scaled for the image encoder,')
    image = image.resize(scaled, Image.Resampling[resample.upper()])
    left, top = ((side - size) // 2 for side in scaled)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / np.float32(255)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def first_image(condition: Tensor) -> Image.Image:
    """Return the first image of one sample's condition, a tensor [C, H, W] or, for several images, [n, C, H, W]."""
    first = condition[0] if condition.dim() == 4 else condition
    return to_pil((first if first.shape[0] in (1, 3) else first[:1]).float().cpu().numpy())


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image | None]]], columns: Sequence[str], title: str = '',
                  cell: int = 0) -> Image.Image:
    """Draw a contact sheet: each row of images under the row's label, each column under its own.

    Args:
        rows: (label, images); None leaves a cell empty.
        columns: labels of the columns.
        title: a line at the top.
        cell: side of a cell in pixels; 0: that of the largest image, between 128 and 512.
    """
    images = [i for _, row in rows for i in row if i is not None]
    if not cell:
        cell = min(512, max([128, *(max(i.size) for i in images)]))
    points = max(12, cell // 18)
    font, line, gap = _font(points), points + 6, 6
    width = gap + len(columns) * (cell + gap)
    wrapped = [_wrap(label, font, width - 2 * gap) for label, _ in rows]
    heights = [len(lines) * line + cell + 2 * gap for lines in wrapped]
    title_lines = _wrap(title, font, width - 2 * gap) if title else []
    top = 2 * gap + line * (len(title_lines) + 1)
    sheet = Image.new('RGB', (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(title_lines):
        draw.text((gap, gap + i * line), text, INK, font)
    for x, label in enumerate(columns):
        draw.text((gap + x * (cell + gap), top - line - gap), _cut(label, font, cell), SOFT, font)
    y = top
    for (_, row), lines, height in zip(rows, wrapped, heights, strict=True):
        for i, text in enumerate(lines):
            draw.text((gap, y + i * line), text, INK, font)
        for x, image in enumerate(row):
            corner = (gap + x * (cell + gap), y + len(lines) * line)
            if image is None:
                draw.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), outline=FAINT)
                continue
            shown = image.convert('RGB')
            scale = cell / max(shown.size)
            # Enlarge small images in whole pixels, to show the pixels that were generated.
            shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))),
                                 Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(shown, corner)
        y += height
    return sheet


def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load matplotlib's font, which has Greek, Cyrillic and accents; PIL's own has plain Latin only."""
    spec = find_spec('matplotlib')
    path = Path(spec.origin).parent / 'mpl-data/fonts/ttf/DejaVuSans.ttf' if spec and spec.origin else None
    return ImageFont.truetype(str(path), points) if path and path.is_file() else ImageFont.load_default(points)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` into at most three lines of at most `width` pixels; dots show where it was cut."""
    lines, current = [], ''
    for word in text.split():
        trial = f'{current} {word}'.strip()
        if current and font.getlength(trial) > width:
            lines.append(current)
            current = word
        else:
            current = trial
    lines.append(current)
    lines = lines if len(lines) <= 3 else [*lines[:2], lines[2] + ' ...']
    return [_cut(line, font, width) for line in lines]


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut `text` to `width` pixels, with dots in place of the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text}...'


class Curve(NamedTuple):
    """Values at steps; NaN breaks the line.

    Attributes:
        low, high: of a band around the values, such as 95 % intervals; NaN where a value has none.
        better: 1 or -1 marks the step of the highest or lowest value, of equal ones the first; 0 marks none.
    """

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    better: int = 0


def save_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Plot curves, panel -> name -> curve; a loss also with its running mean.

    A curve alone in its panel needs no name. One of less than 20 values has dots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for i, (panel, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        for k, (name, (steps, values, low, high, better)) in enumerate(sorted(curves.items())):
            alone = len(curves) == 1
            smooth = 'loss' in name and len(values) >= 20 and not name.startswith('val/')
            axes.plot(steps, values, linewidth=0.8, alpha=0.4 if smooth else 1.0, color=f'C{k}',
                      marker='.' if len(values) < 20 else '', label=None if alone or smooth else name)
            if low:
                axes.fill_between(steps, low, high, color=f'C{k}', alpha=0.15, linewidth=0)
            if better and np.isfinite(values).any():
                best = int(np.nanargmax(np.multiply(values, better)))
                axes.plot(steps[best], values[best], 'o', markersize=9, markerfacecolor='none', color=f'C{k}',
                          label=f'best: step {steps[best]:g}')
            if smooth:
                window = max(5, len(values) // 20)
                mean = np.convolve(values, np.ones(window) / window, mode='valid')
                label = f'mean of {window}' if alone else f'{name}, mean of {window}'
                axes.plot(steps[window - 1:], mean, linewidth=1.6, color='C1' if alone else f'C{k}', label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
        axes.ticklabel_format(axis='y', useOffset=False)
        axes.set_ylabel(panel)
        axes.set_xlabel('optimizer step')
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def png_text(path: str | Path, keyword: str, max_bytes: int) -> str | None:
    """Return the text of a PNG's iTXt chunk `keyword`, or None; read all chunks but decode no pixel.

    Source: PNG specification, third edition, 5.3 (chunks) and 11.3.3.4 (iTXt).

    Args:
        max_bytes: limit on the text's length; PIL's reader has none.

    Raises:
        UserError: the file is not a PNG, is cut off or damaged, or the text is too long or compressed.
    """
    mark, chunk = keyword.encode('latin-1') + b'\0', None
    try:
        with open(path, 'rb') as file:
            if file.read(8) != b'\x89PNG\r\n\x1a\n':
                raise UserError(f"'{path}' is not a PNG.")
            size, kind = os.fstat(file.fileno()).st_size, b''
            while kind != b'IEND':
                head = file.read(8)
                length, kind = struct.unpack('>I4s', head) if len(head) == 8 else (size, b'')
                end = file.tell() + length + 4
                if end > size:
                    raise UserError(f"'{path}' is cut off.")
                if kind == b'iTXt' and chunk is None and file.read(min(length, len(mark))) == mark:
                    if length > max_bytes + len(mark) + 256:
                        raise UserError(f"'{path}' holds {length} bytes of '{keyword}'; at most {max_bytes} are read.")
                    chunk = file.read(length - len(mark))
                    if zlib.crc32(kind + mark + chunk).to_bytes(4, 'big') != file.read(4):
                        raise UserError(f"The chunk '{keyword}' of '{path}' is damaged.")
                file.seek(end)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
    if chunk is None:
        return None
    # Compression flag and method, one byte each; then language and translated keyword, which end with 0.
    text = chunk[2:].split(b'\0', 2)[-1]
    if chunk[:1] != b'\0':
        raise UserError(f"The chunk '{keyword}' of '{path}' is compressed; diffengine_sdxl does not write it so.")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"The chunk '{keyword}' of '{path}' is damaged: {error}.") from error
