"""The distance between a sample's images of several seeds: by hand, for copies, for noise."""

from itertools import combinations

import numpy as np
import pytest
import torch
from evaluation.test_networks import ENCODER, pictures
from evaluation.test_similarity import batch, cosine, outputs

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.networks import ImageFeatures
from diffengine_sdxl.registry import METRICS

NAME = 'seed_diversity_image_encoder'


def test_mean_over_pairs_and_samples() -> None:
    data, metric = batch(), METRICS.build(dict(type='SeedDiversity', model=ENCODER))
    images = pictures(9).reshape(3, 3, 3, 40, 56)  # seed, sample
    metric.check(3, 3)
    for seed in (2, 0, 1):
        metric.process(data, outputs(data, seed, base=images[0], adapted=images[seed]))
    numbers = metric.evaluate(9)
    features = [ImageFeatures(ENCODER)(of_seed, torch.device('cpu')) for of_seed in images]
    expected = [float(np.mean([1 - cosine(features[a][i], features[b][i]) for a, b in combinations(range(3), 2)]))
                for i in range(3)]
    estimate = interval.mean(expected, range(3), (0, 2))
    assert [numbers[f'adapted/{NAME}{q}'] for q in ('', '/low', '/high')] == pytest.approx(estimate[:3], abs=1e-6)
    assert numbers[f'adapted/{NAME}/num_samples'] == 9
    assert numbers[f'base/{NAME}'] == pytest.approx(0, abs=1e-12)  # copies
    gap = interval.difference(expected, [0, 0, 0], range(3))
    assert [numbers[f'adapted - base/{NAME}{q}'] for q in ('', '/low', '/high', '/p')] == pytest.approx(
        [gap.value, gap.low, gap.high, gap.p], abs=1e-6)


def test_one_seed_is_refused_before_images() -> None:
    with pytest.raises(UserError, match='of several seeds, and there is one seed; set `seeds`'):
        METRICS.build(dict(type='SeedDiversity', model=ENCODER)).check(100, 1)
