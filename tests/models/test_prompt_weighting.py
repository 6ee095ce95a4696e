"""Prompts in compel's syntax: bitwise compel's embeddings, and refused where compel silently drops something."""

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
from test_words import new_tokens, pipeline_with

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models import text_encoders as text_module
from diffengine_sdxl.models.prompt_branches import num_chunks
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.request import Request
from diffengine_sdxl.testing import write_tiny_refiner

#: A token for each character: sentences that end within a chunk, one that doesn't, and a weight across a boundary.
LONG = 'a red circle on blue paper. ' * 4 + 'x' * 160 + ' and (gold, ' + 'y ' * 60 + ')1.4 end'
#: Prompt -> its plain text.
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
#: Prompts that compel fails at -> equal ones.
NOTHING = {'()': '', '""0.5 b': 'b'}


def compel(parts: Any, *prompts: Any) -> Any:
    """compel's embeddings for SDXL; `parts` has the text encoders and tokenizers."""
    with torch.no_grad():
        return CompelForSDXL(parts)(*prompts)


@pytest.mark.parametrize('prompt', PROMPTS, ids=lambda prompt: prompt[:24])
def test_text_is_compels(model: SDXL, pipeline: Any, prompt: str) -> None:
    """Bitwise. The pooled embedding is that of the plain text: compel's includes brackets and numbers."""
    got = model.encode(make_batch(1, text=[prompt], prompt_syntax='compel'))
    expected = compel(pipeline, NOTHING.get(prompt, prompt))
    assert torch.equal(got.text, expected.embeds)
    pooled = pipeline.encode_prompt(PROMPTS[prompt], do_classifier_free_guidance=False)[2]
    assert torch.equal(got.pooled, pooled)
    if PROMPTS[prompt] == prompt:
        assert torch.equal(got.pooled, expected.pooled_embeds)


def test_a_blend(model: SDXL, pipeline: Any) -> None:
    """The pooled embedding is blended as the text is."""
    got = model.encode(make_batch(1, text=['("a red", "blue circle++").blend(3, 1)'], prompt_syntax='compel'))
    assert torch.equal(got.text, compel(pipeline, '("a red", "blue circle++").blend(3, 1)').embeds)
    pooled = pipeline.encode_prompt(['a red', 'blue circle'], do_classifier_free_guidance=False)[2]
    assert torch.allclose(got.pooled, pooled[:1] * 0.75 + pooled[1:] * 0.25, atol=1e-6)  # another order of sums


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_in_other_precisions(tiny_base: Path, dtype: torch.dtype) -> None:
    model = SDXL(pretrained=str(tiny_base), dtype=str(dtype).removeprefix('torch.'))
    got = model.encode(make_batch(1, text=[LONG], prompt_syntax='compel'))
    assert torch.equal(got.text, compel(stock(tiny_base, torch_dtype=dtype), LONG).embeds) and got.text.dtype == dtype


def test_weights_by_formula(model: SDXL) -> None:
    """From the encoder only: above 1 away from the empty prompt; below 1 a mix with the prompt without the phrase."""
    tokenizer, encoder = model.tokenizer_2, model.text_encoder_2

    def states(prompt: str, masked: slice = slice(0)) -> torch.Tensor:
        read = tokenizer(prompt, padding='max_length', return_tensors='pt')
        mask = torch.ones_like(read.input_ids)
        mask[:, masked] = 0
        with torch.no_grad():
            return encoder(read.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    got = model.encode(make_batch(1, text=['x'], text_2=['ab (cde)1.5 f'], prompt_syntax='compel')).text[..., 32:]
    expected, empty = states('ab cde f'), states('')
    expected[:, 3:6] = empty[:, 3:6] + 1.5 * (expected - empty)[:, 3:6]
    assert torch.allclose(got, expected, atol=1e-6)
    got = model.encode(make_batch(1, text=['x'], text_2=['ab (cde)0.8 f'], prompt_syntax='compel')).text[..., 32:]
    full, without = states('ab cde f'), states('ab cde f', slice(3, 6))
    full[:, 3:6], without[:, 3:6] = (empty[:, 3:6] + 0.8 * (x - empty)[:, 3:6] for x in (full, without))
    share = math.tan(0.2 * math.pi / 2)
    assert torch.allclose(got, (full + share * without) / (1 + share), atol=1e-6)


def test_short_prompts_without_weights_are_plain(model: SDXL) -> None:
    """Bitwise, and encoded as one batch."""
    rows: list[int] = []
    handle = model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    texts, words = ['a red circle', 'a (red)1 (circle)', r'\(b\)', ''], ['a red circle', 'a red circle', '(b)', '']
    for text_2, words_2 in ((None, None), (texts[::-1], words[::-1])):
        plain = model.encode(make_batch(4, text=words, text_2=words_2), project=True)
        got = model.encode(make_batch(4, text=texts, text_2=text_2, prompt_syntax='compel'), project=True)
        assert torch.equal(got.text, plain.text) and torch.equal(got.pooled, plain.pooled)
    handle.remove()
    assert rows == [4] * 4


def test_all_prompts_of_an_image_have_as_many_chunks(model: SDXL, pipeline: Any) -> None:
    """Short ones are padded with empty chunks, in both branches and encoders; null prompts are zeros of that length."""
    first, second, negative = 'a red++ circle', LONG, 'x. ' * 40
    expected = compel(pipeline, first, second, negative, 'blurry')
    batch = picture_batch([first], [1], text_2=[second], negative_text=[negative], negative_text_2=['blurry'],
                          prompt_syntax='compel')
    got = model.encode(batch, ('uncond', 'cond'), project=True)
    assert torch.equal(got.text, torch.cat([expected.negative_embeds, expected.embeds]))
    chunks = got.text.shape[1] // 77
    prompts = dict(prompt=first, negative_prompt=negative)
    counts = [num_chunks(model, Request(**prompts, **changes)) for changes in (
        {}, dict(prompt_syntax='compel'), dict(prompt_syntax='compel', prompt_2=second))]
    assert counts == [1, 2, chunks] and chunks > 4
    null = model.encode(replace(batch, negative_text=None, negative_text_2=None), ('uncond', 'cond'), project=True)
    assert null.text.shape == got.text.shape and not null.text[:1].any() and torch.equal(null.text[1:], got.text[1:])


def test_rows_of_a_batch(model: SDXL) -> None:
    """Each as in a batch of one; dropped ones are null of the same length; rows of different lengths are refused."""
    texts = [LONG, LONG + ' blue', 'z' * (len(LONG) - 30)]
    batch = make_batch(3, text=texts, prompt_syntax='compel', negative_text=['(x)2', '', ''])
    together = model.encode(batch)
    for i, text in enumerate(texts):
        single = model.encode(make_batch(1, text=[text], prompt_syntax='compel'))
        assert torch.equal(single.text[0], together.text[i]) and torch.equal(single.pooled[0], together.pooled[i])
    for null_prompt in ('zeros', 'empty'):
        model.null_prompt = null_prompt
        dropped = model.encode(replace(batch, drop={'text': torch.tensor([False, True, False])})).text
        null = model.encode(replace(batch, text=[''] * 3, negative_text=texts)).text if null_prompt == 'empty' else (
            torch.zeros_like(dropped))
        assert torch.equal(dropped[::2], together.text[::2]) and torch.equal(dropped[1], null[1])
    model.null_prompt = 'zeros'
    with pytest.raises(UserError, match=r"prompts of 'z.*' and 'short' take \d and 1 chunks of 77 tokens"):
        model.encode(make_batch(2, text=[texts[2], 'short'], prompt_syntax='compel'))
    with pytest.raises(UserError, match="prompt_syntax='a1111' is unknown; choose one of 'plain', 'long', 'compel'"):
        model.encode(make_batch(1, prompt_syntax='a1111'))


def test_images_are_those_of_diffusers_with_compel(model: SDXL, pipeline: Any) -> None:
    """Bitwise, for a weighted prompt of several chunks and a long negative one, with our pooled embeddings."""
    prompt, negative = LONG, 'blurry (dark)1.2 ' + 'n' * 90
    batch = picture_batch([prompt], [3], negative_text=[negative], prompt_syntax='compel')
    embeds = compel(pipeline, prompt, None, negative)
    pooled = model.encode(batch, ('uncond', 'cond'), project=True).pooled
    expected = pipeline(prompt_embeds=embeds.embeds, negative_prompt_embeds=embeds.negative_embeds,
                        pooled_prompt_embeds=pooled[1:], negative_pooled_prompt_embeds=pooled[:1], height=64, width=64,
                        num_inference_steps=3, output_type='latent', generator=generators([3])).images
    assert torch.equal(sampler(steps=3)(model, batch), expected)


def test_new_tokens(tiny_base: Path) -> None:
    """Of one and three vectors, weighted, twice, after the first chunk: as by diffusers' and compel's loaders."""
    tokens = [new_tokens(), new_tokens(seed=1)]
    pipeline = pipeline_with(tiny_base, tokens)
    model = SDXL(pretrained=str(tiny_base))
    model.new_tokens = lambda: tokens
    for prompt in ('a <thing>++ and (a <two> of <two>)0.7', 'x' * 73 + ' <two> <thing>',
                   'x' * 73 + ' <two> (<thing>)1.2'):
        with torch.no_grad():
            expected = CompelForSDXL(pipeline, DiffusersTextualInversionManager(pipeline))(prompt)
        for syntax in ('compel', *(['long'] if '(' not in prompt else [])):
            got = model.encode(make_batch(1, text=[prompt], prompt_syntax=syntax))
            assert torch.equal(got.text, expected.embeds)
        assert not torch.equal(got.text, compel(model, prompt).embeds)
    with model.disable_adapters():
        assert torch.equal(model.encode(make_batch(1, text=['a <two>++'], prompt_syntax='compel')).text,
                           compel(model, 'a <two>++').embeds)
    tokens[0]['<a.b>'] = tokens[1]['<a.b>'] = torch.zeros(1, 32)
    assert model.encode(make_batch(1, text=['a <a.b>'], prompt_syntax='compel')).text.shape == (1, 77, 64)
    with pytest.raises(UserError, match="splits the new token '<a.b>' in the prompt"):
        model.encode(make_batch(1, text=['a (<A.B>)1.2'], prompt_syntax='compel'))


def test_a_lora_in_the_text_encoders(tiny_base: Path, model: SDXL) -> None:
    """compel uses the adapted encoders, and the base's while adapters are disabled."""
    config = lora(alpha=8, parts=['text_encoder', 'text_encoder_2'], targets=['q_proj', 'fc1'])
    adapted = SDXL(pretrained=str(tiny_base), adapters=dict(a=config), objective=dict(type='Denoise'))
    shaken(adapted, SimpleNamespace(noise=0.1))
    batch = make_batch(1, text=[LONG], prompt_syntax='compel')
    base = model.encode(batch)
    with torch.no_grad():
        got = adapted.encode(batch).text
    assert torch.equal(got, compel(adapted, LONG).embeds) and not torch.equal(got, base.text)
    with adapted.disable_adapters():
        disabled = adapted.encode(batch)
    assert torch.equal(disabled.text, base.text) and torch.equal(disabled.pooled, base.pooled)


def test_the_refiner(tmp_path: Path) -> None:
    """One text encoder, which reads the first prompt, as in diffusers."""
    model = SDXL(pretrained=str(write_tiny_refiner(tmp_path / 'refiner')))
    with torch.no_grad():
        expected = Compel(model.tokenizer_2, model.text_encoder_2, truncate_long_prompts=False, requires_pooled=True,
                          returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED)
        text, pooled = expected('o' * 200)
    for texts in (dict(text=['o' * 200]), dict(text=['o' * 200], text_2=['(x)2']),
                  dict(text=['o' * 200], prompt_syntax='long')):
        got = model.encode(make_batch(1, **{'prompt_syntax': 'compel', **texts}))
        assert torch.equal(got.text, text) and torch.equal(got.pooled, pooled) and text.shape == (1, 231, 32)


@pytest.mark.parametrize(('prompt', 'message'), [
    ('a (red circle', r"'a \(red circle' at character 3 \('\(red circle'\) opens a bracket that is not closed"),
    ('a) b', r"at character 2 \('\) b'\) closes a bracket that is not opened; write one of the text as \\\)"),
    (r'(a\)', 'at character 1 .* is not closed'), ('(((((a)))))', 'at character 5 .* more than 4 deep'),
    ('a (red:1.3) b', r'at character 3 .* write \(a word\)1.3'), ('(a)-1.5', 'at character 3 .* a sign before a num'),
    ('(a + b)1.3', 'would read as text, without their weight'), ('(a).attend(-1)', 'would read as text'),
    ('("a", "b").and(), c', r'continues after .and\(\)'), ('("a", "b").blend(1, -1)', r'weights \[1.0, -1.0\], which'),
    ('a withLora(pixel, 0.5)', "names the LoRA 'pixel'; add it to `adapters`"),
    ('(a)2024 b', "gives 'a' the weight 2024"), ('a' + '+' * 9999, 'result out of range'),
    ('a cat.swap(dog)', r'has a .swap\(\)'), ('("a", "b").blend(1)', 'mismatched prompts/weights')])
def test_refused_syntax(model: SDXL, prompt: str, message: str) -> None:
    """By prompt and place; compel silently drops a part of each, or fails without naming it."""
    for texts in (dict(text=[prompt]), dict(text=['a'], text_2=[prompt]), dict(text=['a'], negative_text=[prompt])):
        with pytest.raises(UserError, match=message):
            model.encode(make_batch(1, **texts, prompt_syntax='compel'))


def test_plain_logs_what_it_truncates(model: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each end that is lost, in both encoders; ten ends at most, as captions may all be long."""
    logged: list[str] = []
    monkeypatch.setattr(text_module, 'print_log', lambda message, **_: logged.append(message))
    monkeypatch.setattr(text_module, '_TRUNCATED', set())
    for _ in range(2):
        model.encode(make_batch(3, text=['a' * 75, 'a' * 75 + ' the end', 'b' * 75 + ' the end']))
    assert len(logged) == 1 and "81 tokens and 75 are read, so its end is ignored: 'the end'. " in logged[0]
    assert "prompt_syntax='long' reads all of a prompt; in training, model.caption_chunks=2." in logged[0]
    model.encode(make_batch(1, text=['a' * 75 + ' the end'], prompt_syntax='compel'))
    for number in range(12):
        model.encode(make_batch(1, text=['a' * 75 + str(number)]))
    assert len(logged) == 10 and 'Further ones are not logged' in logged[-1]
