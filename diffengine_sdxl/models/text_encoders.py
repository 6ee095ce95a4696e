"""Prompts to embeddings, through one or both of SDXL's text encoders."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import Tensor

from diffengine_sdxl.errors import UserError, listed, whole_number
from diffengine_sdxl.models.prompt_weighting import WeightedEncoder, plain_text
from diffengine_sdxl.structures import send

#: New tokens of one text encoder: token -> its vectors [n, D].
NewTokens = Mapping[str, Tensor]
#: A tokenizer -> the entries last added to it, and the copy that has them; SDXL's take 0.2 s to copy.
_EXTENDED: WeakKeyDictionary[Any, tuple[list[str], Any]] = WeakKeyDictionary()
#: What was logged: ends of prompts that were truncated, and prompts with words that the base never read.
_TRUNCATED: set[str] = set()
_UNREAD: set[str] = set()
#: Warnings of each kind, as the prompts of a file or the captions of a data set may all be alike.
MAX_WARNINGS = 10
#: Chunks of 75 tokens of one text: a prompt may come from anyone, and attention reads all of them at once.
MAX_CHUNKS = 32
#: Tokens after which a text is split into chunks: the ends of sentences, else of phrases, else of words.
_ENDS = ({'.</w>'}, {'.</w>', ',</w>', ';</w>', ':</w>'})


class TextEncoder:
    """A text encoder with its tokenizer; both know `new_tokens` without being changed."""

    def __init__(self, tokenizer: Any, encoder: Any, new_tokens: NewTokens) -> None:
        self.new_tokens = new_tokens
        self.tokenizer = _Tokenizer(tokenizer, new_tokens)
        self.encoder = _Encoder(encoder, len(tokenizer), new_tokens)

    def token_ids(self, texts: Sequence[str], num_chunks: int | None = None, warn: bool = True) -> Tensor:
        """Tokenize and pad to chunks of 77 tokens: [num_chunks, B, 77], or [1, B, 77] if `num_chunks` is None.

        Ids of new tokens follow the tokenizer's own, one for each vector.

        Args:
            num_chunks: chunks of each text, split by `split_tokens`; empty ones are added, further ones are cut. None
                truncates each text to 75 tokens, as diffusers does.
            warn: log what is cut.
        """
        length, padding = self._chunk_length, self.tokenizer.pad_token_id
        rows = []
        for begin, *ids, end in self.tokenizer(texts)['input_ids']:
            # One token more than can be kept, so that the last chunk is split as that of the whole text.
            chunks = [ids[:length]] if num_chunks is None else split_tokens(
                self.tokenizer, ids[:length * num_chunks + 1], length)[:num_chunks]
            kept = sum(map(len, chunks))
            if warn and kept < len(ids):
                self._warn_of_lost(ids, kept)
            chunks += [[]] * ((num_chunks or 1) - len(chunks))
            rows.append([[begin, *chunk, end, *[padding] * (length - len(chunk))] for chunk in chunks])
        return torch.tensor(rows).transpose(0, 1)

    def num_chunks(self, text: str) -> int:
        """Return how many chunks `token_ids` needs for all of a text.

        Raises:
            UserError: more than MAX_CHUNKS.
        """
        num = len(split_tokens(self.tokenizer, self.tokenizer([text])['input_ids'][0][1:-1], self._chunk_length))
        if num > MAX_CHUNKS:
            raise UserError(f"The prompt '{text[:500]}{'...' * (len(text) > 500)}' takes {num} chunks of "
                            f'{self._chunk_length} tokens; at most {MAX_CHUNKS} are read.')
        return num

    @property
    def _chunk_length(self) -> int:
        """Return how many tokens of a text lie between the begin and end tokens of one chunk."""
        length: int = self.tokenizer.model_max_length - 2
        return length

    def _warn_of_lost(self, ids: Sequence[int], kept: int) -> None:
        lost, length = textwrap.shorten(self.tokenizer.decode(ids[kept:]), 200, placeholder=' ...'), self._chunk_length
        num = min(MAX_CHUNKS, len(split_tokens(self.tokenizer, ids[:length * MAX_CHUNKS], length)))
        _warn_once(_TRUNCATED, lost, f'A text has {len(ids)} tokens and {kept} are read, so its end is ignored: '
                   f"'{lost}'. prompt_syntax='long' reads all of a prompt; in training, model.caption_chunks={num}.")

    def reads_word(self, text: str) -> bool:
        """Return whether a new token of `text` lies within the length that the encoder reads."""
        row = self.tokenizer([text], truncation=True)['input_ids'][0]
        return any(token in ids for ids in self.tokenizer.ids.values() for token in row)

    def weighted(self) -> WeightedEncoder:
        """Return the encoder of compel's syntax."""
        return WeightedEncoder(self.tokenizer, self.encoder)

    def warn_of_unread_words(self, text: str, adapted: bool) -> None:
        """Log the words of `text` that a base of few words was not trained on; once a text.

        Such a base lists its words in its tokenizer_config.json, as `closed_vocabulary`; others, such as SDXL, have no
        such list.

        Args:
            adapted: an adapter changes the base, so it may have learned any word that is one token.
        """
        known = self.tokenizer.init_kwargs.get('closed_vocabulary')
        if known is None:
            return
        plain = text.lower()
        for token in self.new_tokens:
            plain = plain.replace(token.lower(), ' ')
        spared = {*known, *(token.removesuffix('</w>') for token in self.tokenizer.get_vocab() if adapted)}
        if unread := [word for word in dict.fromkeys(re.findall(r'\w+', plain)) if word not in spared]:
            _warn_once(_UNREAD, text, f"The base was not trained on {listed(map(repr, unread))} of the prompt "
                       f"'{text if len(text) <= 200 else text[:200] + '...'}'. It knows {len(known)} words: "
                       f'{listed(known)}; all are in its tokenizer_config.json.')


def encode_prompts(prompts: Sequence[Sequence[str]], encoders: Sequence[TextEncoder],
                   clip_skip: int | None = None, num_chunks: int | None = None) -> tuple[Tensor, Tensor]:
    """Embed one batch of prompts; truncate longer ones and log what is lost.

    The encoders' penultimate hidden states are concatenated; the pooled embedding is the last encoder's projected one
    of the first 75 tokens (Podell et al. 2023, SDXL, section 2.1; as diffusers' `encode_prompt`, and compel).

    Args:
        prompts: one list of B prompts for each encoder.
        clip_skip: layers to skip besides the last; None as 0.
        num_chunks: chunks to split each prompt into, see `TextEncoder.token_ids`, each encoded by itself.

    Returns:
        text [B, 77 num_chunks, sum of widths], pooled [B, P], both in the encoders' dtype.
    """
    states, pooled = [], None
    for texts, part in zip(prompts, encoders, strict=True):
        chunks, of_encoder = part.token_ids(texts, num_chunks), []
        for ids in chunks:
            output = part.encoder(send(ids, part.encoder.device), output_hidden_states=True)
            of_encoder.append(output.hidden_states[-(clip_skip or 0) - 2])
            pooled = output[0] if len(of_encoder) == 1 else pooled
        states.append(torch.cat(of_encoder, dim=1))
    if num_chunks is not None:
        start = part.token_ids(texts, warn=False)[0]
        if not torch.equal(start, chunks[0]):  # the first chunk ends with a sentence, before 75 tokens
            pooled = part.encoder(send(start, part.encoder.device))[0]
    assert pooled is not None and pooled.dim() == 2, 'the last text encoder has a projection'
    return torch.cat(states, dim=-1), pooled


def split_tokens(tokenizer: Any, ids: Sequence[int], length: int) -> list[list[int]]:
    """Split the ids of a text into chunks of at most `length`; one empty chunk if there are none.

    By compel's rule: each chunk but the last ends after the last sentence that fits, else phrase, else word. Its own
    function needs the text encoder, which is not loaded where all captions are in the cache.
    """
    chunks, rest = [], list(ids)
    while len(rest) > length:
        tokens = tokenizer.convert_ids_to_tokens(rest[:length])
        ends = ([i for i, token in enumerate(tokens) if token in _ENDS[0]]
                or [i for i, token in enumerate(tokens) if token in _ENDS[1]]
                or [i for i, token in enumerate(tokens) if token.endswith('</w>')] or [length - 1])
        chunks.append(rest[:ends[-1] + 1])
        rest = rest[ends[-1] + 1:]
    return [*chunks, rest]


def check_chunks(value: Any) -> int:
    """Return `caption_chunks` of a model.

    Raises:
        UserError: it is no whole number from 1 to MAX_CHUNKS.
    """
    num = whole_number('caption_chunks', value, 1)
    if num > MAX_CHUNKS:
        raise UserError(f'caption_chunks={num} must be at most {MAX_CHUNKS}.')
    return num


def encode_weighted(prompts: Sequence[Sequence[str]], encoders: Sequence[TextEncoder],
                    num_chunks: int) -> tuple[Tensor, Tensor]:
    """Embed prompts in compel's syntax, one by one; as `encode_prompts` if none has a weight or is long.

    Args:
        prompts: one list of B prompts for each encoder.
        num_chunks: chunks to pad each prompt to; at least those of the longest.

    Returns:
        text [B, 77 num_chunks, sum of widths], pooled [B, P].

    Raises:
        UserError: the syntax of a prompt is wrong, or splits a new token.
    """
    weighted = [part.weighted() for part in encoders]
    for texts, part in zip(prompts, encoders, strict=True):
        for text in texts:
            _check_new_tokens(text, part.new_tokens)
    if num_chunks == 1:
        unweighted = [[encoder.unweighted(text) for text in texts]
                      for texts, encoder in zip(prompts, weighted, strict=True)]
        if all(text is not None for texts in unweighted for text in texts):
            return encode_prompts(unweighted, encoders)  # type: ignore[arg-type]
    # Each text once: many prompts of a batch share the negative one.
    states = [{text: encoder.states(text, num_chunks) for text in dict.fromkeys(texts)}
              for texts, encoder in zip(prompts, weighted, strict=True)]
    pooled = {text: weighted[-1].pooled(text) for text in dict.fromkeys(prompts[-1])}
    rows = [torch.cat([by_text[text] for text in texts]) for texts, by_text in zip(prompts, states, strict=True)]
    return torch.cat(rows, dim=-1), torch.cat([pooled[text] for text in prompts[-1]])


def _check_new_tokens(prompt: str, tokens: NewTokens) -> None:
    """Check that compel's syntax leaves the new tokens in `prompt` whole."""
    for token in tokens:
        if prompt.lower().count(token.lower()) != plain_text(prompt).lower().count(token.lower()):
            raise UserError(f"compel's syntax splits the new token '{token}' in the prompt '{prompt}'; name it with "
                            "letters, digits, '_', '-', '<' and '>' only.")


def extended(tokenizer: Any, tokens: NewTokens) -> Any:
    """Return a copy of `tokenizer` with an entry for each vector: token, token_1, ..., as diffusers names them.

    Raises:
        UserError: the tokenizer has one of them already, or two are equal.
    """
    entries = [entry for token, vectors in tokens.items()
               for entry in [token, *(f'{token}_{i}' for i in range(1, len(vectors)))]]
    if tokenizer in _EXTENDED and _EXTENDED[tokenizer][0] == entries:
        return _EXTENDED[tokenizer][1]
    vocabulary, lowered = tokenizer.get_vocab(), [entry.lower() for entry in entries]  # CLIP's tokenizers lower all
    for entry in entries:
        duplicate = lowered.count(entry.lower()) > 1
        if duplicate or entry in vocabulary or len(tokenizer.tokenize(entry)) == 1:
            problem = 'is added twice' if duplicate else "is in the tokenizer's vocabulary already"
            raise UserError(f"The new token '{entry}' {problem}; choose another, such as '<my-thing>'.")
    copy = deepcopy(tokenizer)
    copy.add_tokens(entries)
    assert copy.convert_tokens_to_ids(entries) == list(range(len(tokenizer), len(tokenizer) + len(entries)))
    _EXTENDED[tokenizer] = entries, copy
    return copy


def _truncate(rows: list[list[int]], length: int) -> list[list[int]]:
    """Truncate before the end token, as tokenizers do."""
    return [row if len(row) <= length else [*row[:length - 1], row[-1]] for row in rows]


def _warn_once(logged: set[str], key: str, message: str) -> None:
    """Log `message`, unless `key` or MAX_WARNINGS others are in `logged`, to which it is added."""
    if key in logged or len(logged) >= MAX_WARNINGS:
        return
    logged.add(key)
    print_log(message + (' Further ones are not logged.' if len(logged) == MAX_WARNINGS else ''), logger='current',
              level=logging.WARNING)


class _Tokenizer:
    """A tokenizer with new tokens, called as transformers' are."""

    def __init__(self, tokenizer: Any, tokens: NewTokens) -> None:
        self.tokenizer = extended(tokenizer, tokens) if tokens else tokenizer
        firsts = {token: self.tokenizer.convert_tokens_to_ids(token) for token in tokens}
        #: Id of a new token -> the ids of its vectors.
        self.ids = {firsts[token]: range(firsts[token], firsts[token] + len(vectors))
                    for token, vectors in tokens.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Sequence[str], truncation: bool = False, **_: Any) -> dict[str, list[list[int]]]:
        rows = self.tokenizer(list(texts), verbose=False).input_ids
        # Expanded here and not in the text, as diffusers does it, which misses tokens in capitals.
        rows = [[new for old in row for new in self.ids.get(old, (old,))] for row in rows]
        return {'input_ids': _truncate(rows, self.tokenizer.model_max_length) if truncation else rows}


class _Encoder:
    """A text encoder with new tokens, called with ids and an attention mask."""

    def __init__(self, encoder: Any, num_known: int, tokens: NewTokens) -> None:
        self.encoder, self.num_known, self.tokens = encoder, num_known, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        hooks = self._hook_embeddings(ids) if self.tokens else []
        try:
            return self.encoder(ids, attention_mask=attention_mask, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook_embeddings(self, ids: Tensor) -> list[Any]:
        """Embed the ids from `num_known` on as the new tokens' vectors; gradients reach these."""
        layer, vectors, num_known = self.get_input_embeddings(), torch.cat(list(self.tokens.values())), self.num_known

        def replace_rows(_layer: Any, _args: Any, out: Tensor) -> Tensor:
            # The encoder may have moved to its device after the ids were made (inference.offload).
            at = ids.to(out.device)
            new = vectors.to(out.device)[(at - num_known).clamp(min=0)].to(out.dtype)
            # A token that no prompt has gets a gradient of zeros: the graph is the same in every step.
            return torch.where((at >= num_known).unsqueeze(-1), new, out)
        return [layer.register_forward_pre_hook(lambda _layer, args: (args[0].clamp(max=num_known - 1), *args[1:])),
                layer.register_forward_hook(replace_rows)]
