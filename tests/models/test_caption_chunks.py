"""Captions and prompts of several chunks of 77 tokens, and captions that are encoded one by one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import lora, shaken
from parity import make_batch, picture_batch, sampler
from test_prompt_weighting import compel
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models import text_encoders as text_module
from diffengine_sdxl.models.prompt_branches import encode_text, num_chunks, text_digest
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.request import Request
from diffengine_sdxl.structures import Lookups

#: A token for each character; texts without a sign of compel's syntax.
LONG = 'a red circle on blue paper. ' * 4 + 'x' * 160 + ' and gold, ' + 'y ' * 60 + 'end'
TEXTS = ['', 'a red circle', 'x' * 75, 'x' * 76, 'x ' * 75, 'x ' * 76, 'one, two: three; ' * 9, LONG,
         'Ünïcode. 東京 🦀 ' * 12, 'a. ' + 'b, ' + 'c ' * 75, 'x' * 150 + '.']


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged from here on, as if nothing had been before."""
    lines: list[str] = []
    monkeypatch.setattr(text_module, 'print_log', lambda message, **_: lines.append(message))
    monkeypatch.setattr(text_module, '_TRUNCATED', set())
    return lines


@pytest.fixture
def calls(model: SDXL) -> Any:
    """Rows of each call of the first text encoder."""
    rows: list[int] = []
    handle = model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    yield rows
    handle.remove()


@pytest.fixture
def two(model: SDXL, monkeypatch: pytest.MonkeyPatch) -> SDXL:
    """The model, with captions of two chunks."""
    monkeypatch.setattr(model, 'caption_chunks', 2)
    return model


def long(model: SDXL, *texts: str, **changes: Any) -> Any:
    return model.encode(make_batch(len(texts), text=[*texts], prompt_syntax='long', **changes), project=True)


@pytest.mark.parametrize('text', TEXTS, ids=lambda text: text[:12])
def test_a_long_text_is_compels(model: SDXL, pipeline: Any, text: str) -> None:
    """Bitwise, the pooled embedding too."""
    got, expected = long(model, text), compel(pipeline, text)
    assert torch.equal(got.text, expected.embeds) and torch.equal(got.pooled, expected.pooled_embeds)


def test_signs_are_text(model: SDXL) -> None:
    """Brackets, weights and operators are read as in a plain prompt."""
    text = 'miku (vocaloid)++, (a:1.3) [b] ("c").and('
    plain = model.encode(make_batch(1, text=[text], prompt_syntax='plain'), project=True)
    got = long(model, text)
    assert torch.equal(got.text, plain.text) and torch.equal(got.pooled, plain.pooled)


def test_skipped_layers(model: SDXL) -> None:
    """clip_skip is that of 'plain', in every chunk."""
    got = long(model, 'x' * 80, clip_skip=1).text
    plain = [model.encode(make_batch(1, text=[part], prompt_syntax='plain', clip_skip=1), project=True).text
             for part in ('x' * 75, 'x' * 5)]
    assert torch.allclose(got[:, 1:70], plain[0][:, 1:70], atol=1e-6) and got.shape == (1, 154, 64)
    assert not torch.allclose(got, long(model, 'x' * 80).text, atol=1e-3)


def test_captions_are_filled_up_and_cut(two: SDXL, logged: list[str]) -> None:
    """Each to as many chunks, so that no caption depends on the others; null rows have as many, too."""
    # The last one's second chunk ends with a sentence, as its text goes on.
    texts = ['a red circle', 'x' * 80, LONG, 'a. ' + 'b ' * 140, 'x' * 76 + ' a. ' + 'c ' * 100]
    plain = [two.encode(make_batch(1, text=[text], prompt_syntax='plain')).text for text in ('a red circle', '')]
    logged.clear()
    got = two.encode(make_batch(5, text=texts))
    assert torch.equal(got.text[:1], torch.cat(plain, dim=1)) and got.text.shape == (5, 154, 64)
    assert torch.equal(got.text[1:2], long(two, texts[1]).text)
    for i in (2, 3, 4):
        whole = long(two, texts[i])
        assert torch.equal(got.text[i], whole.text[0, :154]) and torch.equal(got.pooled[i], whole.pooled[0])
    for i, text in enumerate(texts):
        assert torch.equal(two.encode(make_batch(1, text=[text])).text[0], got.text[i])
    assert all('model.caption_chunks=' in line for line in logged) and 'caption_chunks=4.' in logged[-1]
    uncond = two.encode(picture_batch(texts, [1] * 5), ('uncond', 'cond'), project=True).text
    assert uncond.shape == (10, 154, 64) and not uncond[:5].any() and torch.allclose(uncond[5:], got.text, atol=1e-5)


@pytest.mark.parametrize('null_prompt', ['zeros', 'empty'])
def test_dropped_captions_have_as_many_chunks(two: SDXL, monkeypatch: pytest.MonkeyPatch, null_prompt: str) -> None:
    """Beside embeddings of the data set's own, too."""
    monkeypatch.setattr(two, 'null_prompt', null_prompt)
    batch = make_batch(2, text=[LONG, 'b'], drop={'text': torch.tensor([True, False])})
    got, empty = two.encode(batch).text, two.encode(make_batch(1, text=[''])).text
    assert torch.equal(got[:1], empty if null_prompt == 'empty' else torch.zeros_like(empty))
    for length in (77, 154):
        own = two.encode(replace(batch, text_embeds=torch.ones(2, length, 64), pooled=torch.ones(2, 32))).text
        expected = empty[:, :length] if null_prompt == 'empty' else torch.zeros(1, length, 64)
        assert torch.allclose(own[:1], expected, atol=1e-6) and torch.equal(own[1:], torch.ones(1, length, 64))


def test_prompts_of_a_model_of_long_captions(two: SDXL) -> None:
    """Read as its captions unless the request says otherwise, and longer if they are."""
    counts = [num_chunks(two, Request(prompt=prompt, **changes)) for prompt in ('a', LONG) for changes in (
        {}, dict(prompt_syntax='plain'), dict(prompt_syntax='long'), dict(prompt_syntax='compel'))]
    chunks = counts[4]
    assert counts == [2, 1, 2, 1, chunks, 1, chunks, chunks] and chunks > 4
    assert num_chunks(two, Request(prompt='a', negative_prompt=LONG)) == chunks
    with pytest.raises(UserError, match="The prompt 'xx.*' takes 40 chunks of 75 tokens; at most 32 are read"):
        long(two, 'x' * 75 * 40)
    with pytest.raises(UserError, match='take 2 and 4 chunks of 77 tokens'):
        long(two, 'a', 'x' * 300)
    for value, sentence in ((0, 'must be at least 1'), (33, 'caption_chunks=33 must be at most 32'), ('2', 'whole')):
        with pytest.raises(UserError, match=sentence):
            text_module.check_chunks(value)


def test_images_of_long_prompts(two: SDXL, pipeline: Any) -> None:
    """Bitwise the stock pipeline's, of the embeddings; with classifier-free guidance."""
    batch = picture_batch([LONG], [3], negative_text=['blurry'], prompt_syntax='long')
    (text, pooled, _), (null, null_pooled, _) = (encode_text(two, batch, branch) for branch in ('cond', 'uncond'))
    expected = pipeline(prompt_embeds=text, negative_prompt_embeds=null, pooled_prompt_embeds=pooled,
                        negative_pooled_prompt_embeds=null_pooled, height=64, width=64, num_inference_steps=2,
                        output_type='latent', generator=torch.Generator().manual_seed(3)).images
    assert torch.equal(sampler(steps=2)(two, batch), expected)


def test_captions_are_encoded_one_by_one(model: SDXL, calls: list[int]) -> None:
    """In training, each distinct one once; sampling encodes a batch, as diffusers does."""
    batch = make_batch(4, text=['a', 'b', 'a', 'a'], text_2=['a', 'a', 'a', 'c'])
    got = model.encode(batch)
    assert calls == [1, 1, 1]
    for i in range(4):
        alone = model.encode(make_batch(1, text=batch.text[i:i + 1], text_2=batch.text_2[i:i + 1]))
        assert torch.equal(got.text[i], alone.text[0]) and torch.equal(got.pooled[i], alone.pooled[0])
    calls.clear()
    together = model.encode(batch, project=True)
    assert calls == [4] and torch.allclose(got.text, together.text, atol=1e-5)


@pytest.mark.parametrize('settings', [
    dict(trainable=['text_encoder']), dict(adapters=dict(a=lora(parts=['text_encoder'], targets=['q_proj'])))])
def test_captions_that_train_are_encoded_together(tiny_base: Path, settings: dict[str, Any]) -> None:
    """With gradients through all chunks; they have no digest, so that nothing is kept of them."""
    model = SDXL(pretrained=str(tiny_base), **settings)
    model.caption_chunks = 2
    if 'adapters' in settings:
        shaken(model, SimpleNamespace(noise=0.1))
    rows: list[int] = []
    model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    text = model.encode(make_batch(3, text=['a', 'a', LONG])).text
    assert rows == [3, 3] and text.shape == (3, 154, 64)
    trained = [parameter for group in model.trainables().values() for _, parameter in group]
    for chunk in text.split(77, dim=1):
        assert any(grad is not None and grad.any() for grad in torch.autograd.grad(
            chunk.square().sum(), trained, retain_graph=True, allow_unused=True))
    assert text_digest(model, str) is None


def test_found_captions_are_not_encoded(model: SDXL, calls: list[int]) -> None:
    """Those that are missing are put into the store, each once, by the key of the lookup."""
    known = {'text_embeds': torch.ones(77, 64), 'pooled': torch.ones(32)}
    put: dict[str, dict[str, Tensor]] = {}
    model.store = SimpleNamespace(get=lambda key: None, count=lambda *_: None,
                                  put=lambda key, kind, tensors: put.update({f'{kind} {key}': tensors}))
    try:
        batch = make_batch(4, text=['a', 'b', 'c', 'b'], lookups={'text': Lookups(
            ['A', 'B', 'C', 'B'], [known, None, known, None])})
        got = model.encode(batch)
    finally:
        model.store = None
    assert calls == [1] and list(put) == ['text B']
    alone = model.encode(make_batch(1, text=['b']))
    assert torch.equal(got.text, torch.stack([known['text_embeds'], alone.text[0]] * 2))
    assert torch.equal(got.pooled[1::2], alone.pooled.expand(2, -1)) and torch.equal(got.pooled[0], known['pooled'])
    assert torch.equal(put['text B']['text_embeds'], alone.text[0])


def test_the_digest_of_what_reads_captions(model: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both encoders, the tokenizers' vocabularies and the number of chunks; not of what was tokenized last."""
    digests = [text_digest(model, str), text_digest(model, lambda part: part.upper())]
    model.tokenizer('a', truncation=True, padding='max_length')
    assert text_digest(model, str) == digests[0]
    monkeypatch.setattr(model, 'caption_chunks', 2)
    digests.append(text_digest(model, str))
    monkeypatch.setattr(model, 'caption_chunks', 1)
    monkeypatch.setattr(model, 'tokenizer_2', text_module.extended(model.tokenizer_2, {'<new>': torch.zeros(1, 32)}))
    digests.append(text_digest(model, str))
    assert len(set(digests)) == 4 and None not in digests
