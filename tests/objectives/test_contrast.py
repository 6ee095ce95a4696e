"""ImageTextContrast against the CLIP paper's pseudocode and a loop; that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, make_batch, t2i
from runs import curves, train
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.structures import Batch

ENCODER = dict(type='ImageEncoder', image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
               num_attention_heads=2)
CAPTIONS = ['a red star', 'a blue circle on brown', 'one green square', 'a pink triangle']
TWICE = ['a red star', 'a blue circle', 'a red star', 'a pink triangle', 'a red star']


def build(base: Path, dtype: str | None = 'float64', **options: Any) -> SDXL:
    model = SDXL(pretrained=str(base), dtype=dtype, adapters=dict(image_encoder=ENCODER),
                 objective=dict(type='ImageTextContrast', **options))
    model.train()
    return model


def batch_of(captions: list[str]) -> Batch:
    return make_batch(len(captions), (32, 32), text=captions, conditions={})


def similarity(base: Path, model: SDXL, batch: Batch) -> Tensor:
    """Cosines of images and captions, [B, B], by the classes of transformers."""
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder='tokenizer_2')
    encoder = CLIPTextModelWithProjection.from_pretrained(base, subfolder='text_encoder_2').double()
    ids = tokenizer(batch.text, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
    text = encoder(ids).text_embeds
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    assert batch.img is not None
    images = model.adapters['image_encoder'].net((batch.img.double() * 0.5 + 0.5 - mean) / std).image_embeds
    return (images / images.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T


def clip_loss(logits: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3: the right label of a row and of a column is its own number."""
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize('temperature', [0.05, 1.0])
def test_loss_and_gradients_are_those_of_clip(tiny_base: Path, temperature: float) -> None:
    """1e-10 in fp64; only the encoder gets gradients, and all of it does."""
    model, batch = build(tiny_base, temperature=temperature), batch_of(CAPTIONS)
    cosines = similarity(tiny_base, model, batch)
    expected = clip_loss(cosines / temperature)
    expected.backward()
    parameters = dict(model.named_parameters())
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    found = model(batch, mode='loss')
    assert found['loss'].dtype == torch.float64
    torch.testing.assert_close(found['loss'], expected.detach(), rtol=1e-10, atol=0, check_dtype=True)
    assert float(found['accuracy']) == (cosines.argmax(dim=1) == torch.arange(4)).double().mean()
    total, logged = model.parse_losses(found)
    assert torch.equal(total, found['loss']) and set(logged) == {'loss', 'accuracy'}
    total.backward()
    assert_same({n: p.grad for n, p in parameters.items() if p.grad is not None}, gradients, 1e-10)
    assert set(gradients) == set(model.state_dict()) == {n for n in parameters if n.startswith('adapters.')}
    assert build(tiny_base, dtype=None)(batch, mode='loss')['loss'].dtype == torch.float32


def test_a_caption_that_occurs_twice_is_right_for_both(tiny_base: Path) -> None:
    """By a loop: the cross-entropy of each row and column to equal shares of all equal captions."""
    model, batch = build(tiny_base), batch_of(TWICE)
    cosines = similarity(tiny_base, model, batch).detach() / 0.05
    terms = []
    for i, caption in enumerate(TWICE):
        right = [j for j, other in enumerate(TWICE) if other == caption]
        rows, columns = cosines[i].log_softmax(dim=0), cosines[:, i].log_softmax(dim=0)
        terms += [-sum(float(rows[j]) for j in right) / len(right), -sum(float(columns[j]) for j in right) / len(right)]
    found = model(batch, mode='loss')
    assert float(found['loss'].detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-10)
    assert float(found['accuracy']) == pytest.approx(sum(
        TWICE[int(row.argmax())] == TWICE[i] for i, row in enumerate(cosines)) / len(TWICE))
    alike = model(batch_of(['the same'] * 3), mode='loss')
    assert float(alike['accuracy']) == 1 and float(alike['loss'].detach()) >= torch.log(torch.tensor(3.0)) - 1e-6


@pytest.mark.parametrize(('options', 'words'), [
    (dict(objective=dict(type='ImageTextContrast', adapter='image_encodr'), adapters=dict(image_encoder=ENCODER)),
     "'image_encodr', but model.adapters holds image_encoder. Did you mean 'image_encoder'"),
    (dict(objective=dict(type='ImageTextContrast')), "'image_encoder', but model.adapters holds nothing"),
    (dict(objective=dict(type='ImageTextContrast', adapter='a'), adapters=dict(a=t2i())), "encoder 'a', but")])
def test_without_an_image_encoder(tiny_base: Path, options: dict[str, Any], words: str) -> None:
    model = SDXL(pretrained=str(tiny_base), **options)
    with pytest.raises(ValueError, match=words):
        model(make_batch(2), mode='loss')


def test_what_is_refused(tiny_base: Path) -> None:
    for temperature in (0, -0.1):
        with pytest.raises(ValueError, match=f'temperature={temperature} must be above 0'):
            OBJECTIVES.build(dict(type='ImageTextContrast', temperature=temperature))
    with pytest.raises(ValueError, match="(hold|have) no 'img'; .* cannot learn from cached latents"):
        build(tiny_base)(make_batch(2, img=None, latents=torch.zeros(2, 4, 4, 4)), mode='loss')


def test_it_learns(tiny_base: Path, tmp_path: Path) -> None:
    """The shapes world's config on the tiny base: captions are told apart better than by chance, 1 in 8."""
    train(tmp_path, {
        'model.pretrained': str(tiny_base), 'resolution': 32, 'train_cfg.max_iters': 30,
        'model.adapters.image_encoder.image_size': 32, 'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.length': 16, 'param_scheduler.num_warmup_steps': 0,
        'default_hooks.logger.interval': 1, 'default_hooks.checkpoint.interval': 30}, name='shapes_image_encoder')
    rows = curves(tmp_path)
    first, last = ([sum(row[k] for row in part) / 6 for k in ('loss', 'accuracy')]
                   for part in (rows[:6], rows[-6:]))
    assert last[0] < 0.85 * first[0] and last[1] > 0.3, (first, last)
    assert (tmp_path / 'step30' / 'image_encoder' / 'preprocessor_config.json').is_file()
