"""Prompts to embeddings, through one or both of SDXL's text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffengine_sdxl.structures import Batch, where

ENCODERS = ('text_encoder', 'text_encoder_2')
#: New words for one text encoder: word -> its vectors [n, D].
Words = Mapping[str, Tensor]
#: A tokenizer -> the entries that were last asked of it, and its copy that has them. At SDXL's size a copy takes 0.2 s.
_TAUGHT: WeakKeyDictionary[Any, tuple[list[str], Any]] = WeakKeyDictionary()


def encode_prompts(prompts: Sequence[Sequence[str]], tokenizers: Sequence[Any],
                   encoders: Sequence[Any], words: Sequence[Words] = ()) -> tuple[Tensor, Tensor]:
    """Embed one batch of prompts.

    Each encoder gives its penultimate hidden state; they are put side by side. The pooled embedding is the last
    encoder's projected one (Podell et al. 2023, SDXL, section 2.1; as diffusers' `encode_prompt`). Prompts longer
    than 77 tokens are cut.

    Args:
        prompts: one list of B prompts for each encoder.
        tokenizers, encoders: in the order in which their outputs are put together.
        words: new ones for each encoder; neither it nor its tokenizer keeps anything of them.

    Returns:
        text [B, 77, sum of widths], pooled [B, P], both in the encoders' dtype.

    Raises:
        ValueError: a tokenizer has a new word already.
    """
    states, pooled = [], None
    for texts, tokenizer, encoder, new in zip(prompts, tokenizers, encoders, words or [{}] * len(prompts), strict=True):
        ids = _token_ids(tokenizer, texts, new).to(encoder.device)
        with _new_words(encoder, ids, len(tokenizer), new):
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None and pooled.dim() == 2, 'the last text encoder has a projection'
    return torch.cat(states, dim=-1), pooled


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
    length = tokenizer.model_max_length
    if not words:
        ids: Tensor = tokenizer(list(texts), padding='max_length', max_length=length, truncation=True,
                                return_tensors='pt').input_ids
        return ids
    copy = taught(tokenizer, words)
    spelled = {}
    for word, vectors in words.items():
        first = copy.convert_tokens_to_ids(word)
        spelled[first] = range(first, first + len(vectors))
    # Spelled out here and not in the text, as diffusers does it, which misses words in capitals.
    read = copy(list(texts), verbose=False).input_ids
    rows = [[new for old in row for new in spelled.get(old, (old,))] for row in read]
    # What is cut is what stands before the end token, as tokenizers do it.
    rows = [row if len(row) <= length else [*row[:length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


@contextmanager
def _new_words(encoder: Any, ids: Tensor, num_known: int, words: Words) -> Iterator[None]:
    """Inside, the embeddings of ids [B, S] from `num_known` on are those of new words; gradients reach these."""
    if not words:
        yield
        return
    layer, vectors = encoder.get_input_embeddings(), torch.cat(list(words.values()))
    is_new = (ids >= num_known).unsqueeze(-1)
    handles = [
        layer.register_forward_pre_hook(lambda _layer, args: (args[0].clamp(max=num_known - 1), *args[1:])),
        # A word that no prompt has gets a gradient of zeros: the graph is the same in every step.
        layer.register_forward_hook(lambda _layer, _args, out: torch.where(
            is_new, vectors[(ids - num_known).clamp(min=0)].to(out.dtype), out))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Prompts:
    """The half of SDXL that owns the text encoders; mixed into it."""

    #: Set when all is attached: whether gradients pass through the encoders, and whether weights of another dtype than
    #: theirs compute in them.
    text_trains = text_mixed = False
    #: Whether an adapter changes what they make of a prompt.
    text_changed = False

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

    def _prompts(self: Any, first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
        # The base alone computes as it does without an adapter's fp32 weights in it.
        own = any(part in self.trainable_parts for part in ENCODERS)
        mixed = own if self.alone else self.text_mixed
        words: Sequence[Words] = ({}, {}) if self.alone else self.words()
        used = [i for i, part in enumerate(ENCODERS) if getattr(self, part) is not None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_trains), self._autocast(mixed):
            return encode_prompts([(first, second)[i] for i in used],
                                  [(self.tokenizer, self.tokenizer_2)[i] for i in used],
                                  [getattr(self, ENCODERS[i]) for i in used], [words[i] for i in used])
