"""A cache is read as it was written; an incomplete or damaged one is refused by name."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from diffengine_sdxl.datasets import CachedLatents, Draw, KeyedSampler, collate
from diffengine_sdxl.datasets.cached import ORIGIN, ROWS
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import BatchPreprocessor
from diffengine_sdxl.registry import DATASETS

SHARDS = (3, 1, 2)
NUM = sum(SHARDS)
#: With line separators of `str.splitlines` that are not those of JSON lines.
TEXTS = ['a red star', '', 'ünï\u2028code\x85', 'two\nlines', 'a "quoted" one', '\U0001f431\x0b\x1c']
TENSORS = {'latents': torch.randn(NUM, 4, 2, 3, generator=torch.Generator().manual_seed(0)),
           'time_ids': torch.arange(6.0 * NUM).view(NUM, 6), 'weight': torch.linspace(0, 1, NUM),
           'conditioning_image': torch.arange(NUM * 48).view(NUM, 3, 4, 4).to(torch.uint8),
           'pose': torch.randn(NUM, 5, generator=torch.Generator().manual_seed(1)) * 9}


def write(folder: Path) -> Path:
    """Write a cache in the documented format, without the code that writes caches."""
    folder.mkdir(parents=True)
    lines = [json.dumps({'key': f'train/{i}', 'text': text, 'text_2': text[::-1]}, ensure_ascii=False)
             for i, text in enumerate(TEXTS)]
    (folder / ROWS).write_bytes(''.join(f'{line}\n' for line in lines).encode())
    (folder / ORIGIN).write_text('{}')
    start = 0
    for count in SHARDS:
        save_file({k: v[start:start + count].contiguous() for k, v in TENSORS.items()},
                  folder / f'{start:09d}.safetensors')
        start += count
    return folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp('cached') / 'cache')


def test_rows_equal_the_files(cache: Path) -> None:
    data = DATASETS.build(dict(type='CachedLatents', source=str(cache)))
    assert len(data) == NUM
    for i in (5, 0, 3, 2, 4, 1):  # back and forth between the files
        sample = data[Draw(i, 2, 7)]
        assert (sample['key'], sample['text'], sample['text_2'], sample['epoch'], sample['seed']) == (
            f'train/{i}', TEXTS[i], TEXTS[i][::-1], 2, 7)
        for name, values in TENSORS.items():
            assert torch.equal(sample[name], values[i]) and sample[name].dtype == values.dtype, name
        assert set(sample) == {*TENSORS, 'key', 'text', 'text_2', 'epoch', 'seed', 'num_skipped'}
    batch = BatchPreprocessor()(collate([data[i] for i in range(NUM)]))['inputs']
    assert batch.img is None and batch.latents is not None and torch.equal(batch.latents, TENSORS['latents'])
    assert batch.weight is not None and torch.equal(batch.weight, TENSORS['weight']) and batch.text_2 is not None
    assert set(batch.conditions) == {'conditioning_image', 'pose'}
    assert torch.equal(batch.conditions['conditioning_image'], TENSORS['conditioning_image'].float() / 255)
    with pytest.raises(IndexError, match='has 6 rows, no row 6'):
        data[NUM]


def test_captions_are_still_dropped_in_training(cache: Path) -> None:
    """Keyed by row and epoch, as without a cache."""
    data = CachedLatents(cache, transforms=[dict(type='CaptionDrop', prob=0.5, to='none')])
    dropped = [[data[Draw(i, epoch, 0)]['text'] == 'none' for i in range(NUM)] for epoch in range(6)]
    assert dropped == [[data[Draw(i, epoch, 0)]['text'] == 'none' for i in range(NUM)] for epoch in range(6)]
    assert len({tuple(d) for d in dropped}) > 3 and 8 < sum(map(sum, dropped)) < 28


def test_the_first_rows_only(cache: Path) -> None:
    data = CachedLatents(str(cache), max_samples=4)
    assert [data[i]['key'] for i in range(len(data))] == [f'train/{i}' for i in range(4)]
    assert torch.equal(data[3]['latents'], TENSORS['latents'][3]) and len(CachedLatents(cache, max_samples=99)) == NUM
    for count in (0, -1):
        with pytest.raises(UserError, match=f'max_samples={count} must be at least 1'):
            CachedLatents(cache, max_samples=count)


def test_workers_read_the_same(cache: Path) -> None:
    """Workers forked while the files are open, and a pickled copy."""
    data = CachedLatents(cache)

    def read(num_workers: int) -> list[dict[str, Any]]:
        loader = DataLoader(data, 2, sampler=KeyedSampler(data, seed=1), num_workers=num_workers, collate_fn=collate)
        return [batch for batch, _ in zip(loader, range(5), strict=False)]
    for one, other in zip(read(0), read(2), strict=True):
        assert one['key'] == other['key'] and one['text'] == other['text']
        assert all(torch.equal(one[name], other[name]) for name in TENSORS)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[4]['latents'], data[4]['latents']) and copy[4]['text'] == TEXTS[4]


def remove(*names: str) -> Any:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
    return change


def cut(name: str, size: int) -> Any:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
    return change


def edit(old: str, new: str) -> Any:
    return lambda folder: (folder / ROWS).write_text((folder / ROWS).read_text().replace(old, new, 1))


FIRST, MIDDLE, LAST = (f'{n:09d}.safetensors' for n in (0, 3, 4))


@pytest.mark.parametrize(('change', 'message'), [
    (remove(ROWS), rf"cache' is not a cache: it lacks {ROWS} or {ORIGIN}. Write one with `diffengine-sdxl cache"),
    (remove(ORIGIN), 'is not a cache'), (shutil.rmtree, 'is not a cache'),
    (remove(FIRST), r"cache' is incomplete: 6 rows of text, 3 of latents. Write it again"),
    (remove(MIDDLE), 'incomplete: 6 rows of text, 5 of latents'), (remove(LAST), '6 rows of text, 4 of latents'),
    (remove(FIRST, MIDDLE, LAST), '6 rows of text, 0 of latents'),
    (lambda folder: (folder / ROWS).write_text(''), 'incomplete: 0 rows of text, 6 of latents'),
    (lambda folder: (folder / ROWS).write_text('{"key": "a", "text": ""}\n'), '1 rows of text, 6 of latents'),
    (cut(ROWS, 200), rf"cache file '.*{ROWS}' cannot be read: .*Write the cache again"),
    (edit('"key"', '"kee"'), rf"{ROWS}' cannot be read: KeyError: 'key'"),
    (edit('{', '[{'), rf"{ROWS}' cannot be read: "),
    (cut(MIDDLE, 300), rf"cache file '.*{MIDDLE}' cannot be read: .*Write the cache again"),
    (cut(LAST, 0), rf"{LAST}' cannot be read"),
    (lambda folder: save_file({'x': torch.ones(1)}, folder / MIDDLE), rf"{MIDDLE}' holds no latents"),
])
@pytest.mark.parametrize('max_samples', [None, 1])
def test_an_incomplete_or_damaged_cache_is_refused(cache: Path, tmp_path: Path, change: Any, message: str,
                                                   max_samples: int | None) -> None:
    """Also if only rows of the first file are used: it may be another's."""
    folder = shutil.copytree(cache, tmp_path / 'cache')
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        CachedLatents(folder, max_samples=max_samples)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('text', ['', '[]', '{"encoder": "x"}', '\xff'])
def test_a_damaged_record_is_refused(cache: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(cache, tmp_path / 'cache')
    (folder / ORIGIN).write_text(text, encoding='latin-1')
    with pytest.raises(UserError, match=f"{ORIGIN}' cannot be read: .*Write the cache again"):
        CachedLatents(folder).check_model(None)
