"""Pictures for people: labelled grids of images, and curves; and pictures for image encoders."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, SOFT, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120), (200, 200, 200)


def to_pil(image: np.ndarray) -> Image.Image:
    """[3, H, W] or gray [1, H, W] floats in [0, 1] to an RGB image."""
    if len(image) == 1:
        image = image.repeat(3, axis=0)
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def clip_pixels(image: Image.Image, size: int, resample: str = 'bicubic', short_edge: int | None = None,
                stretch: bool = False) -> Tensor:
    """A picture as CLIP's image encoder takes it, but not normalised: float32 [3, size, size] in [0, 1].

    Scaled until the short edge is `size`, and the middle cut out. Source: transformers' CLIPImageProcessor, bitwise
    its version on PIL; the one on torchvision filters otherwise.

    Args:
        image: of any mode.
        size: pixels of the encoder's side.
        resample: a filter of PIL, in small letters.
        short_edge: pixels of the short edge before the cut, where they are more than `size` (DINOv2: 256 for 224).
        stretch: scale both edges to `size` instead, whatever the proportions (SigLIP).
    """
    image = image if image.mode == 'RGB' else image.convert('RGB')
    short, width, height = short_edge or size, image.width, image.height
    if stretch:
        scaled = (size, size)
    elif width <= height:
        scaled = (short, int(short * height / width))
    else:
        scaled = (int(short * width / height), short)
    image = image.resize(scaled, Image.Resampling[resample.upper()])
    left, top = ((side - size) // 2 for side in scaled)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / np.float32(255)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def first_picture(condition: Any) -> Image.Image:
    """The first picture of one sample's condition (a tensor): [C, H, W], or [n, C, H, W] where there are several."""
    first = condition[0] if condition.dim() == 4 else condition
    return to_pil((first if first.shape[0] in (1, 3) else first[:1]).float().cpu().numpy())


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image | None]]], columns: Sequence[str], title: str = '',
                  cell: int = 0) -> Image.Image:
    """A contact sheet: a row of images under each row's label, each column under its own.

    Args:
        rows: (label, images); None leaves a cell empty.
        columns: labels of the columns.
        title: a line at the top.
        cell: side of a cell in pixels; 0 takes the largest image's, between 128 and 512.
    """
    images = [i for _, row in rows for i in row if i is not None]
    if not cell:
        cell = min(512, max([128, *(max(i.size) for i in images)]))
    points = max(12, cell // 18)
    font, line, gap = _font(points), points + 6, 6
    width = gap + len(columns) * (cell + gap)
    wrapped = [wrap(label, font, width - 2 * gap) for label, _ in rows]
    heights = [len(lines) * line + cell + 2 * gap for lines in wrapped]
    title_lines = wrap(title, font, width - 2 * gap) if title else []
    top = 2 * gap + line * (len(title_lines) + 1)
    sheet = Image.new('RGB', (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(title_lines):
        draw.text((gap, gap + i * line), text, INK, font)
    for x, label in enumerate(columns):
        draw.text((gap + x * (cell + gap), top - line - gap), cut(label, font, cell), SOFT, font)
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
            # Small pictures are enlarged in whole pixels, so that what is seen is what was made.
            shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))),
                                 Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(shown, corner)
        y += height
    return sheet


def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that matplotlib brings, which has Greek, Cyrillic and accents; PIL's own has plain Latin alone."""
    found = find_spec('matplotlib')
    path = Path(found.origin).parent / 'mpl-data/fonts/ttf/DejaVuSans.ttf' if found and found.origin else None
    return ImageFont.truetype(str(path), points) if path and path.is_file() else ImageFont.load_default(points)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, three at most; a cut is shown."""
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
    return [cut(line, font, width) for line in lines]


def cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or as much of its beginning as fits into `width` pixels, with dots for the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text}...'


def save_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> None:
    """Write a picture with one panel a curve: name -> (steps, values). A loss also gets its running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 2.6 * len(curves)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for i, (name, (steps, values)) in enumerate(curves.items()):
        axes = figure.add_subplot(len(curves), 1, i + 1)
        smooth = 'loss' in name and len(values) >= 20
        axes.plot(steps, values, linewidth=0.8, alpha=0.4 if smooth else 1.0, color='tab:blue')
        if smooth:
            window = max(5, len(values) // 20)
            mean = np.convolve(values, np.ones(window) / window, mode='valid')
            axes.plot(steps[window - 1:], mean, linewidth=1.6, color='tab:orange', label=f'mean of {window}')
            axes.legend(fontsize=8, frameon=False)
        axes.set_ylabel(name)
        axes.set_xlabel('optimizer step')
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def png_text(path: str | Path, keyword: str, most: int) -> str | None:
    """The text of a PNG's iTXt chunk `keyword`, or None; the file is walked through to its end, no pixel decoded.

    Source: PNG specification, third edition, 5.3 (chunks) and 11.3.3.4 (iTXt).

    Args:
        most: bytes of the text at most; PIL's own reader has no limit here.

    Raises:
        ValueError: it is no PNG, is cut off or damaged, or the text is longer or compressed.
    """
    mark, found = keyword.encode('latin-1') + b'\0', None
    try:
        with open(path, 'rb') as file:
            if file.read(8) != b'\x89PNG\r\n\x1a\n':
                raise ValueError(f"'{path}' is no PNG.")
            size, kind = os.fstat(file.fileno()).st_size, b''
            while kind != b'IEND':
                head = file.read(8)
                length, kind = struct.unpack('>I4s', head) if len(head) == 8 else (size, b'')
                end = file.tell() + length + 4
                if end > size:
                    raise ValueError(f"'{path}' is cut off.")
                if kind == b'iTXt' and found is None and file.read(min(length, len(mark))) == mark:
                    if length > most + len(mark) + 256:
                        raise ValueError(f"'{path}' holds {length} bytes of '{keyword}'; at most {most} are read.")
                    found = file.read(length - len(mark))
                    if zlib.crc32(kind + mark + found).to_bytes(4, 'big') != file.read(4):
                        raise ValueError(f"The chunk '{keyword}' of '{path}' is damaged.")
                file.seek(end)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    if found is None:
        return None
    # Compressed or not, method, language, translated keyword: two bytes, and two strings that end with 0.
    text = found[2:].split(b'\0', 2)[-1]
    if found[:1] != b'\0':
        raise ValueError(f"The chunk '{keyword}' of '{path}' is compressed, as this engine does not write it.")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"The chunk '{keyword}' of '{path}' is damaged: {error}.") from error
