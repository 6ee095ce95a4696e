"""IP-Adapters, T2I-Adapters and ControlNets in the files of their authors and of diffusers.

Sources of the layouts: tencent-ailab/IP-Adapter (ip_adapter.py, resampler.py), TencentARC/T2I-Adapter
(adapters.py), lllyasviel/ControlNet (cldm.py), and diffusers' classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffengine_sdxl import rng
from diffengine_sdxl.testing.adapters import original_controlnet
from diffengine_sdxl.testing.layouts.base import Base, Tensors
from diffengine_sdxl.testing.layouts.layout import Layout, plain
from diffengine_sdxl.testing.layouts.single_files import FILE, Writer
from diffengine_sdxl.testing.single_file import unet_tensors

NUM_TOKENS, TEXT, HEAD = 4, 64, 64
WEIGHTS = 'diffusion_pytorch_model.safetensors'
#: What a union ControlNet has in common with its base.
_UNION = ('in_channels', 'block_out_channels', 'layers_per_block', 'cross_attention_dim', 'addition_embed_type',
          'addition_time_embed_dim', 'projection_class_embeddings_input_dim', 'down_block_types', 'attention_head_dim',
          'norm_num_groups', 'transformer_layers_per_block', 'use_linear_projection')


def layouts(write: Writer) -> Iterator[Layout]:
    """Yield all."""
    yield from _ip_adapters(write)
    yield from _t2i_adapters(write)
    yield from _controlnets(write)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], *key: str) -> Tensors:
    """Return tensors of a network that looks trained: fp32, deviation 1 / sqrt(inputs), norms about one."""
    random, tensors = rng.generator('layouts', *key), {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=random)
        if len(shape) < 2:
            tensors[name] = 0.1 * tensor + ('norm' in name or '.1.0.' in name) * name.endswith('weight')
        else:
            tensors[name] = tensor / max(1, tensor[0].numel()) ** 0.5
    return tensors


class DecoupledAttention:
    """Attention to the text, and besides to an image's tokens by keys and values of their own; added up."""

    def __init__(self, to_k: Tensor, to_v: Tensor, tokens: Tensor) -> None:
        self.key, self.value = tokens @ to_k.double().T, tokens @ to_v.double().T

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the attention's output [B, n, D]."""
        query = attn.to_q(hidden_states)
        text = attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn.heads)
        out: Tensor = attn.to_out[0](text + attend(query, self.key, self.value, attn.heads))
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for each head."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _base_projection(tensors: Tensors, embeds: Tensor) -> Tensor:
    """Return tokens [B, 4, 64] of embeddings: a linear layer and a norm."""
    tokens = F.linear(embeds, tensors['proj.weight'], tensors['proj.bias']).unflatten(-1, (NUM_TOKENS, TEXT))
    return F.layer_norm(tokens, (TEXT,), tensors['norm.weight'], tensors['norm.bias'])


def _plus_projection(tensors: Tensors, states: Tensor) -> Tensor:
    """Return tokens [B, 4, 64] of hidden states: a Perceiver resampler of two blocks."""
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f'{name}.weight'], tensors[f'{name}.bias'])

    x = F.linear(states, tensors['proj_in.weight'], tensors['proj_in.bias'])
    latents = tensors['latents'].expand(len(x), -1, -1)
    for block in ('layers.0', 'layers.1'):
        own = norm(latents, f'{block}.0.norm2')
        key, value = F.linear(torch.cat([norm(x, f'{block}.0.norm1'), own], 1),
                              tensors[f'{block}.0.to_kv.weight']).chunk(2, -1)
        query = F.linear(own, tensors[f'{block}.0.to_q.weight'])
        latents = latents + F.linear(attend(query, key, value, query.shape[-1] // HEAD),
                                     tensors[f'{block}.0.to_out.weight'])
        inner = F.gelu(F.linear(norm(latents, f'{block}.1.0'), tensors[f'{block}.1.1.weight']))
        latents = latents + F.linear(inner, tensors[f'{block}.1.3.weight'])
    return norm(F.linear(latents, tensors['proj_out.weight'], tensors['proj_out.bias']), 'norm_out')


def projection_shapes(plus: bool, embed: int, hidden: int = 48) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `image_proj`."""
    if not plus:
        return {'proj.weight': (NUM_TOKENS * TEXT, embed), 'proj.bias': (NUM_TOKENS * TEXT,),
                'norm.weight': (TEXT,), 'norm.bias': (TEXT,)}
    shapes: dict[str, tuple[int, ...]] = {
        'latents': (1, NUM_TOKENS, hidden), 'proj_in.weight': (hidden, embed), 'proj_in.bias': (hidden,),
        'proj_out.weight': (TEXT, hidden), 'proj_out.bias': (TEXT,),
        'norm_out.weight': (TEXT,), 'norm_out.bias': (TEXT,)}
    for block in ('layers.0', 'layers.1'):
        shapes |= {f'{block}.{name}.{kind}': (hidden,) for name in ('0.norm1', '0.norm2', '1.0')
                   for kind in ('weight', 'bias')}
        shapes |= {f'{block}.0.to_q.weight': (HEAD, hidden), f'{block}.0.to_kv.weight': (2 * HEAD, hidden),
                   f'{block}.0.to_out.weight': (hidden, HEAD), f'{block}.1.1.weight': (4 * hidden, hidden),
                   f'{block}.1.3.weight': (hidden, 4 * hidden)}
    return shapes


def ip_adapter(base: Base, plus: bool, embed: int) -> dict[str, Tensors]:
    """Return a file's parts: 'image_proj', and 'ip_adapter' by the number of the attention, in the UNet's order."""
    keys: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(base.parts['unet'].attn_processors):
        if 'attn2' in name:
            width = base.parts['unet'].get_submodule(name.removesuffix('.processor')).to_q.weight.shape[0]
            keys |= {f'{number}.to_k_ip.weight': (width, TEXT), f'{number}.to_v_ip.weight': (width, TEXT)}
    return {'image_proj': random_tensors(projection_shapes(plus, embed), 'image_proj', str(plus)),
            'ip_adapter': random_tensors(keys, 'ip_adapter', str(plus))}


def _ip_adapters(write: Writer) -> Iterator[Layout]:
    base = write.base
    for plus, reads in ((False, 'image_embeds'), (True, 'image_hidden_states')):
        kind, embeds = 'plus' if plus else 'base', base.inputs[reads]
        parts = ip_adapter(base, plus, embeds.shape[-1])
        projection = {key: value.double() for key, value in parts['image_proj'].items()}
        tokens = (_plus_projection if plus else _base_projection)(projection, embeds.double())
        unet, change = base.parts['unet'], f'ip_adapter_{kind}'
        before = unet.attn_processors
        unet.set_attn_processor({name: DecoupledAttention(
            parts['ip_adapter'][f'{number}.to_k_ip.weight'], parts['ip_adapter'][f'{number}.to_v_ip.weight'], tokens)
            if 'attn2' in name else old for number, (name, old) in enumerate(before.items())})
        write.outputs[change] = {'sample': base.denoise()}
        unet.set_attn_processor(before)
        flat = {f'{part}.{key}': value for part, own in parts.items() for key, value in own.items()}
        for name, file, content in (('bin', 'ip_adapter.bin', parts), ('safetensors', 'ip_adapter.safetensors', flat),
                                    ('bin_flat', 'ip_adapter.bin', flat)):
            yield Layout(f'ip_adapter_{kind}_{name}', f'IP-Adapter {kind}, {name.replace("_", ", ")}; it reads {reads}',
                         'tencent-ailab/IP-Adapter, h94', {file: content}, change, file, 'IPAdapter')


def _network(net: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a network in fp64 with other weights."""
    net = net.double().requires_grad_(False)
    net.load_state_dict(state)
    return net


def _config(net: Any) -> dict[str, Any]:
    """Return a network's config.json."""
    return {'_class_name': type(net).__name__, **{k: v for k, v in net.config.items() if not k.startswith('_')}}


@torch.no_grad()
def _t2i_adapters(write: Writer) -> Iterator[Layout]:
    from diffusers import T2IAdapter
    config: dict[str, Any] = dict(in_channels=3, channels=[16, 32, 64, 64], num_res_blocks=2, downscale_factor=16,
                                  adapter_type='full_adapter_xl')
    state = random_tensors({k: tuple(v.shape) for k, v in T2IAdapter(**config).state_dict().items()}, 't2i')
    net = _network(T2IAdapter(**config), state)
    features = [feature.double() for feature in net(write.base.inputs['image'].double())]
    write.outputs['t2i_adapter'] = {'sample': write.base.denoise(down_intrablock_additional_residuals=features)}
    original = {}
    for key, value in state.items():
        body, level, *rest = key.removeprefix('adapter.').split('.')
        if body == 'body':
            number = 2 * int(level) + (int(rest[1]) if rest[0] == 'resnets' else 0)
            key = '.'.join(['body', str(number), *(rest[2:] if rest[0] == 'resnets' else rest)])
        original[key.removeprefix('adapter.')] = value
    for name, title, who, files, source in (
            ('folder', "diffusers' folder", 'diffusers', {WEIGHTS: state, 'config.json': _config(net)}, ''),
            ('file', "one file with diffusers' names", 'diffusers', {FILE: state}, FILE),
            ('path', "the weights' path in diffusers' folder", 'diffusers', {}, f'../t2i_adapter_folder/{WEIGHTS}'),
            ('original', 'the original names', 'TencentARC', {'sketch.pth': original}, 'sketch.pth')):
        yield Layout(f't2i_adapter_{name}', f'T2I-Adapter, {title}', who, files, 't2i_adapter', source, 'T2IAdapter')


def _control(base: Base, net: Any, **arguments: Any) -> Tensors:
    """Return what a ControlNet changes, given the inputs' image at strength 1."""
    x = {key: value.double() if value.is_floating_point() else value for key, value in base.inputs.items()}
    arguments.setdefault('controlnet_cond', x['image'])
    added = {'text_embeds': x['text_embeds'], 'time_ids': x['time_ids']}
    with torch.no_grad():
        down, middle = net(x['latents'], x['timestep'], x['encoder_hidden_states'], added_cond_kwargs=added,
                           return_dict=False, **arguments)
    return {'sample': base.denoise(down_block_additional_residuals=down, mid_block_additional_residual=middle)}


def _controlnets(write: Writer) -> Iterator[Layout]:
    from diffusers import ControlNetModel
    base, kind = write.base, 'ControlNet'
    fresh: Any = ControlNetModel.from_unet(base.parts['unet'], load_weights_from_unet=False)
    state = random_tensors({k: tuple(v.shape) for k, v in fresh.state_dict().items()}, 'controlnet')
    net, config, one_file = _network(fresh, state), _config(fresh), 'canny.safetensors'
    write.outputs['controlnet'] = _control(base, net)
    original = {key: plain(value) for key, value in original_controlnet(net).items()}
    below = {f'control_model.{key}': value for key, value in original.items()}
    for name, title, by, files, source in (
            ('folder', "diffusers' folder", 'diffusers', {WEIGHTS: state, 'config.json': config}, ''),
            ('path', "the weights' path in diffusers' folder", 'diffusers', {}, f'../controlnet_folder/{WEIGHTS}'),
            ('file', "one file with diffusers' names, no config", 'hubs', {one_file: state}, one_file),
            ('original', 'the original names', 'lllyasviel/ControlNet', {one_file: original}, one_file),
            ('control_model', 'the original names below control_model.', 'lllyasviel/ControlNet', {one_file: below},
             one_file), ('checkpoint', 'the same, as PyTorch Lightning pickles it', 'lllyasviel/ControlNet',
                         {'canny.ckpt': {'state_dict': below, 'global_step': 1}}, 'canny.ckpt')):
        yield Layout(f'controlnet_{name}', f'ControlNet, {title}', by, files, 'controlnet', source, kind)
    half = {key: value.half() for key, value in state.items()}
    write.outputs['controlnet_float16'] = _control(base, _network(fresh, half))
    yield Layout('controlnet_float16', "ControlNet, one file in fp16 with diffusers' names", 'hubs',
                 {'canny.fp16.safetensors': half}, 'controlnet_float16', 'canny.fp16.safetensors', kind)
    tensors, merged = control_lora(base, original)
    by_key = {tensor.data_ptr(): key for key, tensor in net.state_dict(keep_vars=True).items()}
    names = {key: by_key[tensor.data_ptr()] for key, tensor in original_controlnet(net).items()}
    merged = {names[key]: value for key, value in merged.items()}
    write.outputs['control_lora'] = _control(base, _network(fresh, merged))
    yield Layout('control_lora', "Control-LoRA: low ranks of the differences to the UNet's own encoder",
                 'Stability', {one_file: tensors}, 'control_lora', one_file, kind)
    yield from _union_controlnets(write)


def control_lora(base: Base, controlnet: Tensors, rank: int = 4) -> tuple[Tensors, Tensors]:
    """Return a Control-LoRA's tensors, and the ControlNet's that it stands for, W + up down, by the original names."""
    unet, tensors, merged = unet_tensors(base.parts['unet']), {'lora_controlnet': torch.tensor([])}, {}
    for key, value in controlnet.items():
        own = unet.get(key)
        if own is None or value.dim() == 1:
            tensors[key], merged[key] = value, value
            continue
        name, flat = key.removesuffix('.weight'), own[0].numel()
        sides = random_tensors({'up': (len(own), rank), 'down': (rank, flat)}, 'control_lora', key)
        merged[key] = own + 0.3 * (sides['up'].double() @ sides['down'].double()).view(own.shape)
        tensors |= {f'{name}.up': 0.3 * sides['up'], f'{name}.down': sides['down'].view(rank, *own.shape[1:])}
        if own.dim() == 4:
            tensors[f'{name}.up'] = tensors[f'{name}.up'][..., None, None]
    return tensors, merged


def _union_controlnets(write: Writer) -> Iterator[Layout]:
    """xinsir's, which read one of several kinds of images: here number 3, edges."""
    from diffusers import ControlNetUnionModel
    base, number, settings = write.base, 3, {'control_type': 3}
    for name, num_types in (('union', 6), ('union_promax', 8)):
        widths = base.parts['unet'].config.block_out_channels
        fresh: Any = ControlNetUnionModel(**{
            **{k: v for k, v in base.parts['unet'].config.items() if k in _UNION}, 'num_control_type': num_types,
            'num_trans_channel': widths[0], 'num_proj_channel': widths[0], 'num_trans_head': 2,
            'conditioning_embedding_out_channels': (16, 32, 96, 256)})
        state = random_tensors({k: tuple(v.shape) for k, v in fresh.state_dict().items()}, name)
        image = base.inputs['image'].double()
        write.outputs[name] = _control(base, _network(fresh, state), controlnet_cond=[image], control_type_idx=[number],
                                       control_type=F.one_hot(torch.tensor([number] * 2), num_types).double(),
                                       conditioning_scale=[1.0])
        for form, files, source in (('folder', {WEIGHTS: state, 'config.json': _config(fresh)}, ''),
                                    ('file', {FILE: state}, FILE)):
            yield Layout(f'controlnet_{name}_{form}', f'union ControlNet of {num_types} kinds, {form}; kind {number}',
                         'xinsir, diffusers', files, name, source, 'ControlNet', settings=settings)
