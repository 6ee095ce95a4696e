"""Samples are collated, and packed to a Batch."""

import pytest
import torch
from PIL import Image

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import pack
from diffengine_sdxl.registry import FUNCTIONS
from diffengine_sdxl.structures import Batch


def sample(key, **changes):
    size = changes.pop('size', 8)
    return dict(img=torch.full((3, size, size), float(key)), conditioning_image=torch.zeros(3, size, size),
                text=f't{key}', time_ids=torch.arange(6.0), key=key, epoch=2, seed=7, num_skipped=int(key), weight=0.5,
                drop={'text': key == '1', 'style': False}, note='x', **changes)


def test_collate_and_pack():
    out = FUNCTIONS.get('diffengine_sdxl.collate')([sample('1'), sample('2'), sample('3')])
    assert out['img'].shape == (3, 3, 8, 8) and out['img'][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert out['epoch'].dtype == out['seed'].dtype == torch.int64 and out['seed'].tolist() == [7, 7, 7]
    assert out['num_skipped'] == 6 and out['weight'].tolist() == [0.5] * 3
    assert out['drop']['text'].tolist() == [True, False, False] and out['drop']['style'].dtype == torch.bool
    batch = pack(out)
    assert isinstance(batch, Batch) and len(batch) == 3
    assert batch.text == ['t1', 't2', 't3'] and batch.key == ['1', '2', '3'] and batch.num_skipped == 6
    assert batch.conditions.keys() == {'conditioning_image'} and batch.time_ids.shape == (3, 6)
    assert batch.drop['text'].tolist() == [True, False, False]


def test_refusals():
    with pytest.raises(UserError, match=r"'1', '2' have 'img' of different sizes .*\(3, 8, 8\) float32, \(3, 4, 4\)"):
        collate([sample('1'), sample('2', size=4)])
    with pytest.raises(UserError, match=r"'1', '3' of one batch have different keys: \['depth'\]"):
        collate([sample('1'), sample('2'), sample('3', depth=torch.zeros(1))])
    with pytest.raises(UserError, match="'pic' of the samples '1' has type Image.*PackInputs"):
        collate([sample('1', pic=Image.new('RGB', (2, 2)))])
    out = collate([sample('1')])
    del out['time_ids']
    with pytest.raises(UserError, match="'time_ids'.*ComputeTimeIds"):
        pack(out)
