"""How what an export holds is loaded elsewhere: diffusers' code, and where ComfyUI and the WebUIs look for the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffengine_sdxl.adapters.formats.textual_inversion import KEYS
from diffengine_sdxl.adapters.formats.textual_inversion import NAME as WORDS
from diffengine_sdxl.loading.trained import PIPELINE

LORA = 'pytorch_lora_weights.safetensors'
KOHYA = 'lora.safetensors'
#: Of diffusers' folders.
NETWORK = 'diffusion_pytorch_model.safetensors'
_LOAD = 'StableDiffusionXLPipeline'


@dataclass
class Loading:
    """How one part of an export is loaded.

    Attributes:
        title: its kind, with an article: 'a LoRA'.
        tags: the hub's.
        notes: sentences.
        code: for stock diffusers, of which `source` is the first line; '' if it cannot load it.
        interfaces: what ComfyUI and WebUIs need; sentences.
    """

    title: str
    tags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: str = ''
    interfaces: list[str] = field(default_factory=list)


def how_to_load(folder: Path, name: str, settings: Mapping[str, Any], base: str, repo_id: str | None,
                prompt: str) -> Loading:
    """Describe the part `name` of the export in `folder`.

    Args:
        settings: the adapter's config; {} for PIPELINE.
        base: of a diffusers pipeline, as its code names it.
        repo_id: of the hub; None: the code names the folder.
        prompt: for the examples.
    """
    kind = PIPELINE if name == PIPELINE else str(settings.get('type'))
    describe = _KINDS.get(kind, _other)
    return describe(_Part(folder / name, name, settings, base, repo_id, prompt))


@dataclass(frozen=True)
class _Part:
    folder: Path
    name: str
    settings: Mapping[str, Any]
    base: str
    repo_id: str | None
    prompt: str

    @property
    def source(self) -> str:
        """The repository, or the folder of the export."""
        return self.repo_id or self.folder.parent.name

    @property
    def scale(self) -> float:
        return float(self.settings.get('scale', 1.0))

    def at(self) -> str:
        """Return the arguments that locate it for diffusers' `from_pretrained` and `load_*`."""
        return f'{self.source!r}, subfolder={self.name!r}'

    def download(self) -> list[str]:
        """Return lines that bring its folder here, for loaders of files."""
        if self.repo_id is None:
            return [f'folder = {self.source!r}']
        return [f'folder = snapshot_download({self.source!r}, allow_patterns={self.name + "/*"!r})']

    def imports(self, *lines: str, downloads: bool = False) -> list[str]:
        hub = ['from huggingface_hub import snapshot_download'] if downloads and self.repo_id else []
        return ['import torch', *sorted([*lines, *hub]), '']

    def pipeline(self, cls: str = _LOAD, *arguments: str) -> str:
        given = ''.join(f', {argument}' for argument in arguments)
        return f"pipeline = {cls}.from_pretrained({self.base!r}{given}, torch_dtype=torch.float16).to('cuda')"

    def image(self, *arguments: str) -> str:
        given = ''.join(f', {argument}' for argument in arguments)
        return f'image = pipeline({self.prompt!r}{given}).images[0]'

    def exported(self) -> str:
        return (f'`diffengine-sdxl export CONFIG {self.name}.safetensors --checkpoint {self.folder.parent.name} '
                f'--adapter {self.name} --format kohya`')


def _lora(part: _Part) -> Loading:
    kind = str(part.settings.get('kind') or 'lora').lower()
    title = {'lora': 'LoRA', 'dora': 'DoRA', 'loha': 'LoHa', 'lokr': 'LoKr', 'oft': 'OFT'}.get(kind, kind)
    loading = Loading(f'{"an" if title == "OFT" else "a"} {title}', ['lora', *([kind] if kind != 'lora' else [])])
    if (part.folder / LORA).is_file():
        scale = [f'pipeline.set_adapters({part.name!r}, {part.scale:g})'] if part.scale != 1 else []
        loading.code = _lines(part.imports(f'from diffusers import {_LOAD}'), part.pipeline(), (
            f'pipeline.load_lora_weights({part.at()}, weight_name={LORA!r}, adapter_name={part.name!r})'),
            *scale, part.image())
    elif (part.folder / KOHYA).is_file():
        loading.notes.append(f"Stock diffusers does not load it: `{part.name}/{KOHYA}` has kohya's layout.")
    else:
        parts = sorted(path.parent.name for path in part.folder.glob('*/adapter_config.json'))
        merge = [f"pipeline.{one} = PeftModel.from_pretrained(pipeline.{one}, f'{{folder}}/{part.name}/{one}')"
                 '.merge_and_unload()' for one in parts]
        loading.notes.append(f"diffusers' `load_lora_weights` does not load a {title} of {' and '.join(parts)}; peft "
                             'does, one folder a part.')
        loading.code = _lines(
            part.imports(f'from diffusers import {_LOAD}', 'from peft import PeftModel', downloads=True),
            *part.download(), part.pipeline(), *merge, part.image())
    if (part.folder / KOHYA).is_file():
        loading.interfaces.append(f'ComfyUI: `{part.name}/{KOHYA}` into `models/loras`. A1111, Forge: into '
                                  '`models/Lora`.')
    elif kind == 'oft':
        loading.interfaces.append('ComfyUI and the WebUIs have no common format for an OFT.')
    else:
        loading.interfaces.append(
            f"Write kohya's layout, of which they read every key, with {part.exported()}. ComfyUI: into "
            '`models/loras`. A1111, Forge: into `models/Lora`.')
    return loading


def _word(part: _Part) -> Loading:
    token = str(part.settings.get('token'))
    loads = [f"pipeline.load_textual_inversion(vectors[{key!r}], token={token!r}, text_encoder=pipeline.{encoder}, "
             f"tokenizer=pipeline.{encoder.replace('text_encoder', 'tokenizer')})" for encoder, key in KEYS.items()]
    code = _lines(part.imports(f'from diffusers import {_LOAD}', 'from safetensors.torch import load_file',
                               downloads=True),
                  *part.download(), part.pipeline(), f"vectors = load_file(f'{{folder}}/{part.name}/{WORDS}')", *loads,
                  part.image())
    return Loading('a textual inversion', ['textual_inversion'],
                   ['One file has the vectors of both text encoders, so diffusers loads it in two calls.'], code,
                   [f'ComfyUI: `{part.name}/{WORDS}` into `models/embeddings`, under the name of the word; write '
                    '`embedding:NAME` into the prompt. A1111, Forge: into `embeddings`, and write the NAME.'])


def _t2i_adapter(part: _Part) -> Loading:
    return Loading('a T2I-Adapter', ['t2i-adapter'], [], _control(
        part, 'T2IAdapter', 'StableDiffusionXLAdapterPipeline', 'adapter', 'image', 'adapter_conditioning_scale'),
        _control_interfaces(part))


def _controlnet(part: _Part) -> Loading:
    cls = str(_config(part.folder).get('_class_name') or 'ControlNetModel')
    if cls == 'ControlNetUnionModel':
        return Loading('a ControlNet union', ['controlnet'], [
            f"diffusers: `ControlNetUnionModel.from_pretrained({part.at()})`, for a "
            'StableDiffusionXLControlNetUnionPipeline.'], '', _control_interfaces(part))
    return Loading('a ControlNet', ['controlnet'], [], _control(
        part, cls, 'StableDiffusionXLControlNetPipeline', 'controlnet', 'image', 'controlnet_conditioning_scale'),
        _control_interfaces(part))


def _control(part: _Part, cls: str, pipeline: str, argument: str, image: str, scale: str) -> str:
    """Return the code for a network that reads a control image."""
    return _lines(part.imports(f'from diffusers import {", ".join(sorted([cls, pipeline]))}',
                               'from diffusers.utils import load_image'),
                  f'{argument} = {cls}.from_pretrained({part.at()}, torch_dtype=torch.float16)',
                  part.pipeline(pipeline, f'{argument}={argument}'),
                  part.image(f"{image}=load_image('CONDITION.png')", f'{scale}={part.scale:g}'))


def _control_interfaces(part: _Part) -> list[str]:
    return [f'ComfyUI, A1111, Forge: `{part.name}/{NETWORK}`, renamed to your liking, into `models/controlnet` '
            '(`models/ControlNet`).']


def _ip_adapter(part: _Part) -> Loading:
    encoder, subfolder = part.settings.get('image_encoder'), part.settings.get('image_encoder_subfolder')
    where = repr(str(encoder or 'IMAGE_ENCODER')) + (f', subfolder={subfolder!r}' if subfolder else '')
    notes = ['The image encoder is not in the file; the one that it was trained with is given to the pipeline.']
    code = _lines(
        part.imports(f'from diffusers import {_LOAD}', 'from diffusers.utils import load_image',
                     'from transformers import CLIPVisionModelWithProjection'),
        f'encoder = CLIPVisionModelWithProjection.from_pretrained({where}, torch_dtype=torch.float16)',
        part.pipeline(_LOAD, 'image_encoder=encoder'),
        f"pipeline.load_ip_adapter({part.at()}, weight_name='ip_adapter.safetensors', image_encoder_folder=None)",
        f'pipeline.set_ip_adapter_scale({part.scale:g})', part.image("ip_adapter_image=load_image('REFERENCE.png')"))
    return Loading('an IP-Adapter', ['ip-adapter'], notes, code, [
        f'ComfyUI (with the extension ComfyUI_IPAdapter_plus): `{part.name}/ip_adapter.safetensors` into '
        '`models/ipadapter`, the image encoder into `models/clip_vision`.'])


def _image_encoder(part: _Part) -> Loading:
    code = _lines(part.imports('from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection'),
                  f'encoder = CLIPVisionModelWithProjection.from_pretrained({part.at()})',
                  f'processor = CLIPImageProcessor.from_pretrained({part.at()})')
    return Loading('an image encoder', ['image-encoder'], [], code,
                   [f'ComfyUI: `{part.name}/model.safetensors` into `models/clip_vision`.'])


def _pipeline(part: _Part) -> Loading:
    lines = part.imports(f'from diffusers import {_LOAD}', downloads=True)
    load = f"pipeline = {_LOAD}.from_pretrained(f'{{folder}}/{PIPELINE}', torch_dtype=torch.float16).to('cuda')"
    return Loading('a fine-tuned base', ['text-to-image'], [], _lines(lines, *part.download(), load, part.image()), [
        f'ComfyUI: `{PIPELINE}/unet/{NETWORK}` into `models/diffusion_models` for the UNet; text encoders and VAE from '
        'the base.'])


def _other(part: _Part) -> Loading:
    kind = str(part.settings.get('type'))
    return Loading(f'an adapter of type {kind}', [], [
        f'It loads as `weights` of a {kind} in a config of diffengine_sdxl, with the module that registers it.'])


_KINDS = {'LoRA': _lora, 'TextualInversion': _word, 'T2IAdapter': _t2i_adapter, 'ControlNet': _controlnet,
          'IPAdapter': _ip_adapter, 'ImageEncoder': _image_encoder, PIPELINE: _pipeline}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / 'config.json'
    return json.loads(path.read_text()) if path.is_file() else {}


def _lines(first: list[str], *rest: str) -> str:
    return '\n'.join([*first, *rest])
