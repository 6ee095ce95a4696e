"""Prompts with weights and of any length, as compel reads them (https://github.com/damian0815/compel, MIT).

compel's parser is lenient: a bracket that it makes nothing of is a letter to it, and what stood in it loses its weight
without a word. `parse` refuses what would be lost.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: How prompts may be written: Batch.syntax.
SYNTAXES = ('plain', 'compel')
#: Brackets in brackets: compel's parser takes five times as long for each further level (0.5 s at 4, 16 s at 7).
MAX_DEPTH = 4
#: Far above any use (from 1.6 on pictures suffer), and far below what half precision holds.
MAX_WEIGHT = 100
#: What the parser reads as something else than it looks like, and what to do.
_MISREAD = (
    (re.compile(r'(?<!\\)\([^()]*:\s*\d*\.?\d+\s*\)'),
     "is no weight in compel's syntax: write (a word)1.3 for (a word:1.3), or leave out the brackets"),
    (re.compile(r'(?<!\\)\)[+-]+\.?\d'),
     'has a sign before a number; weights are 0 or more, and (a word)+ or (a word)- stands alone'),
    (re.compile(r'(?<!\\)\)\s*\.(?:and|add)\s*\([^()]*\)\s*\S'),
     'goes on after .and(), and compel drops the rest; put all of it inside'),
)


def parse(prompt: str) -> Any:
    """A prompt in compel's syntax -> compel's Conjunction of FlattenedPrompts and Blends, each with some text or ''.

    Raises:
        ValueError: brackets that don't match, are nested too deep or mean nothing to compel; a signed weight; words
            about LoRAs and swaps, which compel reads and does nothing with. The sentence has the prompt and the place.
    """
    _check_brackets(prompt)
    return _parse(prompt)


@lru_cache(maxsize=256)
def _parse(prompt: str) -> Any:
    import pyparsing
    from compel.prompt_parser import Blend, Conjunction, FlattenedPrompt, Fragment, PromptParser
    try:
        conjunction = _parser().parse_conjunction(prompt)
    except (pyparsing.ParseBaseException, PromptParser.ParsingException, OverflowError) as error:
        raise _refusal(prompt, str(error)) from error
    if conjunction.lora_weights:
        raise _refusal(prompt, "asks for the LoRA '" + conjunction.lora_weights[0].model + "'; name it among the "
                       'adapters instead')
    parts = [part for each in conjunction.prompts for part in (each.prompts if isinstance(each, Blend) else [each])]
    if any(part.wants_cross_attention_control for part in parts):
        raise _refusal(prompt, 'has a .swap(), which is a matter of sampling and not done here')
    literal = sum(fragment.text.count(sign) for part in parts for fragment in part.children for sign in '()')
    if literal != len(re.findall(r'\\[()]', prompt)):
        raise _refusal(prompt, 'has brackets that compel would read as letters, without their weight: a sign such as '
                       r'+ - = stands alone in them, or an operator is unknown. For brackets as letters write \( \)')
    for fragment in (fragment for part in parts for fragment in part.children if fragment.weight >= MAX_WEIGHT):
        raise _refusal(prompt, f"gives '{fragment.text}' the weight {fragment.weight:g}; take one below {MAX_WEIGHT}")
    for each in conjunction.prompts:
        if isinstance(each, Blend) and each.normalize_weights and not sum(each.weights):
            raise _refusal(prompt, f'blends with weights {each.weights}, which sum to 0')
    for part in parts:
        # compel fails at an empty fragment of a weight below 1.
        part.children = [fragment for fragment in part.children if fragment.text.strip()] or [Fragment('')]
    return conjunction if conjunction.prompts else Conjunction([FlattenedPrompt([Fragment('')])])


@lru_cache(maxsize=1)
def _parser() -> Any:
    from compel.prompt_parser import PromptParser
    return PromptParser()


def _check_brackets(prompt: str) -> None:
    opened: list[int] = []
    for found in re.finditer(r'\\.|[()]', prompt, re.DOTALL):
        if found[0] == '(':
            opened.append(found.start())
            if len(opened) > MAX_DEPTH:
                raise _refusal(prompt, f'has brackets more than {MAX_DEPTH} deep', found.start())
        elif found[0] == ')':
            if not opened:
                raise _refusal(prompt, r'closes a bracket that was not opened; for one as a letter write \)',
                               found.start())
            opened.pop()
    if opened:
        raise _refusal(prompt, r'opens a bracket that is not closed; for one as a letter write \(', opened[-1])
    for pattern, said in _MISREAD:
        if found_one := pattern.search(prompt):
            raise _refusal(prompt, said, found_one.start())


def _refusal(prompt: str, said: str, index: int | None = None) -> ValueError:
    place = '' if index is None else f" at character {index + 1} ('{prompt[index:index + 20]}')"
    return ValueError(f"The prompt '{prompt}'{place} {said}.")


class WeightedEncoder:
    """One text encoder behind compel, as `compel.CompelForSDXL` sets it up.

    A weight above 1 takes a token's embedding away from that of the empty prompt; one below 1 mixes it with the
    embedding of the prompt in which the phrase is masked. Texts of more tokens than the tokenizer's limit are read in
    chunks, each with begin and end tokens, cut after the last sentence, phrase or word that fits.

    The one departure: the pooled embedding is that of the words. compel's is that of the prompt as it was typed, with
    brackets and numbers in it; the two are the same where nothing of the syntax is used.

    Args:
        tokenizer: called with texts and `truncation`, gives {'input_ids': rows with begin and end tokens}; the rest as
            transformers' tokenizers.
        encoder: a CLIP text model, or what is called like one.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        from compel import Compel, ReturnedEmbeddingsType
        self.compel = Compel(
            tokenizer=tokenizer, text_encoder=encoder, truncate_long_prompts=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED)
        self.provider = self.compel.conditioning_provider

    def as_plain(self, prompt: str) -> str | None:
        """The words of a prompt that no weight changes and that fits into one chunk; else None."""
        conjunction = parse(prompt)
        fragments = getattr(conjunction.prompts[0], 'children', [])  # a blend has none
        if conjunction.weights == [1] and len(fragments) == 1 and fragments[0].weight == 1:
            return fragments[0].text if self.num_chunks(prompt) == 1 else None
        return None

    def num_chunks(self, prompt: str) -> int:
        """Chunks that a prompt takes up.

        Raises:
            ValueError: see `parse`.
        """
        return sum(max(self._chunks_of(part) for part in getattr(each, 'prompts', [each]))
                   for each in parse(prompt).prompts)

    def states(self, prompt: str, num_chunks: int) -> Tensor:
        """Penultimate hidden states [1, num_chunks x limit, D]; the empty prompt's fill up what is missing."""
        states = self.compel.build_conditioning_tensor_for_conjunction(parse(prompt))[0]
        missing = num_chunks - states.shape[1] // self.provider.max_token_count
        assert missing >= 0, 'the caller asks for as many as the longest takes'
        return torch.cat([states] + [self.provider.empty_z.to(states)] * missing, dim=1) if missing else states

    def pooled(self, prompt: str) -> Tensor:
        """The pooled embedding [1, P] of the words, unweighted, as many as fit into one chunk; a blend is blended."""
        conjunction = parse(prompt)
        each = self.provider.get_pooled_embeddings(_words(conjunction))
        blend = conjunction.prompts[0]
        if len(each) == 1:
            return each
        mixed = self.provider.apply_embedding_weights(each[None, :, None], blend.weights, blend.normalize_weights)
        return mixed[:, 0].to(each.dtype)

    def _chunks_of(self, part: Any) -> int:
        ids = self.provider.get_token_ids_and_expand_weights(
            [fragment.text for fragment in part.children], [fragment.weight for fragment in part.children], 'cpu')[0]
        return len(ids) // self.provider.max_token_count


def words_of(prompt: str) -> str:
    """A prompt's text without the syntax."""
    return ' '.join(_words(parse(prompt)))


def _words(conjunction: Any) -> list[str]:
    """The text of each prompt of a blend, or the one text of all that are concatenated."""
    # Only a whole prompt can be a blend.
    parts = getattr(conjunction.prompts[0], 'prompts', None)
    texts = [' '.join(fragment.text for fragment in part.children) for part in parts or conjunction.prompts]
    return texts if parts else [' '.join(texts)]
