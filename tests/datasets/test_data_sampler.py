"""The order of the rows depends on (seed, position), not on processes, batches or resuming."""

from itertools import islice

import pytest
import torch

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import Draw, FiniteSampler, KeyedSampler
from diffengine_sdxl.datasets import data_sampler as sampler
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATA_SAMPLERS


def take(monkeypatch, num, rank=0, world=1, rows=10, **options):
    monkeypatch.setattr(sampler, 'get_dist_info', lambda: (rank, world))
    return list(islice(KeyedSampler(range(rows), **options), num))


def test_each_epoch_is_another_permutation(monkeypatch):
    draws = take(monkeypatch, 30, seed=3)
    epochs = [[d.index for d in draws[i:i + 10]] for i in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    assert [d.epoch for d in draws] == [0] * 10 + [1] * 10 + [2] * 10
    assert {d.seed for d in draws} == {3}
    assert epochs[1] == torch.randperm(10, generator=rng.generator(3, 'order', 1)).tolist()
    assert epochs[0] != [d.index for d in take(monkeypatch, 10, seed=4)]


def test_seed_none_is_zero_and_zero_is_kept(monkeypatch):
    assert take(monkeypatch, 5, seed=None) == take(monkeypatch, 5, seed=0) != take(monkeypatch, 5, seed=1)


def test_not_shuffled(monkeypatch):
    assert take(monkeypatch, 12, shuffle=False) == [Draw(i % 10, i // 10, 0) for i in range(12)]


@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_the_rows_of_one(monkeypatch, world):
    whole = take(monkeypatch, 12 * world, seed=5, rows=7)
    parts = [take(monkeypatch, 12, rank, world, seed=5, rows=7) for rank in range(world)]
    assert [draw for step in zip(*parts, strict=True) for draw in step] == whole


def test_start_resumes_a_run(monkeypatch):
    whole = take(monkeypatch, 40, seed=1, rows=7)
    assert take(monkeypatch, 28, seed=1, rows=7, start=12) == whole[12:]
    monkeypatch.setattr(sampler, 'get_dist_info', lambda: (1, 2))
    resumed = KeyedSampler(range(7), seed=1)
    resumed.start = 12
    assert list(islice(resumed, 14)) == whole[13::2]


def test_start_that_cannot_be_split(monkeypatch):
    with pytest.raises(UserError, match='sample 3 .* 2 processes'):
        take(monkeypatch, 1, 0, 2, start=3)


def test_finite_passes_each_row_once_without_padding(monkeypatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(sampler, 'get_dist_info', lambda rank=rank: (rank, 3))
        finite = FiniteSampler(range(7), seed=2)
        parts.append(list(finite))
        assert len(parts[-1]) == len(finite)
    assert [[d.index for d in part] for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert {(d.epoch, d.seed) for part in parts for d in part} == {(0, 2)}


def test_built_as_the_runner_builds_it():
    built = DATA_SAMPLERS.build(dict(type='KeyedSampler'), default_args=dict(dataset=range(4), seed=9))
    assert built.seed == 9 and len(built) == 4
    with pytest.raises(UserError, match='empty'):
        KeyedSampler([])
