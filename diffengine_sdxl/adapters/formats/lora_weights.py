"""The content of any LoRA file (or of its relatives) in peft's terms: what readers return and writers take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: The kinds that peft has, which are those that can be trained from nothing.
KINDS = ('lora', 'dora', 'loha', 'lokr', 'oft')
#: Kind of an adapter whose layers are of several kinds, or changed as no kind of peft can; and of the latter's layers.
MIXED, OTHER = 'mixed', 'other'
#: The parts of an SDXL that such an adapter may change.
PARTS = ('unet', 'text_encoder', 'text_encoder_2')
_HADA = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
#: Kind -> the sets of tensors that a layer may have, for the kinds whose tensors peft and LyCORIS call the same.
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'loha': (_HADA, (*_HADA, 'hada_t1', 'hada_t2')),
    'lokr': tuple((*w1, *w2) for w1 in (('lokr_w1',), ('lokr_w1_a', 'lokr_w1_b')) for w2 in (
        ('lokr_w2',), ('lokr_w2_a', 'lokr_w2_b'), ('lokr_t2', 'lokr_w2_a', 'lokr_w2_b')))}
#: Tensors that peft has no place for -> what they are, in LyCORIS' names.
EXTRAS = {'diff': 'full differences', 'diff_b': 'biases', 'w_norm': 'norms', 'b_norm': 'norms',
          'dora_scale': 'magnitudes that peft lacks'}
TITLES = {'lora': 'LoRA', 'dora': 'DoRA', 'loha': 'LoHa', 'lokr': 'LoKr', 'oft': 'OFT'}


@dataclass
class PartWeights:
    """The weights for one part of the base.

    Attributes:
        tensors: keys are those of peft's state dicts without the adapter's name and without 'base_model.model.':
            '<module>.lora_A.weight', '<module>.lora_B.weight', '<module>.lora_magnitude_vector',
            '<module>.hada_w1_a', '<module>.lokr_w1', '<module>.oft_R.weight', ... where <module> is the full name of
            the changed module within the part as diffusers and transformers name it in memory
            ('down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q', 'encoder.layers.0.self_attn.q_proj').
            Besides these, those of EXTRAS: diff of the weight's shape, diff_b [out], w_norm and b_norm [channels],
            dora_scale [out, 1, ...] or [1, in, ...].
        rank, alpha: <module> -> its rank and alpha; the change is scaled by alpha / rank (alpha / sqrt(rank) with
            `rslora`). OFT, full differences and norms have neither.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)

    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """Return module -> name of the tensor -> tensor."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, suffix = split(key)
            layers.setdefault(name, {})[suffix] = tensor
        return layers


@dataclass
class LoRAWeights:
    """The weights of one adapter.

    Attributes:
        kind: one of KINDS, or MIXED; OTHER in what `by_kind` returns.
        parts: the parts, of PARTS, that it changes.
        rslora: see PartWeights.
        source: where it was read, for errors.
        options: settings of peft that the tensors do not show: OFT's `use_cayley_neumann` and its number of terms.
        words: new words for prompts -> part -> vectors [n, D], which came with it.
    """

    kind: str
    parts: dict[str, PartWeights]
    rslora: bool = False
    source: str = ''
    options: dict[str, Any] = field(default_factory=dict)
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def by_kind(self) -> list[LoRAWeights]:
        """Return adapters of one kind each, which together are this one, without its words."""
        if self.kind != MIXED:
            return [self]
        groups: dict[str, LoRAWeights] = {}
        for part, own in self.parts.items():
            for name, tensors in own.by_layer().items():
                kind = layer_kind(tensors)
                group = groups.setdefault(kind, LoRAWeights(kind, {}, self.rslora, self.source))
                weights = group.parts.setdefault(part, PartWeights())
                weights.tensors |= {f'{name}.{key}': tensor for key, tensor in tensors.items()}
                if name in own.rank:
                    weights.rank[name], weights.alpha[name] = own.rank[name], own.alpha[name]
        return list(groups.values())

    def title(self) -> str:
        """Return its kind, or what its layers are, the most frequent first: 'LoRA, norms and full differences'."""
        if self.kind != MIXED:
            return TITLES[self.kind]
        counts = Counter(text for own in self.parts.values() for tensors in own.by_layer().values()
                         for text in _titles(tensors))
        *most, last = [text for text, _ in counts.most_common()]
        return f'{", ".join(most)} and {last}' if most else last

    def only_in_kohya(self) -> str:
        """Return what neither peft's nor diffusers' files can hold; '' if they can hold all of it."""
        return ' and '.join(filter(None, (self.title() if self.kind == MIXED else '',
                                          'words for prompts' if self.words else '')))


def _titles(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what a layer's tensors are."""
    kind = product_kind(tensors)
    texts = dict.fromkeys(EXTRAS[key] for key in tensors if key in EXTRAS and key != 'dora_scale')
    if kind in TITLES:
        decomposed = 'dora_scale' in tensors or 'lora_magnitude_vector' in tensors
        axis = 'dora_scale' in tensors and tensors['dora_scale'].shape[0] == 1
        texts = {f'{TITLES[kind]}{" with DoRA" if decomposed else ""}{" of the inputs" if axis else ""}': None, **texts}
    return list(texts)


def split(key: str) -> tuple[str, str]:
    """Split '<module>.lora_A.weight' into '<module>' and 'lora_A.weight'."""
    name, _, suffix = key.rpartition('.')
    if suffix in ('weight', 'bias'):
        name, _, start = name.rpartition('.')
        suffix = f'{start}.{suffix}'
    return name, suffix


def product_kind(names: Collection[str]) -> str:
    """Return how a layer's tensors make the change of its weight: 'lora', 'loha', 'lokr', 'full'; '' if they don't."""
    kinds = {'lora_A.weight': 'lora', 'hada_w1_a': 'loha', 'lokr_w1': 'lokr', 'lokr_w1_a': 'lokr', 'diff': 'full'}
    return next((kind for name, kind in kinds.items() if name in names), '')


def layer_kind(names: Collection[str]) -> str:
    """Return the kind of a layer by the names of its tensors: one of KINDS, or OTHER."""
    if any(name in EXTRAS for name in names):
        return OTHER
    if 'lora_magnitude_vector' in names:
        return 'dora'
    return product_kind(names) or 'oft'


def weight_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layer's change of the weight as a matrix, [out, in * k * k], without alpha; not for OFT.

    Raises:
        RuntimeError, IndexError: the shapes do not fit each other.
    """
    def product(a: str, b: str, core: str) -> Tensor:
        if core not in tensors:
            return tensors[a] @ tensors[b]
        return torch.einsum('ij...,ip,jr->pr...', tensors[core], tensors[a], tensors[b]).flatten(1)

    if kind == 'full':
        return tensors['diff'].flatten(1)
    if kind in ('lora', 'dora'):
        return tensors['lora_B.weight'].flatten(1) @ tensors['lora_A.weight'].flatten(1)
    if kind == 'loha':
        return product('hada_w1_a', 'hada_w1_b', 'hada_t1') * product('hada_w2_a', 'hada_w2_b', 'hada_t2')
    w1 = tensors['lokr_w1'] if 'lokr_w1' in tensors else tensors['lokr_w1_a'] @ tensors['lokr_w1_b']
    w2 = (tensors['lokr_w2'].flatten(1) if 'lokr_w2' in tensors else
          product('lokr_w2_a', 'lokr_w2_b', 'lokr_t2'))
    return torch.kron(w1, w2)
