"""Prior preservation: pairs of samples whose mean loss is L_instance + w L_prior; regularisation sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_same, grads, t2i

from diffengine_sdxl.datasets import Draw, KeyedSampler, PriorPreservation, Shapes, collate
from diffengine_sdxl.datasets.mixture import Mixture
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import pack
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch


def shapes(length: int, split: str = 'train', **settings: Any) -> dict[str, Any]:
    """Return the config of one half."""
    return dict(type='Shapes', length=length, split=split, **settings,
                transforms=[dict(type='ComputeTimeIds'), dict(type='PackInputs')])


def batch_of(rows: list[Any]) -> Batch:
    return pack(collate(rows))


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    return SDXL(pretrained=str(tiny_base), adapters=dict(adapter=t2i()), objective=dict(type='Denoise'),
                dtype='float64')


@pytest.mark.parametrize('weight', [0.25, 0.0])
def test_the_loss_is_a_sum_of_means(model: SDXL, weight: float) -> None:
    """Loss and gradients, fp64, equal those of both halves; a plain mean would be half of that."""
    data = PriorPreservation(shapes(3), shapes(2, 'class'), weight)
    rows = [data[Draw(i, 0, 5)] for i in (2, 0)]
    loss, gradients = grads(model, batch_of(rows))
    halves = []
    for half in range(2):
        samples = [{k: v for k, v in row[half].items() if k != 'weight'} for row in rows]
        halves.append(grads(model, batch_of(samples)))
    expected = {'loss': halves[0][0] + weight * halves[1][0],
                **{k: halves[0][1][k] + weight * halves[1][1][k] for k in gradients}}
    assert_same({'loss': loss, **gradients}, expected, 1e-10)


def test_a_regularisation_set(model: SDXL) -> None:
    """Kohya's way: the mean of the samples' losses, each times the weight of its set; loss and gradients, fp64."""
    data = Mixture(dict(thing=shapes(2), reg=shapes(2, 'class')), weights=dict(thing=1, reg=1),
                   loss_weights=dict(reg=0.25))
    samples = [data[Draw(i, 0, 0)] for i in range(3)]
    weights = [0.25 if sample['data_set'] == 'reg' else 1.0 for sample in samples]
    assert [sample['weight'] for sample in samples] == weights and len({*weights}) == 2
    loss, gradients = grads(model, batch_of(samples))
    alone = [grads(model, batch_of([{k: v for k, v in s.items() if k != 'weight'}])) for s in samples]
    expected = {'loss': sum(w * x for w, (x, _) in zip(weights, alone, strict=True)) / 3, **{
        k: sum(w * g[k] for w, (_, g) in zip(weights, alone, strict=True)) / 3 for k in gradients}}
    assert_same({'loss': loss, **gradients}, expected, 1e-10)


def test_rows_of_both() -> None:
    """The longer one decides; the shorter is repeated as another epoch; keys differ; instances come first."""
    data = PriorPreservation(shapes(5), shapes(2, 'class'), 0.5)
    sampler = iter(KeyedSampler(data, seed=1))
    rows = [data[next(sampler)] for _ in range(10)]
    assert len(data) == 5 and all(len(row) == 2 for row in rows)
    keys = [(s['key'], s['epoch']) for row in rows for s in row]
    assert len(set(keys)) == 20, 'a sample was read twice with the same draws'
    assert {k for k, _ in keys[::2]} == {f'train/{i}' for i in range(5)}
    assert {k for k, _ in keys[1::2]} == {'prior/class/0', 'prior/class/1'}
    assert collate(rows)['weight'].tolist() == [2.0, 1.0] * 10
    assert torch.equal(rows[0][0]['img'], Shapes(**{k: v for k, v in shapes(5).items() if k != 'type'})[
        Draw(int(keys[0][0][-1]), 0, 1)]['img'])


def test_an_uneven_prior_is_read_evenly() -> None:
    """Over 3 epochs of 5 rows each of 3 class images is read 5 times, each time as another epoch."""
    data = PriorPreservation(shapes(5), shapes(3, 'class'))
    sampler = iter(KeyedSampler(data, seed=1))
    draws = [next(sampler) for _ in range(15)]
    read = sorted((row[1]['key'], row[1]['epoch']) for row in (data[draw] for draw in draws))
    assert read == [(f'prior/class/{i}', epoch) for i in range(3) for epoch in range(5)]
    resumed = iter(KeyedSampler(data, seed=1, start=7))
    assert [next(resumed) for _ in range(8)] == draws[7:]


def test_weights_of_samples_are_multiplied() -> None:
    instance = Shapes(length=1)
    instance.transforms = [lambda sample: {**sample, 'weight': 0.5}]
    assert [s['weight'] for s in PriorPreservation(instance, Shapes(length=1), 3.0)[0]] == [1.0, 6.0]


@pytest.mark.parametrize('half', [0, 1])
def test_a_half_without_masks_counts_fully(half: int) -> None:
    data = [Shapes(length=1), Shapes(length=1)]
    data[half].transforms = [lambda sample: {**sample, 'mask': torch.zeros(1, 8, 8)}]
    row = PriorPreservation(*data)[0]
    assert float(row[half]['mask'].sum()) == 0 and float(row[1 - half]['mask'].sum()) == 64


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(weight=-1), 'weight=-1'), (dict(weight='much'), "weight='much'"), (dict(weight=float('nan')), 'weight=nan')])
def test_bad_weights(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PriorPreservation(shapes(1), shapes(1), **settings)


def test_a_stream_is_refused(circles: Path) -> None:
    stream = dict(type='HFStream', source=str(circles), conditioning_image_column=None)
    with pytest.raises(UserError, match='instance must be a data set of numbered rows'):
        PriorPreservation(stream, shapes(1))
    with pytest.raises(IndexError, match='no row 1'):
        PriorPreservation(shapes(1), shapes(1))[1]


def test_halves_with_different_keys() -> None:
    """Drops of one half don't apply to the other; a key that only one has is named."""
    drop = dict(type='JointDrop', adapters='ip', image=1.0, text=0.0, both=0.0)
    instance = {**shapes(1), 'transforms': [drop, *shapes(1)['transforms']]}
    row = PriorPreservation(instance, shapes(1))[0]
    assert [s['drop'] for s in row] == [{'ip': True}, {'ip': False}] and collate([row])['drop']['ip'].tolist() == [1, 0]
    with pytest.raises(UserError, match="only one has 'conditioning_image'"):
        PriorPreservation(shapes(1), shapes(1, conditioning=None))[0]
