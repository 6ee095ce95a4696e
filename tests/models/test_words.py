"""New tokens in prompts: ids and embeddings as diffusers', and tokenizers and encoders stay unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import stock
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.text_encoders import NewTokens, TextEncoder, encode_prompts, extended
from diffengine_sdxl.testing import tiny_text_encoders, tiny_tokenizer

LONG = 'x ' * 73
#: The token at the start, twice, beside other characters, truncated before it and within it, and not at all.
PROMPTS = ['<thing> and a <two>', 'a <thing>, <thing>; x<two>y', LONG + '<thing> y', LONG + 'z <two> <thing>',
           LONG + '<two>', 'no such word', '']


def new_tokens(width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two tokens, of one vector and of three."""
    generator = torch.Generator().manual_seed(seed)
    return {token: torch.randn(num, width, generator=generator).to(dtype)
            for token, num in (('<thing>', 1), ('<two>', 3))}


def pipeline_with(base: Path, tokens: list[dict[str, Tensor]], **settings: Any) -> Any:
    """A diffusers pipeline that has loaded the tokens, a call for each text encoder, as documented for SDXL."""
    pipeline = stock(base, **settings)
    for name, vectors in tokens[0].items():
        pipeline.load_textual_inversion(vectors, token=name, text_encoder=pipeline.text_encoder,
                                        tokenizer=pipeline.tokenizer)
        pipeline.load_textual_inversion(tokens[1][name], token=name, text_encoder=pipeline.text_encoder_2,
                                        tokenizer=pipeline.tokenizer_2)
    return pipeline


def embed(prompts: list[str], tokenizer: Any, encoder: Any, tokens: NewTokens | None = None) -> tuple[Tensor, Tensor]:
    """`encode_prompts` by one text encoder."""
    return encode_prompts([prompts], [TextEncoder(tokenizer, encoder, tokens or {})])


def token_ids(tokenizer: Any, prompts: list[str], tokens: NewTokens) -> Tensor:
    return TextEncoder(tokenizer, None, tokens).token_ids(prompts)[0]


@pytest.mark.parametrize(('dtype', 'legacy'), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_embeddings_are_bitwise_those_of_diffusers(tiny_base: Path, dtype: torch.dtype, legacy: bool) -> None:
    """Both encoders, several vectors, in half precision too.

    `legacy`: the configs of SDXL's encoders have eos_token_id=2, for which transformers pools at the largest id: that
    of a new token, if there is one.
    """
    tokens = [new_tokens(), new_tokens(seed=1)]
    plain, pipeline = stock(tiny_base, torch_dtype=dtype), pipeline_with(tiny_base, tokens, torch_dtype=dtype)
    for one in (plain, pipeline):
        for module in one.text_encoder_2.modules() if legacy else ():
            if hasattr(module, 'eos_token_id'):
                module.eos_token_id = 2
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    got, base = (encode_prompts([PROMPTS] * 2, [TextEncoder(plain.tokenizer, plain.text_encoder, first),
                                                TextEncoder(plain.tokenizer_2, plain.text_encoder_2, second)])
                 for first, second in (tokens, ({}, {})))
    assert torch.equal(got[0], text) and torch.equal(got[1], pooled) and text.dtype == dtype
    changed = (got[0] != base[0]).flatten(1).any(1).tolist()
    assert changed == [True, True, True, True, True, False, False]
    assert (got[1] != base[1]).any(1).tolist()[-2:] == [False, False]


def hooks_of(encoder: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules()]


def test_tokenizer_and_encoder_stay_unchanged(tiny_base: Path) -> None:
    """No entry in the tokenizer, no row and no hook in the encoder; also after an error in the encoder."""
    pipeline = stock(tiny_base)
    tokenizer, encoder = pipeline.tokenizer_2, pipeline.text_encoder_2
    before = (len(tokenizer), tokenizer.get_vocab(), {k: v.clone() for k, v in encoder.state_dict().items()})

    def check() -> None:
        assert (len(tokenizer), tokenizer.get_vocab()) == before[:2]
        assert encoder.state_dict().keys() == before[2].keys()
        assert all(torch.equal(v, before[2][k]) for k, v in encoder.state_dict().items())
        assert hooks_of(encoder) == hooks
    embed(PROMPTS, tokenizer, encoder)  # transformers registers its own hooks
    hooks = hooks_of(encoder)
    embed(PROMPTS, tokenizer, encoder, new_tokens())
    check()
    with pytest.raises(RuntimeError):
        embed(PROMPTS, tokenizer, encoder, new_tokens(width=31))
    check()


def test_gradients_are_those_of_an_enlarged_embedding(tiny_base: Path) -> None:
    """In fp64, bitwise: rows of the enlarged embedding matrix and our vectors; zeros for a token that no prompt has."""
    tokens = new_tokens(dtype=torch.float64)
    pipeline = pipeline_with(tiny_base, [tokens, tokens], torch_dtype=torch.float64)
    encoder, known = pipeline.text_encoder_2, len(tiny_tokenizer())
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    weight = torch.randn(2, 77, 32, dtype=torch.float64)
    prompts = pipeline.maybe_convert_prompt(['a <two> and <two>', 'a <two>'], pipeline.tokenizer_2)
    (embed(prompts, pipeline.tokenizer_2, encoder)[0] * weight).sum().backward()
    plain = stock(tiny_base, torch_dtype=torch.float64)
    vectors = {name: value.clone().requires_grad_(True) for name, value in tokens.items()}
    text, _ = embed(['a <two> and <two>', 'a <two>'], plain.tokenizer_2, plain.text_encoder_2, vectors)
    (text * weight).sum().backward()
    assert torch.equal(torch.cat([v.grad for v in vectors.values()]), table.grad[known:])
    assert not vectors['<thing>'].grad.any() and vectors['<two>'].grad.abs().min() > 0


def test_tokens_are_case_insensitive() -> None:
    """CLIP's tokenizers lower all text, so <TWO> is all vectors of <Two>; diffusers takes the first one only."""
    tokenizer = tiny_tokenizer()
    tokens = {'<Two>': torch.zeros(2, 4), '<x>': torch.zeros(1, 4)}
    rows = token_ids(tokenizer, ['a <two>', 'a <TWO>', 'a <Two> <X>', 'a <two>_1'], tokens)
    assert rows.shape == (4, 77)
    end = tokenizer.eos_token_id
    a, = tokenizer('a', add_special_tokens=False).input_ids
    assert [row[1:6].tolist() for row in rows] == [
        [a, 514, 515, end, end], [a, 514, 515, end, end], [a, 514, 515, 516, end], [a, 515, end, end, end]]


def test_padding_of_the_second_tokenizer() -> None:
    """SDXL's second tokenizer pads with '!', id 0; a truncated prompt keeps its end token."""
    tokenizer = tiny_tokenizer(pad_token='!')
    tokens = {'<thing>': torch.zeros(3, 4)}
    short, cut = token_ids(tokenizer, ['<thing>', LONG + '<thing>'], tokens).tolist()
    assert short == [512, 514, 515, 516, 513] + [0] * 72
    assert cut[0] == 512 and cut[-3:] == [514, 515, 513] and len(cut) == 77
    plain = token_ids(tokenizer, ['abc', LONG * 2], {})
    assert torch.equal(token_ids(tokenizer, ['abc', LONG * 2], tokens), plain)


def test_extended_tokenizers_are_cached() -> None:
    """While the tokens, their order and their numbers of vectors are the same."""
    tokenizer, tokens = tiny_tokenizer(), new_tokens()
    copy = extended(tokenizer, tokens)
    assert extended(tokenizer, new_tokens(seed=3)) is copy and copy is not tokenizer
    turned = dict(reversed(tokens.items()))
    assert extended(tokenizer, turned).convert_tokens_to_ids(['<two>', '<two>_1', '<two>_2', '<thing>']) == [
        514, 515, 516, 517]
    encoder = tiny_text_encoders()[1].requires_grad_(False).eval()
    results = [embed(PROMPTS, tokenizer, encoder, t)[0] for t in (tokens, turned, tokens)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    del tokens['<two>']
    assert len(extended(tokenizer, tokens)) == 515


@pytest.mark.parametrize(('tokens', 'message'), [
    ({'x': 1}, "'x' is in the tokenizer's vocabulary"), ({'<|endoftext|>': 1}, "is in the tokenizer's vocabulary"),
    ({'<a>': 1, '<A>': 1}, "'<a>' is added twice"), ({'<a>': 2, '<a>_1': 1}, "'<a>_1' is added twice")])
def test_duplicate_tokens(tokens: dict[str, int], message: str) -> None:
    """Of the tokenizer, of another token, or of the further vectors of another token."""
    with pytest.raises(UserError, match=message):
        extended(tiny_tokenizer(), {token: torch.zeros(num, 4) for token, num in tokens.items()})
