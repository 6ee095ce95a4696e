"""Prompts to embeddings, through one or both of SDXL's text encoders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import Tensor

from diffengine_sdxl.models.weighting import WeightedEncoder, words_of

ENCODERS = ('text_encoder', 'text_encoder_2')
#: New words for one text encoder: word -> its vectors [n, D].
Words = Mapping[str, Tensor]
#: A tokenizer -> the entries that were last asked of it, and its copy that has them. At SDXL's size a copy takes 0.2 s.
_TAUGHT: WeakKeyDictionary[Any, tuple[list[str], Any]] = WeakKeyDictionary()
#: What was cut off of prompts and has been warned of; MAX_CUT of them, as captions may all be long.
_CUT: set[str] = set()
MAX_CUT = 10


def encode_prompts(prompts: Sequence[Sequence[str]], tokenizers: Sequence[Any],
                   encoders: Sequence[Any], words: Sequence[Words] = (), clip_skip: int | None = None
                   ) -> tuple[Tensor, Tensor]:
    """Embed one batch of prompts.

    Each encoder gives its penultimate hidden state; they are put side by side. The pooled embedding is the last
    encoder's projected one (Podell et al. 2023, SDXL, section 2.1; as diffusers' `encode_prompt`). Prompts longer
    than 77 tokens are cut, with a warning.

    Args:
        prompts: one list of B prompts for each encoder.
        tokenizers, encoders: in the order in which their outputs are put together.
        words: new ones for each encoder; neither it nor its tokenizer keeps anything of them.
        clip_skip: further layers to skip, from the penultimate hidden state on; None for none.

    Returns:
        text [B, 77, sum of widths], pooled [B, P], both in the encoders' dtype.

    Raises:
        ValueError: a tokenizer has a new word already.
    """
    states, pooled = [], None
    for texts, tokenizer, encoder, new in zip(prompts, tokenizers, encoders, words or [{}] * len(prompts), strict=True):
        ids = _token_ids(tokenizer, texts, new).to(encoder.device)
        output = _Encoder(encoder, len(tokenizer), new)(ids, output_hidden_states=True)
        states.append(output.hidden_states[-(clip_skip or 0) - 2])
        pooled = output[0]
    assert pooled is not None and pooled.dim() == 2, 'the last text encoder has a projection'
    return torch.cat(states, dim=-1), pooled


def encode_weighted(num_chunks: int, prompts: Sequence[Sequence[str]], tokenizers: Sequence[Any],
                    encoders: Sequence[Any], words: Sequence[Words]) -> tuple[Tensor, Tensor]:
    """Embed one batch of prompts in compel's syntax, one by one; as `encode_prompts` if none has a weight or is long.

    Args:
        num_chunks: that each prompt is filled up to; at least as many as the longest has.
        prompts, tokenizers, encoders, words: as for `encode_prompts`.

    Returns:
        text [B, 77 num_chunks, sum of widths], pooled [B, P].

    Raises:
        ValueError: a prompt is written wrongly, or tears a new word apart; a tokenizer has a new word already.
    """
    weighted = weighted_encoders(tokenizers, encoders, words)
    for texts, new in zip(prompts, words, strict=True):
        for text in texts:
            _check_words(text, new)
    if num_chunks == 1:
        plain = [[found for text in texts if (found := encoder.as_plain(text)) is not None]
                 for texts, encoder in zip(prompts, weighted, strict=True)]
        if all(len(texts) == len(prompts[0]) for texts in plain):
            return encode_prompts(plain, tokenizers, encoders, words)
    # Prompts come again, negative ones mostly: each is read once.
    states = [{text: encoder.states(text, num_chunks) for text in dict.fromkeys(texts)}
              for texts, encoder in zip(prompts, weighted, strict=True)]
    pooled = {text: weighted[-1].pooled(text) for text in dict.fromkeys(prompts[-1])}
    return (torch.cat([torch.cat([read[text] for text in texts]) for texts, read in zip(prompts, states, strict=True)],
                      dim=-1),
            torch.cat([pooled[text] for text in prompts[-1]]))


def _check_words(prompt: str, words: Words) -> None:
    """Refuse a prompt whose new words compel's syntax takes to pieces."""
    for word in words:
        if prompt.lower().count(word.lower()) != words_of(prompt).lower().count(word.lower()):
            raise ValueError(f"In the prompt '{prompt}' compel's syntax tears the new word '{word}' apart; give it a "
                             "token of letters, digits, '_', '-', '<' and '>'.")


def weighted_encoders(tokenizers: Sequence[Any], encoders: Sequence[Any], words: Sequence[Words]
                      ) -> list[WeightedEncoder]:
    """The text encoders behind compel, with new words."""
    return [WeightedEncoder(_Reader(tokenizer, new), _Encoder(encoder, len(tokenizer), new))
            for tokenizer, encoder, new in zip(tokenizers, encoders, words, strict=True)]


def taught(tokenizer: Any, words: Words) -> Any:
    """A copy of `tokenizer` that has new words, an entry for each vector: word, word_1, ..., as diffusers names them.

    Raises:
        ValueError: it has one of them already, or two words want the same.
    """
    entries = [entry for word, vectors in words.items() for entry in _entries(word, len(vectors))]
    if tokenizer in _TAUGHT and _TAUGHT[tokenizer][0] == entries:
        return _TAUGHT[tokenizer][1]
    known = tokenizer.get_vocab()
    for entry in entries:
        # CLIP's tokenizers read all in lower case.
        twice = [e.lower() for e in entries].count(entry.lower()) > 1
        if twice or entry in known or len(tokenizer.tokenize(entry)) == 1:
            raise ValueError(f"The new word '{entry}' " + ('comes twice' if twice else 'is a token of the tokenizer') +
                             "; take another, such as '<my-thing>'.")
    copy = deepcopy(tokenizer)
    copy.add_tokens(entries)
    assert copy.convert_tokens_to_ids(entries) == list(range(len(tokenizer), len(tokenizer) + len(entries)))
    _TAUGHT[tokenizer] = entries, copy
    return copy


def _entries(word: str, num: int) -> list[str]:
    return [word, *(f'{word}_{i}' for i in range(1, num))]


def _token_ids(tokenizer: Any, texts: Sequence[str], words: Words) -> Tensor:
    """[B, 77]. New words have ids from `len(tokenizer)` on, one for each vector, in order."""
    length, reader = tokenizer.model_max_length, _Reader(tokenizer, words)
    rows = reader(texts)['input_ids']
    for row in rows:
        if len(row) > length:
            _warn_of_cut(reader.decode(row[length - 1:-1]), length)
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in _cut(rows, length)])


def _cut(rows: list[list[int]], length: int) -> list[list[int]]:
    """What is cut is what stands before the end token, as tokenizers do it."""
    return [row if len(row) <= length else [*row[:length - 1], row[-1]] for row in rows]


def _warn_of_cut(lost: str, length: int) -> None:
    if lost in _CUT or len(_CUT) >= MAX_CUT:
        return
    _CUT.add(lost)
    print_log(f"A prompt is longer than {length} tokens, so this end of it is not read: '{lost}'. With syntax='compel' "
              'all of it is.' + (' Further ones will not be named.' if len(_CUT) == MAX_CUT else ''),
              logger='current', level=logging.WARNING)


class _Reader:
    """A tokenizer with new words, called as transformers' are. As a type of its own it reads prompts in one way."""

    def __init__(self, tokenizer: Any, words: Words) -> None:
        self.tokenizer = taught(tokenizer, words) if words else tokenizer
        self.spelled = {}
        for word, vectors in words.items():
            first = self.tokenizer.convert_tokens_to_ids(word)
            self.spelled[first] = range(first, first + len(vectors))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Sequence[str], truncation: bool = False, **_: Any) -> dict[str, list[list[int]]]:
        read = self.tokenizer(list(texts), verbose=False).input_ids
        # Spelled out here and not in the text, as diffusers does it, which misses words in capitals.
        rows = [[new for old in row for new in self.spelled.get(old, (old,))] for row in read]
        return {'input_ids': _cut(rows, self.tokenizer.model_max_length) if truncation else rows}


class _Encoder:
    """A text encoder that knows new words, for as long as a call takes; called with ids and an attention mask."""

    def __init__(self, encoder: Any, num_known: int, words: Words) -> None:
        self.encoder, self.num_known, self.words = encoder, num_known, words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        with _new_words(self.encoder, ids, self.num_known, self.words):
            return self.encoder(ids, attention_mask=attention_mask, **kwargs)


@contextmanager
def _new_words(encoder: Any, ids: Tensor, num_known: int, words: Words) -> Iterator[None]:
    """Inside, the embeddings of ids [B, S] from `num_known` on are those of new words; gradients reach these."""
    if not words:
        yield
        return
    layer, vectors = encoder.get_input_embeddings(), torch.cat(list(words.values()))

    def spoken(_layer: Any, _args: Any, out: Tensor) -> Tensor:
        # The encoder may have come to its device after the ids were made (engine.inference.placing).
        at = ids.to(out.device)
        new = vectors.to(out.device)[(at - num_known).clamp(min=0)].to(out.dtype)
        # A word that no prompt has gets a gradient of zeros: the graph is the same in every step.
        return torch.where((at >= num_known).unsqueeze(-1), new, out)
    handles = [layer.register_forward_pre_hook(lambda _layer, args: (args[0].clamp(max=num_known - 1), *args[1:])),
               layer.register_forward_hook(spoken)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def num_chunks(model: Any, request: Any) -> int:
    """Chunks of 77 tokens that the longest of one picture's prompts takes up; pictures of one batch must have as many.

    Args:
        model: an SDXL.
        request: has `prompt`, `prompt_2`, `negative_prompt`, `negative_prompt_2` and `syntax`.

    Raises:
        ValueError: a prompt is written wrongly.
    """
    if request.syntax == 'plain':
        return 1
    return longest(model, request.prompt, request.prompt_2, request.negative_prompt, request.negative_prompt_2)


def longest(model: Any, text: str, text_2: str | None, negative: str | None, negative_2: str | None) -> int:
    """Chunks of the longest of these prompts; as `num_chunks`, whatever the syntax is said to be."""
    pairs = [(text, text if text_2 is None else text_2)]
    if negative is not None or negative_2 is not None:
        first = negative or ''
        pairs.append((first, first if negative_2 is None else negative_2))
    return max(encoder.num_chunks(pair[i]) for i, encoder in enumerate(weighted_encoders(*model._readers()))
               for pair in pairs)
