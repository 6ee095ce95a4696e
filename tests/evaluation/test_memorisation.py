"""The nearest training image: found, by hand, the share of copies, a part of the data, what cannot be compared."""

import numpy as np
import pytest
import torch
from evaluation.test_networks import ENCODER
from evaluation.test_similarity import cosine, outputs

from diffengine_sdxl.datasets import Shapes
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import memorisation
from diffengine_sdxl.evaluation.networks import ImageFeatures
from diffengine_sdxl.registry import METRICS

TRAINING = dict(type='Shapes', length=12, conditioning=None, transforms=[dict(type='PackInputs')])
CPU = torch.device('cpu')


def shown(split: str, num: int) -> torch.Tensor:
    data = Shapes(length=num, split=split, conditioning=None, transforms=[dict(type='PackInputs')])
    return torch.stack([data[i]['img'] for i in range(num)]).float() / 255


def test_copies_and_new_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorisation, 'CHUNK', 3)
    training, new = shown('train', 12), shown('test', 4)
    images = torch.cat([training[[7]], new[1:]])
    known, found, others = (ImageFeatures(ENCODER)(x, CPU) for x in (training, images, new))
    nearest = [[max(cosine(x, y) for y in known) for x in of_set] for of_set in (found, others)]
    assert nearest[0][0] == pytest.approx(1)
    threshold = round(sum(sorted(nearest[0])[1:3]) / 2, 4)  # two of the four are as near
    data = {'key': [f'k{i}' for i in range(4)]}
    numbers: dict[str, float] = {}
    metrics = [METRICS.build(dict(config, dataset=TRAINING, model=ENCODER)) for config in (
        dict(type='NearestTrain'), dict(type='Memorisation', threshold=threshold))]
    assert metrics[0].training is metrics[1].training  # read once
    for metric in metrics:
        assert metric.check(4, 1) is None
        metric.process(data, outputs(data, base=new, adapted=images))
        numbers |= metric.evaluate(4)
    assert list(metrics[0].per_image().values())[1::2] == pytest.approx(nearest[0], abs=1e-6)
    assert numbers['adapted/nearest_train_image_encoder'] == pytest.approx(np.mean(nearest[0]), abs=1e-6)
    assert numbers['adapted/nearest_train_image_encoder/better'] == -1
    name, share = f'memorisation_image_encoder_{threshold:g}', np.mean(np.array(nearest[1]) >= threshold)
    assert (numbers[f'adapted/{name}'], numbers[f'base/{name}']) == (0.5, share)
    assert numbers[f'adapted - base/{name}'] == pytest.approx(0.5 - share)


def test_the_order_of_results_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: several processes gather theirs in another one."""
    monkeypatch.setattr(memorisation, 'CHUNK', 3)
    metric = METRICS.build(dict(type='NearestTrain', dataset=TRAINING, model=ENCODER))
    data = {'key': ['b', 'a', 'd', 'c']}
    for seed in range(2):
        metric.process(data, outputs(data, seed, base=shown('test', 4)))
    results = list(metric.results)
    assert metric.compute_metrics(results) == metric.compute_metrics(results[::-1])


def test_a_part_of_the_training_data_is_said() -> None:
    metric = METRICS.build(dict(type='NearestTrain', dataset=TRAINING, model=ENCODER, max_samples=4))
    assert str(metric.check(4, 1)).startswith('NearestTrain compares with 4 of 12 training images')
    rows = ImageFeatures(ENCODER)(shown('train', 12)[[0, 3, 6, 9]], CPU)
    assert np.abs(metric.training.compute(CPU) - rows).max() < 1e-5


@pytest.mark.parametrize('threshold', [0, 1, 1.5, '0.9', True])
def test_thresholds_are_checked(threshold: object) -> None:
    with pytest.raises(UserError, match='must be a cosine, above 0 and below 1'):
        METRICS.build(dict(type='Memorisation', dataset=TRAINING, threshold=threshold))
