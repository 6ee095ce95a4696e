"""The content of any LoRA file (or of its relatives) in peft's terms: what readers return and writers take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ('lora', 'dora', 'loha', 'lokr', 'oft')
#: The parts of an SDXL that such an adapter may change.
PARTS = ('unet', 'text_encoder', 'text_encoder_2')
_HADA = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
#: Kind -> the sets of tensors that a layer may have, for the kinds whose tensors peft and LyCORIS call the same.
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'loha': (_HADA, (*_HADA, 'hada_t1', 'hada_t2')),
    'lokr': tuple((*w1, *w2) for w1 in (('lokr_w1',), ('lokr_w1_a', 'lokr_w1_b')) for w2 in (
        ('lokr_w2',), ('lokr_w2_a', 'lokr_w2_b'), ('lokr_t2', 'lokr_w2_a', 'lokr_w2_b')))}


@dataclass
class PartWeights:
    """The weights for one part of the base.

    Attributes:
        tensors: keys are those of peft's state dicts without the adapter's name and without 'base_model.model.':
            '<module>.lora_A.weight', '<module>.lora_B.weight', '<module>.lora_magnitude_vector',
            '<module>.hada_w1_a', '<module>.lokr_w1', '<module>.oft_R.weight', ... where <module> is the full name of
            the changed module within the part as diffusers and transformers name it in memory
            ('down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q', 'encoder.layers.0.self_attn.q_proj').
        rank, alpha: <module> -> its rank and alpha; the change is scaled by alpha / rank (alpha / sqrt(rank) with
            `rslora`). OFT has neither.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)


@dataclass
class LoRAWeights:
    """The weights of one adapter.

    Attributes:
        kind: one of KINDS.
        parts: the parts, of PARTS, that it changes.
        rslora: see PartWeights.
        source: where it was read, for errors.
        options: settings of peft that the tensors do not show: OFT's `use_cayley_neumann` and its number of terms.
    """

    kind: str
    parts: dict[str, PartWeights]
    rslora: bool = False
    source: str = ''
    options: dict[str, Any] = field(default_factory=dict)


def weight_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layer's change of the weight as a matrix, [out, in * k * k], without alpha; not for OFT.

    Raises:
        RuntimeError, IndexError: the shapes do not fit each other.
    """
    def product(a: str, b: str, core: str) -> Tensor:
        if core not in tensors:
            return tensors[a] @ tensors[b]
        return torch.einsum('ij...,ip,jr->pr...', tensors[core], tensors[a], tensors[b]).flatten(1)

    if kind in ('lora', 'dora'):
        return tensors['lora_B.weight'].flatten(1) @ tensors['lora_A.weight'].flatten(1)
    if kind == 'loha':
        return product('hada_w1_a', 'hada_w1_b', 'hada_t1') * product('hada_w2_a', 'hada_w2_b', 'hada_t2')
    w1 = tensors['lokr_w1'] if 'lokr_w1' in tensors else tensors['lokr_w1_a'] @ tensors['lokr_w1_b']
    w2 = (tensors['lokr_w2'].flatten(1) if 'lokr_w2' in tensors else
          product('lokr_w2_a', 'lokr_w2_b', 'lokr_t2'))
    return torch.kron(w1, w2)
