"""Textual inversion: a word in prompts, bitwise as in diffusers; its training; its files; what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from parity import generators, grads, make_batch, picture_batch, sampler, stock
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_sdxl

SEEDS = [3, 1]
TEXT = ['a <thing> on a <thing>', 'two red things']
CLIPS = {'text_encoder': 'clip_l', 'text_encoder_2': 'clip_g'}


def word(**settings: Any) -> dict[str, Any]:
    """Config of a new word."""
    return dict(type='TextualInversion', **{**dict(token='<thing>', num_vectors=2, init='red'), **settings})


def build(base: Path, seed: int = 0, settings: dict[str, Any] | None = None, **adapters: Any) -> SDXL:
    """A model whose words look trained."""
    model = SDXL(pretrained=str(base), adapters=adapters, objective=dict(type='Denoise'), **settings or {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in adapters:
            for value in getattr(model.adapters[name], 'vectors', {}).values():
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def sample(model: SDXL, **changes: Any) -> Tensor:
    """Latents of two images whose prompts, also a negative one, have the word."""
    return sampler(steps=2)(model, picture_batch(TEXT, SEEDS, **{**dict(negative_text=['', 'x <thing>']), **changes}))


def test_latents_are_bitwise_diffusers(tiny_base: Path, tmp_path: Path) -> None:
    """The exported file in diffusers' pipeline, a call for each text encoder; also in negative prompts."""
    model = build(tiny_base, a=word())
    model.adapters['a'].save(tmp_path)
    vectors = load_file(tmp_path / 'learned_embeds.safetensors')
    assert {k: v.shape for k, v in vectors.items()} == {'clip_l': (2, 32), 'clip_g': (2, 32)}
    pipeline: StableDiffusionXLPipeline = stock(tiny_base)
    for part, tokenizer in (('text_encoder', 'tokenizer'), ('text_encoder_2', 'tokenizer_2')):
        pipeline.load_textual_inversion(vectors[CLIPS[part]], token='<thing>', text_encoder=getattr(pipeline, part),
                                        tokenizer=getattr(pipeline, tokenizer))
    expected = pipeline(TEXT, negative_prompt=['', 'x <thing>'], height=64, width=64, num_inference_steps=2,
                        generator=generators(SEEDS), output_type='latent').images
    assert torch.equal(sample(model), expected)


def test_without_it_the_word_is_plain_text(tiny_base: Path) -> None:
    """At scale 0, disabled, detached, or not in the prompt: bitwise the base."""
    base, model = SDXL(pretrained=str(tiny_base)), build(tiny_base, a=word())
    expected, learned = sample(base), sample(model)
    assert (expected - learned).abs().max() > 1e-2
    with model.disable_adapters():
        assert torch.equal(sample(model), expected)
    model.adapters['a'].scale = 0.0
    assert torch.equal(sample(model), expected)
    model.adapters['a'].scale = 1.0
    assert torch.equal(sample(model), learned)
    others: dict[str, Any] = dict(text=['a', 'thing'], negative_text=['', '<thin g>'])
    assert torch.equal(sample(model, **others), sample(base, **others))
    model.adapters.pop('a').detach(model)
    assert torch.equal(sample(model), expected)


def test_it_starts_as_the_words_of_init(tiny_base: Path) -> None:
    """Their embeddings in turn; so, with as many vectors, the new word is encoded as they are, bitwise."""
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=word(num_vectors=None, init='x'),
                                                          b=word(token='<four>', num_vectors=4, init='u v w')))
    for part, tokenizer in (('text_encoder', model.tokenizer), ('text_encoder_2', model.tokenizer_2)):
        table = getattr(model, part).get_input_embeddings().weight
        ids = tokenizer('u v w u', add_special_tokens=False).input_ids
        assert torch.equal(model.adapters['b'].vectors[part], table[ids])
        assert model.adapters['a'].vectors[part].shape == (1, 32)
    # 'plain' has other ids, but pooling looks for the end token, so all is the same.
    got, plain = (model.encode(make_batch(1, text=[text])) for text in ('a <thing> <four>', 'a x u v w u'))
    assert torch.equal(got.text, plain.text) and torch.equal(got.pooled, plain.pooled)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_only_the_vectors_train(tiny_base: Path, precision: str) -> None:
    """Several words, beside a T2I-Adapter and a text encoder that trains; each gets a gradient, in fp32."""
    adapters = dict(a=word(), b=word(token='<b>', num_vectors=1), c=dict(type='T2IAdapter'),
                    d=word(token='<d>', trainable=False))
    batch = make_batch(2, text=['<thing> <b> <d>', 'a <b>'])
    for parts in ((), ('text_encoder',)):
        model = build(tiny_base, settings=dict(mixed_precision=precision, trainable=parts), **adapters)
        assert model.text_trains and {p.dtype for p in model.adapters.parameters()} == {torch.float32}
        assert model.text_encoder_2.dtype == (torch.float32 if precision == 'no' else torch.bfloat16)
        declared = {name for parameters in model.trainables().values() for name, _ in parameters}
        _, gradients = grads(model, batch)
        assert set(gradients) == declared == set(model.state_dict())
        words = {k for k in gradients if 'vectors' in k}
        assert words == {f'adapters.{a}.vectors.{part}' for a in 'ab' for part in CLIPS}
        assert all(g.any() and g.isfinite().all() and g.dtype == torch.float32 for g in map(gradients.get, words))
    frozen = build(tiny_base, d=adapters['d'], c=adapters['c'])
    assert not frozen.text_trains and not any('vectors' in k for k in grads(frozen, batch)[1])


def test_gradients_in_fp64(tiny_base: Path) -> None:
    """Of a training step, against finite differences of its loss."""
    model = build(tiny_base, settings=dict(dtype='float64'), a=word())
    batch = make_batch(2, text=TEXT)
    _, gradients = grads(model, batch)
    for part in CLIPS:
        values, gradient = model.adapters['a'].vectors[part], gradients[f'adapters.a.vectors.{part}']
        direction = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                values.add_(step * direction)
                losses.append(float(model(batch, mode='loss')['loss']))
            values.add_(1e-5 * direction)
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
        assert values.dtype == torch.float64


def test_a_base_of_one_text_encoder(tmp_path: Path, tiny_base: Path) -> None:
    """The refiner has the second only: so does the word, and a file with one encoder's vectors is enough."""
    base = write_tiny_sdxl(tmp_path / 'base', cross_attention_dim=32)
    for part in ('text_encoder', 'tokenizer'):
        shutil.rmtree(base / part)
    index = json.loads((base / 'model_index.json').read_text())
    index.update(text_encoder=[None, None], tokenizer=[None, None])
    (base / 'model_index.json').write_text(json.dumps(index))
    model = build(base, a=word())
    assert list(model.adapters['a'].vectors) == ['text_encoder_2'] and model.new_tokens()[0] == {}
    changed = sample(model)
    assert (changed - sample(SDXL(pretrained=str(base)))).abs().max() > 1e-3
    model.adapters['a'].save(tmp_path / 'a')
    path = tmp_path / 'a' / 'learned_embeds.safetensors'
    assert list(load_file(path)) == ['clip_g']
    save_file({'emb_params': load_file(path)['clip_g']}, tmp_path / 'a1111.safetensors')
    for source in (path, tmp_path / 'a1111.safetensors'):
        assert torch.equal(sample(build_from(base, source)), changed)
    both = build(tiny_base, a=word())
    both.adapters['a'].save(tmp_path / 'both')
    with pytest.raises(UserError, match=r"1 unknown \(clip_l\)"):
        model.adapters['a'].load(tmp_path / 'both')


def build_from(base: Path, source: Path, **settings: Any) -> SDXL:
    """A model whose word comes from a file."""
    return SDXL(pretrained=str(base), adapters=dict(a=word(num_vectors=None, weights=str(source), **settings)))


def test_file_formats(tiny_base: Path, tmp_path: Path) -> None:
    """clip_l and clip_g in a file or folder of any name, a pickle, fp16; diffusers' and A1111's pairs of files."""
    model = build(tiny_base, a=word())
    vectors = {part: v.detach().clone() for part, v in model.adapters['a'].vectors.items()}
    expected = sample(model)
    first, second = vectors.values()
    sources = []

    def folder(name: str) -> Path:
        sources.append(tmp_path / name)
        sources[-1].mkdir()
        return sources[-1]
    save_file({'clip_g': second, 'clip_l': first}, folder('one') / 'anything.safetensors')
    torch.save({'clip_g': second, 'clip_l': first}, folder('pickle') / 'learned_embeds.bin')
    for suffix, key in (('', '<thing>'), ('_2', '<thing>')):
        name = f'learned_embeds{suffix}.safetensors'
        save_file({key: first if not suffix else second}, (folder('pair') if not suffix else sources[-1]) / name)
    for suffix, value in (('', first), ('_2', second)):
        torch.save({'string_to_token': {'*': 265}, 'string_to_param': {'*': value}, 'name': 'thing', 'step': 4,
                    'sd_checkpoint': None}, tmp_path / f'a1111{suffix}.pt')
    for source in (*sources, sources[0] / 'anything.safetensors', tmp_path / 'a1111.pt'):
        assert torch.equal(sample(build_from(tiny_base, source)), expected), source
        other = build(tiny_base, seed=5, a=word())
        other.adapters['a'].load(source)
        assert torch.equal(sample(other), expected)
    save_file({'clip_g': second.half(), 'clip_l': first.half()}, tmp_path / 'half.safetensors')
    half = build_from(tiny_base, tmp_path / 'half.safetensors').adapters['a'].vectors['text_encoder']
    assert half.dtype == torch.float32 and torch.equal(half, first.half().float())
    save_file({'clip_g': second[0], 'clip_l': first[0]}, tmp_path / 'single.safetensors')
    assert build_from(tiny_base, tmp_path / 'single.safetensors').adapters['a'].vectors['text_encoder'].shape == (1, 32)


@pytest.mark.parametrize(('tensors', 'sentence'), [
    (dict(clip_l=(2, 32), clip_g=(2, 32), clip_x=(2, 32)), r'1 unknown \(clip_x\)'),
    (dict(emb_params=(2, 32)), "one text encoder only; this base has two.*'clip_l' and 'clip_g'"),
    (dict(clip_l=(2, 24), clip_g=(2, 40)), 'another base: its vectors are 24 wide for text_encoder, whose embeddings '
                                           'are 32 wide and 40 wide for text_encoder_2'),
    (dict(clip_l=(1, 32), clip_g=(2, 32)), '1 vectors for text_encoder and 2 vectors for text_encoder_2'),
    (dict(clip_l=(3, 32), clip_g=(3, 32)), "holds 3 vectors"),
    (dict(clip_l=(1, 2, 32), clip_g=(1, 2, 32)), r'of shape \(1, 2, 32\)'),
    ({f'k{i:02}': (1, 32) for i in range(12)}, r'12 unknown \(k00, .*k09 \.\.\.\); 2 missing \(clip_g, clip_l\)')])
def test_files_that_do_not_fit(tiny_base: Path, tmp_path: Path, tensors: dict[str, Any], sentence: str) -> None:
    """Refused with the keys or widths at fault, by `load` and by `weights`; the word is unchanged."""
    path = tmp_path / 'bad.pt'
    torch.save({k: torch.zeros(shape) for k, shape in tensors.items()}, path)
    model = build(tiny_base, a=word())
    before = {k: v.clone() for k, v in model.adapters['a'].state_dict().items()}
    with pytest.raises(UserError, match=sentence):
        model.adapters['a'].load(path)
    with pytest.raises(UserError, match=sentence):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=word(weights=str(path))))
    assert all(torch.equal(v, before[k]) for k, v in model.adapters['a'].state_dict().items())


@pytest.mark.parametrize(('settings', 'sentence'), [
    (dict(token=''), "token='' is not a valid word"), (dict(token='my thing'), "token='my thing' is not a valid word"),
    (dict(token='x'), "'x'.* is in the tokenizer's vocabulary already"),
    (dict(num_vectors=0), 'num_vectors=0 must be at least 1'), (dict(scale=0.5), 'scale=0.5 of'),
    (dict(active_range=(0.0, 0.5)), r'active_range=\(0.0, 0.5\) of .* must be \(0, 1\)'),
    (dict(init=''), "init='' of"), (dict(init='<|endoftext|>'), 'unknown to the tokenizer')])
def test_invalid_settings(tiny_base: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=word(**settings)))


def test_words_must_differ(tiny_base: Path) -> None:
    """From other adapters' words and from the names of their further vectors; at scale 0 there is no word."""
    with pytest.raises(UserError, match="adapters 'a' and 'b' both add the token '<thing>'"):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=word(), b=word()))
    with pytest.raises(UserError, match="'<thing>_1'.* is added twice"):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=word(), b=word(token='<thing>_1')))
    model = build(tiny_base, a=word(scale=0.0), b=word())
    assert not torch.equal(sample(model), sample(SDXL(pretrained=str(tiny_base))))
    with pytest.raises(UserError, match='scale=0.5'):
        model.adapters['b'].scale = 0.5


def test_what_cannot_be_learned(tiny_base: Path) -> None:
    """Refused: a word at scale 0, and precomputed text embeddings, which don't read it."""
    model = build(tiny_base, a=word(scale=0.0))
    with pytest.raises(UserError, match="'a' has scale=0.*cannot be learned"):
        grads(model, make_batch(2, text=TEXT))
    embeds = dict(text_embeds=torch.zeros(2, 77, 64), pooled=torch.zeros(2, 32))
    with pytest.raises(UserError, match='give the samples their text'):
        grads(build(tiny_base, a=word()), make_batch(2, **embeds))
