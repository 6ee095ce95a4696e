"""Several data sets: shares, orders, keys, and what is refused; loss weights are in test_prior.py."""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import Draw, KeyedSampler, PriorPreservation, Shapes, collate
from diffengine_sdxl.datasets.mixture import Mixture
from diffengine_sdxl.errors import UserError


def shapes(length: int, *transforms: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return the config of one set of tiny images."""
    return dict(type='Shapes', length=length, size=8, **{'conditioning': None, **settings},
                transforms=[*transforms, dict(type='ComputeTimeIds'), dict(type='PackInputs')])


def mixture(*lengths: int, **settings: Any) -> Mixture:
    return Mixture({name: shapes(length) for name, length in zip('abc', lengths, strict=False)}, **settings)


def places(data: Mixture, epochs: int, seed: int = 3) -> list[tuple[int, int, int]]:
    """Return (set, row, the set's own epoch) of all samples of some epochs."""
    return [tuple(row) for epoch in range(epochs) for row in np.stack(data.place(epoch, seed), axis=1).tolist()]


@pytest.mark.parametrize(('lengths', 'weights'), [((5, 3), dict(a=2)), ((7, 2, 4), dict(a=0.1, b=0.7, c=0.2)),
                                                  ((2, 2, 2), dict(a=10, b=1, c=3)), ((3, 4), dict(a=0, b=2.5))])
def test_shares(lengths: tuple[int, ...], weights: dict[str, float]) -> None:
    """After each epoch every set has its share, to one sample, and has read each of its rows equally often, to one."""
    data = mixture(*lengths, weights=weights)
    shares = np.array([weights.get(name, 1) for name in data.sets]) / sum(weights.get(n, 1) for n in data.sets)
    for epochs in range(1, 9):
        read = places(data, epochs)
        assert len(read) == epochs * len(data) and len(set(read)) == len(read)
        counts = np.bincount([number for number, _, _ in read], minlength=len(lengths))
        assert np.abs(counts - shares * len(read)).max() < 1 + 1e-9
        assert data.counts(epochs) == counts.tolist()
        for number, length in enumerate(lengths):
            rows = np.bincount([row for n, row, _ in read if n == number], minlength=length)
            assert rows.max() - rows.min() <= 1


def test_repeats() -> None:
    """Each row comes up so often in each epoch; without a number once."""
    data = mixture(4, 2, repeats=dict(b=3))
    assert len(data) == 4 + 6 == len(mixture(4, 2)) + 4
    for epoch in range(2):
        count = Counter((n, row) for n, row, _ in np.stack(data.place(epoch, 0), axis=1).tolist())
        assert count == {**{(0, i): 1 for i in range(4)}, **{(1, i): 3 for i in range(2)}}
    # The sets take turns, without shuffling too.
    assert ''.join('ab'[n] for n in mixture(4, 2, repeats=dict(b=2)).place(0, 0)[0]) == 'abababab'


def test_order_within_a_set() -> None:
    """That of the sampler's kind, keyed by the seed, the set's name and its own epoch."""
    read = places(mixture(5, 3, weights=dict(b=4)), 6)
    for number, (name, length) in enumerate((('a', 5), ('b', 3))):
        for epoch in range(2):
            # Within an epoch of the mixture a set's rows are in its own order.
            rows = [row for n, row, own in read if n == number and own == epoch]
            order = torch.randperm(length, generator=rng.generator(3, 'order', name, epoch)).tolist()
            assert rows == order[:len(rows)] and rows


def test_samples() -> None:
    """Of the sets' own data sets, with the set's name; the noise of equal keys in two sets differs."""
    data = mixture(3, 2, weights=dict(a=1, b=2))
    sampler = iter(KeyedSampler(data, seed=5))
    draws = [next(sampler) for _ in range(3 * len(data))]
    samples = [data[draw] for draw in draws]
    assert len({(s['key'], s['epoch']) for s in samples}) == len(samples)
    assert {s['key'] for s in samples} == {f'a/train/{i}' for i in range(3)} | {f'b/train/{i}' for i in range(2)}
    own = Shapes(length=3, size=8, conditioning=None)
    for sample in samples:
        assert sample['data_set'] == sample['key'][0] and 'weight' not in sample
        assert np.array_equal(sample['img'].permute(1, 2, 0), own[int(sample['key'][-1])]['img'])
    # From the middle, in a worker of its own.
    data, sampler = pickle.loads(pickle.dumps(data)), iter(KeyedSampler(data, seed=5, start=8))
    assert [data[next(sampler)]['key'] for _ in range(5)] == [s['key'] for s in samples[8:13]]
    assert collate(samples[:4])['data_set'] == [s['data_set'] for s in samples[:4]]
    sized = data[Draw(0, 1, 5, size=(8, 8))]
    assert sized['key'] == data[Draw(0, 1, 5)]['key']


def test_sets_with_different_entries() -> None:
    """Masks, drops and weights of one set change nothing in another; a condition that one lacks is named."""
    drop = dict(type='JointDrop', adapters='ip', image=1.0, text=0.0, both=0.0)
    data = Mixture(dict(a=shapes(1, drop), b=shapes(1), c=shapes(1)))
    data.sets['b'].transforms.append(lambda sample: {**sample, 'mask': torch.zeros(1, 8, 8), 'weight': 0.5})
    batch = collate([data[i] for i in range(3)])
    assert batch['drop']['ip'].tolist() == [True, False, False] and batch['weight'].tolist() == [1.0, 0.5, 1.0]
    assert batch['mask'].sum(dim=(1, 2, 3)).tolist() == [64, 0, 64]
    assert [data.without_drops()[i].get('drop') for i in range(3)] == [None] * 3
    data = Mixture(dict(a=shapes(1, conditioning='edge'), b=shapes(1)))
    assert data[0]['data_set'] == 'a'
    with pytest.raises(UserError, match="samples of 'a' have 'conditioning_image', those of 'b' don't"):
        data[1]


def test_a_set_is_taken_out_with_its_weight() -> None:
    data = Mixture(dict(a=shapes(1), b=None), weights=dict(a=1, b=2), loss_weights=dict(b=0))
    assert list(data.sets) == ['a'] and len(data) == 1
    with pytest.raises(UserError, match="Mixture, set 'b': Shapes: length=0"):
        Mixture(dict(a=shapes(1), b=dict(type='Shapes', length=0)))


def test_captions_and_caches_reach_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    data = mixture(2, 1)
    monkeypatch.setattr(Shapes, 'caption_texts', lambda self: [f'of {len(self)}'] * len(self))
    assert list(data.captions()) == ['of 2', 'of 1', 'of 2']
    plans: list[Any] = []
    monkeypatch.setattr(Shapes, 'attach_cache', lambda self, plan: plans.append((self, plan)))
    data.attach_cache('plan')  # type: ignore[arg-type]
    assert plans == [(data.sets['a'], 'plan'), (data.sets['b'], 'plan')]


@pytest.mark.parametrize(('sets', 'settings', 'message'), [
    ({}, {}, 'sets is empty'), ({'a b': shapes(1)}, {}, "name 'a b' of a set must be an identifier, such as 'a_b'"),
    (None, dict(weights=dict(a=0, b=0)), 'sum to nothing'), (None, dict(weights=dict(a=-1)), r'weights.a=-1'),
    (None, dict(weights=dict(bb=1)), "weights names 'bb', which is not one of its sets a, b"),
    (None, dict(weights=dict(a=float('nan'))), 'weights.a=nan'), (None, dict(repeats=dict(a=0)), 'repeats.a=0'),
    (None, dict(repeats=dict(a=1.5)), 'repeats.a=1.5'), (None, dict(repeats={}, weights={}), 'exclude one another'),
    (None, dict(loss_weights=dict(a=0, b=0)), "loss_weights={'a': 0, 'b': 0} let nothing train"),
    (None, dict(loss_weights=dict(a='much')), "loss_weights.a='much'"),
    (dict(a=dict(type='Mixture', sets=dict(b=shapes(1)))), {}, 'Mixture: a must be a data set of numbered rows'),
    (dict(a=PriorPreservation(shapes(1), shapes(1))), {}, 'Mixture: a must be a data set of numbered rows')])
def test_refused(sets: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(dict(a=shapes(1), b=shapes(1)) if sets is None else sets, **settings)
