"""Prompts to embeddings, through one or both of SDXL's text encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_prompts(prompts: Sequence[Sequence[str]], tokenizers: Sequence[Any],
                   encoders: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Embed one batch of prompts.

    Each encoder gives its penultimate hidden state; they are put side by side. The pooled embedding is the last
    encoder's projected one (Podell et al. 2023, SDXL, section 2.1; as diffusers' `encode_prompt`). Prompts longer
    than 77 tokens are cut.

    Args:
        prompts: one list of B prompts for each encoder.
        tokenizers, encoders: in the order in which their outputs are put together.

    Returns:
        text [B, 77, sum of widths], pooled [B, P], both in the encoders' dtype.
    """
    states, pooled = [], None
    for texts, tokenizer, encoder in zip(prompts, tokenizers, encoders, strict=True):
        ids = tokenizer(list(texts), padding='max_length', max_length=tokenizer.model_max_length, truncation=True,
                        return_tensors='pt').input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None and pooled.dim() == 2, 'the last text encoder has a projection'
    return torch.cat(states, dim=-1), pooled
