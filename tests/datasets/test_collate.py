"""Samples are collated, and packed to a Batch."""

from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.datasets.collate import fill_absent
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import pack
from diffengine_sdxl.registry import FUNCTIONS
from diffengine_sdxl.structures import Batch, Lookups


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


def test_what_some_samples_lack_changes_nothing():
    """Masks of one, weights of one, no drop, no key in the cache; a weight or a drop that is there stays."""
    one, other = sample('1', data_set='a'), sample('2', data_set='b', mask=torch.zeros(1, 8, 8))
    del one['weight'], other['drop']['style']
    one['lookups'] = {'text': Lookups(['x'], [{'text_embeds': torch.ones(2)}])}
    fill_absent([one, other])
    assert bool(one['mask'].all()) and one['weight'] == 1.0 and other['weight'] == 0.5
    assert other['drop'] == {'style': False, 'text': False} and one['drop']['text'] is True
    batch = pack(collate([one, other]))
    assert batch.lookups['text'].keys == ['x', ''] and batch.lookups['text'].values[1] is None
    assert batch.data_set == ['a', 'b'] and batch.weight.tolist() == [1.0, 0.5] and batch.mask.shape == (2, 1, 8, 8)
    plain = sample('3')
    fill_absent([plain])
    assert plain.keys() == sample('3').keys()


def test_lookups_travel_as_one_tensor():
    """From a loader's worker: values of any shape and dtype, and rows without any, come out as they were."""
    rows = [{'mean': torch.randn(4, 2, 2).bfloat16(), 'flag': torch.tensor(True), 'odd': torch.arange(7).byte()}, None,
            {'mean': torch.randn(4, 3, 2).double(), 'view': torch.arange(6.0).view(2, 3).t()}, {}]
    lookups = Lookups(list('abcd'), rows)
    rebuild, args = ForkingPickler._extra_reducers[Lookups](lookups)
    assert sum(isinstance(arg, torch.Tensor) for arg in args) == 1
    result = rebuild(*args)
    assert result.keys == lookups.keys and result.values[1] is None and result.values[3] == {}
    for got, expected in zip(result.values, rows, strict=True):
        assert (got or {}).keys() == (expected or {}).keys()
        assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype
                   for name in expected or {})
    empty = ForkingPickler._extra_reducers[Lookups](Lookups(['a'], [None]))
    assert empty[0](*empty[1]) == Lookups(['a'], [None])
