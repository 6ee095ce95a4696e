"""The tiny base in fp64: its layers, fixed inputs, and what it gives with changed weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from diffengine_sdxl import rng
from diffengine_sdxl.testing.models import write_tiny_sdxl
from diffengine_sdxl.testing.single_file import unet_tensors

Tensors = dict[str, Tensor]
PARTS = ('unet', 'text_encoder', 'text_encoder_2')
#: Layers of every sort: convolutions of 3 x 3 and 1 x 1, one that halves the size, linear ones, and norms.
LAYERS: dict[str, tuple[str, ...]] = {
    'unet': ('conv_in', 'time_embedding.linear_1', 'add_embedding.linear_2', 'down_blocks.0.resnets.0.conv1',
             'down_blocks.0.downsamplers.0.conv', 'down_blocks.1.resnets.0.conv_shortcut',
             'down_blocks.1.attentions.0.proj_in', 'down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k',
             'mid_block.attentions.0.transformer_blocks.0.attn1.to_q',
             'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0', 'mid_block.resnets.1.conv2',
             'up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj', 'up_blocks.1.resnets.1.time_emb_proj'),
    'text_encoder': ('encoder.layers.0.self_attn.q_proj', 'encoder.layers.0.mlp.fc2'),
    'text_encoder_2': ('text_model.encoder.layers.1.self_attn.out_proj', 'text_model.encoder.layers.0.mlp.fc1')}
NORMS: dict[str, tuple[str, ...]] = {
    'unet': ('down_blocks.0.resnets.0.norm1', 'down_blocks.1.attentions.0.norm',
             'mid_block.attentions.0.transformer_blocks.0.norm2', 'conv_norm_out'),
    'text_encoder': ('encoder.layers.0.layer_norm1',), 'text_encoder_2': ('text_model.encoder.layers.1.layer_norm2',)}
#: The word of the textual inversions; in the base it is read as ordinary text.
WORD = '<mark>'
PROMPTS = (f'a photo of {WORD}', f'{WORD} on blue paper')


@dataclass(frozen=True)
class Layer:
    """A layer of the base; `weight` and `bias` are its own, in fp64; `original` is its name in Stability's layout."""

    part: str
    name: str
    weight: Tensor
    bias: Tensor | None
    original: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the weight's shape."""
        return tuple(self.weight.shape)


class Base:
    """The tiny base, written to `folder`, in fp64.

    Attributes:
        unet, text_encoder, text_encoder_2: diffusers' and transformers' modules.
        inputs: what `outputs` reads; see README.txt.
    """

    def __init__(self, folder: Path) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        write_tiny_sdxl(folder)
        classes: dict[str, Any] = {'unet': UNet2DConditionModel, 'text_encoder': CLIPTextModel,
                                   'text_encoder_2': CLIPTextModelWithProjection}
        self.parts: dict[str, Any] = {part: cls.from_pretrained(folder, subfolder=part).double().requires_grad_(False)
                                      for part, cls in classes.items()}
        self.tokenizers = {part: CLIPTokenizer.from_pretrained(folder, subfolder=f'tokenizer{part[len(PARTS[1]):]}')
                           for part in PARTS[1:]}
        by_place = {tensor.data_ptr(): key for key, tensor in unet_tensors(self.parts['unet']).items()}
        self.originals = {name: by_place[parameter.data_ptr()] for name, parameter in
                          self.parts['unet'].named_parameters()}
        random = rng.generator('layouts', 'inputs')
        self.inputs: Tensors = {
            'latents': torch.randn(2, 4, 8, 8, generator=random), 'timestep': torch.tensor([40, 800]),
            'time_ids': torch.tensor([[64., 64., 0., 0., 64., 64.], [72., 88., 1., 2., 64., 64.]]),
            'input_ids': self.input_ids('text_encoder'), 'input_ids_2': self.input_ids('text_encoder_2'),
            'image': torch.rand(2, 3, 64, 64, generator=random),
            'image_embeds': torch.randn(2, 24, generator=random),
            'image_hidden_states': torch.randn(2, 17, 32, generator=random)}
        text = self.encode()
        self.inputs |= {'encoder_hidden_states': text['prompt_embeds'].float(), 'text_embeds': text['pooled'].float()}

    def layers(self, parts: Sequence[str] = PARTS, names: Mapping[str, Sequence[str]] = LAYERS) -> list[Layer]:
        """Return the layers of LAYERS, or of NORMS."""
        return list(self._layers(parts, names))

    def _layers(self, parts: Sequence[str], names: Mapping[str, Sequence[str]]) -> Iterator[Layer]:
        for part in parts:
            for name in names[part]:
                module: Any = self.parts[part].get_submodule(name)
                original = self.originals[f'{name}.weight'].removesuffix('.weight') if part == 'unet' else ''
                yield Layer(part, name, module.weight, getattr(module, 'bias', None), original)

    def input_ids(self, part: str, num_vectors: int = 0) -> Tensor:
        """Return the tokens [2, 77] of PROMPTS; those of WORD follow the tokenizer's own if it has vectors."""
        tokenizer, rows = self.tokenizers[part], []
        word = [len(tokenizer) + i for i in range(num_vectors)]
        for prompt in PROMPTS:
            before, after = prompt.split(WORD)
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, WORD, after)]
            row = [tokenizer.bos_token_id, *ids[0], *(word or ids[1]), *ids[2], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
        return torch.tensor(rows)

    @torch.no_grad()
    def encode(self, changed: Mapping[str, Tensor] | None = None, vectors: Mapping[str, Tensor] | None = None
               ) -> Tensors:
        """Return 'prompt_embeds' [2, 77, 64], the penultimate hidden states of both encoders, and 'pooled' [2, 32].

        Args:
            changed: '<part>.<parameter>' -> its new value.
            vectors: part -> vectors [n, 32] of WORD.
        """
        states, pooled = [], torch.empty(0)
        for part in PARTS[1:]:
            encoder, own = self.parts[part], of_part(changed or {}, part)
            word = (vectors or {}).get(part, torch.empty(0, 32))
            if len(word):
                table = next(name for name, _ in encoder.named_parameters() if name.endswith('token_embedding.weight'))
                own[table] = torch.cat([encoder.get_parameter(table), word.double()])
            output: Any = functional_call(encoder, own, (self.input_ids(part, len(word)),),
                                          {'output_hidden_states': True})
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return {'prompt_embeds': torch.cat(states, dim=-1), 'pooled': pooled}

    @torch.no_grad()
    def denoise(self, changed: Mapping[str, Tensor] | None = None, **more: Any) -> Tensor:
        """Return the UNet's output [2, 4, 8, 8] for the fixed inputs, which include the base's own text.

        Args:
            changed: '<part>.<parameter>' -> its new value.
            more: of the UNet's call.
        """
        x = {key: value.double() if value.is_floating_point() else value for key, value in self.inputs.items()}
        added = {'text_embeds': x['text_embeds'], 'time_ids': x['time_ids']}
        output: Any = functional_call(
            self.parts['unet'], of_part(changed or {}, 'unet'),
            (x['latents'], x['timestep'], x['encoder_hidden_states']),
            {'added_cond_kwargs': added, 'return_dict': False, **more})
        sample: Tensor = output[0]
        return sample

    def outputs(self, changed: Mapping[str, Tensor]) -> Tensors:
        """Return 'sample', and with changed text encoders 'prompt_embeds' and 'pooled'."""
        parts = {name.partition('.')[0] for name in changed}
        return {**({'sample': self.denoise(changed)} if 'unet' in parts else {}),
                **(self.encode(changed) if parts - {'unet'} else {})}


def of_part(changed: Mapping[str, Tensor], part: str) -> Tensors:
    """Return one part's changed parameters by their names in it."""
    return {name.removeprefix(f'{part}.'): value for name, value in changed.items() if name.startswith(f'{part}.')}
