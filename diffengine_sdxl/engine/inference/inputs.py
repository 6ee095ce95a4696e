"""Pictures, masks and latents as a person gives them: files, addresses, PIL, tensors, arrays. Read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl.datasets.images import ImageReader, decode, fetch, is_url
from diffengine_sdxl.engine.inference.request import Request
from diffengine_sdxl.pictures import to_pil

#: What lay behind addresses, oldest first, inside `remembering_urls`; MOST_BYTES of it.
_FETCHED: ContextVar[dict[str, bytes] | None] = ContextVar('fetched', default=None)
MOST_BYTES = 2**28


@contextmanager
def remembering_urls() -> Iterator[None]:
    """Inside, each address is fetched once; one inside another shares what the outer one remembers."""
    token = _FETCHED.set({} if (held := _FETCHED.get()) is None else held)
    try:
        yield
    finally:
        _FETCHED.reset(token)


def read_picture(source: str | Path | Image.Image, what: str = 'the condition') -> Image.Image:
    """An RGB picture from a path, a URL or PIL."""
    held = _FETCHED.get()
    if held is not None and isinstance(source, str) and is_url(source):
        if source not in held:
            held[source] = fetch(source, what)
        content = held[source]
        while sum(map(len, held.values())) > MOST_BYTES:
            del held[next(iter(held))]
        return decode(content, f"{what} ('{source}')")
    if isinstance(source, Path) or isinstance(source, str) and not is_url(source):
        source = os.path.abspath(os.path.expanduser(source))
    # The person who runs the command names the file, so any folder will do.
    return ImageReader('/')(source, what)


def as_picture(source: Any, what: str) -> Any:
    """A picture or a mask as diffusers' image processor takes it: PIL, a tensor [1, C, H, W] or an array [1, H, W, C].

    Args:
        source: also a path or URL, an array of uint8, or a mask without channels or of bool.
        what: 'image' (C = 3) or 'mask_image' (C = 1).

    Raises:
        ValueError: it has another shape or range. The processor itself would take what it says is right, and the VAE
            what is cut off.
    """
    if not isinstance(source, Tensor | np.ndarray):
        return read_picture(source, 'the image' if what == 'image' else what)
    is_mask, is_array = what == 'mask_image', isinstance(source, np.ndarray)
    kind, channels = 'an array' if is_array else 'a tensor', 1 if is_mask else 3
    given = source
    if is_mask and source.ndim == 2:
        source = source[..., None] if is_array else source[None]
    shape = tuple(source.shape[1:] if source.ndim == 4 and len(source) == 1 else source.shape)
    if len(shape) != 3 or shape[-1 if is_array else 0] != channels or 0 in shape:
        wanted = f'[H, W, {channels}]' if is_array else f'[{channels}, H, W]'
        many = f'[n, H, W, {channels}]' if is_array else f'[n, {channels}, H, W]'
        raise ValueError(f'{what} is {kind} of {list(given.shape)}; it must be {wanted}, for one picture, or {many}'
                         + (', or latents [4, h, w].' if not is_mask and not is_array else '.'))
    source = source.reshape(shape)
    if is_array and source.dtype == np.uint8:
        return Image.fromarray(source[..., 0] if is_mask else source)
    if is_mask and source.dtype in (torch.bool, np.bool_):
        source = source.astype(np.float32) if is_array else source.float()
    of_floats = np.issubdtype(source.dtype, np.floating) if is_array else source.is_floating_point()
    if not of_floats:
        raise ValueError(f'{what} is {kind} of {source.dtype}; it must be of floats in [0, 1]'
                         + (' or of uint8.' if is_array else '; divide one of 0 to 255 by 255.'))
    low, high = float(source.min()), float(source.max())
    if not (0 <= low and high <= 1):  # also what is not a number
        hint = ': (x + 1) / 2 brings [-1, 1] there' if -1 <= low < 0 and high <= 1 else \
            ': divide one of 0 to 255 by 255' if 0 <= low and 1 < high <= 255 else ''
        raise ValueError(f'{what} is {kind} with numbers from {low:g} to {high:g}; they must lie in [0, 1]{hint}.')
    return source[None]


def sides(picture: Any) -> tuple[int, int]:
    """Height and width of what `as_picture` gives."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[-3:-1]
    return int(height), int(width)


class Crop(NamedTuple):
    """The part of a picture that is repainted at its own size and put back (diffusers' `padding_mask_crop`).

    Attributes:
        image, mask: the whole ones, of one size. box: left, top, right and bottom of the part, in their pixels.
    """

    image: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    def put_back(self, made: Tensor) -> Tensor:
        """The whole picture [3, H', W'] in [0, 1], of 8 bits, with `made` [3, H, W] where the mask is white."""
        from diffusers.image_processor import VaeImageProcessor
        part = to_pil(made.float().cpu().numpy())
        whole = VaeImageProcessor().apply_overlay(self.mask, self.image, part, self.box)
        return torch.from_numpy(np.asarray(whole, dtype=np.float32) / np.float32(255)).permute(2, 0, 1)


def crop_of(request: Request, size: tuple[int, int]) -> Crop | None:
    """What a request's `padding_mask_crop` cuts out for a picture of `size`; None where it has none.

    Raises:
        ValueError: its image or mask is no picture of pixels, they differ in size, or nothing is white.
    """
    if request.padding_mask_crop is None:
        return None
    from diffusers.image_processor import VaeImageProcessor
    image, mask = (None if are_latents(given := getattr(request, name)) else as_picture(given, name)
                   for name in ('image', 'mask_image'))
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
        raise ValueError('padding_mask_crop cuts out of files, PIL images or arrays of uint8; image or mask_image is '
                         'another array, or a tensor.')
    if image.size != mask.size:
        raise ValueError(f'padding_mask_crop needs an image and a mask_image of one size; they are {image.width} x '
                         f'{image.height} and {mask.width} x {mask.height} pixels.')
    if mask.convert('L').getextrema()[1] == 0:
        raise ValueError('padding_mask_crop cuts out what is not black in mask_image, and all of it is.')
    return Crop(image, mask, VaeImageProcessor.get_crop_region(mask, size[1], size[0], request.padding_mask_crop))


def are_latents(image: Any) -> bool:
    """Whether a Request's `image` is latents: a tensor, and no picture's."""
    return isinstance(image, Tensor) and image.dim() > 2 and image.shape[-3] != 3


def read_latents(source: Any, what: str = 'latents', row: int | None = None) -> Tensor:
    """Starting noise or latents [4, h, w], fp32, from a tensor or a .safetensors file that holds one.

    Args:
        what: words that name them in errors.
        row: which to take of a file that holds [n, 4, h, w].

    Raises:
        ValueError: it is neither, or of another shape, or its numbers are not finite.
    """
    named = what
    if isinstance(source, str | Path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            held = load_file(os.path.expanduser(source))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"latents '{source}' cannot be read as a .safetensors file: {error}") from error
        if len(held) != 1:
            raise ValueError(f"latents '{source}' holds {len(held)} tensors; it must hold one.")
        named, source = f"latents '{source}'", next(iter(held.values()))
        if source.dim() == 4 and (row is not None or len(source) > 1):
            if row is None or row >= len(source):
                raise ValueError(f'{named} holds {len(source)}; ' + (
                    f'give num_images_per_prompt={len(source)}, or latents_row for one of them.' if row is None else
                    f'there is no row {row}, counted from 0, for one more picture.'))
            source = source[row]
        elif row is not None:
            raise ValueError(f'{named} must be [n, 4, h, w], a row for each picture; it is {list(source.shape)}.')
    if not isinstance(source, Tensor) or source.dim() not in (3, 4) or source.dim() == 4 and len(source) != 1:
        shape = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        raise ValueError(f'{named} must be [4, h, w], for one picture; {"this is" if what == "image" else "these are"} '
                         f'{shape}.')
    if not bool(torch.isfinite(source).all()):
        raise ValueError(f'{named}: not all numbers are finite.')
    latents = source[0] if source.dim() == 4 else source
    return latents if latents.dtype == torch.float64 else latents.float()
