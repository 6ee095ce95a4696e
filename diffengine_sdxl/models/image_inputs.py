"""Read and check images, masks and latents that a user gives: files, URLs, PIL images, tensors, arrays."""

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

from diffengine_sdxl.datasets.image_files import ImageReader, decode, fetch, is_url
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.request import Request

#: Contents of URLs, oldest first, inside `cached_urls`; at most MAX_CACHED_BYTES.
_CONTENTS: ContextVar[dict[str, bytes] | None] = ContextVar('contents', default=None)
MAX_CACHED_BYTES = 2**28


@contextmanager
def cached_urls() -> Iterator[None]:
    """Fetch each URL once inside; an inner context shares the outer one's cache."""
    cache = _CONTENTS.get()
    token = _CONTENTS.set({} if cache is None else cache)
    try:
        yield
    finally:
        _CONTENTS.reset(token)


def read_image_input(source: str | Path | Image.Image, what: str = 'the condition') -> Image.Image:
    """Return an RGB image from a path, a URL or a PIL image; `what` names it in errors.

    Raises:
        UserError: it cannot be read.
    """
    cache = _CONTENTS.get()
    if cache is not None and isinstance(source, str) and is_url(source):
        if source not in cache:
            cache[source] = fetch(source, what)
        content = cache[source]
        while sum(map(len, cache.values())) > MAX_CACHED_BYTES:
            del cache[next(iter(cache))]
        return decode(content, f"{what} ('{source}')")
    if isinstance(source, Path) or isinstance(source, str) and not is_url(source):
        source = os.path.abspath(os.path.expanduser(source))
    # The user who runs the command names the file, so any folder is allowed.
    return ImageReader('/')(source, what)


def as_image_input(source: Any, what: str) -> Any:
    """Return an image or mask for diffusers' image processor: PIL, a tensor [1, C, H, W] or an array [1, H, W, C].

    Args:
        source: also a path or URL, an array of uint8, or a mask without channels or of bool.
        what: 'image' (C = 3) or 'mask_image' (C = 1).

    Raises:
        UserError: it has another shape or range. The processor would accept it, and the VAE clip it.
    """
    if not isinstance(source, Tensor | np.ndarray):
        return read_image_input(source, 'the image' if what == 'image' else what)
    is_mask, is_array = what == 'mask_image', isinstance(source, np.ndarray)
    kind, channels = 'an array' if is_array else 'a tensor', 1 if is_mask else 3
    values: Any = source
    if is_mask and values.ndim == 2:
        values = values[..., None] if is_array else values[None]
    shape = tuple(values.shape[1:] if values.ndim == 4 and len(values) == 1 else values.shape)
    if len(shape) != 3 or shape[-1 if is_array else 0] != channels or 0 in shape:
        layout = f'H, W, {channels}' if is_array else f'{channels}, H, W'
        latents = '' if is_mask or is_array else ', or latents [4, h, w]'
        raise UserError(f'{what} is {kind} of {list(source.shape)}; it must be [{layout}], for one image, or '
                        f'[n, {layout}]{latents}.')
    values = values.reshape(shape)
    if is_array and values.dtype == np.uint8:
        return Image.fromarray(values[..., 0] if is_mask else values)
    if is_mask and values.dtype in (torch.bool, np.bool_):
        values = values.astype(np.float32) if is_array else values.float()
    if not (np.issubdtype(values.dtype, np.floating) if is_array else values.is_floating_point()):
        raise UserError(f'{what} is {kind} of {values.dtype}; it must be of floats in [0, 1]'
                        + (' or of uint8.' if is_array else '; divide one of 0 to 255 by 255.'))
    low, high = float(values.min()), float(values.max())
    if not (0 <= low and high <= 1):  # also NaN
        hint = ': (x + 1) / 2 converts [-1, 1]' if -1 <= low < 0 and high <= 1 else \
            ': divide one of 0 to 255 by 255' if 0 <= low and 1 < high <= 255 else ''
        raise UserError(f'{what} is {kind} with numbers from {low:g} to {high:g}; they must be in [0, 1]{hint}.')
    return values[None]


def image_size(image: Any) -> tuple[int, int]:
    """Return height and width of what `as_image_input` returns."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[-3:-1]
    return int(height), int(width)


class MaskCrop(NamedTuple):
    """A crop of an image that is repainted at its own size and put back (diffusers' `padding_mask_crop`).

    Attributes:
        image, mask: the whole ones, of equal size.
        box: left, top, right and bottom of the crop, in their pixels.
    """

    image: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    def put_back(self, repainted: Tensor) -> Tensor:
        """Return the whole image [3, H', W'] in [0, 1], of 8 bits, with `repainted` [3, H, W] inside the mask."""
        from diffusers.image_processor import VaeImageProcessor
        crop = to_pil(repainted.float().cpu().numpy())
        whole = VaeImageProcessor().apply_overlay(self.mask, self.image, crop, self.box)
        return torch.from_numpy(np.asarray(whole, dtype=np.float32) / np.float32(255)).permute(2, 0, 1)


def crop_of(request: Request, size: tuple[int, int]) -> MaskCrop | None:
    """Return the crop of a request's `padding_mask_crop` for an output of `size`, or None if it is not set.

    Raises:
        UserError: image or mask is in floats or latents, their sizes differ, or all of the mask is black.
    """
    if request.padding_mask_crop is None:
        return None
    from diffusers.image_processor import VaeImageProcessor
    image, mask = (None if is_latents(value := getattr(request, name)) else as_image_input(value, name)
                   for name in ('image', 'mask_image'))
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
        raise UserError('padding_mask_crop needs image and mask_image as files, PIL images or arrays of uint8.')
    if image.size != mask.size:
        raise UserError(f'padding_mask_crop needs an image and a mask_image of one size; they are {image.width} x '
                        f'{image.height} and {mask.width} x {mask.height} pixels.')
    if mask.convert('L').getextrema()[1] == 0:
        raise UserError('padding_mask_crop crops to what is not black in mask_image, and all of it is black.')
    return MaskCrop(image, mask, VaeImageProcessor.get_crop_region(mask, size[1], size[0], request.padding_mask_crop))


def is_latents(image: Any) -> bool:
    """Return whether a request's `image` is a tensor of latents, not of pixels."""
    return isinstance(image, Tensor) and image.dim() > 2 and image.shape[-3] != 3


def read_latents(source: Any, what: str = 'latents', row: int | None = None) -> Tensor:
    """Return initial noise or latents [4, h, w], fp32, from a tensor or a .safetensors file that holds one.

    Args:
        what: names them in errors.
        row: index into a file's [n, 4, h, w].

    Raises:
        UserError: it cannot be read, has another shape, or is not finite.
    """
    if isinstance(source, str | Path):
        what = f"latents '{source}'"
        source = _load_tensor(source, what)
        if source.dim() == 4 and (row is not None or len(source) > 1):
            if row is None or row >= len(source):
                raise UserError(f'{what} holds {len(source)}; ' + (
                    f'set num_images_per_prompt={len(source)}, or latents_row for one of them.' if row is None else
                    f'row {row}, counted from 0, does not exist.'))
            source = source[row]
        elif row is not None:
            raise UserError(f'{what} must be [n, 4, h, w], a row for each image; it is {list(source.shape)}.')
    if not isinstance(source, Tensor) or source.dim() not in (3, 4) or source.dim() == 4 and len(source) != 1:
        shape = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        raise UserError(f'{what} must be [4, h, w], for one image; it is {shape}.')
    if not bool(torch.isfinite(source).all()):
        raise UserError(f'{what} has NaN or Inf.')
    latents = source[0] if source.dim() == 4 else source
    return latents if latents.dtype == torch.float64 else latents.float()


def _load_tensor(path: str | Path, what: str) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        tensors = load_file(os.path.expanduser(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f'{what} cannot be read as a .safetensors file: {error}') from error
    if len(tensors) != 1:
        raise UserError(f'{what} holds {len(tensors)} tensors; it must hold one.')
    return next(iter(tensors.values()))
