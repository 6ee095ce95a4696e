"""LoRA and its relatives in diffusers' files and peft's folders.

Sources of the layouts: diffusers/loaders/lora_base.py (`_save_lora_weights`, lora_adapter_metadata) and the older
attention processors; peft/utils/save_and_load.py and peft/tuners/*/config.py, whose fields are written out here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from diffengine_sdxl.testing.layouts import forms
from diffengine_sdxl.testing.layouts import layout as spell
from diffengine_sdxl.testing.layouts.base import PARTS, Layer
from diffengine_sdxl.testing.layouts.forms import ALPHA, RANK, Form, Piece, piece, rotation
from diffengine_sdxl.testing.layouts.layout import Layout, spelled
from diffengine_sdxl.testing.layouts.single_files import AB, UNET, Writer, magnitude

WEIGHTS, CONFIG, DIFFUSERS = 'adapter_model.safetensors', 'adapter_config.json', 'pytorch_lora_weights.safetensors'
BIAS = {**AB, 'diff_b': 'lora_B.bias'}
#: The layers that diffusers' oldest files hold: those of attentions.
ATTENTIONS = ('attn1.to_q', 'attn2.to_k', 'attn1.to_out.0', 'q_proj', 'out_proj')


def layouts(write: Writer) -> Iterator[Layout]:
    """Yield all."""
    yield from _of_diffusers(write)
    yield from _of_older_diffusers(write)
    yield from _of_peft(write)
    yield from _of_peft_without_config(write)


def _lora_config(layers: Sequence[Layer], **fields: Any) -> dict[str, Any]:
    """Return peft's LoraConfig for layers of one part."""
    return {'peft_type': 'LORA', 'r': RANK, 'lora_alpha': ALPHA, 'target_modules': [layer.name for layer in layers],
            'rank_pattern': {}, 'alpha_pattern': {}, 'use_rslora': False, 'use_dora': False, 'lora_bias': False,
            'bias': 'none', 'fan_in_fan_out': False, 'init_lora_weights': True, 'lora_dropout': 0.0,
            'inference_mode': True, **fields}


def _by_part(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    return {part: own for part in PARTS if (own := [one for one in pieces if one.layer.part == part])}


def _metadata(pieces: Sequence[Piece], **fields: Any) -> dict[str, str]:
    """Return the header of a file of diffusers: each part's config, its keys with the part's name before them."""
    config = {f'{part}.{key}': value for part, own in _by_part(pieces).items()
              for key, value in _lora_config([one.layer for one in own], **fields).items()}
    return {'lora_adapter_metadata': json.dumps(config)}


def _of_diffusers(write: Writer) -> Iterator[Layout]:
    who = 'diffusers'
    plain, folded = ([one.renamed(AB) for one in write.pieces(alpha=alpha, scale=0.5, fold=fold)]
                     for alpha, fold in ((None, False), (None, True)))

    def one_file(name: str, title: str, pieces: Sequence[Piece], change: str | None, **fields: Any) -> Layout:
        return Layout(name, title, who, {DIFFUSERS: spelled(pieces, spell.diffusers)},
                      write.change(change or name, pieces), **fields)
    yield one_file('diffusers_lora', 'LoRA with metadata, alpha 2 and rank 4', plain, 'lora',
                   metadata=_metadata(plain))
    yield one_file('diffusers_rslora', 'LoRA with metadata, use_rslora: alpha / sqrt(rank)', plain, 'lora',
                   metadata=_metadata(plain, use_rslora=True, lora_alpha=1.0))
    yield one_file('diffusers_no_metadata', 'LoRA without metadata: alpha is the rank', folded, 'lora')
    yield write.layout('diffusers_unet_without_prefix', 'LoRA of the UNet alone, keys without its prefix', who,
                       [one for one in folded if one.layer.part == 'unet'], lambda layer: layer.name, 'unet_lora')
    biased = [one.renamed(BIAS) for one in write.pieces(alpha=None, fold=True, scale=0.5, bias=True)]
    yield one_file('diffusers_bias', 'LoRA with lora_B.bias', biased, None, metadata=_metadata(
        biased, lora_bias=True, lora_alpha=RANK))
    dora = [magnitude(one) for one in write.pieces(UNET, alpha=None, fold=True, scale=0.5, dora='out')]
    yield one_file('diffusers_dora', 'DoRA of the UNet with metadata', dora, None,
                   metadata=_metadata(dora, use_dora=True, lora_alpha=RANK))


def _older(layer: Layer, encoder: str) -> str:
    """Spell as diffusers of 2023: the UNet's attention processors; the encoders' layers by `encoder`."""
    if layer.part == 'unet':
        path, _, leaf = layer.name.removesuffix('.0').rpartition('.')
        return f'unet.{path}.processor.{leaf}_lora'
    path, _, leaf = spell.diffusers(layer).rpartition('.')
    if encoder == 'lora_linear_layer':
        return f'{path}.{leaf}.lora_linear_layer'
    return f'{path}.to_{leaf.removesuffix("_proj")}_lora'


def _of_older_diffusers(write: Writer) -> Iterator[Layout]:
    """Without metadata; alpha is the rank."""
    folded = write.pieces(alpha=None, scale=0.5, fold=True)
    up_down = {'lora_down.weight': 'lora.down.weight', 'lora_up.weight': 'lora.up.weight'}
    yield write.layout('diffusers_lora_up', 'LoRA, keys .lora.down.weight and .lora.up.weight',
                       'diffusers 0.22 to 0.25', [one.renamed(up_down) for one in folded], spell.diffusers, 'lora')
    yield write.layout('diffusers_lora_up_alpha', 'the same with the alpha of each layer, unet.<layer>.alpha',
                       'mergers', [one.renamed(up_down) for one in write.pieces()], spell.diffusers, 'lora')
    yield Layout('diffusers_pickle', 'the first of these, pickled', 'diffusers 0.17 to 0.22', {
        'pytorch_lora_weights.bin': spelled([one.renamed(up_down) for one in folded], spell.diffusers)}, 'lora')
    short = {'lora_down.weight': 'down.weight', 'lora_up.weight': 'up.weight'}
    # A change of attentions alone must be large for the output's to be well above fp32's rounding.
    oldest = [one.renamed(short) for one in write.pieces(alpha=None, scale=0.5, fold=True, size=3.0)
              if one.layer.name.endswith(ATTENTIONS)]
    for encoder in ('lora_linear_layer', 'to_q_lora'):
        yield write.layout(f'diffusers_processors_{encoder}', 'LoRA of attentions: processor.to_q_lora.down.weight; '
                           f"text encoders' layers by {encoder}", 'diffusers 0.18 to 0.21', oldest,
                           partial(_older, encoder=encoder), 'attention_lora')


def _peft_form(layer: Layer, kind: str) -> Form:
    """Return LoKr's form with peft's choice of factors: those of a width that are closest to each other."""
    if kind == 'loha':
        return forms.loha(layer)
    out, wide = (max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0) for size in layer.shape[:2])
    whole = RANK >= max(layer.shape[0] // out, layer.shape[1] // wide) / 2
    form = forms.lokr(layer, (out, wide), (False, not whole), rank=RANK)
    return Form(form.shapes, form.change, RANK, scaled=True)  # peft scales whole factors too


def _folder(pieces: Sequence[Piece], **fields: Any) -> dict[str, Any]:
    """Return peft's folders, one for each part."""
    files: dict[str, Any] = {}
    for part, own in _by_part(pieces).items():
        files[f'{part}/{WEIGHTS}'] = spelled(own, lambda layer: f'base_model.model.{layer.name}')
        files[f'{part}/{CONFIG}'] = _lora_config([one.layer for one in own], **fields)
    return files


def _of_peft(write: Writer) -> Iterator[Layout]:
    def folder(name: str, title: str, pieces: Sequence[Piece], change: str | None = None, **fields: Any) -> Layout:
        return Layout(f'peft_{name}', f'peft folders: {title}', 'peft', _folder(pieces, **fields),
                      write.change(change or f'peft_{name}', pieces))

    plain = [one.renamed(AB) for one in write.pieces(alpha=None, scale=0.5)]
    yield folder('lora', 'LoRA', plain, 'lora')
    yield folder('rslora', 'LoRA with use_rslora', plain, 'lora', use_rslora=True, lora_alpha=1.0)
    layers = write.base.layers()
    ranks = {layer.name: 2 if i % 2 else RANK for i, layer in enumerate(layers)}
    alphas = {layer.name: 3.0 if i % 3 else ALPHA for i, layer in enumerate(layers)}
    yield folder('patterns', 'LoRA with rank_pattern and alpha_pattern', [
        piece(layer, partial(forms.lora, rank=ranks[layer.name]), None, scale=alphas[layer.name] / ranks[layer.name]
              ).renamed(AB) for layer in layers],
        rank_pattern={name: rank for name, rank in ranks.items() if rank != RANK},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != ALPHA})
    yield folder('bias', 'LoRA with lora_bias', [one.renamed(BIAS) for one in write.pieces(
        alpha=None, fold=True, scale=0.5, bias=True)], 'diffusers_bias', lora_bias=True, lora_alpha=RANK)
    yield folder('dora', 'DoRA', [magnitude(one, '') for one in write.pieces(alpha=None, scale=0.5, dora='out')],
                 'kohya_dora_lora_out', use_dora=True)
    for kind in ('loha', 'lokr'):
        yield folder(kind, f'{kind.title()} of alpha 2', write.pieces(
            make=partial(_peft_form, kind=kind), alpha=None, scale=0.5), peft_type=kind.upper(), alpha=ALPHA)
    flat = [layer for layer in write.base.layers() if layer.weight[0, 0].numel() == 1]
    for exact in (True, False):
        yield folder(f'oft_{"exact" if exact else "series"}', 'OFT, ' + (
            'the exact Cayley transform' if exact else "peft's truncated series"),
            [rotation(layer, neumann=not exact) for layer in flat], peft_type='OFT', oft_block_size=4, r=0,
            block_share=False, coft=False, use_cayley_neumann=not exact, num_cayley_neumann_terms=5)
    alone = [one for one in plain if one.layer.part == 'unet']
    files = {path.removeprefix('unet/'): content for path, content in _folder(alone).items()}
    yield Layout('peft_unet', 'peft folder of the UNet alone', 'peft', files, write.change('unet_lora', alone))
    yield Layout('peft_unet_path', "the weights' path in that folder", 'peft', {}, 'unet_lora',
                 f'../peft_unet/{WEIGHTS}')
    yield Layout('peft_pickle', 'peft folder of the UNet alone, pickled', 'peft', {
        CONFIG: files[CONFIG], 'adapter_model.bin': files[WEIGHTS]}, 'unet_lora')
    for init in ('pissa', 'olora', 'corda', 'pissa_niter_4', 'loftq', 'lora_ga'):
        yield Layout(f'refused_{init}', f"peft folders that hold a part of the change: init_lora_weights='{init}'",
                     'peft', _folder(plain, init_lora_weights=init), refused=f'(?i){init.partition("_niter")[0]}')
    yield Layout('refused_diffusers_pissa', "diffusers' file with PiSSA in its metadata", 'diffusers',
                 {DIFFUSERS: spelled(plain, spell.diffusers)}, metadata=_metadata(plain, init_lora_weights='pissa'),
                 refused='(?i)pissa')
    yield folder('gaussian', "LoRA with init_lora_weights='gaussian', which is only where it began", plain, 'lora',
                 init_lora_weights='gaussian')


def _of_peft_without_config(write: Writer) -> Iterator[Layout]:
    alone = [one.renamed(AB) for one in write.pieces(UNET, alpha=None, scale=0.5)]
    files: Mapping[str, Any] = {'style.safetensors': spelled(alone, lambda layer: f'base_model.model.{layer.name}')}
    yield Layout('refused_peft_without_config', "peft's weights without their config: alpha is unknown", 'peft', files,
                 source='style.safetensors', refused='alpha')
    yield Layout('peft_without_config', 'the same; alpha is told', 'peft', files, write.change('unet_lora', alone),
                 'style.safetensors', settings={'alpha': ALPHA})
