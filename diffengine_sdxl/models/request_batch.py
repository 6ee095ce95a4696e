"""Make a Batch from requests: prompts, images and sizes as a user gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, did_you_mean, listed
from diffengine_sdxl.models.image_inputs import (
    as_image_input,
    crop_of,
    image_size,
    is_latents,
    read_image_input,
    read_latents,
)
from diffengine_sdxl.models.prompt_branches import default_syntax
from diffengine_sdxl.protocols import Model
from diffengine_sdxl.request import Request
from diffengine_sdxl.structures import Batch, Start, to_device

#: A refiner's aesthetic scores in diffusers.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


def request_batch(model: Model, requests: Sequence[Request], size: tuple[int, int], continues: bool = False) -> Batch:
    """Return a batch of one image for each request, on the model's device.

    Args:
        model: an SDXL.
        requests: all with or all without image, mask, latents and conditions of the same adapters.
        size: height and width of the images, in pixels.
        continues: whether it will start from another model's latents.

    Raises:
        UserError: an adapter is unknown, or an image cannot be read or does not match the others.
    """
    first, num = requests[0], len(requests)
    negative, negative_2 = _texts(requests, 'negative_prompt'), _texts(requests, 'negative_prompt_2', 'negative_prompt')
    if negative is None and negative_2 is not None:
        negative = [''] * num
    return to_device(Batch(
        text=[r.prompt for r in requests], text_2=_texts(requests, 'prompt_2', 'prompt'), negative_text=negative,
        negative_text_2=negative_2, time_ids=_stack(_time_ids(model, r, size) for r in requests),
        negative_time_ids=_stack(_negative_time_ids(model, r, size, continues or r.image is not None)
                                 for r in requests),
        key=[f'prompt {i}' for i in range(num)], epoch=torch.zeros(num, dtype=torch.int64),
        seed=torch.tensor([r.seed for r in requests], dtype=torch.int64), conditions=_conditions(model, requests, size),
        size=size, start=_start(model, requests, size), prompt_syntax=first.prompt_syntax or default_syntax(model),
        clip_skip=first.clip_skip), model.device)


def size_of(model: Model, request: Request) -> tuple[int, int]:
    """Return height and width, in pixels, of a request's images.

    Those that it sets; else those of its image, latents or control image, rounded down to a valid size as in
    diffusers; else the base's.
    """
    if request.height is not None and request.width is not None:
        return request.height, request.width
    side = model.unet.config.sample_size * model.vae_factor
    height, width = _natural_size(model, request) or (side, side)
    return request.height or height, request.width or width


def _natural_size(model: Model, request: Request) -> tuple[int, int] | None:
    """Return the size of the input image or latents, or of the first condition of the output's size."""
    image = request.image
    if image is None and request.latents is not None:
        image = read_latents(request.latents, row=request.latents_row)
    if is_latents(image):
        height, width = read_latents(image, 'image').shape[-2:]
        return height * model.vae_factor, width * model.vae_factor
    if image is None:
        image = next((value for name, value in request.conditions.items()
                      if name in model.adapters and model.adapters[name].condition_has_image_size), None)
    if image is None or isinstance(image, Mapping):
        return None
    divisor = model.size_divisor
    height, width = (max(side // divisor, 1) * divisor for side in image_size(as_image_input(image, 'image')))
    return height, width


def _texts(requests: Sequence[Request], name: str, other: str = '') -> list[str] | None:
    """Return one text per request, or None if no request sets it; default to `other`, else ''."""
    texts = [getattr(r, name) for r in requests]
    if all(text is None for text in texts):
        return None
    return [text if text is not None else (getattr(r, other) if other else '') or ''
            for r, text in zip(requests, texts, strict=True)]


def _stack(rows: Iterable[list[float] | None]) -> Any:
    rows = list(rows)
    return None if rows[0] is None else torch.tensor(rows, dtype=torch.float32)


def _time_ids(model: Model, request: Request, size: tuple[int, int]) -> list[float]:
    """Return original size, corner of the crop, and target size or score (Podell et al. 2023, SDXL, section 2.2)."""
    score = AESTHETIC_SCORE if request.aesthetic_score is None else request.aesthetic_score
    last = (score,) if model.is_refiner else request.target_size or size
    return [*(request.original_size or size), *request.crops_coords_top_left, *last]


def _negative_time_ids(model: Model, request: Request, size: tuple[int, int], from_image: bool) -> list[float] | None:
    """Return the unconditional branch's, with diffusers' defaults, or None if they are the conditional's.

    Args:
        from_image: it starts from an image or latents; then diffusers defaults to the conditional corner.

    Raises:
        UserError: one of the sizes is set without the other. With an image, diffusers uses each by itself; with text
            only, both or none.
    """
    original, target, corner = (request.negative_original_size, request.negative_target_size,
                                request.negative_crops_coords_top_left)
    if not model.is_refiner and not from_image:
        if (original is None) != (target is None):
            names = ['negative_original_size', 'negative_target_size']
            present, absent = names if target is None else names[::-1]
            raise UserError(f'{present}={original or target} goes with {absent} where there is no image; give both, or '
                            'none.')
        if original is None and corner is None:
            return None
    if corner is None:
        corner = request.crops_coords_top_left if from_image and not model.is_refiner else (0, 0)
    score = request.negative_aesthetic_score
    last = (NEGATIVE_AESTHETIC_SCORE if score is None else score,) if model.is_refiner else (
        target or request.target_size or size)
    return [*(original or request.original_size or size), *corner, *last]


def _start(model: Model, requests: Sequence[Request], size: tuple[int, int]) -> Start | None:
    """Return images, masks and noise of all requests."""
    def stacked(name: str, read: Callable[[Request, Any], Tensor]) -> Tensor | None:
        present = [getattr(r, name) is not None for r in requests]
        assert all(present) or not any(present), f'requests with and without {name} go into separate batches'
        # diffusers returns images in channels_last: the VAE's kernels depend on it, and with them the last bits. `cat`
        # keeps that, `stack` does not.
        return torch.cat([read(r, getattr(r, name)) for r in requests]) if all(present) else None

    noise = stacked('latents', lambda r, source: read_latents(source, row=r.latents_row)[None])
    first = requests[0].image
    if first is None:
        return None if noise is None else Start(noise=noise)
    from diffusers.image_processor import VaeImageProcessor
    factor = model.vae_factor
    of_masks = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_binarize=True,
                                 do_convert_grayscale=True)
    of_images = VaeImageProcessor(vae_scale_factor=factor)

    def read_with(processor: Any, name: str) -> Tensor | None:
        def read(request: Request, source: Any) -> Tensor:
            crop = crop_of(request, size)
            kwargs = {} if crop is None else {'crops_coords': crop.box, 'resize_mode': 'fill'}
            pixels: Tensor = processor.preprocess(as_image_input(source, name), *size, **kwargs)
            return pixels
        return stacked(name, read)
    mask = read_with(of_masks, 'mask_image')
    if is_latents(first):
        latents = stacked('image', lambda _, source: read_latents(source, 'image')[None])
        return Start(latents=latents, mask=mask, noise=noise)
    return Start(image=read_with(of_images, 'image'), mask=mask, noise=noise)


def _conditions(model: Model, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the adapters' conditions and masks, [B, ...]."""
    tensors: dict[str, Tensor] = {}
    readers: dict[str, str] = {}
    for name in requests[0].conditions:
        if name not in model.adapters:
            raise UserError(f"Unknown adapter '{name}' in `conditions`; there are {listed(model.adapters) or 'none'}."
                            f'{did_you_mean(name, list(model.adapters))}')
        adapter = model.adapters[name]
        key = adapter.condition_key
        if key is None:
            raise UserError(f"Adapter '{name}' ({adapter.kind}) reads no image; remove it from `conditions`.")
        values = [r.conditions[name] for r in requests]
        other = readers.setdefault(key, name)
        if other != name and values != [r.conditions[other] for r in requests]:
            raise UserError(f"Adapters '{other}' and '{name}' both read '{key}' and got different images; give one "
                            'another `condition_key`.')
        entries = [value if isinstance(value, Mapping) else {'image': value} for value in values]
        images = [adapter.read_image(_images(entry, name), size) for entry in entries]
        if len({tensor.shape for tensor in images}) > 1:
            raise UserError(f"Adapter '{name}' got {[len(tensor) for tensor in images]} images for its prompts; give "
                            'each prompt equally many.')
        # In diffusers' memory layout, as in `_start`.
        layout = torch.channels_last if adapter.condition_has_image_size else torch.contiguous_format
        tensors[key] = torch.stack(images).contiguous(memory_format=layout)
        if any(entry.get('mask') is not None for entry in entries):
            tensors[adapter.mask_key] = torch.stack(
                [_masks(entry, name, size, model.vae_factor) for entry in entries])
    return tensors


def _images(entry: Mapping[str, Any], name: str) -> Any:
    """Return the image or images in an entry of `conditions`."""
    if unknown := [key for key in entry if key not in ('image', 'mask')]:
        raise UserError(f"conditions['{name}'] has the key '{unknown[0]}'; it takes 'image' and 'mask'.")
    image, what = entry.get('image'), f"the image of adapter '{name}'"
    if isinstance(image, list | tuple):
        return [read_image_input(i, what) for i in image]
    return read_image_input(image, what)  # type: ignore[arg-type]


def _masks(entry: Mapping[str, Any], name: str, size: tuple[int, int], factor: int) -> Tensor:
    """Return where in the output an image prompt acts, [n, H, W] of 0 and 1, by diffusers' IPAdapterMaskProcessor."""
    from diffusers.image_processor import IPAdapterMaskProcessor
    masks = entry.get('mask')
    if masks is None:
        raise UserError(f"Adapter '{name}' got a mask for some prompts only; give each one, or none.")
    images = [read_image_input(mask, f"the mask of adapter '{name}'")
              for mask in (masks if isinstance(masks, list | tuple) else [masks])]
    processor = IPAdapterMaskProcessor(vae_scale_factor=factor)
    return torch.cat([processor.preprocess(image, *size)[:, 0] for image in images])
