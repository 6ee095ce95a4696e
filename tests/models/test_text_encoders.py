"""Prompts to embeddings, bitwise as diffusers' `encode_prompt`; the null prompts of guidance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import make_batch, picture_batch, sampler
from transformers import CLIPTokenizer

from diffengine_sdxl.config_files import PACKAGE
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models import text_encoders
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.shapes.scene import WORDS

PROMPTS = ['a cat', 'x' * 300, 'Ünïcode 東京 & emoji 🦀', '']


def test_prompts(model: SDXL, pipeline: Any) -> None:
    """Any text, also longer than 77 tokens; both encoders, each with its own padding.

    Sampling encodes a batch as diffusers does; training each caption by itself, as diffusers does with one.
    """
    for i, prompt in enumerate(PROMPTS):
        text, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        got = model.encode(make_batch(4, text=PROMPTS))
        assert torch.equal(got.text[i], text[0]) and torch.equal(got.pooled[i], pooled[0])
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    got = model.encode(make_batch(4, text=PROMPTS), project=True)
    assert torch.equal(got.text, text) and torch.equal(got.pooled, pooled)
    assert got.text.shape == (4, 77, 64) and got.pooled.shape == (4, 32)
    assert len({float(row.sum()) for row in got.text}) == 4


def test_other_prompts_for_the_second_encoder(model: SDXL, pipeline: Any) -> None:
    """The second encoder's are the second half of the widths, and the pooled embedding."""
    two = PROMPTS[::-1]
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, two, do_classifier_free_guidance=False)
    got = model.encode(make_batch(4, text=PROMPTS, text_2=two), project=True)
    assert torch.equal(got.text, text) and torch.equal(got.pooled, pooled)
    plain = model.encode(make_batch(4, text=PROMPTS), project=True)
    assert torch.equal(got.text[..., :32], plain.text[..., :32])
    assert not torch.equal(got.text[..., 32:], plain.text[..., 32:])


@pytest.mark.parametrize('null_prompt', ['zeros', 'empty'])
def test_no_negative_prompt(tiny_base: Path, pipeline: Any, null_prompt: str) -> None:
    """Zeros, or the empty caption as in diffusers without force_zeros_for_empty_prompt."""
    model = SDXL(pretrained=str(tiny_base), null_prompt=null_prompt)
    pipeline.register_to_config(force_zeros_for_empty_prompt=null_prompt == 'zeros')
    text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    got = model.encode(picture_batch(PROMPTS, [1, 2, 3, 4]), ('uncond', 'cond'), project=True)
    assert torch.equal(got.text, torch.cat([null, text])) and torch.equal(got.pooled, torch.cat([null_pooled, pooled]))
    assert bool(got.text[:4].any()) == (null_prompt == 'empty')
    assert not torch.equal(sampler(steps=1)(model, picture_batch(['a'], [1])),
                           sampler(steps=1, scale=1)(model, picture_batch(['a'], [1])))


def test_a_negative_prompt_is_not_null(model: SDXL, pipeline: Any) -> None:
    """An empty negative prompt is encoded, as in diffusers; drops don't replace it."""
    _, null, _, null_pooled = pipeline.encode_prompt(PROMPTS[:2], negative_prompt=['', 'blurry'])
    batch = picture_batch(PROMPTS[:2], [1, 2], negative_text=['', 'blurry'], drop={'text': torch.tensor([True, True])})
    got = model.encode(batch, ('uncond', 'cond'), project=True)
    assert torch.equal(got.text[:2], null) and torch.equal(got.pooled[:2], null_pooled) and null.any()
    assert not got.text[2:].any() and not got.pooled[2:].any()


def test_encoders_run_once_a_branch(model: SDXL) -> None:
    """Not once a prompt, not once a step, and not for zeros."""
    rows: list[int] = []
    handle = model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    batch = picture_batch(['a', 'b', 'c'], [1, 2, 3])
    sampler(steps=3)(model, batch)
    assert rows == [3]
    sampler(steps=3)(model, replace(batch, negative_text=['x', 'y', 'z']))
    assert rows == [3, 3, 3]
    handle.remove()


def test_skipped_layers(model: SDXL, pipeline: Any) -> None:
    """Both encoders skip as many; as in diffusers, the negative prompt and the pooled embedding skip none."""
    batch = picture_batch(PROMPTS, [1, 2, 3, 4], negative_text=['blurry'] * 4)
    texts = []
    for skip in (None, 0, 1):
        text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=batch.negative_text,
                                                                 clip_skip=skip)
        got = model.encode(replace(batch, clip_skip=skip), ('uncond', 'cond'), project=True)
        assert torch.equal(got.text, torch.cat([null, text]))
        assert torch.equal(got.pooled, torch.cat([null_pooled, pooled]))
        texts.append(got.text)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[1][4:, :, :32], texts[2][4:, :, :32])
    for changes, sentence in ((dict(clip_skip=2), 'clip_skip=2 must be between 0 and, .* 1\\.'),
                              (dict(clip_skip=-1), 'clip_skip=-1 must be between 0'),
                              (dict(clip_skip=1, prompt_syntax='compel'), "does not go with prompt_syntax='compel'")):
        with pytest.raises(UserError, match=sentence):
            model.encode(replace(batch, **changes))


def test_cached_prompts_are_not_trained(tiny_base: Path) -> None:
    """With gradients, prompts are encoded again inside `cached_prompts`; without, only once."""
    model = SDXL(pretrained=str(tiny_base), trainable=['text_encoder'])
    calls: list[int] = []
    model.text_encoder.register_forward_hook(lambda _m, _a, out: calls.append(len(out[0])))
    batch = make_batch(2, text=['a', 'b'])
    with model.cached_prompts():
        texts = [model.encode(batch).text for _ in range(2)]
        assert calls == [2, 2] and all(t.requires_grad for t in texts)
        with torch.no_grad():
            again = [model.encode(batch).text for _ in range(2)]
        assert calls == [2, 2, 2] and torch.equal(again[0], again[1]) and torch.equal(again[0], texts[0])
    with torch.no_grad():
        model.encode(batch)
    assert calls == [2, 2, 2, 2]


SHAPES = 'diffengine_sdxl::shapes/base'


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged from here on, as if nothing had been before."""
    lines: list[str] = []
    monkeypatch.setattr(text_encoders, 'print_log', lambda message, **_: lines.append(message))
    monkeypatch.setattr(text_encoders, '_UNREAD', set())
    return lines


def infer(model: SDXL, *texts: str, **changes: Any) -> None:
    """Encode prompts as SDXLInferencer does, each call with a cache of its own."""
    with model.cached_prompts(), torch.no_grad():
        model.encode(picture_batch([*texts], [1] * len(texts), **changes), ('uncond', 'cond'), project=True)


def test_words_that_a_base_never_read_are_named_in_inference(logged: list[str]) -> None:
    """Once a text, of both encoders, of negative prompts and of compel's syntax too; captions of a training are not."""
    model = SDXL(SHAPES)
    infer(model, 'A Striped red circle, on blue.', 'one glossy star on a background of wavy gray', '')
    model.encode(picture_batch(['a small dog'], [1]))
    assert logged == []
    infer(model, 'a small green square', 'a small green square')
    infer(model, 'a small green square')
    assert len(logged) == 1 and "'small' of the prompt 'a small green square'. " in logged[0]
    assert f'It knows {len(WORDS)} words: {", ".join(WORDS[:10])} ...' in logged[0]
    infer(model, 'a red star', negative_text=['ugly'], text_2=['Big and 2 blue stars'])
    assert ["'ugly' of the prompt 'ugly'" in line for line in logged] == [False, True, False]
    assert "'big', 'and', '2', 'stars' of the prompt 'Big" in logged[2]
    infer(model, 'a (tiny)1.3 star++', prompt_syntax='compel')
    assert len(logged) == 4 and "'tiny' of the prompt 'a tiny star'" in logged[3]
    for number in range(12):
        infer(model, f'a{number}')
    assert len(logged) == 10 and 'Further ones are not logged' in logged[-1]


@pytest.mark.parametrize(('adapter', 'unread'), [
    (dict(type='T2IAdapter'), ["'dotted', 'dots'"]), (dict(type='LoRA', rank=2), ["'dots'"]),
    (dict(type='TextualInversion', token='<dots>', init='star'), ["'dotted'"])])
def test_words_that_an_adapter_may_know(adapter: dict[str, Any], unread: list[str], logged: list[str]) -> None:
    """A LoRA may have learned a word of one token, which the base never read; a new token is known."""
    model = SDXL(SHAPES, adapters=dict(adapter=adapter))
    conditions = {'conditioning_image': torch.zeros(1, 3, 64, 64)}
    text = f'a dotted star, {adapter.get("token", "dots")}'
    infer(model, text, conditions=conditions)
    assert [line[:line.index(' of the prompt')] for line in logged] == [
        f'The base was not trained on {words}' for words in unread]
    logged.clear()
    with model.disable_adapters():
        infer(model, f'{text}!')
    assert "'dotted', 'dots' of the prompt" in logged[0]


def test_sdxls_words_are_all_known(tiny_base: Path, logged: list[str]) -> None:
    """SDXL declares no closed vocabulary; a base with one keeps it when it is written."""
    for part in ('tokenizer', 'tokenizer_2'):
        tokenizer = CLIPTokenizer.from_pretrained(f'{PACKAGE}/loading/sdxl_files/{part}')
        text_encoders.TextEncoder(tokenizer, None, {}).warn_of_unread_words('zyxwv 123 ünï', False)
    infer(SDXL(str(tiny_base)), 'zyxwv 123 ünï')
    assert logged == [] and len(tokenizer) == 49408
