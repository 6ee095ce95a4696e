"""Prompts with weights and of any length, in compel's syntax (https://github.com/damian0815/compel, MIT).

compel's parser takes brackets that it cannot interpret as text and silently drops their weight; `parse` refuses them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError

#: Nesting of brackets: compel's parser takes five times as long for each further level (0.5 s at 4, 16 s at 7).
MAX_DEPTH = 4
#: Far above any use (from 1.6 on images degrade), and far below the limit of half precision.
MAX_WEIGHT = 100
#: What the parser reads as something else than it looks like, with the fix.
_MISREAD = (
    (re.compile(r'(?<!\\)\([^()]*:\s*\d*\.?\d+\s*\)'),
     "is not a weight in compel's syntax: write (a word)1.3 for (a word:1.3), or remove the brackets"),
    (re.compile(r'(?<!\\)\)[+-]+\.?\d'),
     'has a sign before a number; a weight is 0 or more, and the sign in (a word)+ stands alone'),
    (re.compile(r'(?<!\\)\)\s*\.(?:and|add)\s*\([^()]*\)\s*\S'),
     'continues after .and(), where compel drops it; put all of it inside'),
)


def parse(prompt: str) -> Any:
    """Parse a prompt to compel's Conjunction of FlattenedPrompts and Blends, each with at least one fragment.

    Raises:
        UserError: brackets don't match, are nested too deep or would be read as text; a weight is out of range; it
            has what compel parses but ignores (LoRAs, swaps); or it is longer than `limits.compel_characters`.
    """
    if len(prompt) > (most := limits.CURRENT.compel_characters):
        raise _error(prompt, f'has {len(prompt)} characters; in compel\'s syntax at most {most} are read '
                     '(limits.compel_characters)')
    _check_brackets(prompt)
    return _parse(prompt)


@lru_cache(maxsize=256)
def _parse(prompt: str) -> Any:
    import pyparsing
    from compel.prompt_parser import Blend, Conjunction, FlattenedPrompt, Fragment, PromptParser
    try:
        conjunction = _parser().parse_conjunction(prompt)
    except (pyparsing.ParseBaseException, PromptParser.ParsingException, OverflowError) as error:
        raise _error(prompt, str(error)) from error
    if conjunction.lora_weights:
        raise _error(prompt, f"names the LoRA '{conjunction.lora_weights[0].model}'; add it to `adapters` instead")
    parts = [part for each in conjunction.prompts for part in (each.prompts if isinstance(each, Blend) else [each])]
    if any(part.wants_cross_attention_control for part in parts):
        raise _error(prompt, 'has a .swap(), which is not supported')
    literal = sum(fragment.text.count(sign) for part in parts for fragment in part.children for sign in '()')
    if literal != len(re.findall(r'\\[()]', prompt)):
        raise _error(prompt, 'has brackets that compel would read as text, without their weight: they hold a lone sign '
                     r'such as + - =, or an operator is unknown. Write brackets of the text as \( \)')
    for fragment in (fragment for part in parts for fragment in part.children if fragment.weight >= MAX_WEIGHT):
        raise _error(prompt, f"gives '{fragment.text}' the weight {fragment.weight:g}; use one below {MAX_WEIGHT}")
    for each in conjunction.prompts:
        if isinstance(each, Blend) and each.normalize_weights and not sum(each.weights):
            raise _error(prompt, f'blends with weights {each.weights}, which sum to 0')
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
    for match in re.finditer(r'\\.|[()]', prompt, re.DOTALL):
        if match[0] == '(':
            opened.append(match.start())
            if len(opened) > MAX_DEPTH:
                raise _error(prompt, f'nests brackets more than {MAX_DEPTH} deep', match.start())
        elif match[0] == ')':
            if not opened:
                raise _error(prompt, r'closes a bracket that is not opened; write one of the text as \)', match.start())
            opened.pop()
    if opened:
        raise _error(prompt, r'opens a bracket that is not closed; write one of the text as \(', opened[-1])
    for pattern, problem in _MISREAD:
        if misread := pattern.search(prompt):
            raise _error(prompt, problem, misread.start())


def _error(prompt: str, problem: str, index: int | None = None) -> UserError:
    place = '' if index is None else f" at character {index + 1} ('{prompt[index:index + 20]}')"
    return UserError(f"The prompt '{prompt[:500]}{'...' * (len(prompt) > 500)}'{place} {problem}.")


class WeightedEncoder:
    """One text encoder behind compel, set up as by `compel.CompelForSDXL`.

    A weight above 1 moves a token's embedding away from that of the empty prompt; one below 1 mixes it with the
    embedding of the prompt in which the phrase is masked. Longer texts are encoded in chunks, each with begin and end
    tokens, split after the last sentence, phrase or word that fits.

    One difference to compel: the pooled embedding is that of the plain text, not of the prompt with its brackets and
    numbers.

    Args:
        tokenizer, encoder: as transformers'; the tokenizer is called with texts and `truncation`.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        from compel import Compel, ReturnedEmbeddingsType
        self.compel = Compel(
            tokenizer=tokenizer, text_encoder=encoder, truncate_long_prompts=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED)
        self.provider = self.compel.conditioning_provider

    def unweighted(self, prompt: str) -> str | None:
        """Return the plain text of a prompt without weights that fits into one chunk, else None."""
        conjunction = parse(prompt)
        fragments = getattr(conjunction.prompts[0], 'children', [])  # a blend has none
        if conjunction.weights == [1] and len(fragments) == 1 and fragments[0].weight == 1:
            return fragments[0].text if self.num_chunks(prompt) == 1 else None
        return None

    def num_chunks(self, prompt: str) -> int:
        """Return how many chunks a prompt takes.

        Raises:
            UserError: see `parse`.
        """
        return sum(max(self._chunks_of(part) for part in getattr(each, 'prompts', [each]))
                   for each in parse(prompt).prompts)

    def states(self, prompt: str, num_chunks: int) -> Tensor:
        """Return the penultimate hidden states [1, num_chunks x limit, D], padded with the empty prompt's."""
        states = self.compel.build_conditioning_tensor_for_conjunction(parse(prompt))[0]
        missing = num_chunks - states.shape[1] // self.provider.max_token_count
        assert missing >= 0, 'num_chunks is at least that of the longest prompt'
        return torch.cat([states] + [self.provider.empty_z.to(states)] * missing, dim=1) if missing else states

    def pooled(self, prompt: str) -> Tensor:
        """Return the pooled embedding [1, P] of the plain text, truncated to one chunk; a blend's are blended."""
        conjunction = parse(prompt)
        pooled = self.provider.get_pooled_embeddings(_plain_texts(conjunction))
        blend = conjunction.prompts[0]
        if len(pooled) == 1:
            return pooled
        mixed = self.provider.apply_embedding_weights(pooled[None, :, None], blend.weights, blend.normalize_weights)
        return mixed[:, 0].to(pooled.dtype)

    def _chunks_of(self, part: Any) -> int:
        ids = self.provider.get_token_ids_and_expand_weights(
            [fragment.text for fragment in part.children], [fragment.weight for fragment in part.children], 'cpu')[0]
        return len(ids) // self.provider.max_token_count


def plain_text(prompt: str) -> str:
    """Return a prompt's text without the syntax."""
    return ' '.join(_plain_texts(parse(prompt)))


def _plain_texts(conjunction: Any) -> list[str]:
    """Return the text of each prompt of a blend, or the joined text of all others."""
    # Only a whole prompt can be a blend.
    parts = getattr(conjunction.prompts[0], 'prompts', None)
    texts = [' '.join(fragment.text for fragment in part.children) for part in parts or conjunction.prompts]
    return texts if parts else [' '.join(texts)]
