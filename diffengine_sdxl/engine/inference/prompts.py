"""A Batch from prompts, pictures and sizes, as a person gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl.datasets.images import ImageReader, is_url
from diffengine_sdxl.engine.inference.request import Request
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.structures import Batch, Start, to_device


def read_picture(source: str | Path | Image.Image, what: str = 'the condition') -> Image.Image:
    """An RGB picture from a path, a URL or PIL."""
    if isinstance(source, Path) or isinstance(source, str) and not is_url(source):
        source = os.path.abspath(os.path.expanduser(source))
    # The person who runs the command names the file, so any folder will do.
    return ImageReader('/')(source, what)


def prompt_batch(model: Any, prompts: Sequence[str], conditions: Mapping[str, Sequence[Any]], size: tuple[int, int],
                 seeds: Sequence[int], negative_prompts: Sequence[str] | None = None) -> Batch:
    """One picture for each prompt.

    Args:
        model: an SDXL; says which adapter reads what, and the device.
        prompts: B texts.
        conditions: adapter name -> B images (paths, URLs, PIL), or B lists of images where an adapter takes several.
        size: height and width in pixels, which are also original and target size.
        seeds: B seeds of the starting noise.
        negative_prompts: B texts; None for the null text.

    Raises:
        ValueError: no adapter of that name, other counts, or an image that cannot be read.
    """
    for name, images in conditions.items():
        if len(images) != len(prompts):
            raise ValueError(f"Adapter '{name}' got {len(images)} images for {len(prompts)} prompts.")
    negatives = negative_prompts if negative_prompts is not None else [None] * len(prompts)
    return request_batch(model, [
        Request(prompt=prompt, negative_prompt=negatives[i], seed=int(seeds[i]),
                conditions={name: images[i] for name, images in conditions.items()})
        for i, prompt in enumerate(prompts)], size)


def request_batch(model: Any, requests: Sequence[Request], size: tuple[int, int], goes_on: bool = False) -> Batch:
    """One picture for each request, on the model's device.

    Args:
        model: an SDXL; says which adapter reads what, and how many time ids there are (a refiner's are five).
        requests: all with or all without image, mask, latents and conditions of the same adapters.
        size: height and width of the pictures, in pixels.
        goes_on: it will begin with another model's latents.

    Raises:
        ValueError: no adapter of that name, images of other numbers or sizes, or one that cannot be read.
    """
    first, num = requests[0], len(requests)
    negative = _texts(requests, 'negative_prompt')
    batch = Batch(
        text=[r.prompt for r in requests], text_2=_texts(requests, 'prompt_2', 'prompt'), negative_text=negative,
        negative_text_2=_texts(requests, 'negative_prompt_2', 'negative_prompt'),
        time_ids=_stack(_time_ids(model, r, size) for r in requests),
        negative_time_ids=_stack(_negative_time_ids(model, r, size, goes_on or r.image is not None) for r in requests),
        key=[f'prompt {i}' for i in range(num)], epoch=torch.zeros(num, dtype=torch.int64),
        seed=torch.tensor([r.seed for r in requests], dtype=torch.int64), conditions=_conditions(model, requests, size),
        size=size, start=_start(requests, size, model.vae_factor), syntax=first.syntax)
    if negative is None and batch.negative_text_2 is not None:
        batch.negative_text = [''] * num
    return to_device(batch, model.device)


def size_of(model: Any, request: Request) -> tuple[int, int]:
    """Height and width, in pixels, of the pictures that a request asks for.

    What it says; else those of its image or control images, cut down to what can be made, as in diffusers; else the
    base's own.
    """
    given = (request.height, request.width)
    if None not in given:
        return given  # type: ignore[return-value]
    natural = _natural_size(model, request)
    if natural is None:
        side = model.unet.config.sample_size * model.vae_factor
        natural = (side, side)
    natural = tuple(n if g is None else g for n, g in zip(natural, given, strict=True))  # type: ignore[assignment]
    return natural


def _natural_size(model: Any, request: Request) -> tuple[int, int] | None:
    """The size of the image that is given, or of the first one that lies over the picture."""
    image = request.image
    if image is None and request.latents is not None:
        image = read_latents(request.latents)
    if isinstance(image, Tensor):
        _, channels, height, width = _one(image, 'image').shape
        factor = model.vae_factor if channels == model.unet.config.out_channels else 1
        return height * factor, width * factor
    if image is None:
        over = [value for name, value in request.conditions.items()
                if name in model.adapters and model.adapters[name].of_picture_size]
        image = over[0] if over else None
    if image is None or isinstance(image, Mapping):
        return None
    width, height = read_picture(image, 'the image').size
    divisor = model.size_divisor
    return max(height // divisor, 1) * divisor, max(width // divisor, 1) * divisor


def read_latents(source: Any) -> Tensor:
    """Starting noise or latents [4, h, w], fp32, from a tensor or a .safetensors file that holds one.

    Raises:
        ValueError: it is neither, or of another shape.
    """
    if isinstance(source, str | Path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            held = load_file(os.path.expanduser(source))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"latents '{source}' cannot be read as a .safetensors file: {error}") from error
        if len(held) != 1:
            raise ValueError(f"latents '{source}' holds {len(held)} tensors; it must hold one.")
        source = next(iter(held.values()))
    if not isinstance(source, Tensor) or source.dim() not in (3, 4) or source.dim() == 4 and len(source) != 1:
        shape = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        raise ValueError(f'latents must be [4, h, w], for one picture; these are {shape}.')
    latents = source[0] if source.dim() == 4 else source
    return latents if latents.dtype == torch.float64 else latents.float()


def _texts(requests: Sequence[Request], name: str, other: str = '') -> list[str] | None:
    """A text of each request; None where nobody gives one. Who gives none beside others that do takes `other`."""
    found = [getattr(r, name) for r in requests]
    if all(text is None for text in found):
        return None
    return [text if text is not None else (getattr(r, other) if other else '') or ''
            for r, text in zip(requests, found, strict=True)]


def _stack(rows: Any) -> Any:
    rows = list(rows)
    return None if rows[0] is None else torch.tensor(rows, dtype=torch.float32)


def _is_refiner(model: Any) -> bool:
    """Whether it takes an aesthetic score where the base takes the target size."""
    return bool(model.num_time_ids == 5)


def _time_ids(model: Any, request: Request, size: tuple[int, int]) -> list[float]:
    """Original size, corner of the crop, and target size or score (Podell et al. 2023, SDXL, section 2.2)."""
    original, target = request.original_size or size, request.target_size or size
    last = (request.aesthetic_score,) if _is_refiner(model) else target
    return [*original, *request.crops_coords_top_left, *last]


def _negative_time_ids(model: Any, request: Request, size: tuple[int, int], of_image: bool) -> list[float] | None:
    """Those of the unconditional branch, with diffusers' defaults; None for the conditional's.

    Args:
        of_image: it begins with an image or latents; there diffusers takes the conditional's corner.
    """
    refiner = _is_refiner(model)
    own = request.negative_original_size is not None and request.negative_target_size is not None
    if not refiner and not own and not of_image and request.negative_crops_coords_top_left is None:
        return None
    original = request.negative_original_size or request.original_size or size
    target = request.negative_target_size or request.target_size or size
    corner = request.negative_crops_coords_top_left
    if corner is None:
        corner = request.crops_coords_top_left if of_image and not refiner else (0, 0)
    return [*original, *corner, *((request.negative_aesthetic_score,) if refiner else target)]


def _start(requests: Sequence[Request], size: tuple[int, int], factor: int) -> Start | None:
    """Images, masks and noise of all requests."""
    def stacked(name: str, read: Any) -> Tensor | None:
        given = [getattr(r, name) is not None for r in requests]
        assert all(given) or not any(given), f'requests with and without {name} are made apart'
        # diffusers leaves a picture's channels last in memory: the VAE's kernels depend on it, and with them the last
        # bits. `cat` keeps that, `stack` does not.
        return torch.cat([read(getattr(r, name)) for r in requests]) if all(given) else None

    noise = stacked('latents', lambda source: read_latents(source)[None])
    first = requests[0].image
    if first is None:
        return None if noise is None else Start(noise=noise)
    from diffusers.image_processor import VaeImageProcessor
    masks = VaeImageProcessor(factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    mask = stacked('mask_image', lambda m: masks.preprocess(
        _one(m, 'mask_image') if isinstance(m, Tensor) else read_picture(m, 'mask_image'), *size))
    if isinstance(first, Tensor) and first.shape[-3] != 3:
        return Start(latents=stacked('image', lambda source: read_latents(source)[None]), mask=mask, noise=noise)
    pictures = VaeImageProcessor(factor)
    image = stacked('image', lambda i: pictures.preprocess(
        _one(i, 'image') if isinstance(i, Tensor) else read_picture(i, 'image'), *size))
    return Start(image=image, mask=mask, noise=noise)


def _one(picture: Tensor, what: str) -> Tensor:
    """A picture's tensor, [1, C, H, W].

    Raises:
        ValueError: it holds several, or none.
    """
    if picture.dim() not in (3, 4) or picture.dim() == 4 and len(picture) != 1:
        raise ValueError(f'{what} must be [C, H, W], for one picture; this one is {list(picture.shape)}.')
    return picture if picture.dim() == 4 else picture[None]


def _conditions(model: Any, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Tensor]:
    """What each adapter reads, [B, ...]."""
    tensors: dict[str, Tensor] = {}
    readers: dict[str, str] = {}
    for name in requests[0].conditions:
        if name not in model.adapters:
            raise ValueError(f"There is no adapter '{name}' to give images to.{nearest(name, list(model.adapters))}")
        adapter = model.adapters[name]
        if adapter.reads is None:
            raise ValueError(f"Adapter '{name}' ({adapter.kind}) reads no image; take it out of `conditions`.")
        given = [r.conditions[name] for r in requests]
        other = readers.setdefault(adapter.reads, name)
        if other != name and given != [r.conditions[other] for r in requests]:
            raise ValueError(f"Adapters '{other}' and '{name}' both read '{adapter.reads}', so they cannot get images "
                             'of their own; give one of them another `reads`.')
        masked = [g if isinstance(g, Mapping) else {'image': g} for g in given]
        read = [adapter.read_image(_pictures(one, name), size) for one in masked]
        if len({tensor.shape for tensor in read}) > 1:
            raise ValueError(f"Adapter '{name}' got {[len(tensor) for tensor in read]} images for its prompts; give "
                             'each prompt as many.')
        # In memory as diffusers has them, as in `_start`.
        layout = torch.channels_last if adapter.of_picture_size else torch.contiguous_format
        tensors[adapter.reads] = torch.stack(read).contiguous(memory_format=layout)
        if any(one.get('mask') is not None for one in masked):
            tensors[adapter.mask_name] = torch.stack([_masks(one, name, size) for one in masked])
    return tensors


def _pictures(given: Mapping[str, Any], name: str) -> Any:
    """The picture or pictures in one entry of `conditions`."""
    if unknown := [key for key in given if key not in ('image', 'mask')]:
        raise ValueError(f"conditions['{name}'] has the key '{unknown[0]}'; it takes 'image' and 'mask'.")
    image = given.get('image')
    if isinstance(image, list | tuple):
        return [read_picture(i, f"the image of adapter '{name}'") for i in image]
    return read_picture(image, f"the image of adapter '{name}'")  # type: ignore[arg-type]


def _masks(given: Mapping[str, Any], name: str, size: tuple[int, int]) -> Tensor:
    """Where in the picture an image prompt acts, [n, H, W] of 0 and 1, by diffusers' IPAdapterMaskProcessor."""
    from diffusers.image_processor import IPAdapterMaskProcessor
    masks = given.get('mask')
    if masks is None:
        raise ValueError(f"Adapter '{name}' got a mask for some prompts only; give each one, or none.")
    read = [read_picture(m, f"the mask of adapter '{name}'") for m in (masks if isinstance(masks, list | tuple)
                                                                      else [masks])]
    return torch.cat([IPAdapterMaskProcessor().preprocess(m, *size)[:, 0] for m in read])
