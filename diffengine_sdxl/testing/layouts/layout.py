"""A layout: files that hold an adapter, and the change that they must make, or that they must be refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffengine_sdxl.testing.layouts.base import WORD, Layer, Tensors
from diffengine_sdxl.testing.layouts.forms import Piece

#: Outputs of a change: its name -> tensors by 'sample', 'prompt_embeds', 'pooled'.
Outputs = dict[str, Tensors]


@dataclass
class Layout:
    """Files of one layout.

    Attributes:
        name: of its folder. title, written_by: for people.
        files: path in its folder -> tensors (.safetensors, .bin, .pt), or what is written as JSON (.json).
        change: of `outputs`; '' if it must be refused.
        source: what a loader is given, a path in its folder; '' for the folder.
        kind: of adapter.
        metadata: of the .safetensors.
        settings: what a loader must be told besides, such as alpha.
        refused: a regular expression of what the refusal must say.
    """

    name: str
    title: str
    written_by: str
    files: Mapping[str, Any]
    change: str = ''
    source: str = ''
    kind: str = 'LoRA'
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ''

    def write(self, folder: Path) -> None:
        """Write the files into `folder`/<name>."""
        for path, content in self.files.items():
            target = folder / self.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == '.json':
                target.write_text(json.dumps(content, indent=2))
            elif target.suffix == '.safetensors':
                save_file({key: plain(value) for key, value in content.items()}, target,
                          metadata={'format': 'pt', **self.metadata})
            else:
                torch.save(content, target)

    def entry(self) -> dict[str, Any]:
        """Return it for layouts.json."""
        entry: dict[str, Any] = {'kind': self.kind, 'title': self.title, 'written_by': self.written_by,
                 'source': os.path.normpath(f'{self.name}/{self.source}')}
        entry |= {'settings': dict(self.settings)} if self.settings else {}
        entry |= {'word': WORD} if self.kind == 'TextualInversion' else {}
        return {**entry, **({'refused': self.refused} if self.refused else {'expected': self.change})}


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor as files hold it: contiguous, its own memory, fp32 if it was computed in fp64."""
    return tensor.to(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype).contiguous().clone()


#: A layer's name in a file.
Spelling = Callable[[Layer], str]
_KOHYA = {'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}


def text_name(layer: Layer) -> str:
    """Return a text encoder's layer as transformers 4 named it, which files follow."""
    return f'text_model.{layer.name.removeprefix("text_model.")}'


def kohya(layer: Layer) -> str:
    """Spell as sd-scripts: 'lora_unet_input_blocks_4_1_proj_in', 'lora_te1_text_model_...'."""
    name, prefix = (layer.original, 'lora_unet_') if layer.part == 'unet' else (text_name(layer), _KOHYA[layer.part])
    return prefix + name.replace('.', '_')


def mixture(layer: Layer) -> str:
    """Spell with diffusers' names of the UNet: 'lora_unet_down_blocks_1_attentions_0_proj_in'."""
    return f'lora_unet_{layer.name.replace(".", "_")}' if layer.part == 'unet' else kohya(layer)


def lycoris(layer: Layer) -> str:
    """Spell as LyCORIS' own wrapper of a UNet: 'lycoris_down_blocks_1_attentions_0_proj_in'."""
    return f'lycoris_{layer.name.replace(".", "_")}'


def comfy(layer: Layer) -> str:
    """Spell as ComfyUI names the weights: 'diffusion_model.input_blocks.4.1.proj_in', 'text_encoders.clip_l...'."""
    encoder = {'text_encoder': 'clip_l', 'text_encoder_2': 'clip_g'}
    return f'diffusion_model.{layer.original}' if layer.part == 'unet' else (
        f'text_encoders.{encoder[layer.part]}.transformer.{text_name(layer)}')


def diffusers(layer: Layer) -> str:
    """Spell as diffusers: 'unet.down_blocks.1.attentions.0.proj_in', 'text_encoder.text_model...'."""
    return f'{layer.part}.{layer.name if layer.part == "unet" else text_name(layer)}'


def spelled(pieces: Sequence[Piece], spelling: Spelling) -> Tensors:
    """Return all tensors by the keys of a file."""
    return {f'{spelling(piece.layer)}.{name}': tensor for piece in pieces for name, tensor in piece.tensors.items()}
