"""Tiny adapters that look trained, in the formats of their ecosystems."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing.single_file import Tensors, encoder_tensors, put, write

#: What says where an adapter's weights come from.
LOCATION = ('weights', 'subfolder', 'weight_name', 'revision', 'variant')
#: Deviation of the noise in place of training; a LoRA's is the product of two matrices.
NOISE = {'LoRA': 0.1}


def write_tiny_adapter(folder: str | Path, base: str | Path, config: Mapping[str, Any]) -> Path:
    """Write the adapter of a config, with noise added to its fresh weights. The same arguments give the same bytes.

    Args:
        base: folder of the base that it is for.
        config: of the adapter, with its `type`; what it says of existing weights is ignored.
    """
    if config.get('control_type') is not None:  # a union is not made from scratch by the adapter
        return write_tiny_union(folder, base, num_control_type=8)
    fresh = {key: value for key, value in config.items() if key not in LOCATION} | {'trainable': True}
    model = SDXL(pretrained=str(base), adapters={'tiny': fresh})
    _add_noise([parameter for _, parameter in model.trainables()['tiny']], str(config['type']))
    model.adapters['tiny'].save(folder)
    return Path(folder)


def write_tiny_union(folder: str | Path, base: str | Path, num_control_type: int = 6) -> Path:
    """Write a union ControlNet, which reads images of several control types. The same arguments give the same bytes."""
    from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
    config = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base, subfolder='unet'),
                                       load_weights_from_unet=False).config
    width = config['block_out_channels'][0]
    with rng.fork('tiny union'):
        net = ControlNetUnionModel.from_config(
            {key: value for key, value in config.items() if key != 'mid_block_type' and not key.startswith('_')},
            num_control_type=num_control_type, num_trans_channel=width, num_proj_channel=width)
    _add_noise(list(net.parameters()), 'union')
    net.save_pretrained(str(folder))
    return Path(folder)


def write_original_controlnet(path: Path, source: str | Path, prefix: str = 'control_model.') -> Path:
    """Write the ControlNet in a folder of diffusers as one file in the original layout."""
    from diffusers import ControlNetModel
    tensors = original_controlnet(ControlNetModel.from_pretrained(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, {f'{prefix}{key}': value.contiguous() for key, value in tensors.items()})


def original_controlnet(net: Any) -> Tensors:
    """Return a ControlNet's tensors under the names of cldm.ControlNet, where every input block has an output."""
    out = encoder_tensors(net)
    embedding = net.controlnet_cond_embedding
    for number, conv in enumerate((embedding.conv_in, *embedding.blocks, embedding.conv_out)):
        put(out, f'input_hint_block.{2 * number}', conv)  # an activation between each two
    for number, conv in enumerate(net.controlnet_down_blocks):
        put(out, f'zero_convs.{number}.0', conv)
    put(out, 'middle_block_out.0', net.controlnet_mid_block)
    for number, name in ((0, 'linear_1'), (2, 'linear_2')):
        put(out, f'time_embed.{number}', getattr(net.time_embedding, name))
        put(out, f'label_emb.0.{number}', getattr(net.add_embedding, name))
    return out


@torch.no_grad()
def _add_noise(parameters: list[nn.Parameter], kind: str) -> None:
    for i, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=rng.generator('tiny adapter', kind, i))
        parameter.add_(NOISE.get(kind, 0.02) * noise)
