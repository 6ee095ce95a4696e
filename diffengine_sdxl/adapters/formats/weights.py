"""What any file of a LoRA or of its relatives holds, in peft's terms: what readers return and writers take."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

KINDS = ('lora', 'dora', 'loha', 'lokr', 'oft')
#: The parts of an SDXL that such an adapter may change.
PARTS = ('unet', 'text_encoder', 'text_encoder_2')


@dataclass
class PartWeights:
    """Of one part of the base.

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
    """One adapter.

    Attributes:
        kind: of KINDS.
        parts: of PARTS, those that it changes.
        rslora: see PartWeights.
        source: where it was read, for errors.
    """

    kind: str
    parts: dict[str, PartWeights]
    rslora: bool = False
    source: str = ''
