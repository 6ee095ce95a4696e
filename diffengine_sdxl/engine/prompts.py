"""A Batch from prompts and condition images, as a person gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from diffengine_sdxl.datasets.images import ImageReader, is_url
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.structures import Batch, to_device


def read_picture(source: str | Image.Image) -> Image.Image:
    """An RGB picture from a path, a URL or PIL."""
    if isinstance(source, str) and not is_url(source):
        source = os.path.abspath(source)
    # The person who runs the command names the file, so any folder will do.
    return ImageReader('/')(source, 'the condition')


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
    tensors: dict[str, torch.Tensor] = {}
    readers: dict[str, str] = {}
    for name, images in conditions.items():
        if name not in model.adapters:
            raise ValueError(f"There is no adapter '{name}' to give images to.{nearest(name, list(model.adapters))}")
        if model.adapters[name].reads is None:
            raise ValueError(f"Adapter '{name}' ({model.adapters[name].kind}) reads no image; take it out of "
                             '`conditions`.')
        if len(images) != len(prompts):
            raise ValueError(f"Adapter '{name}' got {len(images)} images for {len(prompts)} prompts.")
        reads = model.adapters[name].reads
        if (other := readers.setdefault(reads, name)) != name and list(images) != list(conditions[other]):
            raise ValueError(f"Adapters '{other}' and '{name}' both read '{reads}', so they cannot get images of their "
                             f'own; give one of them another `reads`.')
        read = [model.adapters[name].read_image(
            [read_picture(i) for i in image] if isinstance(image, list | tuple) else read_picture(image), size)
            for image in images]
        if len({tensor.shape for tensor in read}) > 1:
            raise ValueError(f"Adapter '{name}' got {[len(tensor) for tensor in read]} images for its prompts; give "
                             'each prompt as many.')
        tensors[reads] = torch.stack(read)
    batch = Batch(text=list(prompts), time_ids=torch.tensor([[*size, 0, 0, *size]] * len(prompts), dtype=torch.float32),
                  key=[f'prompt {i}' for i in range(len(prompts))], epoch=torch.zeros(len(prompts), dtype=torch.int64),
                  seed=torch.tensor(list(seeds), dtype=torch.int64), conditions=tensors, size=size,
                  negative_text=list(negative_prompts) if negative_prompts is not None else None)
    return to_device(batch, model.unet.device)
