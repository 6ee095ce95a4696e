"""Adapters that are not supported: files with the keys and shapes that their tools write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from diffengine_sdxl.testing.layouts import layout as spell
from diffengine_sdxl.testing.layouts.base import Layer, Tensors
from diffengine_sdxl.testing.layouts.forms import rotation
from diffengine_sdxl.testing.layouts.layout import Layout
from diffengine_sdxl.testing.layouts.networks import ip_adapter, random_tensors
from diffengine_sdxl.testing.layouts.single_files import FILE, UNET, Writer

Shapes = dict[str, tuple[int, ...]]


def _glora(layer: Layer) -> Shapes:
    out, wide = layer.shape[:2]
    return {'a1.weight': (wide, 4), 'a2.weight': (4, wide), 'b1.weight': (out, 4), 'b2.weight': (4, wide), 'alpha': ()}


def _diag_oft(layer: Layer) -> Shapes:
    return {'oft_blocks': (4, layer.shape[0] // 4, layer.shape[0] // 4), 'alpha': ()}


def _boft(layer: Layer) -> Shapes:
    return {'oft_blocks': (2, layer.shape[0] // 4, 4, 4), 'alpha': ()}


def _ia3(layer: Layer) -> Shapes:
    return {'weight': (layer.shape[0],), 'on_input': ()}


def layouts(write: Writer) -> Iterator[Layout]:
    """Yield all."""
    linear = [layer for layer in write.base.layers(UNET) if layer.weight.dim() == 2]
    kinds: Mapping[str, tuple[Callable[[Layer], Shapes], str, str]] = {
        'glora': (_glora, 'GLoRA', 'GLoRA'), 'diag_oft': (_diag_oft, 'diag-OFT', '(?i)diag.?oft'),
        'boft': (_boft, 'BOFT', 'BOFT'), 'ia3': (_ia3, '(IA)^3', r'IA3|\(IA\)\^3')}
    for name, (shapes, title, refused) in kinds.items():
        tensors = random_tensors({f'{spell.kohya(layer)}.{key}': shape for layer in linear
                                  for key, shape in shapes(layer).items()}, name)
        yield Layout(f'refused_{name}', title, 'LyCORIS', {FILE: tensors}, source=FILE, refused=refused)
    oft = {f'{spell.kohya(layer)}.oft_R.weight': rotation(layer).tensors['oft_R.weight'] for layer in linear}
    yield Layout('refused_onetrainer_oft', "OFT under kohya's names", 'OneTrainer', {FILE: oft}, source=FILE,
                 refused='OFT')
    empty = {f'{spell.kohya(layer)}.lora_{side}.weight': torch.zeros(shape) for layer in linear[:2]
             for side, shape in (('down', (0, layer.shape[1])), ('up', (layer.shape[0], 0)))}
    yield Layout('refused_rank_0', 'LoRA of rank 0', 'pruning scripts', {FILE: empty}, source=FILE, refused='rank 0')
    yield from _image_prompts(write)
    modules = [name for name in write.base.parts['unet'].attn_processors if 'attn2' in name][:3]
    lllite: Shapes = {}
    for module in modules:
        name = f'lllite_unet_{module.removesuffix(".processor").replace(".", "_")}_to_q'
        lllite |= {f'{name}.conditioning1.0.weight': (8, 3, 4, 4), f'{name}.conditioning1.0.bias': (8,),
                   f'{name}.down.0.weight': (4, 32), f'{name}.mid.0.weight': (4, 12), f'{name}.up.0.weight': (32, 4)}
    yield Layout('refused_lllite', 'ControlNet-LLLite', 'sd-scripts', {FILE: random_tensors(lllite, 'lllite')},
                 source=FILE, kind='ControlNet', refused='LLLite')


def _image_prompts(write: Writer) -> Iterator[Layout]:
    """FaceID and InstantID: IP-Adapters that read the embeddings of a face, 512 numbers."""
    name = 'ip_adapter.bin'
    face: dict[str, Any] = ip_adapter(write.base, False, 24)
    face['image_proj'] = random_tensors({'proj.0.weight': (64, 512), 'proj.0.bias': (64,), 'proj.2.weight': (256, 64),
                                         'proj.2.bias': (256,), 'norm.weight': (64,), 'norm.bias': (64,)}, 'faceid')
    loras: Tensors = {}
    for key, value in face['ip_adapter'].items():
        number, _, leaf = key.partition('.')
        loras |= random_tensors({f'{number}.{leaf[:4]}_lora.down.weight': (4, value.shape[1]),
                                 f'{number}.{leaf[:4]}_lora.up.weight': (value.shape[0], 4)}, 'faceid', key)
    face['ip_adapter'] |= loras
    yield Layout('refused_faceid', 'IP-Adapter FaceID', 'tencent-ailab/IP-Adapter', {name: face}, source=name,
                 kind='IPAdapter', refused='FaceID')
    yield Layout('refused_instantid', 'InstantID: a resampler of face embeddings', 'InstantID',
                 {name: ip_adapter(write.base, True, 512)}, source=name, kind='IPAdapter', refused='InstantID')
