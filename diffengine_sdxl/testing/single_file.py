"""Write a diffusers folder as the single file that Stability's own code would have saved.

The names are built by walking the modules and counting blocks as the original's constructor does, so that they don't
share a rule with the loader under test, which rewrites the names of the parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def put(out: Tensors, name: str, module: nn.Module | None) -> None:
    """Write the parameters of `module` below `name`; nothing for None."""
    if module is not None:
        out.update({f'{name}.{key}': value for key, value in module.state_dict().items()})


def unet_resnet(out: Tensors, name: str, block: Any) -> None:
    """openaimodel.ResBlock: norm, act, conv; act, linear; norm, act, dropout, conv; skip."""
    put(out, f'{name}.in_layers.0', block.norm1)
    put(out, f'{name}.in_layers.2', block.conv1)
    put(out, f'{name}.emb_layers.1', block.time_emb_proj)
    put(out, f'{name}.out_layers.0', block.norm2)
    put(out, f'{name}.out_layers.3', block.conv2)
    put(out, f'{name}.skip_connection', block.conv_shortcut)


def encoder_tensors(net: Any) -> Tensors:
    """The input blocks and the middle block of a UNet, or of a ControlNet, which has no others."""
    out: Tensors = {}
    put(out, 'input_blocks.0.0', net.conv_in)
    number = 1
    for level in net.down_blocks:
        for index, resnet in enumerate(level.resnets):
            unet_resnet(out, f'input_blocks.{number}.0', resnet)
            if hasattr(level, 'attentions'):
                put(out, f'input_blocks.{number}.1', level.attentions[index])
            number += 1
        if level.downsamplers:
            put(out, f'input_blocks.{number}.0.op', level.downsamplers[0].conv)
            number += 1
    unet_resnet(out, 'middle_block.0', net.mid_block.resnets[0])
    put(out, 'middle_block.1', net.mid_block.attentions[0])
    unet_resnet(out, 'middle_block.2', net.mid_block.resnets[1])
    return out


def unet_tensors(unet: Any) -> Tensors:
    """openaimodel.UNetModel: one list of input blocks, one of output blocks, each block a sequence of layers."""
    out = encoder_tensors(unet)
    number = 0
    for level in unet.up_blocks:
        for index, resnet in enumerate(level.resnets):
            layers: list[Any] = [resnet, *([level.attentions[index]] if hasattr(level, 'attentions') else [])]
            unet_resnet(out, f'output_blocks.{number}.0', resnet)
            for place, layer in enumerate(layers[1:], start=1):
                put(out, f'output_blocks.{number}.{place}', layer)
            if level.upsamplers and index == len(level.resnets) - 1:
                put(out, f'output_blocks.{number}.{len(layers)}.conv', level.upsamplers[0].conv)
            number += 1
    for index, (time, label) in enumerate([(unet.time_embedding.linear_1, unet.add_embedding.linear_1),
                                           (unet.time_embedding.linear_2, unet.add_embedding.linear_2)]):
        put(out, f'time_embed.{2 * index}', time)
        put(out, f'label_emb.0.{2 * index}', label)
    put(out, 'out.0', unet.conv_norm_out)
    put(out, 'out.2', unet.conv_out)
    return out


def vae_resnet(out: Tensors, name: str, block: Any) -> None:
    """diffusionmodules.model.ResnetBlock."""
    for part in ('norm1', 'conv1', 'norm2', 'conv2'):
        put(out, f'{name}.{part}', getattr(block, part))
    put(out, f'{name}.nin_shortcut', block.conv_shortcut)


def vae_side(out: Tensors, name: str, side: Any, levels: list[Any], way: str, sampler: str) -> None:
    """The encoder or the decoder; `levels` in the original's order, which begins at the image."""
    put(out, f'{name}.conv_in', side.conv_in)
    for level, block in enumerate(levels):
        for index, resnet in enumerate(block.resnets):
            vae_resnet(out, f'{name}.{way}.{level}.block.{index}', resnet)
        for sample in getattr(block, f'{sampler}rs') or []:
            put(out, f'{name}.{way}.{level}.{sampler}.conv', sample.conv)
    middle = side.mid_block
    vae_resnet(out, f'{name}.mid.block_1', middle.resnets[0])
    vae_resnet(out, f'{name}.mid.block_2', middle.resnets[1])
    attention = middle.attentions[0]
    put(out, f'{name}.mid.attn_1.norm', attention.group_norm)
    for part, layer in (('q', attention.to_q), ('k', attention.to_k), ('v', attention.to_v),
                        ('proj_out', attention.to_out[0])):
        # 1x1 convolutions in the original.
        out[f'{name}.mid.attn_1.{part}.weight'] = layer.weight.data[:, :, None, None]
        out[f'{name}.mid.attn_1.{part}.bias'] = layer.bias.data
    put(out, f'{name}.norm_out', side.conv_norm_out)
    put(out, f'{name}.conv_out', side.conv_out)


def vae_tensors(vae: Any) -> Tensors:
    """AutoencoderKL of the original, which counts the decoder's levels from the image too."""
    out: Tensors = {}
    vae_side(out, 'encoder', vae.encoder, list(vae.encoder.down_blocks), 'down', 'downsample')
    vae_side(out, 'decoder', vae.decoder, list(vae.decoder.up_blocks)[::-1], 'up', 'upsample')
    put(out, 'quant_conv', vae.quant_conv)
    put(out, 'post_quant_conv', vae.post_quant_conv)
    return out


def clip_tensors(encoder: Any) -> Tensors:
    """transformers' CLIPTextModel as version 4 wrote it: below `text_model`, with its position ids."""
    inner = getattr(encoder, 'text_model', encoder)
    out = {f'text_model.{key}': value for key, value in inner.state_dict().items()}
    out['text_model.embeddings.position_ids'] = torch.arange(77)[None]
    return out


def open_clip_tensors(encoder: Any) -> Tensors:
    """open_clip's text tower: torch.nn.MultiheadAttention with fused inputs; x @ text_projection."""
    inner = encoder.text_model
    out: Tensors = {'token_embedding.weight': inner.embeddings.token_embedding.weight.data,
                    'positional_embedding': inner.embeddings.position_embedding.weight.data,
                    'text_projection': encoder.text_projection.weight.data.T, 'logit_scale': torch.tensor(4.6052)}
    for index, layer in enumerate(inner.encoder.layers):
        name, attention = f'transformer.resblocks.{index}', layer.self_attn
        three = [attention.q_proj, attention.k_proj, attention.v_proj]
        out[f'{name}.attn.in_proj_weight'] = torch.cat([m.weight.data for m in three])
        out[f'{name}.attn.in_proj_bias'] = torch.cat([m.bias.data for m in three])
        put(out, f'{name}.attn.out_proj', attention.out_proj)
        put(out, f'{name}.ln_1', layer.layer_norm1)
        put(out, f'{name}.ln_2', layer.layer_norm2)
        put(out, f'{name}.mlp.c_fc', layer.mlp.fc1)
        put(out, f'{name}.mlp.c_proj', layer.mlp.fc2)
    put(out, 'ln_final', inner.final_layer_norm)
    return out


def below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The same tensors with `prefix` before their names."""
    return {prefix + key: value.clone().contiguous() for key, value in tensors.items()}


def original_tensors(folder: Path) -> Tensors:
    """All tensors of the diffusers folder, named and shaped as in Stability's single file (fp32)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    out = {**below('model.diffusion_model.',
                   unet_tensors(UNet2DConditionModel.from_pretrained(folder, subfolder='unet'))),
           **below('first_stage_model.', vae_tensors(AutoencoderKL.from_pretrained(folder, subfolder='vae')))}
    base = (folder / 'text_encoder').is_dir()  # a refiner has one encoder only
    if base:
        out |= below('conditioner.embedders.0.transformer.',
                     clip_tensors(CLIPTextModel.from_pretrained(folder, subfolder='text_encoder')))
    return out | below(f'conditioner.embedders.{int(base)}.model.', open_clip_tensors(
        CLIPTextModelWithProjection.from_pretrained(folder, subfolder='text_encoder_2')))


def write(path: Path, tensors: Tensors) -> Path:
    """A `.safetensors`, or a `.ckpt` as PyTorch Lightning lays it out."""
    if path.suffix == '.safetensors':
        save_file(tensors, path)
    else:
        torch.save({'state_dict': tensors, 'global_step': 1, 'epoch': 0}, path)
    return path
