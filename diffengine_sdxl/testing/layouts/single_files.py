"""LoRA and its relatives in single files of kohya's sd-scripts, LyCORIS, ComfyUI and OneTrainer.

Sources of the layouts: sd-scripts' networks/lora.py; LyCORIS' modules/*.py and wrapper.py; ComfyUI's comfy/lora.py,
comfy/weight_adapter and comfy_extras/nodes_lora_extract.py; OneTrainer's modules/modelSaver/mixin/LoRASaverMixin.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.testing.layouts import forms
from diffengine_sdxl.testing.layouts import layout as spell
from diffengine_sdxl.testing.layouts.base import NORMS, WORD, Base, Layer, Tensors
from diffengine_sdxl.testing.layouts.forms import Form, Piece, changed, full, piece
from diffengine_sdxl.testing.layouts.layout import Layout, Outputs, Spelling, spelled

#: lora_A and lora_B instead of lora_down and lora_up.
AB = {'lora_down.weight': 'lora_A.weight', 'lora_up.weight': 'lora_B.weight'}
FILE = 'adapter.safetensors'
UNET = ('unet',)
LYCORIS: dict[str, Callable[[Layer], Form]] = {
    'loha': forms.loha, 'loha_tucker': forms.tucker_loha, 'lokr': forms.lokr,
    'lokr_w1': partial(forms.lokr, split=(True, False)), 'lokr_w2': partial(forms.lokr, split=(False, True)),
    'lokr_both': partial(forms.lokr, split=(True, True)), 'lokr_tucker': partial(forms.lokr, tucker=True),
    'lokr_unbalanced': partial(forms.lokr, sizes=(4, 1), split=(False, True))}


class Writer:
    """Layouts of one base; `outputs` and `changes` grow with the changes that they make."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.outputs: Outputs = {}
        self.changes: dict[str, Tensors] = {}

    def layout(self, name: str, title: str, written_by: str, pieces: Sequence[Piece], spelling: Spelling = spell.kohya,
               change: str | None = None, more: Mapping[str, Tensor] | None = None, **fields: Any) -> Layout:
        """Return a layout of one file; `change` is that of other layouts with the same change, None for a new one."""
        return Layout(name, title, written_by, {FILE: {**spelled(pieces, spelling), **(more or {})}},
                      self.change(change or name, pieces), FILE, **fields)

    def change(self, name: str, pieces: Sequence[Piece]) -> str:
        """Return `name`, and compute what the change is, or check that it is the one of that name."""
        own = changed(pieces)
        if name not in self.changes:
            self.changes[name] = own
            self.outputs[name] = self.base.outputs(own)
        before = self.changes[name]
        assert before.keys() == own.keys() and all(torch.allclose(own[k], before[k], 1e-12, 1e-12) for k in own), name
        return name

    def pieces(self, parts: Sequence[str] = ('unet', 'text_encoder', 'text_encoder_2'), **fields: Any) -> list[Piece]:
        """Return a piece of every layer."""
        return [piece(layer, **fields) for layer in self.base.layers(parts)]

    def norms(self, names: tuple[str, str] = ('w_norm', 'b_norm'), parts: Sequence[str] = UNET) -> list[Piece]:
        """Return full differences of norms."""
        return [full(layer, names) for layer in self.base.layers(parts, NORMS)]


def words() -> Tensors:
    """Return two vectors [2, 32] of WORD for each text encoder, by the part's name."""
    return {part: 0.3 * torch.randn(2, 32, generator=rng.generator('layouts', 'word', part))
            for part in ('text_encoder', 'text_encoder_2')}


def layouts(write: Writer) -> Iterator[Layout]:
    """Yield all."""
    yield from _of_sd_scripts(write)
    yield from _of_lycoris(write)
    yield from _mixed(write)
    yield from _of_comfy(write)
    yield from _of_onetrainer(write)


def _of_sd_scripts(write: Writer) -> Iterator[Layout]:
    plain = write.pieces()
    yield write.layout('kohya_lora', 'LoRA, original names', 'sd-scripts', plain, change='lora')
    yield Layout('kohya_pickle', 'the same, pickled', 'sd-scripts', {'adapter.pt': spelled(plain, spell.kohya)}, 'lora',
                 'adapter.pt')
    yield write.layout('kohya_lora_diffusers_names', "LoRA, diffusers' names", 'older trainers, OneTrainer (legacy)',
                       plain, spell.mixture, 'lora')
    yield write.layout('kohya_no_alpha', 'LoRA without alpha, which stands for the rank', 'extractors, mergers',
                       write.pieces(fold=True), change='lora')
    yield write.layout('kohya_alpha_int', 'LoRA whose alpha is an integer of shape [1]', 'mergers',
                       [replace(one, tensors={**one.tensors, 'alpha': one.tensors['alpha'].long().view(1)})
                        for one in plain], change='lora')
    yield write.layout('kohya_other_dimensions', 'LoRA with linear layers as 1 x 1 convolutions and the reverse',
                       'older trainers', [_other_dimensions(one) for one in plain], change='lora')
    yield write.layout('kohya_ranks', 'LoRA with ranks that differ by layer', 'sd-scripts (block dims)',
                       [piece(layer, partial(forms.lora, rank=1 + i % 5)) for i, layer in
                        enumerate(write.base.layers())])
    zero = [piece(layer, alpha=0.0 if i % 2 else 2.0) for i, layer in enumerate(write.base.layers())]
    yield write.layout('kohya_alpha_0', 'LoRA whose alpha is 0 in every other layer, which change nothing',
                       'pruning scripts', zero)
    yield write.layout('kohya_alpha_negative', 'LoRA with alpha -2', 'mergers', write.pieces(alpha=-2.0))
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        short = str(dtype).removeprefix('torch.')
        yield write.layout(f'kohya_{short}', f'LoRA in {short}', 'sd-scripts, mergers', write.pieces(dtype=dtype))
    yield write.layout('kohya_text_encoders', 'LoRA of the text encoders alone', 'sd-scripts',
                       write.pieces(('text_encoder', 'text_encoder_2')))
    te = write.pieces(('unet', 'text_encoder'))
    yield write.layout('kohya_te', 'LoRA of UNet and first text encoder, whose layers are lora_te_*',
                       'older trainers', te,
                       lambda layer: spell.kohya(layer).replace('lora_te1_', 'lora_te_'))
    both = {**spelled(plain, spell.kohya), **spelled(plain, spell.mixture)}
    yield write.layout('kohya_two_names', 'LoRA with the same layers under both sets of names', 'mergers', plain,
                       change='lora', more=both)
    key = next(k for k in spelled(plain, spell.mixture) if k not in spelled(plain, spell.kohya) and 'up' in k)
    yield Layout('refused_two_names', 'LoRA with other numbers under the two names of a layer', 'mergers',
                 {FILE: {**both, key: 2 * both[key]}}, source=FILE, refused='two names')
    vectors = words()
    bundle = {f'bundle_emb.{WORD}.{name}': vectors[part]
              for part, name in (('text_encoder', 'clip_l'), ('text_encoder_2', 'clip_g'))}
    yield write.layout('kohya_bundle_emb', 'LoRA with the vectors of a word in the same file', 'OneTrainer, A1111',
                       plain, more=bundle)
    write.outputs['kohya_bundle_emb'] |= write.base.encode(changed(plain), vectors)


def _other_dimensions(one: Piece) -> Piece:
    """Return a linear layer's matrices as 1 x 1 convolutions, and those of a 1 x 1 convolution as matrices."""
    def reshaped(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            return tensor.flatten(1)
        return tensor[..., None, None] if tensor.dim() == 2 else tensor
    return replace(one, tensors={name: reshaped(tensor) for name, tensor in one.tensors.items()})


def _of_lycoris(write: Writer) -> Iterator[Layout]:
    """kohya's names; the tensors of LyCORIS' modules."""
    locon = write.pieces(make=forms.tucker_lora)
    yield write.layout('kohya_locon_tucker', 'LoCon with a Tucker core, lora_mid', 'LyCORIS', locon)
    for name, form in LYCORIS.items():
        yield write.layout(f'kohya_{name}', f'{name.replace("_", ", ")}', 'LyCORIS', write.pieces(make=form))
    for axis, who in (('out', 'LyCORIS'), ('in', 'OneTrainer by default; LyCORIS with wd_on_out=False')):
        decomposed: dict[str, Callable[[Layer], Form]] = {
            'lora': forms.lora, 'lora_tucker': forms.tucker_lora, 'loha': forms.loha, 'lokr': LYCORIS['lokr_w2']}
        for name, form in decomposed.items():
            yield write.layout(f'kohya_dora_{name}_{axis}', f'{name} with dora_scale of the {axis}put channels', who,
                               write.pieces(make=form, dora=axis))
    yield write.layout('kohya_full', 'full differences, diff and diff_b', 'LyCORIS',
                       [full(layer) for layer in write.base.layers()])
    for name, form in (('lora', forms.lora), ('lokr', LYCORIS['lokr_w2'])):
        yield write.layout(f'lycoris_{name}', f"{name} as LyCORIS' own wrapper names the layers",
                           'LyCORIS, SimpleTuner', write.pieces(UNET, make=form), spell.lycoris)


def _mixed(write: Writer) -> Iterator[Layout]:
    """Several kinds in one file."""
    norms = write.norms(parts=('unet', 'text_encoder', 'text_encoder_2'))
    yield write.layout('kohya_locon_norms', 'LoCon with trained norms, w_norm and b_norm', 'LyCORIS',
                       [*write.pieces(make=forms.tucker_lora), *norms])
    half = write.base.layers()
    yield write.layout('kohya_locon_full_norms', 'LoCon, full differences and trained norms', 'LyCORIS',
                       [*(piece(layer) if i % 2 else full(layer) for i, layer in enumerate(half)), *norms])
    yield write.layout('kohya_lora_diff_b', 'LoRA with differences of biases, diff_b', 'ComfyUI, sd-scripts',
                       write.pieces(bias=True))
    kinds: list[Callable[..., Piece]] = [
        piece, partial(piece, make=forms.loha), partial(piece, make=LYCORIS['lokr_w2']), full,
        partial(piece, dora='out'), partial(piece, dora='in'), partial(piece, make=forms.tucker_lora),
        partial(piece, make=forms.lokr)]
    yield write.layout('kohya_mixed', 'every layer of another kind: LoRA, LoHa, LoKr, full, DoRA, norms',
                       'LyCORIS presets, mergers',
                       [*(kinds[i % len(kinds)](layer) for i, layer in enumerate(half)), *norms])
    yield write.layout('kohya_lora_and_dora', 'LoRA in some layers, DoRA in others', 'mergers',
                       [piece(layer, dora='out' if i % 2 else None) for i, layer in enumerate(half)])


def _of_comfy(write: Writer) -> Iterator[Layout]:
    plain = write.pieces()
    yield write.layout('comfy_lora', "LoRA with ComfyUI's names of the weights", 'ComfyUI', plain, spell.comfy, 'lora')
    yield write.layout('comfy_lora_no_alpha', 'the same without alpha', 'ComfyUI (LoraSave)', write.pieces(fold=True),
                       spell.comfy, 'lora')
    yield write.layout('comfy_lora_bias_diff', 'the same with differences of norms (.diff) and biases (.diff_b)',
                       'ComfyUI (LoraSave with bias_diff)',
                       [*write.pieces(fold=True, bias=True),
                        *write.norms(('diff', 'diff_b'), ('unet', 'text_encoder', 'text_encoder_2'))],
                       spell.comfy)
    yield write.layout('comfy_full', 'full differences under the same names', 'ComfyUI (LoraSave, full_diff)',
                       [full(layer) for layer in write.base.layers()], spell.comfy, 'kohya_full')
    yield write.layout('comfy_loha', 'LoHa under the same names', 'ComfyUI (TrainLoraNode)',
                       write.pieces(make=forms.loha), spell.comfy, 'kohya_loha')
    yield write.layout('comfy_lokr', 'LoKr under the same names', 'ComfyUI (TrainLoraNode)',
                       write.pieces(make=LYCORIS['lokr_w2']), spell.comfy, 'kohya_lokr_w2')


def _of_onetrainer(write: Writer) -> Iterator[Layout]:
    who = 'OneTrainer'
    plain = [one.renamed(AB) for one in write.pieces()]
    yield write.layout('onetrainer_comfy', 'LoRA: lora_A, lora_B and alpha', f'{who} (COMFY)', plain, spell.comfy,
                       'lora')
    yield write.layout('onetrainer_comfy_dora', 'DoRA of the input channels: lora_A, lora_B, alpha, dora_scale',
                       f'{who} (COMFY)', [one.renamed(AB) for one in write.pieces(dora='in')], spell.comfy,
                       'kohya_dora_lora_in')
    yield write.layout('onetrainer_original', 'LoRA of the UNet, original names without a prefix',
                       f'{who} (ORIGINAL)', [one.renamed(AB) for one in write.pieces(UNET)],
                       lambda layer: layer.original, 'unet_lora')
    folded = [one.renamed(AB) for one in write.pieces(fold=True)]
    yield write.layout('onetrainer_diffusers', 'LoRA, alpha multiplied into lora_B', f'{who} (DIFFUSERS)', folded,
                       spell.diffusers, 'lora')
    dora = [one.renamed(AB) for one in write.pieces(dora='in', fold=True)]
    yield write.layout('onetrainer_diffusers_dora_in', 'DoRA of the input channels, kept as dora_scale',
                       f'{who} (DIFFUSERS)', dora, spell.diffusers, 'kohya_dora_lora_in')
    yield write.layout('onetrainer_diffusers_dora_out', 'DoRA of the output channels, without metadata',
                       f'{who} (DIFFUSERS)', [magnitude(one) for one in write.pieces(dora='out', fold=True)],
                       spell.diffusers, 'kohya_dora_lora_out')
    yield write.layout('onetrainer_diffusers_loha', 'LoHa with alpha', f'{who} (DIFFUSERS)',
                       write.pieces(make=forms.loha), spell.diffusers, 'kohya_loha')
    yield write.layout('onetrainer_internal', "LoRA: diffusers' names with lora_down, lora_up and alpha",
                       f'{who} (backups)', write.pieces(), spell.diffusers, 'lora')


def magnitude(one: Piece, ending: str = '.weight') -> Piece:
    """Return a DoRA of output channels in peft's names: a magnitude [out], or [1, out, 1, 1] of a convolution."""
    tensors = one.renamed(AB).tensors
    scale = tensors.pop('dora_scale')
    shaped = scale.reshape(1, -1, 1, 1) if scale.dim() == 4 else scale.reshape(-1)
    return Piece(one.layer, {**tensors, f'lora_magnitude_vector{ending}': shaped}, one.weight, one.bias)
