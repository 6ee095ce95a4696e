"""All sources give the same samples, in any process and order; bad input is refused by name."""

import functools
import http.server
import json
import shutil
import threading
import time

import datasets as hf
import numpy as np
import pytest
import torch

from diffengine_sdxl.datasets import CaptionFolder, Draw, FiniteSampler, HFDataset, KeyedSampler, collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.testing import draw_circle, write_circles

NUM = 6
CHAIN = [dict(type='Resize', size=24), dict(type='Crop', size=16, mode='random'), dict(type='Flip', prob=0.5),
         dict(type='CaptionDrop', prob=0.3), dict(type='ComputeTimeIds'), dict(type='PackInputs')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_circles(tmp_path_factory.mktemp('data'), NUM, 32)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp('cache'))


def rows(folder):
    return [json.loads(line) for line in (folder / 'metadata.jsonl').read_text().splitlines()]


def table(folder, kind):
    """Return the rows of the imagefolder with images as 'bytes', 'path' (relative) or 'struct'."""
    def cell(name):
        return {'bytes': (folder / name).read_bytes(), 'path': name,
                'struct': {'bytes': (folder / name).read_bytes(), 'path': None}}[kind]
    return [{'image': cell(r['file_name']), 'conditioning_image': cell(r['conditioning_image_file_name']),
             'text': r['text']} for r in rows(folder)]


def write_jsonl(path, entries):
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return path


@pytest.fixture(scope='module', params=['imagefolder', 'saved', 'saved dict', 'parquet', 'parquet folder', 'jsonl',
                                        'images'])
def source(request, folder, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('source')
    match request.param:
        case 'imagefolder':
            return dict(source=folder)
        case 'saved':
            hf.load_dataset(str(folder), split='train', cache_dir=cache).save_to_disk(out / 'saved')
            return dict(source=out / 'saved')
        case 'saved dict':
            hf.DatasetDict(valid=hf.Dataset.from_list(table(folder, 'struct'))).save_to_disk(out / 'saved')
            return dict(source=str(out / 'saved'), split='valid')
        case 'parquet':
            hf.Dataset.from_list(table(folder, 'bytes')).to_parquet(out / 'data.parquet')
            return dict(source=out / 'data.parquet')
        case 'parquet folder':
            hf.Dataset.from_list(table(folder, 'struct')).to_parquet(out / 'train.parquet')
            return dict(source=out)
        case 'jsonl':
            write_jsonl(out / 'rows.jsonl', table(folder, 'path'))
            return dict(source=out / 'rows.jsonl', image_root=folder)
        case _:
            features = hf.Features(image=hf.Image(), conditioning_image=hf.Image(), text=hf.Value('string'))
            hf.Dataset.from_list([dict(zip(features, draw_circle(i, 32), strict=True)) for i in range(NUM)],
                                 features=features).save_to_disk(out / 'saved')
            return dict(source=out / 'saved')


def test_every_source_gives_the_written_samples(source, cache):
    data = DATASETS.build(dict(type='HFDataset', cache_dir=cache, **source))
    assert len(data) == NUM
    for index in range(NUM):
        image, condition, text = draw_circle(index, 32)
        out = data[Draw(index, 3, 4)]
        np.testing.assert_array_equal(out['img'], image)
        np.testing.assert_array_equal(out['conditioning_image'], condition)
        assert (out['text'], out['key'], out['epoch'], out['seed'], out['num_skipped']) == (text, str(index), 3, 4, 0)


def test_options(folder, cache, tmp_path):
    short = HFDataset(folder, max_samples=3, conditioning_image_column=None, caption_column=None, cache_dir=cache)
    assert len(short) == 3 and short[2]['key'] == '2' and short[2]['text'] == ''
    assert 'conditioning_image' not in short[0]
    entries = [dict(pic=r['file_name'], words=['a', 'b', 'c'], depth=r['conditioning_image_file_name'], w=0.5,
                    emb=[[1.0, 2.0], [3.0, 4.0]], neg='bad') for r in rows(folder)]
    data = HFDataset(write_jsonl(tmp_path / 'x.jsonl', entries), image_column='pic', conditioning_image_column=None,
                     caption_column='words', image_root=folder, cache_dir=cache, max_samples=99,
                     extra_columns=dict(depth='depth', weight='w', negative_text='neg', emb='emb'))
    out = data[0]
    np.testing.assert_array_equal(out['depth'], draw_circle(0, 32)[1])
    assert out['weight'].shape == () and out['negative_text'] == 'bad' and out['emb'].tolist() == [[1, 2], [3, 4]]
    chosen = [data[Draw(0, e, 0)]['text'] for e in range(30)]
    assert set(chosen) == {'a', 'b', 'c'} and chosen == [data[Draw(0, e, 0)]['text'] for e in range(30)]
    with pytest.raises(UserError, match="cannot write .'img'."):
        HFDataset(folder, extra_columns=dict(img='text'), cache_dir=cache)


def test_edited_metadata_is_read_again(folder, cache, tmp_path):
    copy = shutil.copytree(folder, tmp_path / 'copy')
    assert HFDataset(copy, cache_dir=cache)[0]['text'] == draw_circle(0)[2]
    entries = [dict(r, text='new') for r in rows(copy)]
    time.sleep(0.01)
    write_jsonl(copy / 'metadata.jsonl', entries)
    assert HFDataset(copy, cache_dir=cache)[0]['text'] == 'new'


def random_transform(sample):
    """A user's transform that draws from the global generators."""
    import random
    sample['draws'] = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
    return sample


def batches(data, order, num_workers=0, batch_size=2, num=6):
    loader = torch.utils.data.DataLoader(data, batch_size, sampler=order, num_workers=num_workers, collate_fn=collate)
    return [batch for batch, _ in zip(loader, range(num), strict=False)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k]
                                        for k in a)


def test_samples_do_not_depend_on_workers_processes_or_resuming(folder, cache, monkeypatch):
    data = HFDataset(folder, transforms=[random_transform, *CHAIN], cache_dir=cache)
    single = batches(data, KeyedSampler(data, seed=1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    forked = batches(data, KeyedSampler(data, seed=1), num_workers=2)
    assert all(equal(a, b) for a, b in zip(single, forked, strict=True))
    data[0]
    assert len({tuple(d) for b in single for d in b['draws'].tolist()}) == 12
    torch.set_rng_state(state)
    data[0]
    assert torch.equal(torch.get_rng_state(), state)
    parts = []
    for rank in range(2):
        monkeypatch.setattr('diffengine_sdxl.datasets.data_sampler.get_dist_info', lambda rank=rank: (rank, 2))
        parts.append(batches(data, KeyedSampler(data, seed=1), batch_size=1))
    for whole, *pair in zip(single, *parts, strict=True):
        assert all(torch.equal(whole['img'][r], pair[r]['img'][0]) for r in range(2))
        assert all(torch.equal(whole['draws'][r], pair[r]['draws'][0]) for r in range(2))
    monkeypatch.undo()
    resumed = batches(data, KeyedSampler(data, seed=1, start=4), num_workers=2, num=4)
    assert all(equal(a, b) for a, b in zip(single[2:], resumed, strict=True))
    assert not equal(single[0], batches(data, KeyedSampler(data, seed=2), num=1)[0])
    assert [k for b in batches(data, FiniteSampler(data), num=9) for k in b['key']] == [str(i) for i in range(NUM)]


@pytest.fixture
def captions(tmp_path):
    for index, name in enumerate(['b.png', 'a.png', 'sub/c.png']):
        image, condition, text = draw_circle(index, 32)
        for content, path in ((image, tmp_path / name), (condition, (tmp_path / 'cond' / name).with_suffix('.webp'))):
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path, lossless=True)
        (tmp_path / name).with_suffix('.txt').write_text(text + '\n')
    return tmp_path


def test_caption_folder(captions):
    data = DATASETS.build(dict(type='CaptionFolder', source=str(captions), condition_folder=str(captions / 'cond')))
    assert [data[i]['key'] for i in range(len(data))] == ['a.png', 'b.png', 'sub/c.png']
    image, condition, text = draw_circle(2, 32)
    out = data[Draw(2, 1, 5)]
    np.testing.assert_array_equal(out['img'], image)
    np.testing.assert_array_equal(out['conditioning_image'], condition)
    assert out['text'] == text and out['epoch'] == 1
    (captions / 'a.txt').unlink()
    with pytest.raises(UserError, match=r"a.png' has no caption: write .*a.txt"):
        CaptionFolder(captions, captions / 'cond')
    out = CaptionFolder(captions, captions / 'cond', default_caption='plain', max_samples=1)
    assert len(out) == 1 and out[0]['text'] == 'plain'
    (captions / 'cond' / 'b.webp').unlink()
    with pytest.raises(UserError, match=r"1 images have no condition .* the first is '.*b.png'"):
        CaptionFolder(captions, captions / 'cond', default_caption='')
    with pytest.raises(UserError, match=r"source='nowhere' is not a folder"):
        CaptionFolder('nowhere')
    (captions / 'empty').mkdir()
    with pytest.raises(UserError, match=r"empty' holds no images"):
        CaptionFolder(captions / 'empty')
    (captions / 'b.txt').write_bytes(b'\xff')
    with pytest.raises(UserError, match=r"The caption '.*b.txt' cannot be read as UTF-8 text"):
        CaptionFolder(captions, default_caption='')[1]


@pytest.mark.parametrize('options, message', [
    (dict(image_column='imagge'), r"no column 'imagge' \(image_column\). Its columns are 'image', 'cond.*mean 'image'"),
    (dict(caption_column='txt'), r"no column 'txt' \(caption_column\).*Did you mean 'text'"),
    (dict(conditioning_image_column='cond_image'), r'\(conditioning_image_column\)'),
    (dict(extra_columns=dict(depth='d')), r"no column 'd' \(extra_columns.depth\)"),
    (dict(split='trian'), "trian"),
    (dict(max_samples=0), 'max_samples=0'),
    (dict(on_bad_image='drop'), "on_bad_image='drop'"),
])
def test_bad_options(folder, cache, options, message):
    with pytest.raises(UserError, match=message):
        HFDataset(folder, cache_dir=cache, **options)


def test_bad_sources(folder, cache, tmp_path):
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none.jsonl').touch()
    (tmp_path / 'x.txt').touch()
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1 no')
    hf.Dataset.from_list(table(folder, 'bytes')).select([]).save_to_disk(tmp_path / 'empty')
    hf.DatasetDict(a=hf.Dataset.from_list([dict(text='')])).save_to_disk(tmp_path / 'dict')
    for name, message in (('none', "none' is empty"), ('none.jsonl', "none.jsonl' is empty"),
                          ('x.txt', 'a file of an unknown type'), ('bad.parquet', "bad.parquet' cannot be read"),
                          ('empty', "empty' is empty"), ('dict', "no split 'train'; it has a"),
                          ('a/b/c', 'neither a local folder or file nor an id')):
        with pytest.raises(UserError, match=message) as error:
            HFDataset(tmp_path / name, cache_dir=cache)
        assert len(str(error.value).splitlines()) == 1


def test_hub_without_network_says_so_quickly(cache, monkeypatch):
    import huggingface_hub

    def unreachable(self, *args, timeout, **options):
        assert timeout <= 10
        raise ConnectionError('Name or service not known')
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', unreachable)
    start = time.time()
    with pytest.raises(UserError, match="neither a local folder nor .* Hub cannot be reached: Name or service"):
        HFDataset('fusing/fill50k', cache_dir=cache)
    assert time.time() - start < 5 and not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='offline mode is set'):
        HFDataset('fusing/fill50k', cache_dir=cache)


def broken(folder, tmp_path, *names):
    """Copy the data and cut off the files `names`."""
    copy = shutil.copytree(folder, tmp_path / 'broken')
    for name in names:
        path = copy / name
        path.write_bytes(path.read_bytes()[:-40])
    return copy


def test_truncated_image_is_named_or_skipped(folder, cache, tmp_path, monkeypatch):
    copy = broken(folder, tmp_path, 'images/00002.png', 'conditioning_images/00003.png', 'images/00005.png')
    (copy / 'images/00000.png').write_bytes(b'<html>')
    data = HFDataset(copy, cache_dir=cache)
    for index, column in ((0, 'image'), (2, 'image'), (3, 'conditioning_image')):
        with pytest.raises(UserError, match=rf"Column '{column}' of row {index} of '.*broken' .*0000{index}.png"):
            data[index]
    warned = []
    monkeypatch.setattr('diffengine_sdxl.datasets.base.print_log', lambda text, **_: warned.append(text))
    data = HFDataset(copy, cache_dir=cache, on_bad_image='skip', transforms=CHAIN)
    samples = [data[Draw(i, 0, 0)] for i in range(NUM)]
    assert [s['key'] for s in samples] == ['1', '1', '4', '4', '4', '1']
    assert [s['num_skipped'] for s in samples] == [1, 0, 2, 1, 0, 2]
    assert collate(samples)['num_skipped'] == 6
    assert len(warned) == 4 and all('0000' in text for text in warned)
    first = HFDataset(copy, cache_dir=cache, on_bad_image='skip', max_samples=1)
    with pytest.raises(UserError, match='None of the 1 rows of .* has a readable image'):
        first[0]
    (copy / 'images/00001.png').unlink()
    with pytest.raises(UserError, match=r"row 1 of .*00001.png cannot be read: No such file"):
        HFDataset(copy, cache_dir=cache)[1]


def test_paths_stay_inside_the_root(folder, cache, tmp_path):
    secret = tmp_path / 'secret.png'
    draw_circle(0, 32)[0].save(secret)
    (tmp_path / 'in').mkdir()
    for name, path in (('up', '../secret.png'), ('abs', str(secret)), ('scheme', f'file://{secret}'),
                       ('chain', f'file://{secret}::hf://datasets/a/b')):
        entries = [dict(image=path, conditioning_image=path, text='')]
        file = write_jsonl(tmp_path / 'in' / f'{name}.jsonl', entries)
        with pytest.raises(UserError, match="Column 'image' of row 0 of .* names '.*secret.png"):
            HFDataset(file, cache_dir=cache, on_bad_image='skip')[0]
        cell = dict(bytes=None, path=path)
        table = hf.Dataset.from_list([dict(image=cell, conditioning_image=cell, text='')])
        table.to_parquet(tmp_path / 'in' / f'{name}.parquet')
        with pytest.raises(UserError, match="Column 'image' of row 0 of .* names '.*secret.png"):
            HFDataset(tmp_path / 'in' / f'{name}.parquet', cache_dir=cache, on_bad_image='skip')[0]
    for root in ('/', tmp_path):
        out = HFDataset(tmp_path / 'in' / 'abs.jsonl', cache_dir=cache, image_root=root)[0]
        np.testing.assert_array_equal(out['img'], draw_circle(0, 32)[0])
    copy = shutil.copytree(folder, tmp_path / 'copy')
    entries = [dict(r, conditioning_image_file_name='../secret.png') for r in rows(copy)]
    write_jsonl(copy / 'metadata.jsonl', entries)
    with pytest.raises(UserError, match=r"metadata.jsonl', line 1 names '../secret.png', outside of"):
        HFDataset(copy, cache_dir=cache)


def test_urls(folder, cache, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        entries = [dict(image=f'{address}/images/{name}', text='t') for name in ('00001.png', 'none.png')]
        data = HFDataset(write_jsonl(tmp_path / 'urls.jsonl', entries), conditioning_image_column=None,
                         cache_dir=cache)
        np.testing.assert_array_equal(data[0]['img'], draw_circle(1, 32)[0])
        with pytest.raises(UserError, match=f'row 1 .* could not be downloaded from {address}/images/none.png: 404'):
            data[1]
        server.shutdown()


def test_cells_of_another_type(cache, tmp_path):
    file = write_jsonl(tmp_path / 'x.jsonl', [dict(image=[1], text=None), dict(image=None, text='')])
    data = HFDataset(file, conditioning_image_column=None, cache_dir=cache)
    with pytest.raises(UserError, match='row 0 .* holds a list'):
        data[0]
    with pytest.raises(UserError, match='row 1 .* is empty'):
        data[1]
    draw_circle(0, 32)[0].save(tmp_path / 'a.png')
    file = write_jsonl(tmp_path / 'y.jsonl', [dict(image='a.png', text=3)])
    with pytest.raises(UserError, match="Column 'text' of row 0 .* holds 3"):
        HFDataset(file, conditioning_image_column=None, cache_dir=cache)[0]


def test_packaged_builder_with_data_files(folder, cache):
    data = HFDataset('json', data_files=str(folder / 'metadata.jsonl'), image_column='file_name', image_root=folder,
                     conditioning_image_column='conditioning_image_file_name', cache_dir=cache)
    np.testing.assert_array_equal(data[4]['img'], draw_circle(4, 32)[0])
