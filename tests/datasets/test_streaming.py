"""A stream has one global order, which does not depend on workers and processes."""

import shutil
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffengine_sdxl.datasets import HFDataset, collate, image_files, streaming
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.testing import draw_circle, write_circles

NUM = 7
PACK = [dict(type='Crop', size=16, mode='random'), dict(type='ComputeTimeIds'), dict(type='PackInputs')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_circles(tmp_path_factory.mktemp('data'), NUM, 32)


def stream(folder, **options):
    return DATASETS.build(dict(type='HFStream', source=str(folder), **{**dict(transforms=PACK, seed=3), **options}))


def keys(data, num):
    return [(s['key'], s['epoch']) for s in islice(data, num)]


def load(data, num, num_workers=0, batch_size=2):
    data.batch_size = batch_size
    loader = torch.utils.data.DataLoader(data, batch_size, num_workers=num_workers, collate_fn=collate)
    return list(islice(loader, num))


def test_samples_equal_those_of_the_map_style_data(folder, tmp_path):
    table = HFDataset(folder, cache_dir=tmp_path)
    for index, out in enumerate(stream(folder, buffer_size=0, repeat=False, transforms=())):
        np.testing.assert_array_equal(out['img'], table[index]['img'])
        np.testing.assert_array_equal(out['conditioning_image'], draw_circle(index, 32)[1])
        assert out['key'] == table[index]['key'] and out['text'] == table[index]['text'] and out['seed'] == 3
    assert index == NUM - 1


@pytest.mark.parametrize('buffer_size', [3, 100])
def test_epochs_are_shuffled_by_key(folder, buffer_size):
    seen = keys(stream(folder, buffer_size=buffer_size), 3 * NUM)
    epochs = [[k for k, e in seen if e == epoch] for epoch in range(3)]
    assert all(sorted(order) == [str(i) for i in range(NUM)] for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and seen[:NUM] == [(k, 0) for k in epochs[0]]
    assert seen == keys(stream(folder, buffer_size=buffer_size), 3 * NUM)
    assert seen != keys(stream(folder, buffer_size=buffer_size, seed=4), 3 * NUM)
    assert keys(stream(folder, max_samples=2, buffer_size=0), 4) == [('0', 0), ('1', 0), ('0', 1), ('1', 1)]


def test_processes_workers_and_start(folder, monkeypatch):
    single = load(stream(folder), 8)
    for other in (load(stream(folder), 8, num_workers=2), load(stream(folder, buffer_size=99), 8, num_workers=2)):
        assert all(torch.equal(a['img'], b['img']) and a['key'] == b['key'] for a, b in zip(single, other, strict=True))
    assert len(Counter(tuple(b['time_ids'].flatten().tolist()) for b in single)) > 4
    parts = []
    for rank in range(2):
        monkeypatch.setattr(streaming, 'get_dist_info', lambda rank=rank: (rank, 2))
        parts.append(load(stream(folder), 8, batch_size=1, num_workers=2 * rank))
    for whole, first, second in zip(single, *parts, strict=True):
        assert torch.equal(whole['img'], torch.cat([first['img'], second['img']]))
    with pytest.raises(UserError, match='sample 3 .* 2 processes'):
        next(iter(stream(folder, start=3)))
    monkeypatch.undo()
    for num_workers in (0, 2):
        resumed = stream(folder)
        resumed.start = 6
        assert [b['key'] for b in load(resumed, 5, num_workers)] == [b['key'] for b in single[3:]]


def test_start_decodes_only_what_it_returns(folder, monkeypatch):
    decoded = []
    decode = image_files.decode
    monkeypatch.setattr(image_files, 'decode', lambda data, what: decoded.append(what) or decode(data, what))
    next(iter(stream(folder, start=12)))
    assert len(decoded) == 2


def test_workers_need_the_batch_size(folder, monkeypatch):
    monkeypatch.setattr(streaming, 'get_worker_info', lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(UserError, match='needs the batch_size'):
        next(iter(stream(folder)))


def test_bad_rows(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / 'copy')
    for index in (1, 2, 6):
        path = copy / f'images/0000{index}.png'
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="Column 'image' of row 1 of"):
        list(stream(copy, buffer_size=0, repeat=False))
    options = dict(buffer_size=0, on_bad_image='skip')
    out = list(islice(stream(copy, **options), 8))
    assert [s['key'] for s in out] == ['0', '3', '3', '3', '4', '5', '0', '0']
    assert [s['num_skipped'] for s in out] == [0, 2, 1, 0, 0, 0, 1, 0] and [s['epoch'] for s in out] == [0] * 6 + [1, 1]
    assert [s['key'] for s in stream(copy, repeat=False, **options)] == ['0', '3', '3', '3', '4', '5']
    assert keys(stream(copy, start=6, **options), 2) == [('0', 1), ('0', 1)]
    monkeypatch.setattr(streaming, 'MAX_BAD_ROWS', 2)
    with pytest.raises(UserError, match='2 consecutive rows of .* have no readable image'):
        keys(stream(copy, **options), 2)


def test_refusals(folder, tmp_path):
    with pytest.raises(UserError, match="no column 'txt' .caption_column.*Did you mean 'text'"):
        stream(folder, caption_column='txt')
    (tmp_path / 'none.jsonl').touch()
    (tmp_path / 'none').mkdir()
    for name in ('none', 'none.jsonl'):
        with pytest.raises(UserError, match=f"{name}' is empty"):
            stream(tmp_path / name)


def test_a_file_that_cannot_be_parsed_ends_the_stream(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' * 3)
    (tmp_path / 'b.jsonl').write_text('{"text": \n')
    data = stream(tmp_path, image_column=None, conditioning_image_column=None, transforms=(), buffer_size=0)
    samples = iter(data)
    assert [next(samples)['text'] for _ in range(3)] == ['a'] * 3
    with pytest.raises(UserError, match=f"{tmp_path.name}' cannot be read: "):
        next(samples)
