"""The half of SDXL that owns the text encoders: what each guidance branch reads, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.models.text import ENCODERS, Words, encode_prompts, encode_weighted, longest, taught
from diffengine_sdxl.models.weighting import SYNTAXES
from diffengine_sdxl.structures import Batch, where

#: Rows of embeddings that are remembered, at most: some 40 MB at SDXL's size, in fp32.
MOST_REMEMBERED = 64


class Prompts:
    """The half of SDXL that owns the text encoders; mixed into it."""

    #: Set when all is attached: whether gradients pass through the encoders, and whether weights of another dtype than
    #: theirs compute in them.
    text_trains = text_mixed = False
    #: Whether an adapter changes what they make of a prompt.
    text_changed = False
    #: What the encoders gave, oldest first, inside `remembering_prompts`; None: nothing is remembered.
    _remembered: dict[Any, tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def remembering_prompts(self: Any) -> Iterator[None]:
        """Inside, the same prompts are encoded once. For pictures: weights must not change, but adapters' scales may.

        One inside another shares what the outer one remembers.
        """
        before = self._remembered
        self._remembered = {} if before is None else before
        try:
            yield
        finally:
            self._remembered = before

    def _num_chunks(self: Any, batch: Batch) -> int:
        """Of every picture of the batch.

        Raises:
            ValueError: they are not as many for each, the syntax is unknown, a prompt is written wrongly, or there are
                no such layers to skip.
        """
        if batch.clip_skip is not None:
            self._check_clip_skip(batch, batch.clip_skip)
        if batch.syntax not in SYNTAXES:
            raise ValueError(f"syntax='{batch.syntax}' is not known; choose of {', '.join(map(repr, SYNTAXES))}.")
        if batch.syntax == 'plain':
            return 1
        if batch.text_embeds is not None:
            raise ValueError(f"The samples hold 'text_embeds' and prompts of syntax='{batch.syntax}'; give them "
                             'one of the two.')
        absent = [None] * len(batch)
        rows = [longest(self, *row) for row in zip(batch.text, batch.text_2 or absent, batch.negative_text or absent,
                                                    batch.negative_text_2 or absent, strict=True)]
        if len(set(rows)) > 1:
            other = next(i for i, num in enumerate(rows) if num != rows[0])
            raise ValueError(f"The prompts '{batch.text[0]}' and '{batch.text[other]}' (or what stands beside them) "
                             f'take up {rows[0]} and {rows[other]} chunks of {self.tokenizer_2.model_max_length} '
                             'tokens; pictures of one batch must have as many.')
        return rows[0]

    def _check_clip_skip(self: Any, batch: Batch, clip_skip: int) -> None:
        """Refuse layers to skip that there are not, or that nothing can skip."""
        most = min(getattr(self, part).config.num_hidden_layers for part in ENCODERS
                   if getattr(self, part) is not None) - 1
        if not 0 <= clip_skip <= most:
            raise ValueError(f'clip_skip={clip_skip} must be at least 0 and, with these text encoders, at most {most}.')
        if batch.syntax != 'plain':
            raise ValueError(f"clip_skip={clip_skip} goes with syntax='plain' only; '{batch.syntax}' reads the "
                             'penultimate layer.')
        if batch.text_embeds is not None:
            raise ValueError(f"The samples hold 'text_embeds', of which clip_skip={clip_skip} can skip nothing.")

    def _encode_text(self: Any, batch: Batch, branch: str) -> tuple[Tensor, Tensor, Tensor]:
        time_ids, num_chunks = batch.time_ids, self._num_chunks(batch)
        first, second = batch.text, batch.text_2 or batch.text
        dropped = batch.drop.get('text')
        if branch == 'uncond':
            if batch.negative_time_ids is not None:
                time_ids = batch.negative_time_ids
            if batch.negative_text is None and self.null_text == 'zeros':
                text, pooled = self._shape_of_text(batch, num_chunks)
                return torch.zeros_like(text), torch.zeros_like(pooled), time_ids
            first = batch.negative_text or [''] * len(batch)
            second, dropped = batch.negative_text_2 or first, None
        if branch == 'cond' and batch.text_embeds is not None and batch.pooled is not None:
            if self.text_trains or self.text_changed and not self.alone:
                raise ValueError("The samples hold 'text_embeds', but the config trains or adapts what reads prompts "
                                 '(a text encoder): give the samples their text.')
            text, pooled = batch.text_embeds, batch.pooled
            if dropped is not None and self.null_text == 'empty' and bool(dropped.any()):
                empty = [''] * len(batch)
                text, pooled = (where(dropped, null.to(given), given)
                                for null, given in zip(self._prompts(empty, empty), (text, pooled), strict=True))
        else:
            if dropped is not None and self.null_text == 'empty':
                first, second = ([('' if d else t) for d, t in zip(dropped.tolist(), texts, strict=True)]
                                 for texts in (first, second))
            # As in diffusers, whose negative prompt skips nothing.
            clip_skip = None if branch == 'uncond' else batch.clip_skip
            text, pooled = self._prompts(first, second, batch.syntax, num_chunks, clip_skip)
        if dropped is not None and self.null_text == 'zeros':
            text, pooled = (where(dropped, torch.zeros_like(x), x) for x in (text, pooled))
        return text, pooled, time_ids

    def _shape_of_text(self: Any, batch: Batch, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Tensors of the text's shapes, for zeros."""
        width = sum(e.config.hidden_size for e in (self.text_encoder, self.text_encoder_2) if e is not None)
        kwargs = {'device': self.device, 'dtype': self.text_encoder_2.dtype}
        return (torch.empty(len(batch), num_chunks * self.tokenizer_2.model_max_length, width, **kwargs),
                torch.empty(len(batch), self.text_encoder_2.config.projection_dim, **kwargs))

    def words(self: Any) -> tuple[Words, Words]:
        """The adapters' new words for each of the two text encoders.

        Raises:
            ValueError: two adapters bring the same word, or a tokenizer has it.
        """
        words: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        owners: dict[str, str] = {}
        for name, adapter in self.adapters.items():
            for word, vectors in adapter.words().items():
                if owners.setdefault(word, name) != name:
                    raise ValueError(f"The adapters '{owners[word]}' and '{name}' both bring the word '{word}'; give "
                                     'each a token of its own.')
                for held, new in zip(words, vectors, strict=True):
                    held.update({} if new is None else {word: new})
        for tokenizer, held in zip((self.tokenizer, self.tokenizer_2), words, strict=True):
            if held:
                taught(tokenizer, held)
        return words

    def _readers(self: Any) -> tuple[list[Any], list[Any], list[Words]]:
        """What reads prompts: tokenizer, encoder and new words of each text encoder that there is."""
        used = [i for i, part in enumerate(ENCODERS) if getattr(self, part) is not None]
        words: Sequence[Words] = ({}, {}) if self.alone else self.words()
        return ([(self.tokenizer, self.tokenizer_2)[i] for i in used], [getattr(self, ENCODERS[i]) for i in used],
                [words[i] for i in used])

    def _prompts(self: Any, first: Sequence[str], second: Sequence[str], syntax: str = 'plain',
                 num_chunks: int = 1, clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
        """What the encoders give, or what they gave for the same, inside `remembering_prompts`."""
        if self._remembered is None or torch.is_grad_enabled() and self.text_trains:
            return self._read(first, second, syntax, num_chunks, clip_skip)
        scales = tuple((name, adapter.scale) for name, adapter in self.adapters.items() if self.text_changed)
        # The batch as a whole, as kernels round by the number of rows.
        key = (tuple(first), tuple(second), syntax, num_chunks, clip_skip, self.alone, scales)
        # Put in again as the last, so that what was not asked for longest goes first.
        found = self._remembered.pop(key, None)
        self._remembered[key] = found or self._read(first, second, syntax, num_chunks, clip_skip)
        while len(self._remembered) > 1 and sum(len(held[0]) for held in self._remembered) > MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return self._remembered[key]

    def _read(self: Any, first: Sequence[str], second: Sequence[str], syntax: str, num_chunks: int,
              clip_skip: int | None) -> tuple[Tensor, Tensor]:
        # The base alone computes as it does without an adapter's fp32 weights in it.
        own = any(part in self.trainable_parts for part in ENCODERS)
        mixed = own if self.alone else self.text_mixed
        tokenizers, encoders, words = self._readers()
        # A refiner's only encoder is the second one; as in diffusers it reads the first prompt all the same.
        prompts = [first, second][:len(encoders)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_trains), self._autocast(mixed):
            if syntax == 'plain':
                return encode_prompts(prompts, tokenizers, encoders, words, clip_skip)
            return encode_weighted(num_chunks, prompts, tokenizers, encoders, words)
