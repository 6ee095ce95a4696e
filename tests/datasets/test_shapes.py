"""Shapes as a data set: at any size, cropped, with all optional entries, in any order."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffengine_sdxl.datasets import Draw, FiniteSampler, KeyedSampler, Shapes, collate
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import images_to_floats, pack
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.shapes import draw
from diffengine_sdxl.shapes.scene import ATTRIBUTES, BASE_STYLES, HELD_OUT, STYLES, draw_scene, reference

PACK = [dict(type='ComputeTimeIds'), dict(type='PackInputs')]
CROP = [dict(type='Crop', size=32, mode='random'), *PACK]


def same(one: Any, other: Any) -> bool:
    """Return whether two samples or batches are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Image.Image):
        return np.array_equal(np.asarray(one), np.asarray(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


@pytest.mark.parametrize('kind', draw.CONDITIONS)
def test_a_row_shows_the_scene_of_its_number(kind: str) -> None:
    data = DATASETS.build(dict(type='Shapes', length=7, seed=3, split='val', size=48, conditioning=kind))
    assert len(data) == 7
    for index in (6, 0):
        sample, scene = data[Draw(index, 2, 5)], draw_scene(3, index, split='val')
        np.testing.assert_array_equal(sample['img'], draw.render(scene, 48))
        np.testing.assert_array_equal(sample['conditioning_image'], draw.condition(scene, 48, kind))
        assert list(sample) == ['img', 'conditioning_image', 'text', 'key', 'epoch', 'seed', 'num_skipped']
        assert [sample[k] for k in ('text', 'key', 'epoch', 'seed', 'num_skipped')] == [
            scene.caption, f'val/{index}', 2, 5, 0]
    assert same(data[3], data[Draw(3, 9, 1)] | {'epoch': 0, 'seed': 0}), 'the image is the same in every epoch'
    with pytest.raises(IndexError, match="seed=3, split='val'.* has 7 rows, no row 7"):
        data[7]


def test_all_optional_entries_are_batched() -> None:
    data = Shapes(length=4, split='val', size=32, conditioning='mask', reference=True, truth=True, transforms=PACK)
    samples = [data[i] for i in range(4)]
    batch = pack(images_to_floats(collate(samples)))
    assert batch.img is not None and batch.img.shape == (4, 3, 32, 32) and batch.img.min() >= -1
    assert set(batch.conditions) == {'conditioning_image', 'reference', 'shape_mask'}
    assert torch.equal(batch.conditions['shape_mask'], batch.conditions['conditioning_image'])
    assert batch.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 4 and batch.key == [f'val/{i}' for i in range(4)]
    for i, sample in enumerate(samples):
        scene = data.scene(i)
        assert {k: sample[k] for k in ('shape', 'style', 'fill', 'ground', 'texture', 'text')} == {
            **{k: getattr(scene, k) for k in ('shape', 'style', 'fill', 'ground', 'texture')}, 'text': batch.text[i]}
        other = torch.from_numpy(draw.render(reference(scene, 0, i, 'val'), 32)).permute(2, 0, 1) / 255
        assert torch.equal(batch.conditions['reference'][i], other)
        assert torch.equal((batch.img[i] * 127.5 + 127.5).round().byte().permute(1, 2, 0),
                           torch.from_numpy(draw.render(scene, 32)))
    assert set(Shapes(length=1, conditioning=None)[0]) == {'img', 'text', 'key', 'epoch', 'seed', 'num_skipped'}


def test_masks_lie_where_the_image_has_its_shape() -> None:
    """After crops and flips too: pixels have the fill's colour where the mask is white, and the ground's elsewhere."""
    data = Shapes(length=8, size=64, conditioning='mask', styles='flat', oversize=1.0, transforms=[
        dict(type='Crop', size=48, mode='random'), dict(type='Flip', prob=0.5), *PACK])
    plain = [i for i in range(8) if data.scene(i).texture == 'plain']
    for index in plain:
        sample, scene = data[index], data.scene(index)
        image = sample['img'].permute(1, 2, 0)
        ground = (image == torch.tensor(draw.palette.COLOURS[scene.ground])).all(dim=-1)
        fill = (image == torch.tensor(draw.palette.COLOURS[scene.fill])).all(dim=-1)
        white = sample['conditioning_image'][0]
        assert torch.equal(fill, white == 255) and ground[white == 0].all() and not ground[white > 0.05 * 255].any()
        assert fill.any() and ground.any()
    assert len(plain) > 1


def test_styles_and_combinations() -> None:
    scenes = [Shapes(styles=list(STYLES), combinations='held_out').scene(i) for i in range(150)]
    assert {s.style for s in scenes} == set(STYLES) and {(s.fill, s.shape) for s in scenes} == set(HELD_OUT)
    scenes = [Shapes().scene(i) for i in range(300)]
    assert {s.style for s in scenes} == set(BASE_STYLES) and not {(s.fill, s.shape) for s in scenes} & set(HELD_OUT)
    assert {Shapes(styles='ringed').scene(i).style for i in range(20)} == {'ringed'}


def test_splits_and_seeds_have_different_images() -> None:
    data = [Shapes(length=20, seed=seed, split=split) for seed in (0, 1) for split in ('train', 'test')]
    images = {np.asarray(d[i]['img']).tobytes() for d in data for i in range(20)}
    assert len(images) == 80 and len({d.source for d in data}) == 4


def test_oversize_is_cropped_and_the_time_ids_are_true() -> None:
    """The sample is a window of the larger image, at the place that the time ids name; and so is the condition."""
    data = Shapes(length=60, size=32, oversize=0.5, transforms=CROP)
    larger = []
    for index in range(60):
        sample = data[Draw(index, 1, 7)]
        height, width, top, left, *target = (int(v) for v in sample['time_ids'])
        assert height == width and 32 <= height <= 48 and target == [32, 32]
        window = slice(top, top + 32), slice(left, left + 32)
        whole = draw.render(data.scene(index), height)[window]
        assert torch.equal(sample['img'], torch.from_numpy(whole).permute(2, 0, 1))
        outline = draw.condition(data.scene(index), height, 'outline')[window]
        assert torch.equal(sample['conditioning_image'], torch.from_numpy(outline).permute(2, 0, 1))
        larger.append((height, top, left))
    sizes = [height for height, _, _ in larger if height > 32]
    assert 18 <= len(sizes) <= 42 and len(set(sizes)) > 6 and max(sizes) >= 46
    assert len({(top, left) for _, top, left in larger}) > 10
    assert same(data[Draw(5, 1, 7)], data[Draw(5, 1, 7)])
    other = [tuple(data[Draw(i, epoch, seed)]['time_ids'].tolist()) for epoch, seed in ((1, 7), (2, 7), (1, 8))
             for i in range(20)]
    assert other[:20] != other[20:40] != other[40:] != other[:20]
    with pytest.raises(UserError, match='add a Crop of 32 pixels'):
        uncut = Shapes(length=20, size=32, oversize=0.5, transforms=PACK)
        collate([uncut[i] for i in range(20)])


def test_rows_do_not_depend_on_workers_processes_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With oversize, crops and dropped captions."""
    data = Shapes(length=6, size=32, oversize=0.7, reference=True, truth=True, transforms=[
        dict(type='CaptionDrop', prob=0.4), *CROP])

    def read(num_workers: int, batch_size: int = 2, num: int = 6, **options: Any) -> list[dict[str, Any]]:
        loader = DataLoader(data, batch_size, sampler=KeyedSampler(data, **options), num_workers=num_workers,
                            collate_fn=collate)
        return [batch for batch, _ in zip(loader, range(num), strict=False)]
    single = read(0, seed=4)
    assert all(map(same, single, read(2, seed=4))) and all(map(same, single[2:], read(0, seed=4, start=4, num=4)))
    assert not same(single[0], read(0, seed=5, num=1)[0])
    parts = []
    for rank in range(2):
        monkeypatch.setattr('diffengine_sdxl.datasets.data_sampler.get_dist_info', lambda rank=rank: (rank, 2))
        parts.append(read(0, batch_size=1, seed=4))
    for whole, *pair in zip(single, *parts, strict=True):
        assert all(torch.equal(whole['img'][r], pair[r]['img'][0]) and whole['text'][r] == pair[r]['text'][0]
                   for r in range(2))
    monkeypatch.undo()
    rows = list(DataLoader(data, 1, sampler=FiniteSampler(data), collate_fn=collate))
    assert [row['key'] for row in rows] == [[f'train/{i}'] for i in range(6)]


@pytest.mark.parametrize(('options', 'message'), [
    (dict(length=0), 'length=0 must be at least 1'), (dict(size=7), 'size=7'), (dict(oversize=1.5), 'oversize=1.5'),
    (dict(oversize=-0.1), 'oversize=-0.1'),
    (dict(conditioning='outlines'), "conditioning='outlines' is unknown; .*Did you mean 'outline'"),
    (dict(styles=['flat', 'strpied']), "styles='strpied' is unknown; .*Did you mean 'striped'"),
    (dict(styles='dots'), "styles='dots'"), (dict(styles=[]), r'styles=\[\] must be a list .* at least one'),
    (dict(combinations='heldout'), "combinations='heldout' .*Did you mean 'held_out'"),
    (dict(length='abc'), "length='abc' must be a whole number"), (dict(size=64.5), 'size=64.5 must be a whole number'),
    (dict(oversize='x'), "oversize='x'"), (dict(split=''), "split=''"), (dict(styles=3), 'styles=3 must be a list'),
    (dict(oversize=0.5, transforms=[dict(type='PackInputs')]), 'add a Crop of 64 pixels'),
])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Shapes(**options)
    assert 'Shapes' in str(error.value) and len(str(error.value).splitlines()) == 1


def test_captions_name_what_is_asked() -> None:
    """All of them the same attributes, or a share of them some; and the truth says which."""
    full, shapes = Shapes(length=60, truth=True), Shapes(length=60, truth=True, mentions=['shape'])
    for i in range(60):
        sample = shapes[i]
        assert sample['mentioned'] == 'shape' and sample['shape'] in sample['text'].split() and sample['fill']
        assert sample['fill'] not in sample['text'] and np.array_equal(sample['img'], full[i]['img'])
        words = full[i]['text'].replace(',', '').split()
        assert full[i]['mentioned'].split() == [name for name in ATTRIBUTES if full[i][name] in words]
    assert {Shapes(length=9, mentions=[])[i]['text'] for i in range(9)} == {''}
    some = Shapes(length=400, truth=True, partial_captions=0.6)
    texts = [some.texts(i, Draw(0, 0, 0))['text'] for i in range(400)]
    same_text = sum(text == full.texts(i, Draw(0, 0, 0))['text'] for i, text in enumerate(texts))
    assert 0.3 * 400 < same_text < 0.5 * 400 and 5 <= texts.count('') <= 30


@pytest.mark.parametrize(('settings', 'words'), [
    (dict(mentions='shape'), "mentions='shape' must be a list"), (dict(mentions=['colour']), 'mentions.*colour'),
    (dict(partial_captions=1.5), r'partial_captions=1.5 must be a number in \[0, 1\]'),
    (dict(mentions=['shape'], partial_captions=0.5), 'None beside partial_captions=0.5')])
def test_invalid_captions_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Shapes(**settings)
