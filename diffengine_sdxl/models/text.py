"""Prompts to embeddings, through one or both of SDXL's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.structures import Batch, where

ENCODERS = ('text_encoder', 'text_encoder_2')


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


class Prompts:
    """The half of SDXL that owns the text encoders; mixed into it."""

    #: Set when all is attached: whether gradients pass through the encoders, and whether weights of another dtype than
    #: theirs compute in them.
    text_trains = text_mixed = False

    def _encode_text(self: Any, batch: Batch, branch: str) -> tuple[Tensor, Tensor, Tensor]:
        time_ids = batch.time_ids
        first, second = batch.text, batch.text_2 or batch.text
        dropped = batch.drop.get('text')
        if branch == 'uncond':
            if batch.negative_time_ids is not None:
                time_ids = batch.negative_time_ids
            if batch.negative_text is None and self.null_text == 'zeros':
                text, pooled = self._shape_of_text(batch)
                return torch.zeros_like(text), torch.zeros_like(pooled), time_ids
            first = batch.negative_text or [''] * len(batch)
            second, dropped = batch.negative_text_2 or first, None
        if branch == 'cond' and batch.text_embeds is not None and batch.pooled is not None:
            if torch.is_grad_enabled() and self.text_trains:
                raise ValueError("The samples hold 'text_embeds', but the config trains what reads prompts (a text "
                                 'encoder, or an adapter of one): give the samples their text.')
            text, pooled = batch.text_embeds, batch.pooled
            if dropped is not None and self.null_text == 'empty' and bool(dropped.any()):
                empty = [''] * len(batch)
                text, pooled = (where(dropped, null.to(given), given)
                                for null, given in zip(self._prompts(empty, empty), (text, pooled), strict=True))
        else:
            if dropped is not None and self.null_text == 'empty':
                first, second = ([('' if d else t) for d, t in zip(dropped.tolist(), texts, strict=True)]
                                 for texts in (first, second))
            text, pooled = self._prompts(first, second)
        if dropped is not None and self.null_text == 'zeros':
            text, pooled = (where(dropped, torch.zeros_like(x), x) for x in (text, pooled))
        return text, pooled, time_ids

    def _shape_of_text(self: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tensors of the text's shapes, for zeros."""
        width = sum(e.config.hidden_size for e in (self.text_encoder, self.text_encoder_2) if e is not None)
        kwargs = {'device': self.unet_weight.device, 'dtype': self.text_encoder_2.dtype}
        return (torch.empty(len(batch), self.tokenizer_2.model_max_length, width, **kwargs),
                torch.empty(len(batch), self.text_encoder_2.config.projection_dim, **kwargs))

    def _prompts(self: Any, first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
        # The base alone computes as it does without an adapter's fp32 weights in it.
        own = any(part in self.trainable_parts for part in ENCODERS)
        mixed = own if self.alone else self.text_mixed
        used = [i for i, part in enumerate(ENCODERS) if getattr(self, part) is not None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_trains), self._autocast(mixed):
            return encode_prompts([(first, second)[i] for i in used],
                                  [(self.tokenizer, self.tokenizer_2)[i] for i in used],
                                  [getattr(self, ENCODERS[i]) for i in used])
