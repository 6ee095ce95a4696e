"""Rows through the cache: what is found is what would be read, and nothing is found that is another's."""

import copy
import pickle
import shutil
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.cache.samples import keep_samples, pack_entry, unpack_entry
from diffengine_sdxl.datasets import CaptionFolder, Draw, HFStream, cached, collate, image_files
from diffengine_sdxl.datasets.base import MapDataset
from diffengine_sdxl.datasets.row_digests import code_digest, package_digest
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.shapes import draw as drawing

PACK = [dict(type='ComputeTimeIds'), dict(type='PackInputs')]
CROP = [dict(type='Resize', size=12), dict(type='Crop', size=8, mode='random'), dict(type='Flip'), *PACK]
DROP = dict(type='JointDrop', adapters='ip', image=0.3, text=0.3, both=0.2, to=None)


class FakeStore(dict[str, Any]):
    """Entries in memory; `hashed` names the files that were read for their digest."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}
        self.counts: dict[str, tuple[int, int]] = {}
        self.hashed: list[str] = []

    def put(self, key: str, kind: str, tensors: Any) -> None:
        self[key], self.kinds[key] = {name: tensor.clone() for name, tensor in tensors.items()}, kind

    def count(self, kind: str, hits: int, misses: int) -> None:
        before = self.counts.get(kind, (0, 0))
        self.counts[kind] = before[0] + hits, before[1] + misses

    def file_digest(self, path: Path) -> str:
        self.hashed.append(path.name)
        return digest(path.read_bytes())

    def num(self, kind: str) -> int:
        return list(self.kinds.values()).count(kind)


def plan(store: Any, **settings: Any) -> CachePlan:
    return CachePlan(store, **{**dict(moments='vae', text='clip', images={'reference': 'vit'}), **settings})


def write_images(folder: Path, num: int = 4, size: int = 16) -> Path:
    """Write images of noise with gray conditions, coloured masks and captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (num, 2, size, size, 3), np.uint8)
    for part in ('images', 'conditions'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, (image, condition) in enumerate(pixels):
        Image.fromarray(image).save(folder / f'images/{i}.png')
        (folder / f'images/{i}.txt').write_text(f'caption {i}')
        Image.fromarray(condition[..., 0]).save(folder / f'conditions/{i}.png')
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / 'data')


def captioned(folder: Path, *transforms: Any, **settings: Any) -> Any:
    return DATASETS.build(dict(type='CaptionFolder', source=str(folder / 'images'), transforms=[*transforms],
                               condition_folder=str(folder / 'conditions'), **settings))


def train(samples: Iterable[Any], store: FakeStore | None, batch_size: int = 2) -> list[dict[str, Any]]:
    """Return what a step has of each batch, with stand-ins for the encoders."""
    samples, batches = iter(samples), []
    while rows := list(islice(samples, batch_size)):
        batch = collate(rows)
        if store is not None:
            keep_samples(batch, store)
        lookups, num = batch.pop('lookups', {}), len(batch['key'])
        assert 'sample' not in lookups
        batch['moments'] = by_row(num, lambda i, b=batch: {'mean': b['img'][i].double().sqrt()}, 'moments',
                                  lookups.get('moments'), store)
        batch['encoded'] = by_row(num, lambda i, b=batch: {'text_embeds': torch.tensor(rng.key_seed(b['text'][i]))},
                                  'text', lookups.get('text'), store)
        if 'reference' in batch or 'reference' in lookups:
            batch['embeds'] = by_row(num, lambda i, b=batch: {'embeds': b['reference'][i].mean(-1)}, 'image_embeds',
                                     lookups.get('reference'), store)
        batches.append({key: value for key, value in batch.items() if key not in ('img', 'reference')})
    return batches


def draws(num: int, epochs: int = 4) -> list[Draw]:
    return [Draw(i, epoch, 5) for epoch in range(epochs) for i in range(num)]


def assert_equal(one: Any, other: Any, where: str = '') -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f'{where}.{key}')
    elif isinstance(one, list):
        assert len(one) == len(other)
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f'{where}[{i}]')
    else:
        assert one == other, where


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError('an image was read')
    monkeypatch.setattr(image_files, 'decode', fail)
    monkeypatch.setattr(drawing, 'render', fail)


PROMPT = dict(type='ImagePrompt', key='reference', source='img', size=4)
KINDS: dict[str, dict[str, Any]] = {
    'folder': dict(type='CaptionFolder', transforms=[PROMPT, DROP, *CROP], variants=3),
    'rows': dict(type='HFDataset', variants=3, extra_columns=dict(loss_mask='mask', original_size='size'),
                 transforms=[PROMPT, dict(type='LossMask', outside=0.2), DROP, *CROP]),
    'stream': dict(type='HFStream', variants=3, buffer_size=0, seed=5, transforms=[PROMPT, DROP, *CROP]),
    'shapes': dict(type='Shapes', length=4, size=8, reference=True, truth=True, oversize=0.7, variants=3, transforms=[
        dict(type='ImagePrompt', size=4), dict(type='CaptionDrop', prob=0.5), dict(type='Canny'), *CROP[1:]]),
    'pair': dict(type='PriorPreservation', weight=0.5, instance=dict(
        type='Shapes', length=2, size=8, transforms=[DROP, PROMPT, dict(type='Flip'), *PACK], variants=2), prior=dict(
        type='Shapes', split='class', length=3, size=8, transforms=[PROMPT, dict(type='Flip'), *PACK])),
}


def build(kind: str, folder: Path) -> Any:
    config = copy.deepcopy(KINDS[kind])
    if kind == 'folder':
        return captioned(folder, *config.pop('transforms'), variants=config['variants'])
    if kind in ('rows', 'stream'):
        import datasets
        rows = {'image': [{'bytes': (folder / f'images/{i}.png').read_bytes(), 'path': None} for i in range(4)],
                'conditioning_image': [str(folder / f'conditions/{i}.png') for i in range(4)],
                'mask': [{'bytes': (folder / f'images/{3 - i}.png').read_bytes(), 'path': None} for i in range(4)],
                'size': [[i, 7] for i in range(4)], 'text': [[f'caption {i}', 'another 1'] for i in range(4)]}
        if not (folder / 'saved').exists():
            datasets.Dataset.from_dict(rows).save_to_disk(str(folder / 'saved'))
        config |= dict(source=str(folder / 'saved'), image_root=str(folder))
    return DATASETS.build(config)


@pytest.mark.parametrize('kind', KINDS)
def test_cold_and_warm_equal_uncached(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """All that a step reads, bitwise: time ids, conditions, masks, drops; a warm pass decodes and draws no image."""
    def run(store: FakeStore | None) -> list[dict[str, Any]]:
        data = build(kind, folder)
        if store is not None:
            data.attach_cache(plan(store))
            data = pickle.loads(pickle.dumps(data)) if kind == 'rows' else data  # as a spawned worker has it
        if isinstance(data, HFStream):
            return train(islice(data, 16), store)
        return train((data[draw] for draw in draws(len(data))), store)
    store = FakeStore()
    expected = run(None)
    assert_equal(run(store), expected)
    assert store.kinds and {'sample', 'moments', 'image_embeds'} <= {*store.kinds.values()}
    geometry = store.num('sample')
    assert geometry == store.num('moments') == store.num('image_embeds') <= (10 if kind == 'pair' else 12)
    entries = len(store)
    forbid_decoding(monkeypatch)
    store.counts.clear()
    assert_equal(run(store), expected)
    assert len(store) == entries and all(misses == 0 for _, misses in store.counts.values())
    assert store.counts['sample'][0] == sum(len(batch['key']) for batch in expected)


def test_a_batch_of_found_and_other_rows(folder: Path) -> None:
    """Rows without an image are zeros beside others; batches of found rows only have none."""
    def read(data: Any) -> dict[str, Any]:
        return collate([data[Draw(i, 0, 5)] for i in range(3)])
    store, data = FakeStore(), captioned(folder, PROMPT, *CROP, variants=2)
    whole = read(data)
    data.attach_cache(plan(store))
    train([data[Draw(i, 0, 5)] for i in (0, 2)], store)
    mixed = read(data)
    lookups = mixed.pop('lookups')
    for key in ('img', 'reference'):
        assert torch.equal(mixed[key][1], whole[key][1]) and not mixed[key][0].any() and not mixed[key][2].any()
    assert torch.equal(mixed['conditioning_image'], whole['conditioning_image'])
    assert {name: [value is not None for value in found.values] for name, found in lookups.items()} == {
        'moments': [True, False, True], 'reference': [True, False, True], 'text': [True, False, True],
        'sample': [False, True, False]}
    assert lookups['sample'].values[1].keys() == {'time_ids', 'gray:conditioning_image'}
    again = collate([data[Draw(i, 0, 5)] for i in (0, 2)])
    assert again.keys() == (whole.keys() - {'img', 'reference'}) | {'lookups'}
    # A sample of a set that has no cache joins them: its lookups have no key.
    plain = captioned(folder, PROMPT, *CROP, variants=2)[Draw(1, 0, 5)]
    joined = collate([plain, data[Draw(0, 0, 5)]])
    assert joined['lookups']['moments'].keys[0] == '' and joined['lookups']['moments'].values[0] is None
    # Pixels are there for samples while training.
    assert data.without_drops()[Draw(0, 0, 5)]['img'] is not None and 'lookups' not in data.without_drops()[0]


def keys_of(data: Any, item: Any = 0) -> tuple[str, ...]:
    data.attach_cache(plan(FakeStore()))
    lookups = data[item]['lookups']
    return tuple(lookups[name].keys[0] for name in ('sample', 'moments', 'reference') if name in lookups)


def test_files_are_known_by_their_content(folder: Path) -> None:
    """A renamed copy is found; changed content is not, of the image or of its condition, whatever its times say."""
    def keys(name: str) -> tuple[str, ...]:
        data = captioned(folder, PROMPT, dict(type='Crop', size=8), *PACK)
        return keys_of(data, next(i for i in range(len(data)) if data.key(i) == name))
    first = keys('0.png')
    for part in ('images', 'conditions'):
        (folder / part / '0.png').rename(folder / part / 'z.png')
    (folder / 'images/0.txt').rename(folder / 'images/z.txt')
    assert keys('z.png') == first != keys('1.png')
    for part in ('conditions', 'images'):
        shutil.copyfile(folder / part / '2.png', folder / part / 'z.png')
        assert not {*keys('z.png')} & {*first}


#: Settings of transforms, and of these what may be changed.
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dict(type='Resize', size=12), dict(size=10, interpolation='box')),
    (dict(type='Crop', size=8), dict(size=6, mode='random')),
    (dict(type='Flip', prob=0.5), dict(prob=0.4)),
    (dict(type='ComputeTimeIds'), dict(original_size=9, crops_coords_top_left=1, target_size=9, aesthetic_score=5)),
    (dict(type='Canny'), dict(low=50, high=150, source='conditioning_image', key='edges', detection_resolution=8)),
    (dict(type='ImagePrompt', source='img', size=4), dict(
        key='other', source=['img'], size=5, resample='box', short_edge=6, stretch=True, keep=True)),
    (dict(type='Preprocessor', function='PIL.ImageOps:invert'), dict(
        function='PIL.ImageOps:mirror', call=dict(border=1), init={}, device='cuda', key='x'))]


@pytest.mark.parametrize(('config', 'changes'), SETTINGS, ids=[config['type'] for config, _ in SETTINGS])
def test_any_setting_changes_the_digest(folder: Path, config: dict[str, Any], changes: dict[str, Any]) -> None:
    def row(*transforms: Any, **draw: Any) -> str:
        data = captioned(folder, variants=1)
        data.transforms = [MapDataset([t]).transforms[0] for t in transforms]
        data.attach_cache(plan(FakeStore()))
        head = dict(key='a', epoch=0, seed=5, variant=0, **draw)
        return str(data.cache._row_digest(data._row(0, Draw(0, 0, 5)), head))
    digests = [row(), row(config), row(config, config), *(row({**config, **{k: v}}) for k, v in changes.items())]
    assert len({*digests}) == len(digests) and row(config) == digests[1] != row(config, bucket=(8, 16))


def test_what_is_drawn_and_numbers_of_the_row_count(folder: Path) -> None:
    """Crops differ by seed and variant, flips by their result; a row's own size is in its time ids."""
    data = captioned(folder, PROMPT, *CROP, variants=2)
    keys = {name: keys_of(data, Draw(0, *where)) for name, where in {
        'first': (0, 5), 'same': (2, 5), 'variant': (1, 5), 'seed': (0, 6)}.items()}
    assert keys['first'] == keys['same'] and len({*keys.values()}) == 3
    flips = captioned(folder, PROMPT, dict(type='Flip'), dict(type='Crop', size=8), *PACK)
    assert len({keys_of(flips, Draw(0, epoch, 5)) for epoch in range(20)}) == 2
    shapes = {keys_of(DATASETS.build(dict(type='Shapes', transforms=[dict(type='Crop', size=8), *PACK], **settings)))
              for settings in [dict(size=8, **{key: value}) for key, value in dict(
                  seed=0, length=9, conditioning='mask', reference=True, truth=True).items()] + [dict(size=9)]}
    assert len(shapes) == 5  # the length changes no row
    rows = build('rows', folder)
    first = keys_of(rows)
    rows.data, rows._last = rows.data.map(lambda row: {'size': [50, 7]}), None
    assert keys_of(build('rows', folder)) == first and not {*keys_of(rows)} & {*first}


def test_crops_without_variants_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cached, 'print_log', lambda line, **_: lines.append(line))
    store, data = FakeStore(), captioned(folder, *CROP)
    data.attach_cache(plan(store))
    expected = train((captioned(folder, *CROP)[draw] for draw in draws(4)), None)
    assert_equal(train((data[draw] for draw in draws(4)), store), expected)
    assert {*store.kinds.values()} == {'text'}
    oversize = DATASETS.build(dict(type='Shapes', length=2, size=8, oversize=1.0, transforms=[
        dict(type='Crop', size=8), *PACK]))
    oversize.attach_cache(plan(store))
    assert len(lines) == 2 and all('variants=4' in line for line in lines) and set(oversize[0]['lookups']) == {'text'}


class Brighter(CaptionFolder):
    """A user's data set, whose images are not those of its cells."""

    def images(self, index: int, draw: Draw) -> dict[str, Any]:
        images = super().images(index, draw)
        return {**images, 'img': images['img'].point(lambda value: value // 2)}


class Listed(MapDataset):
    """A user's data set with `load` only."""

    def __init__(self, folder: Path, transforms: Sequence[Any]) -> None:
        super().__init__(transforms)
        self.folder, self.source = folder, 'mine'

    def __len__(self) -> int:
        return 4

    def key(self, index: int) -> str:
        return str(index)

    def load(self, index: int, draw: Draw) -> dict[str, Any]:
        return {'img': Image.open(self.folder / f'images/{index}.png').convert('RGB'), 'text': f'caption {index}'}


class Told(Listed):
    """One that tells what its images are."""

    load = MapDataset.load

    def images(self, index: int, draw: Draw) -> dict[str, Any]:
        return {'img': Listed.load(self, index, draw)['img']}

    def texts(self, index: int, draw: Draw) -> dict[str, Any]:
        return {'text': f'caption {index}'}

    def cells(self, index: int) -> dict[str, Any]:
        return {'img': self.folder / f'images/{index}.png'}


def test_data_and_transforms_of_a_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run as ever, and known by the pixels that they make; only a first pass is kept."""
    plain = captioned(folder, dict(type='Crop', size=8), *PACK)

    def darken(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, 'img': sample['img'].point(lambda value: value // 2)}
    users: dict[str, Any] = {
        'transform': captioned(folder, darken, dict(type='Crop', size=8), *PACK),
        'class': Brighter(folder / 'images', folder / 'conditions', transforms=[dict(type='Crop', size=8), *PACK]),
        'folder': type('Same', (CaptionFolder,), {})(folder / 'images', folder / 'conditions', transforms=[
            dict(type='Crop', size=8), *PACK]),
        'load': Listed(folder, [dict(type='Crop', size=8), *PACK]),
        'images again': type('Repainted', (Told,), {'images': Told.images})(folder, [dict(type='Crop', size=8), *PACK]),
        'told': Told(folder, [dict(type='Crop', size=8), *PACK])}
    assert not torch.equal(users['transform'][0]['img'], plain[0]['img'])
    for name, data in users.items():
        store = FakeStore()
        expected = train((data[draw] for draw in draws(4, 2)), None)
        data.attach_cache(plan(store, images={}))
        for _ in range(2):
            assert_equal(train((data[draw] for draw in draws(4, 2)), store), expected)
        assert store.num('moments') == 4 and (store.num('sample') == 4) == (name == 'told')
        assert store.counts['moments'] == (12, 4) and all(data[0]['lookups']['moments'].values)
        assert (data[0]['img'] is None) == (name == 'told')
    store, noisy = FakeStore(), captioned(folder, dict(type='Crop', size=8), *PACK, lambda sample: {
        **sample, 'img': sample['img'] + torch.rand(())})
    noisy.attach_cache(plan(store))
    train((noisy[draw] for draw in draws(4, 3)), store)
    assert store.num('moments') == 4, 'a transform that draws anew in each epoch fills the disk'


@pytest.mark.parametrize('kind', ['folder', 'rows'])
def test_unreadable_images_are_skipped_as_ever(folder: Path, kind: str) -> None:
    """Cold and warm; a row outside of the folder is refused, and its file is not even read."""
    for name in ('images/1.png', 'conditions/2.png'):
        (folder / name).write_bytes(b'no image' * 9)
    store = FakeStore()
    expected: Any = None
    for with_cache in (False, True, True):
        data = build(kind, folder)
        data.on_bad_image = 'skip'
        if kind == 'folder':
            (folder / 'images/3.png').unlink(missing_ok=True)
        if with_cache:
            data.attach_cache(plan(store))
        result = train((data[draw] for draw in draws(3, 2)), store if with_cache else None)
        assert sum(batch['num_skipped'] for batch in result) > 0
        expected = expected or result
        if kind == 'folder':
            write_images(folder.parent / 'again')
            shutil.copyfile(folder.parent / 'again/images/3.png', folder / 'images/3.png')
        assert_equal(result, expected)
    if kind == 'rows':
        data.read_image.root = folder / 'saved'
        data.on_bad_image = 'raise'
        store.hashed.clear()
        with pytest.raises(UserError, match='outside of'):
            data[0]
        assert not store.hashed


def test_the_text_that_is_looked_up(folder: Path) -> None:
    """The final caption; '' where it is dropped and the null prompt is empty; none if its embeddings are given."""
    def key(*transforms: Any, **settings: Any) -> Any:
        data = captioned(folder, *transforms, dict(type='Crop', size=8), *PACK)
        data.attach_cache(plan(FakeStore(), **settings))
        lookups = data[0]['lookups']
        return lookups['text'].keys[0] if 'text' in lookups else None
    texts, drop = plan(None), dict(type='CaptionDrop', prob=1, to=None)
    assert key() == key(drop) == texts.text_key('caption 0') == texts.text_key('caption 0', 'caption 0')
    assert key(dict(type='CaptionPrefix', prefix='a ')) == texts.text_key('a caption 0')
    assert key(drop, empty_when_dropped=True) == texts.text_key('') != key(empty_when_dropped=True)
    assert key(lambda sample: {**sample, 'text_2': 'x'}) == texts.text_key('caption 0', 'x') != texts.text_key('x')
    assert key(text=None) is None and key(lambda sample: {**sample, 'text_embeds': torch.ones(2)}) is None


def test_a_vae_that_trains_reads_all_images(folder: Path) -> None:
    store, data = FakeStore(), captioned(folder, PROMPT, dict(type='Crop', size=8), *PACK)
    data.attach_cache(plan(store, moments=None))
    for _ in range(2):
        sample = data[0]
        assert sample['img'] is not None and set(sample['lookups']) == {'text', 'reference'}
        train([sample], store)
    assert sample['lookups']['reference'].values != [None] and store.num('sample') == 0


def test_a_run_without_the_adapter_finds_no_sample_without_its_pixels(folder: Path) -> None:
    """An image prompt that is no longer encoded is a condition like others."""
    store, data = FakeStore(), captioned(folder, PROMPT, dict(type='Crop', size=8), *PACK)
    data.attach_cache(plan(store))
    train([data[0]], store)
    data.attach_cache(plan(store, images={}))
    sample = data[0]
    assert sample['reference'] is not None and sample['lookups']['moments'].values != [None]


def test_entries_of_samples_are_small() -> None:
    """One channel of gray maps; all else as it is."""
    gray = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, -1, -1).contiguous()
    colour = gray.clone()
    colour[2, 2, 3] = 0
    tensors = {'gray': gray, 'colour': colour, 'float': torch.ones(3, 2, 2), 'numbers': gray[:, 0, 0]}
    entry = pack_entry(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in entry.items()} == {
        'gray:gray': (1, 3, 4), 'colour': (3, 3, 4), 'float': (3, 2, 2), 'numbers': (3,)}
    assert entry['gray:gray'].untyped_storage().nbytes() == 12
    assert_equal(unpack_entry(entry), tensors)


def test_what_makes_maps_is_told_by_content_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in a folder, a function's file, code without its comments."""
    from diffengine_sdxl.datasets.transforms import Depth, Preprocessor
    store = FakeStore()
    for value in (b'a', b'b', b'a'):
        (tmp_path / 'model.safetensors').write_bytes(value)
        store.put(digest(value), 'made', {})
        store.hashed.append(repr(Depth(str(tmp_path)).made_of(store.file_digest)))
    assert store.hashed[1] == store.hashed[5] != store.hashed[3]
    monkeypatch.syspath_prepend(str(tmp_path))
    results = []
    for text in ('def invert(image): return image', '"""A doc."""\n# A comment.\ndef invert(image):\n    return image',
                 'def invert(image): return None'):
        (tmp_path / 'my_maps.py').write_text(text)
        package_digest.cache_clear()
        code_digest.cache_clear()
        results.append((code_digest('my_maps'), Preprocessor('my_maps:invert').made_of(store.file_digest)))
    assert results[0][0] == results[1][0] != results[2][0] and len({made for _, made in results}) == 3
