"""New words in prompts: ids and embeddings as stock's enlarged tokenizers and encoders have them, and nothing stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import stock
from torch import Tensor

from diffengine_sdxl.models.text import _token_ids, encode_prompts, taught
from diffengine_sdxl.testing import tiny_text_encoders, tiny_tokenizer

LONG = 'x ' * 73
#: The word at the start, twice, with signs and letters beside it, cut off, cut in its middle, and not at all.
PROMPTS = ['<thing> and a <two>', 'a <thing>, <thing>; x<two>y', LONG + '<thing> y', LONG + 'z <two> <thing>',
           LONG + '<two>', 'no such word', '']


def new_words(width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two words, of one vector and of three."""
    generator = torch.Generator().manual_seed(seed)
    return {word: torch.randn(num, width, generator=generator).to(dtype)
            for word, num in (('<thing>', 1), ('<two>', 3))}


def pipeline_with(base: Path, words: list[dict[str, Tensor]], **settings: Any) -> Any:
    """A stock pipeline that has loaded the words, a call for each text encoder, as its documentation says for SDXL."""
    pipeline = stock(base, **settings)
    for name, vectors in words[0].items():
        pipeline.load_textual_inversion(vectors, token=name, text_encoder=pipeline.text_encoder,
                                        tokenizer=pipeline.tokenizer)
        pipeline.load_textual_inversion(words[1][name], token=name, text_encoder=pipeline.text_encoder_2,
                                        tokenizer=pipeline.tokenizer_2)
    return pipeline


@pytest.mark.parametrize(('dtype', 'legacy'), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_embeddings_are_bitwise_stocks(tiny_base: Path, dtype: torch.dtype, legacy: bool) -> None:
    """Both encoders, several vectors, in half precision too.

    `legacy`: the configs of SDXL's encoders have eos_token_id=2, with which transformers pools at the largest id: at
    the new word, where there is one. So stock does, and so do we.
    """
    words = [new_words(), new_words(seed=1)]
    plain, pipeline = stock(tiny_base, torch_dtype=dtype), pipeline_with(tiny_base, words, torch_dtype=dtype)
    for one in (plain, pipeline):
        for module in one.text_encoder_2.modules() if legacy else ():
            if hasattr(module, 'eos_token_id'):
                module.eos_token_id = 2
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    tokenizers, encoders = (plain.tokenizer, plain.tokenizer_2), (plain.text_encoder, plain.text_encoder_2)
    with torch.no_grad():
        got = encode_prompts([PROMPTS] * 2, tokenizers, encoders, words)
        base = encode_prompts([PROMPTS] * 2, tokenizers, encoders)
        again = encode_prompts([PROMPTS] * 2, tokenizers, encoders, [{}, {}])
    assert torch.equal(got[0], text) and torch.equal(got[1], pooled) and text.dtype == dtype
    assert torch.equal(base[0], again[0]) and torch.equal(base[1], again[1])
    changed = (got[0] != base[0]).flatten(1).any(1).tolist()
    assert changed == [True, True, True, True, True, False, False]
    assert (got[1] != base[1]).any(1).tolist()[-2:] == [False, False]


def hooks_of(encoder: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules()]


def test_nothing_stays(tiny_base: Path) -> None:
    """No entry in the tokenizer, no row and no hook in the encoder; also when the encoder fails."""
    pipeline = stock(tiny_base)
    tokenizer, encoder = pipeline.tokenizer_2, pipeline.text_encoder_2
    before = (len(tokenizer), tokenizer.get_vocab(), {k: v.clone() for k, v in encoder.state_dict().items()})

    def check() -> None:
        assert (len(tokenizer), tokenizer.get_vocab()) == before[:2]
        assert encoder.state_dict().keys() == before[2].keys()
        assert all(torch.equal(v, before[2][k]) for k, v in encoder.state_dict().items())
        assert hooks_of(encoder) == hooks
    encode_prompts([PROMPTS], [tokenizer], [encoder])  # transformers leaves hooks of its own then
    hooks = hooks_of(encoder)
    encode_prompts([PROMPTS], [tokenizer], [encoder], [new_words()])
    check()
    with pytest.raises(RuntimeError):
        encode_prompts([PROMPTS], [tokenizer], [encoder], [new_words(width=31)])
    check()


def test_gradients_are_those_of_an_enlarged_embedding(tiny_base: Path) -> None:
    """In fp64, bitwise: rows of stock's embedding matrix against our vectors; a word that no prompt has: zeros."""
    words = new_words(dtype=torch.float64)
    pipeline = pipeline_with(tiny_base, [words, words], torch_dtype=torch.float64)
    encoder, known = pipeline.text_encoder_2, len(tiny_tokenizer())
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    weight = torch.randn(2, 77, 32, dtype=torch.float64)
    prompts = pipeline.maybe_convert_prompt(['a <two> and <two>', 'a <two>'], pipeline.tokenizer_2)
    (encode_prompts([prompts], [pipeline.tokenizer_2], [encoder])[0] * weight).sum().backward()
    plain = stock(tiny_base, torch_dtype=torch.float64)
    vectors = {name: value.clone().requires_grad_(True) for name, value in words.items()}
    text, _ = encode_prompts([['a <two> and <two>', 'a <two>']], [plain.tokenizer_2], [plain.text_encoder_2], [vectors])
    (text * weight).sum().backward()
    assert torch.equal(torch.cat([v.grad for v in vectors.values()]), table.grad[known:])
    assert not vectors['<thing>'].grad.any() and vectors['<two>'].grad.abs().min() > 0


def test_ids_in_any_case_of_letters() -> None:
    """CLIP's tokenizers read in lower case, so each vector of <Two> follows <TWO> too, which stock overlooks."""
    tokenizer = tiny_tokenizer()
    words = {'<Two>': torch.zeros(2, 4), '<x>': torch.zeros(1, 4)}
    rows = _token_ids(tokenizer, ['a <two>', 'a <TWO>', 'a <Two> <X>', 'a <two>_1'], words)
    assert rows.shape == (4, 77)
    end = tokenizer.eos_token_id
    a, = tokenizer('a', add_special_tokens=False).input_ids
    assert [row[1:6].tolist() for row in rows] == [
        [a, 514, 515, end, end], [a, 514, 515, end, end], [a, 514, 515, 516, end], [a, 515, end, end, end]]


def test_padding_of_the_second_tokenizer() -> None:
    """SDXL's second tokenizer pads with '!', id 0; a prompt that is cut keeps its end token."""
    tokenizer = tiny_tokenizer(pad_token='!')
    words = {'<thing>': torch.zeros(3, 4)}
    short, cut = _token_ids(tokenizer, ['<thing>', LONG + '<thing>'], words).tolist()
    assert short == [512, 514, 515, 516, 513] + [0] * 72
    assert cut[0] == 512 and cut[-3:] == [514, 515, 513] and len(cut) == 77
    plain = _token_ids(tokenizer, ['abc', LONG * 2], {})
    assert torch.equal(_token_ids(tokenizer, ['abc', LONG * 2], words), plain)


def test_copies_of_tokenizers_are_kept() -> None:
    """As long as the words are the same, in the same order and number."""
    tokenizer, words = tiny_tokenizer(), new_words()
    copy = taught(tokenizer, words)
    assert taught(tokenizer, new_words(seed=3)) is copy and copy is not tokenizer
    turned = dict(reversed(words.items()))
    assert taught(tokenizer, turned).convert_tokens_to_ids(['<two>', '<two>_1', '<two>_2', '<thing>']) == [
        514, 515, 516, 517]
    encoder = tiny_text_encoders()[1].requires_grad_(False).eval()
    results = [encode_prompts([PROMPTS], [tokenizer], [encoder], [w])[0] for w in (words, turned, words)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    del words['<two>']
    assert len(taught(tokenizer, words)) == 515


@pytest.mark.parametrize(('words', 'sentence'), [
    ({'x': 1}, "'x' is a token of the tokenizer"), ({'<|endoftext|>': 1}, 'is a token of the tokenizer'),
    ({'<a>': 1, '<A>': 1}, "'<a>' comes twice"), ({'<a>': 2, '<a>_1': 1}, "'<a>_1' comes twice")])
def test_words_that_are_taken(words: dict[str, int], sentence: str) -> None:
    """By the tokenizer, by another word, or by the further vectors of another word."""
    with pytest.raises(ValueError, match=sentence.replace('|', r'\|')):
        taught(tiny_tokenizer(), {word: torch.zeros(num, 4) for word, num in words.items()})
