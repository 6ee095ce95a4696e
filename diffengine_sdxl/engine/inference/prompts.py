"""A Batch from prompts, pictures and sizes, as a person gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.engine.inference.inputs import (
    are_latents,
    as_picture,
    crop_of,
    read_latents,
    read_picture,
    sides,
)
from diffengine_sdxl.engine.inference.request import Request
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.structures import Batch, Start, to_device

#: What refiners are told that are told nothing: diffusers' defaults.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


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
        size=size, start=_start(model, requests, size), syntax=first.syntax, clip_skip=first.clip_skip)
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
        image = read_latents(request.latents, row=request.latents_row)
    if are_latents(image):
        height, width = read_latents(image, 'image').shape[-2:]
        return height * model.vae_factor, width * model.vae_factor
    if image is None:
        over = [value for name, value in request.conditions.items()
                if name in model.adapters and model.adapters[name].of_picture_size]
        image = over[0] if over else None
    if image is None or isinstance(image, Mapping):
        return None
    divisor = model.size_divisor
    height, width = (max(side // divisor, 1) * divisor for side in sides(as_picture(image, 'image')))
    return height, width


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


def is_refiner(model: Any) -> bool:
    """Whether it takes an aesthetic score where the base takes the target size."""
    return bool(model.num_time_ids == 5)


def _time_ids(model: Any, request: Request, size: tuple[int, int]) -> list[float]:
    """Original size, corner of the crop, and target size or score (Podell et al. 2023, SDXL, section 2.2)."""
    original, target = request.original_size or size, request.target_size or size
    score = AESTHETIC_SCORE if request.aesthetic_score is None else request.aesthetic_score
    last = (score,) if is_refiner(model) else target
    return [*original, *request.crops_coords_top_left, *last]


def _negative_time_ids(model: Any, request: Request, size: tuple[int, int], of_image: bool) -> list[float] | None:
    """Those of the unconditional branch, with diffusers' defaults; None for the conditional's.

    Args:
        of_image: it begins with an image or latents; there diffusers takes the conditional's corner.

    Raises:
        ValueError: one of the sizes lacks the other. In diffusers each holds by itself where there is an image, but
            with text alone both hold or none.
    """
    refiner = is_refiner(model)
    pair = ('negative_original_size', 'negative_target_size')
    alone = [name for name in pair if getattr(request, name) is not None]
    if len(alone) == 1 and not refiner and not of_image:
        raise ValueError(f'{alone[0]}={getattr(request, alone[0])} goes with '
                         f'{pair[1 - pair.index(alone[0])]} where there is no image; give both, or none.')
    own = request.negative_original_size is not None and request.negative_target_size is not None
    if not refiner and not own and not of_image and request.negative_crops_coords_top_left is None:
        return None
    original = request.negative_original_size or request.original_size or size
    target = request.negative_target_size or request.target_size or size
    corner = request.negative_crops_coords_top_left
    if corner is None:
        corner = request.crops_coords_top_left if of_image and not refiner else (0, 0)
    score = request.negative_aesthetic_score
    return [*original, *corner, *((NEGATIVE_AESTHETIC_SCORE if score is None else score,) if refiner else target)]


def _start(model: Any, requests: Sequence[Request], size: tuple[int, int]) -> Start | None:
    """Images, masks and noise of all requests."""
    def stacked(name: str, read: Any) -> Tensor | None:
        given = [getattr(r, name) is not None for r in requests]
        assert all(given) or not any(given), f'requests with and without {name} are made apart'
        # diffusers leaves a picture's channels last in memory: the VAE's kernels depend on it, and with them the last
        # bits. `cat` keeps that, `stack` does not.
        return torch.cat([read(r, getattr(r, name)) for r in requests]) if all(given) else None

    noise = stacked('latents', lambda r, source: read_latents(source, row=r.latents_row)[None])
    first = requests[0].image
    if first is None:
        return None if noise is None else Start(noise=noise)
    from diffusers.image_processor import VaeImageProcessor
    masks = VaeImageProcessor(model.vae_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def cut(r: Request) -> dict[str, Any]:
        crop = crop_of(r, size)
        return {} if crop is None else dict(crops_coords=crop.box, resize_mode='fill')
    mask = stacked('mask_image', lambda r, m: masks.preprocess(as_picture(m, 'mask_image'), *size, **cut(r)))
    if are_latents(first):
        return Start(latents=stacked('image', lambda _, source: read_latents(source, 'image')[None]), mask=mask,
                     noise=noise)
    pictures = VaeImageProcessor(model.vae_factor)
    image = stacked('image', lambda r, i: pictures.preprocess(as_picture(i, 'image'), *size, **cut(r)))
    return Start(image=image, mask=mask, noise=noise)


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
