"""Recognize an adapter by its file or folder: what a config must say of it besides `weights`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor

from diffengine_sdxl.adapters.formats import controlnet, diffusers_lora, files, kohya, lora, peft_lora, t2i_adapter
from diffengine_sdxl.adapters.formats import ip_adapter as ip
from diffengine_sdxl.adapters.formats import textual_inversion as words
from diffengine_sdxl.adapters.formats.files import Folder, WeightFile
from diffengine_sdxl.adapters.formats.lora_weights import PARTS
from diffengine_sdxl.adapters.frozen_image_encoder import encoder_beside
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading.files import WEIGHTS, read_json
from diffengine_sdxl.loading.trained import PIPELINE, read_manifest
from diffengine_sdxl.registry import ADAPTERS

KINDS = ('LoRA', 'T2IAdapter', 'ControlNet', 'IPAdapter', 'TextualInversion')
#: Names of weight files that show the kind; their loaders look for them too.
NAMES = (*lora.NAMES, *ip.NAMES, *words.NAMES)
MANIFEST, INDEX, CONFIG = 'manifest.json', 'model_index.json', 'config.json'
#: Keys of a trained adapter's config that are not of its weights: where it began, what trained, and the data's columns.
_OF_TRAINING = ('weights', 'subfolder', 'weight_name', 'revision', 'variant', 'trainable', 'condition_key', 'mask')
#: Width of the text that a UNet reads -> the models that have it. SDXL's is 2048.
_OTHER_WIDTHS = words.OTHER_WIDTHS
#: Outputs and inputs of the first layer of Stable Diffusion 1.x's T2I-Adapters: 8 x 8 pixels of one or three channels.
_OTHER_T2I_INPUTS = ((320, 64), (320, 192))
#: A weight whose inputs are the text: of a LoRA or LoHa, of an IP-Adapter, of a ControlNet.
_TEXT_INPUT = re.compile(r'attn2.*to_k.*(down\.weight|lora_A\.weight|hada_w1_b)$|to_k_ip\.weight$|attn2\.to_k\.weight$')
#: Parts of keys, each of which must occur -> what such a file is; {source} is the file, {folder} its folder.
_NO_ADAPTERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (('model.diffusion_model.', 'conditioner.embedders.'), "a whole SDXL, so a base: model.pretrained='{source}'"),
    (('cond_stage_model.',), 'a whole Stable Diffusion 1.x or 2.x, which is not supported'),
    (('input_blocks.', 'label_emb.'), "the UNet of an SDXL: model.unet='{source}'"),
    (('down_blocks.', 'up_blocks.', 'add_embedding.'), "the UNet of an SDXL: model.unet='{source}'"),
    (('encoder.', 'decoder.conv_in.'), "a VAE: model.vae='{source}'"),
    (('vision_model.',), "an image encoder; an IP-Adapter takes its folder: image_encoder='{folder}'"),
    (('state_dict', 'meta', 'message_hub'), 'a checkpoint of a training; give the export of its step, a folder '
                                            "step<N>/<adapter> in '{folder}'"))


def adapter_settings(source: str, base: str | None = None, *, subfolder: str | None = None,
                     weight_name: str | None = None, revision: str | None = None,
                     variant: str | None = None, ignore_keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return the config of the adapter in `source`, without `weights`: its `type`, and what its files don't show.

    Only settings and the headers of weights are read, and from the hub nothing else is downloaded but the weights that
    the adapter loads.

    Args:
        source: a file, folder, hub id or link, as an adapter's `weights`.
        base: of the model, whose image encoder an IP-Adapter reads through if it has none of its own.
        subfolder, weight_name, revision: of `source`, as the adapters take them.
        variant: of `source`; all variants are of one kind.
        ignore_keys: patterns of keys that are left out.

    Returns:
        {'type': 'LoRA'}, {'type': 'T2IAdapter'} or {'type': 'ControlNet'}.
        {'type': 'IPAdapter', 'architecture': ..., 'image_encoder': ...}; without the encoder if none was found.
        {'type': 'TextualInversion', 'token': ...}; without the token if the file does not hold it.
        Of an export with its manifest.json: what it was trained with, of any type. Of a whole export that holds one
        adapter, also `subfolder`.

    Raises:
        UserError: there is no such source, or it is no adapter; what it is, and where to give that.
    """
    folder, name = files.locate(source, subfolder, weight_name, revision)
    # A link to a model's weights stands for their folder.
    is_folder = name is None or name in NAMES or folder.repo and (WEIGHTS.fullmatch(name) or name == CONFIG)
    settings = _of_folder(folder, str(source), subfolder) if is_folder else None
    if settings is None:
        path = files.find(source, NAMES, subfolder, weight_name, revision)
        settings = _of_file(files.read(path, header_only=True, ignore_keys=ignore_keys))
        if settings['type'] == 'T2IAdapter' and (name is None or weight_name):
            raise UserError(f"'{path}' is a T2I-Adapter without config.json; give the file itself as `weights` (or a "
                            'link to it on the hub), without `weight_name`.')
    embed_dim = settings.pop('embed_dim', None)
    if settings['type'] == 'IPAdapter' and not settings.get('image_encoder'):
        plus = settings.get('architecture') == 'plus'
        found = encoder_beside(folder, base, embed_dim, plus) if embed_dim else None
        if found is not None:
            settings |= {'image_encoder': found[0], 'image_encoder_subfolder': found[1]}
    return settings


def _of_folder(folder: Folder, source: str, subfolder: str | None) -> dict[str, Any] | None:
    """Return what the settings in a folder, or in an export around it, say; None if the weights must be looked at."""
    whole = _manifest(folder) if folder.has(MANIFEST) and not folder.has(INDEX) else {}
    if whole:
        return _of_export(whole, folder, source, subfolder)
    name = os.path.basename(os.path.abspath(folder.path))
    if (config := _manifest(folder.at('..')).get(name)) is not None:
        return _trained(config, folder)
    if any(folder.has(known) for known in NAMES):
        return None
    if any(folder.has(f'{part}{peft_lora.CONFIG}') for part in ('', *(f'{part}/' for part in PARTS))):
        return {'type': 'LoRA'}
    if folder.has(CONFIG):
        return _of_config(read_json(folder.file(CONFIG)), source)
    if folder.has(INDEX):
        cls = str(read_json(folder.file(INDEX)).get('_class_name'))
        raise UserError(f"'{source}' is no adapter but a whole model ({cls})" + (
            f", so a base: model.pretrained='{source}'." if 'XL' in cls else ', which is not an SDXL.'))
    return None


def _manifest(folder: Folder) -> dict[str, Any]:
    """Return name -> config of what an export holds (None: the base's folder); {} if `folder` is no export."""
    manifest = None
    if folder.has(MANIFEST):
        with suppress(UserError):  # other tools have files of that name too
            manifest = read_manifest(folder.file(MANIFEST).parent)
    configs: Any = manifest
    for key in ('config', 'model', 'adapters'):
        configs = configs.get(key) if isinstance(configs, Mapping) else None
    configs = configs if isinstance(configs, Mapping) else {}
    return {} if manifest is None else {name: configs.get(name) for name in manifest['contents']}


def _of_export(contents: Mapping[str, Any], folder: Folder, source: str, subfolder: str | None) -> dict[str, Any]:
    """Return the settings of the only adapter in a whole export."""
    names = [name for name in contents if name != PIPELINE]
    if not names:
        raise UserError(f"'{source}' holds a trained base and no adapter: model.pretrained='{folder}/{PIPELINE}'.")
    if len(names) > 1:
        raise UserError(f"'{source}' holds the adapters {', '.join(names)}; give one of their folders, as "
                        f"'{folder}/{names[0]}'.")
    inner = '/'.join(filter(None, (subfolder, names[0])))
    if contents[names[0]] is None:
        raise UserError(f"The {MANIFEST} of '{source}' does not hold the config of '{names[0]}'.")
    return {**_trained(contents[names[0]], folder.at(names[0])), 'subfolder': inner}


def _trained(config: Any, folder: Folder) -> dict[str, Any]:
    """Return the config that an adapter was trained with, as far as it is of its weights.

    A manifest may come from anyone, and mmengine imports whatever module a `type` or a `_scope_` names.
    """
    kind = config.get('type') if isinstance(config, Mapping) else None
    if kind not in ADAPTERS.module_dict:
        raise UserError(f"'{folder}' is an adapter of type {kind!r}, which no imported module registers; name its "
                        'module in `custom_imports` of the config.')
    settings = {key: value for key, value in config.items() if key not in _OF_TRAINING and not key.startswith('_')}
    return _image_encoder(folder) if kind == 'ImageEncoder' else settings


def _image_encoder(source: object) -> NoReturn:
    raise UserError(f"'{source}' is an image encoder, which adds nothing to an image by itself; give it to an "
                    f"IP-Adapter: image_encoder='{source}'.")


def _of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the kind of a folder of diffusers or transformers by its config.json."""
    cls = str(config.get('_class_name') or listed(config.get('architectures') or [config.get('model_type')]))
    if cls == 'T2IAdapter' and config.get('adapter_type') != 'full_adapter_xl':
        raise UserError(f"'{source}' is a T2I-Adapter of type {config.get('adapter_type')}, made for Stable Diffusion "
                        "1.x; SDXL's are of type full_adapter_xl.")
    if cls in controlnet.CLASSES and config.get('addition_embed_type') != 'text_time':
        width = config.get('cross_attention_dim')
        model = _OTHER_WIDTHS.get(width, 'another base') if isinstance(width, int) else 'another base'
        raise UserError(f"'{source}' is a ControlNet for {model}: it has no addition_embed_type='text_time', as all of "
                        "SDXL's have.")
    kinds = {'T2IAdapter': 'T2IAdapter', **dict.fromkeys(controlnet.CLASSES, 'ControlNet')}
    if cls in kinds:
        return {'type': kinds[cls]}
    if 'vision' in cls.lower() or 'vision' in str(config.get('model_type')) or 'vision_config' in config:
        _image_encoder(source)
    key = {'UNet2DConditionModel': 'unet', 'AutoencoderKL': 'vae'}.get(cls)
    raise UserError(f"'{source}' is no adapter but a model of class {cls}" + (
        f": model.{key}='{source}'." if key else f'; supported are {", ".join(KINDS)}.'))


def _of_file(file: WeightFile) -> dict[str, Any]:
    """Return the settings that a file shows, with `embed_dim` of an IP-Adapter."""
    keys = [key for key in file.tensors if isinstance(key, str)]
    if controlnet.is_controlnet(file.tensors):
        _refuse_other_widths(file, controlnet.unnested(file.tensors), 'a ControlNet')
        return {'type': 'ControlNet'}
    if ip.is_ip_adapter(file):
        tensors = ip.flat(file)
        _refuse_other_widths(file, tensors, 'an IP-Adapter')
        shown = ip.settings(tensors, token_dim=1, dim_head=1)
        return {'type': 'IPAdapter', **{k: shown[k] for k in ('architecture', 'embed_dim') if k in shown}}
    if kohya.is_kohya(keys) or diffusers_lora.has_layers(keys):
        _refuse_other_widths(file, file.tensors, 'a LoRA')
        # Beside SDXL's UNet it is the first text encoder, as diffusers and ComfyUI read it.
        if any(k.startswith('lora_te_') for k in keys) and not any(k.startswith('lora_unet_') for k in keys):
            raise UserError(f"'{file.path}' is a LoRA for Stable Diffusion 1.x or 2.x: it has layers lora_te_* alone, "
                            "and SDXL's are lora_te1_* and lora_te2_*. Ask for one made for SDXL.")
        return {'type': 'LoRA'}
    if t2i_adapter.has_blocks(keys):
        conv = next((file.tensors[key] for key in keys if key.endswith('conv_in.weight')), None)
        if conv is None or tuple(conv.shape[:2]) in _OTHER_T2I_INPUTS:
            raise UserError(f"'{file.path}' is a T2I-Adapter for Stable Diffusion 1.x. Ask for one made for SDXL.")
        return {'type': 'T2IAdapter'}
    single = words.of_one_encoder(file.tensors)
    if not set(keys).isdisjoint(words.KEYS.values()):
        return {'type': 'TextualInversion'}
    if single is not None and isinstance(single[1], Tensor) and single[1].dim() in (1, 2):
        width = single[1].shape[-1]
        if width in _OTHER_WIDTHS and len(words.pair(file.path)) == 1:
            raise UserError(f"'{file.path}' is a textual inversion for {_OTHER_WIDTHS[width]}, whose only text encoder "
                            f"is {width} wide; SDXL's has vectors 'clip_l' and 'clip_g'.")
        # Tools that take the name of the file for the token write a key that is always the same.
        return {'type': 'TextualInversion', **({} if single[0] in ('emb_params', '*') else {'token': single[0]})}
    return _refuse(file, keys)


def _refuse_other_widths(file: WeightFile, tensors: Mapping[str, Any], what: str) -> None:
    """Refuse a file whose layers read the text of another model than SDXL, by the width alone."""
    widths = {value.shape[1] for key, value in tensors.items()
              if isinstance(value, Tensor) and value.dim() > 1 and _TEXT_INPUT.search(str(key))}
    if len(widths) == 1 and (model := _OTHER_WIDTHS.get(width := widths.pop())):
        raise UserError(f"'{file.path}' is {what} for {model}: it reads text that is {width} wide, and SDXL's is 2048. "
                        'Ask for one made for SDXL.')


def _refuse(file: WeightFile, keys: Collection[str]) -> NoReturn:
    """Say what a file is that is no adapter."""
    def holds(parts: Iterable[str], names: Collection[str]) -> bool:
        return all(any(part in name for name in names) for part in parts)

    nested = file.tensors.get('state_dict')
    names = [*keys, *map(str, nested)] if isinstance(nested, Mapping) else keys
    what = next((what for parts, what in _NO_ADAPTERS if holds(parts, names)), None)
    if what is not None:
        raise UserError(f"'{file.path}' is no adapter but "
                        f'{what.format(source=file.path, folder=file.path.parent)}.')
    raise UserError(f"'{file.path}' is no adapter that is recognized: it holds {len(names)} entries "
                    f"({listed(names, 3) or 'none'}). If you know its kind, set `type` to one of {', '.join(KINDS)}.")
