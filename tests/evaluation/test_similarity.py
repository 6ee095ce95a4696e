"""CLIP-T, PickScore, CLIP-I and DINO against transformers and a cosine by hand, and their names and sentences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from evaluation.test_networks import ENCODER, by_hand, pictures
from evaluation.tiny_networks import write_clip, write_vision

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.networks import release
from diffengine_sdxl.models.data_preprocessor import images_to_floats
from diffengine_sdxl.registry import METRICS

TEXTS = ['a red circle', 'x', 'a blue star on a green ground, much longer than the model reads']


@pytest.fixture(scope='module')
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp('networks') / 'clip-tiny')


def batch(num: int = 3) -> dict[str, Any]:
    """A batch as the evaluation gives it: 'img' in [-1, 1], an image prompt in [0, 1] of another size."""
    own, prompt = pictures(num, 36, 44), pictures(num, 32, 32).flip(0)
    return images_to_floats(collate([
        {'key': f'k{i}', 'text': TEXTS[i], 'img': (own[i] * 255).round().byte(), 'reference': prompt[i],
         'several': torch.stack([prompt[i]] * 2), 'num_skipped': 0} for i in range(num)]))


def outputs(data: dict[str, Any], seed: int = 0, **images: torch.Tensor) -> list[dict[str, Any]]:
    return [{'key': key, 'seed': seed, 'images': {name: value[i] for name, value in images.items()}}
            for i, key in enumerate(data['key'])]


def measured(config: dict[str, Any], data: dict[str, Any], **images: torch.Tensor) -> Any:
    metric = METRICS.build(config)
    metric.check(len(data['key']), 1)
    metric.process(data, outputs(data, **images))
    return metric, metric.evaluate(len(data['key']))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(a * b for a, b in zip(x, y, strict=True)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5)


@pytest.mark.parametrize(('kind', 'name'), [('CLIPText', 'clip_t'), ('PickScore', 'pickscore')])
def test_prompts_and_images(kind: str, name: str, clip: Path) -> None:
    data, images = batch(), pictures()
    metric, numbers = measured(dict(type=kind, model=str(clip)), data, base=images.flip(0), adapted=images)
    net, inputs = by_hand(transformers.CLIPModel, clip, images)
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(TEXTS, padding=True, truncation=True, max_length=20,
                                                               return_tensors='pt')
    with torch.no_grad():
        output = net(**inputs, **tokens)
    expected = output.logits_per_image.diagonal().numpy()  # exp(logit_scale) times the cosines
    assert net.logit_scale.exp() > 10
    expected = expected if kind == 'PickScore' else expected / net.logit_scale.exp().item()
    scores = metric.per_image()
    assert [scores[key, 0, 'adapted'] for key in data['key']] == pytest.approx(expected.tolist(), abs=1e-6)
    assert numbers[f'adapted/{name}_clip-tiny'] == pytest.approx(expected.mean(), abs=1e-6)
    assert numbers[f'adapted/{name}_clip-tiny/better'] == 1
    assert numbers[f'adapted - base/{name}_clip-tiny'] == pytest.approx(
        np.mean([scores[key, 0, 'adapted'] - scores[key, 0, 'base'] for key in data['key']]))


@pytest.mark.parametrize('reference', ['img', 'reference'])
def test_images_and_the_samples_own(reference: str, clip: Path, tmp_path: Path) -> None:
    data, images = batch(), pictures()
    own = pictures(3, 36, 44) if reference == 'img' else pictures(3, 32, 32).flip(0)
    for kind, folder, cls in (('CLIPImage', clip, transformers.CLIPModel),
                              ('DINO', write_vision(tmp_path / 'dinov2-x', 'dinov2'), transformers.Dinov2Model)):
        metric, numbers = measured(dict(type=kind, model=str(folder), reference=reference), data, adapted=images)
        vectors = []
        for given in (images, own):
            net, inputs = by_hand(cls, folder, given)
            with torch.no_grad():
                vectors.append((net.get_image_features(**inputs) if kind == 'CLIPImage' else net(**inputs)
                                ).pooler_output.numpy().astype(np.float64))
        expected = [cosine(x, y) for x, y in zip(*vectors, strict=True)]
        assert list(metric.per_image().values()) == pytest.approx(expected, abs=1e-6)
        name = {'CLIPImage': 'clip_i_clip-tiny', 'DINO': 'dino_dinov2-x'}[kind]
        assert numbers[f'adapted/{name}'] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_same_image_by_the_shipped_encoder_and_more_seeds() -> None:
    data, metric = batch(), METRICS.build(dict(type='CLIPImage', model=ENCODER))
    release()
    for seed in range(2):
        metric.process(data, outputs(data, seed, base=pictures(), adapted=pictures(3, 36, 44)))
    numbers = metric.evaluate(6)
    assert numbers['adapted/clip_i_image_encoder'] == pytest.approx(1, abs=1e-12)
    assert numbers['base/clip_i_image_encoder'] < 0.99
    assert numbers['base/clip_i_image_encoder/num_samples'] == 6
    # Each batch goes through the network once: the data's own images, which are the adapted ones too, and the base's.
    assert len(metric.features.network._features) == 2


def test_default_networks_and_their_names() -> None:
    for kind, name in (('CLIPText', 'clip_t'), ('CLIPImage', 'clip_i'), ('DINO', 'dino'), ('PickScore', 'pickscore')):
        metric = METRICS.build(dict(type=kind))
        assert metric.name == name
    assert metric.images.network.source.processor == 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
    assert METRICS.build(dict(type='PickScore', model='/m/PickScore_v1')).name == 'pickscore'
    assert METRICS.build(dict(type='PickScore', model='/m/PickScore_v1')).images.network.source.processor == ''


def test_what_is_missing_is_said(clip: Path, tmp_path: Path) -> None:
    data = batch()
    with pytest.raises(UserError, match="CLIPImage needs 'refrence' of every sample.*reference='img'"):
        measured(dict(type='CLIPImage', model=str(clip), reference='refrence'), data, adapted=pictures())
    with pytest.raises(UserError, match="CLIPImage compares with 'several' of each sample"):
        measured(dict(type='CLIPImage', model=str(clip), reference='several'), data, adapted=pictures())
    del data['text']
    with pytest.raises(UserError, match="CLIPText needs 'text' of every sample.*caption_column"):
        measured(dict(type='CLIPText', model=str(clip)), data, adapted=pictures())
    with pytest.raises(UserError, match='reads no text'):
        METRICS.build(dict(type='CLIPText', model=ENCODER)).check(1, 1)
    with pytest.raises(UserError, match="There is no file or folder"):
        METRICS.build(dict(type='DINO', model=str(tmp_path / 'none'))).check(1, 1)


def test_a_processor_of_another_folder(clip: Path, tmp_path: Path) -> None:
    """As PickScore's, whose tokenizer and image processor are those of the CLIP that it was tuned from."""
    bare = tmp_path / 'PickScore_v1'
    transformers.CLIPModel.from_pretrained(clip).save_pretrained(bare)
    data, images = batch(), pictures()
    with pytest.raises(UserError, match='PickScore_v1. has no tokenizer.json'):
        METRICS.build(dict(type='PickScore', model=str(bare))).check(1, 1)
    _, whole = measured(dict(type='PickScore', model=str(clip)), data, adapted=images)
    _, parts = measured(dict(type='PickScore', model=str(bare), processor=str(clip)), data, adapted=images)
    assert list(parts.values()) == list(whole.values()) and 'adapted/pickscore' in parts
