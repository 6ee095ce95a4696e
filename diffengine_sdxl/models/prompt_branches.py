"""What each guidance branch reads of a batch's prompts, and the cache of prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.adapters.precision import under_autocast
from diffengine_sdxl.cache.keys import code_digest, digest
from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.models.prompt_weighting import plain_text
from diffengine_sdxl.models.text_encoders import NewTokens, TextEncoder, encode_prompts, encode_weighted, extended
from diffengine_sdxl.protocols import Model
from diffengine_sdxl.request import SYNTAXES, Request
from diffengine_sdxl.structures import Batch, Lookups, where

ENCODERS = ('text_encoder', 'text_encoder_2')
#: Rows of embeddings to cache: some 40 MB at SDXL's size, in fp32.
MAX_CACHED_ROWS = 64


class PromptMixin:
    """The state and the public methods of SDXL for prompts."""

    #: Whether gradients pass through the text encoders; whether an adapter changes their outputs.
    text_trains = text_adapted = False
    #: Embeddings by prompts, oldest first; None outside of `cached_prompts`.
    prompt_cache: dict[Any, tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def cached_prompts(self: Model) -> Iterator[None]:
        """Encode equal prompts once inside; an inner context shares the outer one's cache.

        For sampling: weights must not change, but the adapters' scales may.
        """
        outer = self.prompt_cache
        self.prompt_cache = {} if outer is None else outer
        try:
            yield
        finally:
            self.prompt_cache = outer

    def new_tokens(self: Model) -> tuple[NewTokens, NewTokens]:
        """Return the adapters' new tokens for each text encoder.

        Raises:
            UserError: two adapters add the same token, or a tokenizer has it.
        """
        tokens: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        owners: dict[str, str] = {}
        for name, adapter in self.adapters.items():
            for token, vectors in adapter.new_tokens().items():
                if owners.setdefault(token, name) != name:
                    raise UserError(f"The adapters '{owners[token]}' and '{name}' both add the token '{token}'; give "
                                    'each its own.')
                for of_encoder, value in zip(tokens, vectors, strict=True):
                    of_encoder.update({} if value is None else {token: value})
        for tokenizer, of_encoder in zip((self.tokenizer, self.tokenizer_2), tokens, strict=True):
            if of_encoder:
                extended(tokenizer, of_encoder)
        return tokens

    def reads_word(self: Model, text: str, words: Mapping[str, Any]) -> bool:
        """Return whether a text encoder reads one of `words`, new tokens of an adapter, in `text`, cut to 77 tokens."""
        if not any(word.lower() in text.lower() for word in words):
            return False
        parts = zip((self.tokenizer, self.tokenizer_2), (self.text_encoder, self.text_encoder_2), (0, 1), strict=True)
        vectors = [{word: both[i] for word, both in words.items() if both[i] is not None} for i in (0, 1)]
        return any(TextEncoder(tokenizer, encoder, vectors[i]).reads_word(text)
                   for tokenizer, encoder, i in parts if encoder is not None and vectors[i])


def default_syntax(model: Model) -> str:
    """Return how prompts are read if a request does not say: as the captions were in training."""
    return 'plain' if model.caption_chunks == 1 else 'long'


def num_chunks(model: Model, request: Request) -> int:
    """Return how many chunks of 77 tokens the prompts of one image take.

    Raises:
        UserError: the syntax of a prompt is wrong, or one has too many chunks.
    """
    return _longest(*_chunk_counters(model, request.prompt_syntax or default_syntax(model)), request.prompt,
                    request.prompt_2, request.negative_prompt, request.negative_prompt_2)


def _chunk_counters(model: Model, syntax: str) -> tuple[int, list[Callable[[str], int]]]:
    """Return the least number of chunks, and what counts those of a prompt for each text encoder."""
    if syntax == 'plain':
        return 1, []
    if syntax == 'long':
        return model.caption_chunks, [encoder.num_chunks for encoder in _text_encoders(model)]
    return 1, [encoder.weighted().num_chunks for encoder in _text_encoders(model)]


def _longest(least: int, counters: Sequence[Callable[[str], int]], text: str, text_2: str | None,
             negative: str | None, negative_2: str | None) -> int:
    pairs = [(text, text if text_2 is None else text_2)]
    if negative is not None or negative_2 is not None:
        first = negative or ''
        pairs.append((first, first if negative_2 is None else negative_2))
    return max([least, *(count(pair[i]) for i, count in enumerate(counters) for pair in pairs)])


def encode_text(model: Model, batch: Batch, branch: str, one_by_one: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `branch`, 'cond' or 'uncond', reads: text [B, S, D], pooled [B, P] and time_ids [B, 6].

    Args:
        one_by_one: encode each distinct caption by itself, once, or take it from `batch.lookups`; new ones are put into
            the model's store. As training does, so that no loss depends on the other captions of a batch or on the
            cache; sampling encodes a batch at once, as diffusers does. Text encoders that train or are adapted always
            do.

    Raises:
        UserError: see `_reading`; or embeddings were computed in advance, and a text encoder trains or is adapted.
    """
    (syntax, num_chunks), empty = _reading(model, batch), [''] * len(batch)
    if branch == 'uncond':
        time_ids = batch.time_ids if batch.negative_time_ids is None else batch.negative_time_ids
        if batch.negative_text is None and model.null_prompt == 'zeros':
            return (*_zeros(model, len(batch), num_chunks), time_ids)
        first = batch.negative_text or empty
        # As in diffusers, the negative prompt skips no layers.
        return (*embed(model, first, batch.negative_text_2 or first, syntax, num_chunks), time_ids)
    drop = batch.drop.get('text')
    if batch.text_embeds is not None and batch.pooled is not None:
        assert batch.prompt_syntax is None and batch.clip_skip is None, 'a request has no text_embeds'
        if model.text_trains or model.text_adapted and not model.adapters_disabled:
            raise UserError("The samples hold 'text_embeds', but the config trains or adapts a text encoder: give the "
                            'samples their text.')
        text, pooled = batch.text_embeds, batch.pooled
        if drop is not None and model.null_prompt == 'empty' and bool(drop.any()):
            text, pooled = (where(drop, null.to(value), value) for null, value in zip(
                embed(model, empty, empty, syntax, num_chunks), (text, pooled), strict=True))
    else:
        first, second = batch.text, batch.text_2 or batch.text
        if drop is not None and model.null_prompt == 'empty':
            first, second = ([('' if dropped else text) for dropped, text in zip(drop.tolist(), texts, strict=True)]
                             for texts in (first, second))
        if one_by_one and not (model.text_trains or model.text_adapted):
            text, pooled = _embed_one_by_one(model, batch, first, second, syntax, num_chunks)
        else:
            text, pooled = embed(model, first, second, syntax, num_chunks, batch.clip_skip)
    if drop is not None and model.null_prompt == 'zeros':
        text, pooled = (where(drop, torch.zeros_like(x), x) for x in (text, pooled))
    return text, pooled, batch.time_ids


def _embed_one_by_one(model: Model, batch: Batch, first: Sequence[str], second: Sequence[str], syntax: str,
                      num_chunks: int) -> tuple[Tensor, Tensor]:
    def compute(i: int) -> dict[str, Tensor]:
        text, pooled = embed(model, first[i:i + 1], second[i:i + 1], syntax, num_chunks, batch.clip_skip)
        return {'text_embeds': text[0], 'pooled': pooled[0]}

    lookups, store = batch.lookups.get('text'), model.store
    if lookups is None:
        lookups, store = Lookups([repr(pair) for pair in zip(first, second, strict=True)], [None] * len(batch)), None
    rows = by_row(len(batch), compute, 'text', lookups, store, model.device)
    return rows['text_embeds'], rows['pooled']


def text_digest(model: Model, digest_of: Callable[[str], str]) -> str | None:
    """Return the digest of all that captions are embedded by; None if that changes: text trains or is adapted.

    Args:
        digest_of: name of a component -> the digest of its weights, config and dtype.
    """
    if model.text_trains or model.text_adapted:
        return None
    parts = []
    for part, tokenizer in zip(ENCODERS, (model.tokenizer, model.tokenizer_2), strict=True):
        if getattr(model, part) is not None:
            backend = tokenizer.backend_tokenizer
            # These are of the last call; transformers sets them in each.
            backend.no_truncation()
            backend.no_padding()
            parts.append((digest_of(part), backend.to_str(), tokenizer.model_max_length, tokenizer.pad_token_id))
    return digest('text encoders', parts, model.caption_chunks, code_digest(encode_prompts.__module__))


def _reading(model: Model, batch: Batch) -> tuple[str, int]:
    """Check how the prompts are written; return their syntax, and how many chunks each image's take.

    Raises:
        UserError: the syntax or clip_skip is unknown or wrong, or the images' numbers of chunks differ.
    """
    syntax = batch.prompt_syntax or default_syntax(model)
    one_of('prompt_syntax', syntax, SYNTAXES)
    if batch.clip_skip is not None:
        most = min(encoder.config.num_hidden_layers for encoder in _modules(model)) - 1
        if not 0 <= batch.clip_skip <= most:
            raise UserError(f'clip_skip={batch.clip_skip} must be between 0 and, for these text encoders, {most}.')
        if syntax == 'compel':
            raise UserError(f"clip_skip={batch.clip_skip} does not go with prompt_syntax='compel', which reads the "
                            "penultimate layer; use 'plain' or 'long'.")
    if batch.text_embeds is not None:
        return syntax, batch.text_embeds.shape[1] // model.tokenizer_2.model_max_length
    if batch.prompt_syntax is None:  # captions
        return syntax, model.caption_chunks
    (least, counters), absent = _chunk_counters(model, syntax), [None] * len(batch)
    rows = [_longest(least, counters, *row) for row in zip(
        batch.text, batch.text_2 or absent, batch.negative_text or absent, batch.negative_text_2 or absent,
        strict=True)]
    for i, num in enumerate(rows):
        if num != rows[0]:
            raise UserError(f"The prompts of '{batch.text[0]}' and '{batch.text[i]}' take {rows[0]} and {num} chunks "
                            f'of {model.tokenizer_2.model_max_length} tokens; images of one batch must take as many.')
    return syntax, rows[0]


def _zeros(model: Model, num: int, num_chunks: int) -> tuple[Tensor, Tensor]:
    width = sum(encoder.config.hidden_size for encoder in _modules(model))
    kwargs = {'device': model.device, 'dtype': model.text_encoder_2.dtype}
    return (torch.zeros(num, num_chunks * model.tokenizer_2.model_max_length, width, **kwargs),
            torch.zeros(num, model.text_encoder_2.config.projection_dim, **kwargs))


def _modules(model: Model) -> list[Any]:
    """Return the text encoders; a refiner has the second one only."""
    return [encoder for encoder in (model.text_encoder, model.text_encoder_2) if encoder is not None]


def _text_encoders(model: Model) -> list[TextEncoder]:
    tokens: Sequence[NewTokens] = ({}, {}) if model.adapters_disabled else model.new_tokens()
    parts = zip((model.tokenizer, model.tokenizer_2), (model.text_encoder, model.text_encoder_2), tokens, strict=True)
    return [TextEncoder(*part) for part in parts if part[1] is not None]


def embed(model: Model, first: Sequence[str], second: Sequence[str], syntax: str = 'plain', num_chunks: int = 1,
          clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
    """Embed the prompts of both encoders, or take them from the cache.

    Returns:
        text [B, S, D], pooled [B, P].
    """
    cache = model.prompt_cache
    if cache is None or torch.is_grad_enabled() and model.text_trains:
        return _embed(model, first, second, syntax, num_chunks, clip_skip)
    scales = tuple((name, adapter.scale) for name, adapter in model.adapters.items() if model.text_adapted)
    # The batch as a whole, as kernels round by the number of rows.
    key = (tuple(first), tuple(second), syntax, num_chunks, clip_skip, model.adapters_disabled, scales)
    # Insert again as the newest, so that the least recently used goes first.
    cache[key] = cache.pop(key) if key in cache else _embed(model, first, second, syntax, num_chunks, clip_skip)
    while len(cache) > 1 and sum(len(text) for text, _ in cache.values()) > MAX_CACHED_ROWS:
        del cache[next(iter(cache))]
    return cache[key]


def _embed(model: Model, first: Sequence[str], second: Sequence[str], syntax: str, num_chunks: int,
           clip_skip: int | None) -> tuple[Tensor, Tensor]:
    mixed = any(under_autocast(model, part) for part in ENCODERS)
    encoders = _text_encoders(model)
    # As in diffusers, a refiner's only encoder, the second one, reads the first prompt.
    prompts = [first, second][:len(encoders)]
    if model.prompt_cache is not None:  # inference; captions of a training may teach new words
        _warn_of_unread_words(model, prompts, encoders, syntax)
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.text_trains), model.autocast(mixed):
        if syntax == 'compel':
            return encode_weighted(prompts, encoders, num_chunks)
        return encode_prompts(prompts, encoders, clip_skip, None if syntax == 'plain' else num_chunks)


def _warn_of_unread_words(model: Model, prompts: Sequence[Sequence[str]], encoders: Sequence[TextEncoder],
                          syntax: str) -> None:
    adapted = not model.adapters_disabled and any(adapter.modifies_base for adapter in model.adapters.values())
    for texts, encoder in zip(prompts, encoders, strict=True):
        for text in texts:
            encoder.warn_of_unread_words(plain_text(text) if syntax == 'compel' else text, adapted)
