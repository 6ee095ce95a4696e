"""A config's model on the meta device: its layers and shapes without their weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl.adapters.base import ControlAdapter
from diffengine_sdxl.commands.plan.counter import EmptyOnMeta, autocast
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import hub, strict
from diffengine_sdxl.loading.single_file import is_single_file
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import MODELS
from diffengine_sdxl.structures import Batch

#: Settings of a base's and an adapter's source on the hub, which go with it.
OF_BASE = ('revision', 'variant')
OF_WEIGHTS = ('subfolder', 'weight_name', 'revision', 'variant', 'ignore_keys')
#: CLIP ViT-H/14, which IP-Adapters of h94/IP-Adapter read.
VIT_H = {'model_type': 'clip_vision_model', 'hidden_size': 1280, 'intermediate_size': 5120, 'num_hidden_layers': 32,
         'num_attention_heads': 16, 'patch_size': 14, 'image_size': 224, 'projection_dim': 1024, 'hidden_act': 'gelu'}


def build(config: Mapping[str, Any]) -> tuple[SDXL, list[str]]:
    """Build the SDXL of a resolved config's `model` on the meta device, ready to train.

    Returns:
        The model, and a sentence for each source that is not on this machine and what was counted in its place.

    Raises:
        UserError: it is no SDXL, or cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, notes = _local_sources({**config, 'sampler': None, 'gradient_checkpointing': False}, Path(folder))
        with EmptyOnMeta(), strict.configs_only():
            model: Any = MODELS.build(settings)
    if not isinstance(model, SDXL):
        raise UserError(f"plan counts models of type='SDXL'; the config's is {type(model).__name__}.")
    _move(model)
    setattr(model, 'autocast', autocast(model.compute_dtype))  # noqa: B010  (a method of this one object)
    return model.train(), notes


def _move(model: nn.Module) -> None:
    """Move what was computed on the CPU to the meta device; parameters stay the objects that adapters know."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to('meta')
    for parameter in model.parameters():
        if parameter.device.type != 'meta':
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to('meta'), parameter.requires_grad))


def _local_sources(model: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Replace the sources of a model that are not on this machine; also return sentences about it."""
    notes = []
    for key in ('pretrained', 'unet', 'vae', 'tokenizer'):
        source = strict.shipped(model.get(key))
        if source is None:
            continue
        model[key] = _on_disk(source, model)
        if model[key] is None and key == 'pretrained':
            used = f"the configs in '{model['config']}'" if model.get('config') else "SDXL base 1.0's configs"
            notes.append(f"'{source}' is {_why(source)}: counted by {used}.")
        elif model[key] is None and key != 'tokenizer':
            notes.append(f"{key}='{source}' is {_why(source)}: counted by the base's own.")
    if model.get('pretrained') is None:
        model = {key: value for key, value in model.items() if key not in OF_BASE}
    adapters: dict[str, Any] = {}
    for name, adapter in (model.get('adapters') or {}).items():
        adapters[name] = adapter and _local_adapter(dict(adapter), name, folder, notes)
    return {**model, 'adapters': adapters}, notes


def _local_adapter(adapter: dict[str, Any], name: str, folder: Path, notes: list[str]) -> dict[str, Any]:
    weights = strict.shipped(adapter.get('weights'))
    if weights is not None and _is_remote(weights):
        notes.append(f"The weights of adapter '{name}', '{weights}', are not on this machine: counted by fresh ones.")
        adapter = {key: value for key, value in adapter.items() if key not in ('weights', *OF_WEIGHTS)}
    encoder = strict.shipped(adapter.get('image_encoder'))
    if str(adapter.get('type')).rpartition('.')[2] == 'IPAdapter' and (
            _is_remote(encoder) if encoder else adapter.get('weights') is None):
        notes.append(f"The image encoder of adapter '{name}' is not read: counted by CLIP ViT-H's config.")
        (folder / 'config.json').write_text(json.dumps(VIT_H))
        (folder / 'model.safetensors').touch()  # which is what makes it a model's folder
        adapter |= {'image_encoder': str(folder), 'image_encoder_subfolder': None}
    return adapter


def _is_remote(source: str) -> bool:
    return hub.parse_model_link(source) is not None or hub.parse_file_link(source) is not None or (
        hub.local_path(source) is None)


def _on_disk(source: str, model: Mapping[str, Any]) -> str | None:
    """Return the folder of a source, also in the hub's cache; None: it is not here, or a single file."""
    from huggingface_hub import try_to_load_from_cache
    if is_single_file(source):
        return None
    if hub.local_path(source) is not None:
        return source
    for name in ('model_index.json', 'config.json'):
        found = try_to_load_from_cache(source, name, model.get('cache_dir'), model.get('revision'))
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def _why(source: str) -> str:
    return 'a single file' if is_single_file(source) else 'not on this machine'


def batch_of(model: SDXL, num: int, size: Sequence[int], embeds: Mapping[str, Sequence[int]]) -> Batch:
    """Return inputs of `num` samples on the meta device, with what is frozen as a cache gives it.

    Args:
        size: height and width of the images, in pixels.
        embeds: condition of an image prompt -> shape of one sample's embeddings.
    """
    meta, height, width = torch.device('meta'), *size
    encoder_2, unet = model.text_encoder_2.config, model.unet.config
    dtype = model.text_encoder_2.dtype
    conditions = {f'{name}_embeds': torch.zeros(num, *shape, device=meta, dtype=dtype)
                  for name, shape in embeds.items()}
    for adapter in model.adapters.values():
        if isinstance(adapter, ControlAdapter) and adapter.condition_key is not None:
            config = adapter.net.config
            channels = config.get('conditioning_channels', config.get('in_channels'))
            conditions[adapter.condition_key] = torch.zeros(num, channels, height, width, device=meta)
    words = sorted({word for tokens in model.new_tokens() for word in tokens})
    batch = Batch(text=[' '.join(words)] * num, key=[str(i) for i in range(num)], epoch=torch.zeros(num).long(),
                  seed=torch.zeros(num).long(), time_ids=torch.zeros(num, 5 if model.is_refiner else 6, device=meta),
                  conditions=conditions)
    if reads_images(model):
        batch.img = torch.zeros(num, 3, height, width, device=meta)
    else:
        factor, channels = model.vae_factor, model.vae.config.latent_channels
        batch.latents = torch.zeros(num, channels, height // factor, width // factor, device=meta)
    if not (model.text_trains or model.text_adapted):
        positions = encoder_2.max_position_embeddings * getattr(model, 'caption_chunks', 1)
        batch.text_embeds = torch.zeros(num, positions, unet.cross_attention_dim, device=meta, dtype=dtype)
        batch.pooled = torch.zeros(num, encoder_2.projection_dim, device=meta, dtype=dtype)
    return batch


def reads_images(model: SDXL) -> bool:
    """Return whether a step reads images, so that their latents cannot be cached: all objectives but Denoise do."""
    return getattr(model.objective, 'reads_images', type(model.objective).__name__ != 'Denoise')
