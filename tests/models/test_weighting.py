"""Prompts in compel's syntax: bitwise what compel makes of them, and refused where it loses something in silence."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compel import Compel, CompelForSDXL, DiffusersTextualInversionManager, ReturnedEmbeddingsType
from kinds import lora, shaken
from parity import generators, make_batch, picture_batch, sampler, stock
from test_words import new_words, pipeline_with

from diffengine_sdxl.models import text as text_module
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.models.text import num_chunks
from diffengine_sdxl.testing import write_tiny_refiner

#: Of letters, which are a token each: sentences that end within a chunk, one that doesn't, and a weight across an edge.
LONG = 'a red circle on blue paper. ' * 4 + 'x' * 160 + ' and (gold, ' + 'y ' * 60 + ')1.4 end'
#: Prompt -> its words without the syntax.
PROMPTS = {
    'a red circle': 'a red circle', '': '', '()': '', '""0.5 b': 'b', '(a red)1.4': 'a red', '(a red)0.5': 'a red',
    'a red++ circle': 'a red circle',
    'a (red circle)1.3, x-': 'a red circle , x', '(red)0 circle': 'red circle', '()0.5 b': 'b',
    'a ((very)1.5 red)0.4 b': 'a very red b', '"a red" circle.attend(1.5)': 'a red circle',
    r'a \(red\)++ circle': 'a (red) circle', 'one,two (b c)1.5 b c (b)0.5': 'one, two b c b c b',
    '("a red", "blue++").and()': 'a red blue', 'Ünïcode++ 東京 🦀-': 'Ünïcode 東京 🦀',
    'o' * 300: 'o' * 300, 'a b ' * 150: 'a b ' * 150,
    LONG: LONG.replace('(gold', 'gold').replace(')1.4', ''),
}
#: At which compel fails -> what they are the same as.
NOTHING = {'()': '', '""0.5 b': 'b'}


def compel(parts: Any, *prompts: Any) -> Any:
    """compel's own way for SDXL; `parts`: what has its text encoders and tokenizers."""
    with torch.no_grad():
        return CompelForSDXL(parts)(*prompts)


@pytest.mark.parametrize('prompt', PROMPTS, ids=lambda prompt: prompt[:24])
def test_text_is_compels(model: SDXL, pipeline: Any, prompt: str) -> None:
    """Bitwise. The pooled embedding is stock's of the words: compel's own is that of the brackets and numbers too."""
    got = model.encode(make_batch(1, text=[prompt], syntax='compel'))
    expected = compel(pipeline, NOTHING.get(prompt, prompt))
    assert torch.equal(got.text, expected.embeds)
    pooled = pipeline.encode_prompt(PROMPTS[prompt], do_classifier_free_guidance=False)[2]
    assert torch.equal(got.pooled, pooled)
    if PROMPTS[prompt] == prompt:
        assert torch.equal(got.pooled, expected.pooled_embeds)


def test_a_blend(model: SDXL, pipeline: Any) -> None:
    """Its pooled embedding is blended as its text is."""
    got = model.encode(make_batch(1, text=['("a red", "blue circle++").blend(3, 1)'], syntax='compel'))
    assert torch.equal(got.text, compel(pipeline, '("a red", "blue circle++").blend(3, 1)').embeds)
    pooled = pipeline.encode_prompt(['a red', 'blue circle'], do_classifier_free_guidance=False)[2]
    assert torch.allclose(got.pooled, pooled[:1] * 0.75 + pooled[1:] * 0.25, atol=1e-6)  # another order of sums


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_in_other_precisions(tiny_base: Path, dtype: torch.dtype) -> None:
    model = SDXL(pretrained=str(tiny_base), dtype=str(dtype).removeprefix('torch.'))
    got = model.encode(make_batch(1, text=[LONG], syntax='compel'))
    assert torch.equal(got.text, compel(stock(tiny_base, torch_dtype=dtype), LONG).embeds) and got.text.dtype == dtype


def test_what_a_weight_is(model: SDXL) -> None:
    """From the encoder alone: above 1 away from the empty prompt; below 1 a mix with the prompt without the phrase."""
    tokenizer, encoder = model.tokenizer_2, model.text_encoder_2

    def states(prompt: str, masked: slice = slice(0)) -> torch.Tensor:
        read = tokenizer(prompt, padding='max_length', return_tensors='pt')
        mask = torch.ones_like(read.input_ids)
        mask[:, masked] = 0
        with torch.no_grad():
            return encoder(read.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    got = model.encode(make_batch(1, text=['ab cde f'], text_2=['ab (cde)1.5 f'], syntax='compel')).text[..., 32:]
    expected, empty = states('ab cde f'), states('')
    expected[:, 3:6] = empty[:, 3:6] + 1.5 * (expected - empty)[:, 3:6]
    assert torch.allclose(got, expected, atol=1e-6)
    got = model.encode(make_batch(1, text=['x'], text_2=['ab (cde)0.8 f'], syntax='compel')).text[..., 32:]
    full, without = states('ab cde f'), states('ab cde f', slice(3, 6))
    full[:, 3:6], without[:, 3:6] = (empty[:, 3:6] + 0.8 * (x - empty)[:, 3:6] for x in (full, without))
    share = math.tan(0.2 * math.pi / 2)
    assert torch.allclose(got, (full + share * without) / (1 + share), atol=1e-6)


def test_no_weights_and_short_is_plain(model: SDXL) -> None:
    """Bitwise, and read at once, as 'plain' does it."""
    rows: list[int] = []
    handle = model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    texts, words = ['a red circle', 'a (red)1 (circle)', r'\(b\)', ''], ['a red circle', 'a red circle', '(b)', '']
    for text_2, words_2 in ((None, None), (texts[::-1], words[::-1])):
        plain = model.encode(make_batch(4, text=words, text_2=words_2))
        got = model.encode(make_batch(4, text=texts, text_2=text_2, syntax='compel'))
        assert torch.equal(got.text, plain.text) and torch.equal(got.pooled, plain.pooled)
    handle.remove()
    assert rows == [4] * 4


def test_every_prompt_of_a_picture_has_as_many_chunks(model: SDXL, pipeline: Any) -> None:
    """What is short is filled up with empty chunks, in both branches and encoders; null prompts are zeros as long."""
    first, second, negative = 'a red++ circle', LONG, 'x. ' * 40
    expected = compel(pipeline, first, second, negative, 'blurry')
    batch = picture_batch([first], [1], text_2=[second], negative_text=[negative], negative_text_2=['blurry'],
                          syntax='compel')
    got = model.encode(batch, ('uncond', 'cond'), project=True)
    assert torch.equal(got.text, torch.cat([expected.negative_embeds, expected.embeds]))
    chunks = got.text.shape[1] // 77
    asked = SimpleNamespace(prompt=first, prompt_2=None, negative_prompt=negative, negative_prompt_2=None)
    count = {text: num_chunks(model, SimpleNamespace(**{**vars(asked), 'prompt_2': text, 'syntax': 'compel'}))
             for text in (None, second)}
    assert count == {None: 2, second: chunks} and chunks > 4
    assert num_chunks(model, SimpleNamespace(**vars(asked), syntax='plain')) == 1
    null = model.encode(replace(batch, negative_text=None, negative_text_2=None), ('uncond', 'cond'), project=True)
    assert null.text.shape == got.text.shape and not null.text[:1].any() and torch.equal(null.text[1:], got.text[1:])


def test_rows_of_a_batch(model: SDXL) -> None:
    """Each as it is alone; dropped ones are null as long; rows of another length are refused by name."""
    texts = [LONG, LONG + ' blue', 'z' * (len(LONG) - 30)]
    batch = make_batch(3, text=texts, syntax='compel', negative_text=['(x)2', '', ''])
    together = model.encode(batch)
    for i, text in enumerate(texts):
        alone = model.encode(make_batch(1, text=[text], syntax='compel'))
        assert torch.equal(alone.text[0], together.text[i]) and torch.equal(alone.pooled[0], together.pooled[i])
    for null_text in ('zeros', 'empty'):
        model.null_text = null_text
        dropped = model.encode(replace(batch, drop={'text': torch.tensor([False, True, False])})).text
        null = model.encode(replace(batch, text=[''] * 3, negative_text=texts)).text if null_text == 'empty' else (
            torch.zeros_like(dropped))
        assert torch.equal(dropped[::2], together.text[::2]) and torch.equal(dropped[1], null[1])
    model.null_text = 'zeros'
    with pytest.raises(ValueError, match=r"'z.*' and 'short' \(or what stands beside them\) take up \d and 1 chunks"):
        model.encode(make_batch(2, text=[texts[2], 'short'], syntax='compel'))
    with pytest.raises(ValueError, match="syntax='a1111' is not known; choose of 'plain', 'compel'"):
        model.encode(make_batch(1, syntax='a1111'))
    with pytest.raises(ValueError, match="'text_embeds' and prompts of syntax='compel'"):
        model.encode(make_batch(1, syntax='compel', text_embeds=together.text[:1], pooled=together.pooled[:1]))


def test_a_picture_is_stocks_with_compel(model: SDXL, pipeline: Any) -> None:
    """Bitwise, of a weighted prompt of several chunks and a long negative one; its pooled embeddings are ours."""
    prompt, negative = LONG, 'blurry (dark)1.2 ' + 'n' * 90
    batch = picture_batch([prompt], [3], negative_text=[negative], syntax='compel')
    made = compel(pipeline, prompt, None, negative)
    pooled = model.encode(batch, ('uncond', 'cond'), project=True).pooled
    expected = pipeline(prompt_embeds=made.embeds, negative_prompt_embeds=made.negative_embeds,
                        pooled_prompt_embeds=pooled[1:], negative_pooled_prompt_embeds=pooled[:1], height=64, width=64,
                        num_inference_steps=3, output_type='latent', generator=generators([3])).images
    assert torch.equal(sampler(steps=3)(model, batch), expected)


def test_new_words(tiny_base: Path) -> None:
    """Of one and of three vectors, weighted, twice, and beyond the first chunk: as stock's and compel's loaders do."""
    words = [new_words(), new_words(seed=1)]
    pipeline = pipeline_with(tiny_base, words)
    model = SDXL(pretrained=str(tiny_base))
    model.words = lambda: words
    for prompt in ('a <thing>++ and (a <two> of <two>)0.7', 'a <two>', 'x' * 73 + ' <two> (<thing>)1.2'):
        with torch.no_grad():
            expected = CompelForSDXL(pipeline, DiffusersTextualInversionManager(pipeline))(prompt)
        got = model.encode(make_batch(1, text=[prompt], syntax='compel'))
        assert torch.equal(got.text, expected.embeds)
        assert not torch.equal(got.text, compel(model, prompt).embeds)
    with model.without_adapters():
        assert torch.equal(model.encode(make_batch(1, text=['a <two>++'], syntax='compel')).text,
                           compel(model, 'a <two>++').embeds)
    words[0]['<a.b>'] = words[1]['<a.b>'] = torch.zeros(1, 32)
    assert model.encode(make_batch(1, text=['a <a.b>'], syntax='compel')).text.shape == (1, 77, 64)
    with pytest.raises(ValueError, match="tears the new word '<a.b>' apart"):
        model.encode(make_batch(1, text=['a (<A.B>)1.2'], syntax='compel'))


def test_a_lora_in_the_text_encoders(tiny_base: Path, model: SDXL) -> None:
    """compel reads with the adapted encoders, and with the base's alone where that is asked for."""
    config = lora(alpha=8, parts=['text_encoder', 'text_encoder_2'], targets=['q_proj', 'fc1'])
    adapted = SDXL(pretrained=str(tiny_base), adapters=dict(a=config), objective=dict(type='Denoise'))
    shaken(adapted, SimpleNamespace(shaken=0.1))
    batch, base = make_batch(1, text=[LONG], syntax='compel'), model.encode(make_batch(1, text=[LONG], syntax='compel'))
    with torch.no_grad():
        got = adapted.encode(batch).text
    assert torch.equal(got, compel(adapted, LONG).embeds) and not torch.equal(got, base.text)
    with adapted.without_adapters():
        alone = adapted.encode(batch)
    assert torch.equal(alone.text, base.text) and torch.equal(alone.pooled, base.pooled)


def test_the_refiner(tmp_path: Path) -> None:
    """One text encoder, which reads the first prompt, as stock's."""
    model = SDXL(pretrained=str(write_tiny_refiner(tmp_path / 'refiner')))
    with torch.no_grad():
        expected = Compel(model.tokenizer_2, model.text_encoder_2, truncate_long_prompts=False, requires_pooled=True,
                          returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED)
        text, pooled = expected('o' * 200)
    for texts in (dict(text=['o' * 200]), dict(text=['o' * 200], text_2=['(x)2'])):
        got = model.encode(make_batch(1, **texts, syntax='compel'))
        assert torch.equal(got.text, text) and torch.equal(got.pooled, pooled) and text.shape == (1, 231, 32)


@pytest.mark.parametrize(('prompt', 'sentence'), [
    ('a (red circle', r"'a \(red circle' at character 3 \('\(red circle'\) opens a bracket that is not closed"),
    ('a) b', r"at character 2 \('\) b'\) closes a bracket that was not opened; for one as a letter write \\\)"),
    (r'(a\)', 'at character 1 .* is not closed'), ('(((((a)))))', 'at character 5 .* more than 4 deep'),
    ('a (red:1.3) b', r'at character 3 .* write \(a word\)1.3'), ('(a)-1.5', 'at character 3 .* a sign before a num'),
    ('(a + b)1.3', 'would read as letters, without their weight'), ('(a).attend(-1)', 'would read as letters'),
    ('("a", "b").and(), c', r'goes on after .and\(\)'), ('("a", "b").blend(1, -1)', r'weights \[1.0, -1.0\], which'),
    ('a withLora(pixel, 0.5)', "asks for the LoRA 'pixel'; name it among the adapters"),
    ('(a)2024 b', "gives 'a' the weight 2024"), ('a' + '+' * 9999, 'result out of range'),
    ('a cat.swap(dog)', r'has a .swap\(\)'), ('("a", "b").blend(1)', 'mismatched prompts/weights')])
def test_what_would_be_lost_is_refused(model: SDXL, prompt: str, sentence: str) -> None:
    """By the prompt and the place; compel drops a part of each in silence, or fails without naming it."""
    for texts in (dict(text=[prompt]), dict(text=['a'], text_2=[prompt]), dict(text=['a'], negative_text=[prompt])):
        with pytest.raises(ValueError, match=sentence):
            model.encode(make_batch(1, **texts, syntax='compel'))


def test_plain_warns_of_what_it_cuts(model: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each end that is lost, of both encoders; of ten ends, as captions may all be long."""
    said: list[str] = []
    monkeypatch.setattr(text_module, 'print_log', lambda message, **_: said.append(message))
    monkeypatch.setattr(text_module, '_CUT', set())
    for _ in range(2):
        model.encode(make_batch(3, text=['a' * 75, 'a' * 75 + ' the end', 'b' * 75 + ' the end']))
    assert len(said) == 1 and "longer than 77 tokens, so this end of it is not read: 'the end'" in said[0]
    model.encode(make_batch(1, text=['a' * 75 + ' the end'], syntax='compel'))
    for number in range(20):
        model.encode(make_batch(1, text=['a' * 75 + str(number)]))
    assert len(said) == 10 and 'Further ones will not be named' in said[-1]
