"""Weights of every kind of change of a layer, by formula, and the base with them merged by hand; no peft there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parity import make_batch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import lora_weights
from diffengine_sdxl.adapters.lora import LoRA
from diffengine_sdxl.models.sdxl import SDXL

Tensors = dict[str, Tensor]
#: Full name in memory -> name in kohya's files: linear layers, convolutions of 1 and 3.
LAYERS = {'unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q':
          'lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q',
          'unet.down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k':
          'lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_k',
          'unet.mid_block.resnets.1.conv2': 'lora_unet_middle_block_2_out_layers_3',
          'unet.down_blocks.1.resnets.0.conv_shortcut': 'lora_unet_input_blocks_3_0_skip_connection',
          'unet.up_blocks.2.resnets.0.conv1': 'lora_unet_output_blocks_4_0_in_layers_2',
          'text_encoder.encoder.layers.0.mlp.fc1': 'lora_te1_text_model_encoder_layers_0_mlp_fc1',
          'text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj':
          'lora_te2_text_model_encoder_layers_0_self_attn_q_proj'}
NORMS = {'unet.down_blocks.1.attentions.0.transformer_blocks.0.norm2':
         'lora_unet_input_blocks_3_1_transformer_blocks_0_norm2',
         'unet.mid_block.resnets.0.norm1': 'lora_unet_middle_block_0_in_layers_0',
         'unet.conv_norm_out': 'lora_unet_out_0',
         'text_encoder.encoder.layers.0.layer_norm1': 'lora_te1_text_model_encoder_layers_0_layer_norm1'}
#: Numbers that fp32 has, in which peft holds a LoHa's and LoKr's scale.
SCALES = (1.0, -0.625)


def rand(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def low_rank(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    """Tensors of a LoRA of rank 3 and alpha 2, and the change that they make."""
    out, wide, *kernel = weight.shape
    up, down = rand(random, out, 3, *[1] * len(kernel)), rand(random, 3, wide, *kernel)
    return {'lora_up.weight': up, 'lora_down.weight': down, 'alpha': torch.tensor(2.0)}, (
        up.flatten(1) @ down.flatten(1)).view(weight.shape) * 2 / 3


def tucker(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    """A LoRA with a core where there is a kernel of 3."""
    if weight.shape[2:] != (3, 3):
        return low_rank(weight, random)
    up, mid, down = rand(random, len(weight), 3, 1, 1), rand(random, 3, 3, 3, 3), rand(random, 3, weight.shape[1], 1, 1)
    return {'lora_up.weight': up, 'lora_mid.weight': mid, 'lora_down.weight': down, 'alpha': torch.tensor(2.0)}, (
        torch.einsum('or,rskl,si->oikl', up[..., 0, 0], mid, down[..., 0, 0]) * 2 / 3)


def hadamard(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    flat = weight.flatten(1).shape[1]
    own = {f'hada_w{i}_{s}': rand(random, *((len(weight), 3) if s == 'a' else (3, flat))) for i in '12' for s in 'ab'}
    change = (own['hada_w1_a'] @ own['hada_w1_b']) * (own['hada_w2_a'] @ own['hada_w2_b'])
    return {**own, 'alpha': torch.tensor(1.5)}, change.view(weight.shape) / 2


def kronecker(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    """Two whole factors, whose alpha counts for nothing."""
    out, wide, *kernel = weight.shape
    w1, w2 = rand(random, 2, 2), rand(random, out // 2, wide // 2, *kernel)
    change = torch.einsum('ab,cdk->acbdk', w1, w2.reshape(out // 2, wide // 2, -1)).reshape(weight.shape)
    return {'lokr_w1': w1, 'lokr_w2': w2, 'alpha': torch.tensor(9.0)}, change


def full(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    change = rand(random, *weight.shape)
    return {'diff': change}, change


def nothing(weight: Tensor, random: torch.Generator) -> tuple[Tensors, Tensor]:
    return {}, torch.zeros_like(weight)


#: Name -> (change of the weight, what is added: 'in' or 'out' magnitudes, a 'bias').
FORMS: dict[str, tuple[Callable[[Tensor, torch.Generator], tuple[Tensors, Tensor]], tuple[str, ...]]] = {
    'DoRA of the inputs': (low_rank, ('in',)), 'Tucker DoRA of the inputs': (tucker, ('in',)),
    'Tucker DoRA': (tucker, ('out',)),
    'LoHa, DoRA': (hadamard, ('out',)), 'LoHa, DoRA of the inputs': (hadamard, ('in',)),
    'LoKr, DoRA': (kronecker, ('out',)), 'LoKr, DoRA of the inputs': (kronecker, ('in',)),
    'full': (full, ()), 'full and bias': (full, ('bias',)), 'LoRA and bias': (low_rank, ('bias',)),
    'LoKr and bias': (kronecker, ('bias',)), 'bias alone': (nothing, ('bias',)),
    'DoRA, bias': (low_rank, ('out', 'bias')), 'LoRA': (low_rank, ()), 'LoHa': (hadamard, ()), 'LoKr': (kronecker, ()),
    'DoRA': (low_rank, ('out',))}


def changed(form: str, layer: Any, random: torch.Generator) -> tuple[Tensors, Callable[[float], Tensors]]:
    """A layer's tensors in a file, and its weight and bias at a scale."""
    make, extras = FORMS[form]
    weight = layer.weight.detach().double()
    own, change = make(weight, random)
    if own:
        first = next(iter(own))
        factor = 0.4 * weight.norm() / change.norm()
        own[first], change = own[first] * factor, change * factor
    axes = [axis for axis in range(weight.dim()) if axis != (1 if 'in' in extras else 0)]
    magnitude = torch.linalg.vector_norm(weight + change, dim=axes, keepdim=True)
    magnitude = magnitude * (0.5 + torch.rand(magnitude.shape, generator=random, dtype=torch.float64))
    if 'in' in extras or 'out' in extras:
        own['dora_scale'] = magnitude
    if 'bias' in extras:
        own['diff_b'] = 0.3 * rand(random, len(weight))

    def at(scale: float) -> Tensors:
        new = weight + scale * change
        if 'dora_scale' in own:
            new = magnitude * new / torch.linalg.vector_norm(new, dim=axes, keepdim=True)
        bias = layer.bias.detach().double() if layer.bias is not None else None
        # A layer without a bias gets none by merging, so what is added to it is not compared there.
        return {'weight': new, **({} if bias is None else {'bias': bias + scale * own.get('diff_b', torch.zeros(1))})}
    return own, at


def norm(layer: Any, random: torch.Generator, with_bias: bool = True) -> tuple[Tensors, Callable[[float], Tensors]]:
    own = {'w_norm': 0.4 * rand(random, len(layer.weight)), **(
        {'b_norm': 0.3 * rand(random, len(layer.weight))} if with_bias else {})}
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return own, lambda scale: {'weight': weight + scale * own['w_norm'],
                               'bias': bias + scale * own.get('b_norm', torch.zeros(1))}


def make(model: SDXL, forms: Mapping[str, str], seed: int = 5) -> tuple[Tensors, Callable[[float], Tensors]]:
    """A file's tensors for layer -> form, and all changed weights and biases at a scale, by full name."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    all_at: dict[str, Callable[[float], Tensors]] = {}
    for name, form in forms.items():
        layer = model.get_submodule(name)
        if form in ('norm', 'norm, weight'):
            own, all_at[name] = norm(layer, random, form == 'norm')
        else:
            if 'bias' in FORMS[form][1] and layer.bias is None:
                form = 'LoRA'
            own, all_at[name] = changed(form, layer, random)
        tensors |= {f'{(LAYERS | NORMS)[name]}.{key}': value for key, value in own.items()}
    return tensors, lambda scale: {f'{name}.{key}': value for name, at in all_at.items()
                                   for key, value in at(scale).items()}


def predict(model: SDXL, progress: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """The denoiser's output, two prompts through the model's own encoders."""
    random = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 4, 8, 8, generator=random).to(model.unet_weight.dtype), torch.tensor([40, 800])
    return model.predict(x, t, model.encode(make_batch(2)), torch.tensor([progress, progress]).T)


output = torch.no_grad()(predict)


def modules(model: SDXL) -> dict[str, dict[str, nn.Module]]:
    parts = {part: getattr(model, part) for part in lora_weights.PARTS}
    return {part: lora_layers.plain(module) | lora_layers.norms(module) for part, module in parts.items()}


@contextmanager
def merged(model: SDXL, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights of the base inside."""
    before = {name: model.get_parameter(name).detach().clone() for name in weights}
    for values in (weights, before):
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        if values is weights:
            yield


@contextmanager
def attached(model: SDXL, source: Path | str, name: str = 'a', **settings: Any) -> Iterator[LoRA]:
    adapter = LoRA(weights=str(source), **{'trainable': False, **settings})
    adapter.name = name
    model.adapters[name] = adapter
    try:
        adapter.attach(model)
        yield adapter
    finally:
        adapter.detach(model)
        del model.adapters[name]


def assert_near(found: Tensor, expected: Tensor, base: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the change that the adapter makes."""
    change = (expected - base).norm()
    assert change > 1e-3 * base.norm()
    assert (found - expected).norm() <= tolerance * change, float((found - expected).norm() / change)


MIXED = dict(zip(LAYERS, ('DoRA of the inputs', 'LoKr, DoRA', 'LoRA', 'full and bias', 'Tucker DoRA', 'LoHa',
                          'LoRA and bias'), strict=True), **dict.fromkeys(NORMS, 'norm'))


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path
