"""Buckets: every row once an epoch, one shape a step, whatever the processes and wherever a run resumes."""

import math
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl.datasets import Draw, PriorPreservation, buckets, data_sampler
from diffengine_sdxl.datasets.base import MapDataset
from diffengine_sdxl.datasets.buckets import BucketSampler, bucket_sizes
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.mixture import Mixture
from diffengine_sdxl.datasets.shapes import Shapes
from diffengine_sdxl.errors import UserError

SIZES = [(64, 64), (90, 60), (60, 90), (100, 60), (64, 70), (60, 100), (80, 80)]


class Rows(MapDataset):
    """Images of given sizes, drawn when they are read."""

    source = 'drawn'

    def __init__(self, sizes, **options):
        super().__init__(**options)
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def key(self, index):
        return f'{index}.png'

    def load(self, index, draw):
        if self.sizes[index] is None:
            raise BadImageError('bad')
        return dict(img=Image.new('RGB', self.sizes[index][::-1]), text='')


def many(num):
    """Sizes in uneven numbers: few of some."""
    return [SIZES[int(math.sqrt(i)) % len(SIZES)] for i in range(num)]


def sampler(dataset, rank=0, world=1, per_step=4, monkeypatch=None, **options):
    """A sampler of 64 x 64 pixels in steps of 8, as process `rank` of `world` has it."""
    if monkeypatch is not None:
        monkeypatch.setattr(data_sampler, 'get_dist_info', lambda: (rank, world))
    built = BucketSampler(dataset, **{**dict(resolution=64, step=8, seed=3, upscale=True), **options})
    built.prepare(per_step, 8)
    return built


def test_the_shapes_of_sdxl():
    # Podell et al. 2023, appendix I, within a ratio of 2
    upright = [(1088, 960), (1152, 896), (1216, 832), (1344, 768)]
    chosen = bucket_sizes(1024**2, 64, 2.0, 9, np.zeros((0, 2)))
    assert chosen == [*((w, h) for h, w in reversed(upright)), (1024, 1024), *upright]


@pytest.mark.parametrize('side, step', [(512, 64), (768, 32), (1024, 8), (100, 8), (1000, 64)])
def test_shapes_are_symmetric_multiples_of_equal_area(side, step):
    sizes = np.array([(3, 2), (2, 3), (100, 101), (7, 4)] * 3)
    chosen = bucket_sizes(side**2, step, 2.5, 9, sizes)
    assert len(chosen) <= 9 and chosen == [(w, h) for h, w in reversed(chosen)] == sorted(set(chosen))
    square = chosen[len(chosen) // 2]
    assert square == (side // step * step,) * 2
    for height, width in chosen:
        assert height % step == width % step == 0 and max(height / width, width / height) <= 2.5
        assert side**2 - step * max(height, width) < height * width <= side**2 or height == width


def test_shapes_are_chosen_that_cut_off_the_least():
    sizes = np.array([(150, 100)] * 5 + [(100, 180)] * 4 + [(100, 100)])

    def lost(chosen):
        return sum(1 - max(min(h * W / (w * H), w * H / (h * W)) for H, W in chosen) for h, w in sizes.tolist())
    pool = bucket_sizes(512**2, 8, 2.0, 10**4, sizes)
    chosen = bucket_sizes(512**2, 8, 2.0, 5, sizes)
    pairs = [((w, h), (h, w)) for h, w in pool if h > w]
    best = min(lost([(512, 512), *one, *other]) for one in pairs for other in pairs)
    assert len(chosen) == 5 < len(pool) and math.isclose(lost(chosen), best, abs_tol=1e-3)
    assert bucket_sizes(512**2, 8, 2.0, 2, sizes) == [(512, 512)]


def test_each_image_goes_to_the_nearest_aspect_ratio():
    rows = Rows(many(50))
    built = sampler(rows)
    for index, (height, width) in enumerate(rows.sizes):
        nearest = min(built.sizes, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))
        assert built.draw(index).size == nearest
        assert built.draw(index, 5) == Draw(index, 5, 3, nearest)


def test_every_row_once_an_epoch_in_steps_of_one_shape():
    rows = Rows(many(53))
    built = sampler(rows, per_step=6)
    draws = list(islice(built, 6 * 200))
    steps = [draws[i:i + 6] for i in range(0, len(draws), 6)]
    assert all(len({d.size for d in step}) == 1 for step in steps)
    assert all(d.size == built.draw(d.index).size for d in draws)
    counts = Counter((d.index, d.epoch) for d in draws)
    assert set(counts.values()) == {1}
    # What an epoch lacks waits in a queue: less than a step of each bucket.
    last = draws[-1].epoch
    for epoch in range(last):
        missing = Counter(built.draw(i).size for i in range(53) if (i, epoch) not in counts)
        assert all(number < 6 for number in missing.values()), epoch
    whole = {e for e in range(last) if all((i, e) in counts for i in range(53))}
    assert len(whole) > last - 8 and {d.seed for d in draws} == {3}


def test_steps_are_those_of_queues_that_the_keyed_order_fills():
    built = sampler(Rows(many(40)), per_step=5)
    queues, expected = defaultdict(list), []
    for epoch in range(10):
        for draw in built.draws(epoch):
            queues[draw.size].append(draw)
            if len(queues[draw.size]) == 5:
                expected += queues.pop(draw.size)
    assert list(islice(built, len(expected))) == expected and len(expected) > 300
    plain = [(d.index, d.epoch) for d in data_sampler.KeyedSampler(range(40), seed=3).draws(2)]
    assert [(d.index, d.epoch) for d in built.draws(2)] == plain
    unshuffled = sampler(Rows([(64, 64)] * 4), shuffle=False)
    assert [d.index for d in islice(unshuffled, 8)] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_the_steps_of_one(monkeypatch, world):
    whole = list(islice(sampler(Rows(many(45)), per_step=8), 8 * 30))
    parts = [list(islice(sampler(Rows(many(45)), rank, world, 8, monkeypatch), 8 * 30 // world))
             for rank in range(world)]
    assert [draw for position in zip(*parts, strict=True) for draw in position] == whole
    # Micro-batches of 2 on each process: all of a step, on all processes, have one shape.
    for start in range(0, len(parts[0]), 8 // world):
        assert len({d.size for part in parts for d in part[start:start + 8 // world]}) == 1


def test_start_resumes_a_run_everywhere(monkeypatch):
    rows = Rows(many(30))
    whole = list(islice(sampler(rows), 200))
    built = sampler(rows)
    for start in range(0, 150, 7):
        built.start = start
        assert list(islice(built, 50)) == whole[start:start + 50]
    resumed = sampler(rows, 1, 2, 4, monkeypatch, start=12)
    assert list(islice(resumed, 40)) == whole[13:93:2]
    resumed.start = 13
    with pytest.raises(UserError, match='sample 13'):
        next(iter(resumed))


def test_length_counts_what_is_read(monkeypatch):
    rows = Rows([*[(64, 64)] * 7, (64, 640)])
    assert len(sampler(rows, unfit='skip')) == 7
    assert len(sampler(rows, 0, 2, 2, monkeypatch, unfit='skip')) == 4


def test_images_that_fit_no_bucket_are_named(monkeypatch):
    sizes = [(64, 64)] * 6 + [(40, 90), (64, 300), (63, 64), (200, 1200), (600, 90)]
    with pytest.raises(UserError, match=r"5 of 11 images fit no bucket \(height x width\): '6.png' \(40 x 90, smaller "
                                        r"than its bucket of 48 x 80\), '7.png' \(64 x 300, .*\), '8.png' .* \.\.\.\. "
                                        "Set train_dataloader.sampler.unfit='skip'"):
        sampler(Rows(sizes), upscale=False)
    with pytest.raises(UserError, match=r"3 of 11 .*'7.png' \(64 x 300, by more than half cut off by its bucket of 48 "
                                        r"x 80\), '9.png' .*'10.png'"):
        sampler(Rows(sizes))
    lines = []
    monkeypatch.setattr(buckets, 'print_log', lambda text, **_: lines.append(text))
    built = sampler(Rows(sizes), unfit='skip', upscale=False)
    assert {d.index for d in islice(built, 60)} == set(range(6)) and "'6.png'" in lines[0]
    assert built.describe() == 'Buckets (height x width): 64 x 64: 6 images; 5 are left out'
    with pytest.raises(UserError, match='no image fits'):
        sampler(Rows(sizes[6:]), unfit='skip', upscale=False)


def test_half_of_an_image_may_be_cut_off():
    # 48 x 80 is 5 : 3; of a strip of 1 : 3.3 it keeps 1/1.98
    assert len(sampler(Rows([(100, 330)]))) == 1
    with pytest.raises(UserError, match='cut off'):
        sampler(Rows([(100, 340)]))


def test_unreadable_images_follow_on_bad_image(monkeypatch):
    sizes = [(64, 64), None, (64, 64)]
    with pytest.raises(BadImageError):
        sampler(Rows(sizes))
    built = sampler(Rows(sizes, on_bad_image='skip'))
    assert {d.index for d in islice(built, 20)} == {0, 2} and built.draw(1).size == (64, 64)


def test_a_bucket_smaller_than_a_step_is_said():
    built = sampler(Rows([(64, 64)] * 9 + [(90, 60)] * 2), per_step=8)
    assert built.describe() == ('Buckets (height x width): 64 x 64: 9 images, 80 x 48: 2 images\nFewer than the 8 '
                                'samples of a step are in 80 x 48: such a bucket is read once in several epochs.')
    draws = list(islice(built, 8 * 11))
    assert Counter(d.size for d in draws) == {(64, 64): 72, (80, 48): 16}


def test_given_buckets():
    built = sampler(Rows([(64, 64), (100, 30)]), buckets=[(64, 64), [96, 32]])
    assert built.draw(1).size == (96, 32) and len(built.sizes) == 2
    with pytest.raises(UserError, match='bucket of 64 x 64 pixels does not suit .* multiples of 48'):
        built.prepare(4, 48)


@pytest.mark.parametrize('options, message', [
    (dict(resolution='big'), "BucketSampler: resolution='big'"), (dict(step=0), 'step=0 must be at least 1'),
    (dict(step=128), 'step=128 is more than the side'), (dict(max_buckets=0), 'max_buckets=0'),
    (dict(max_ratio=0.5), 'max_ratio=0.5'), (dict(unfit='drop'), "unfit='drop' is unknown"),
    (dict(buckets=[]), 'different .height, width.'), (dict(buckets=[64, (64, 64)]), 'different .height, width.'),
    (dict(buckets=[64, 'wide']), "BucketSampler: buckets='wide'")])
def test_refused_options(options, message):
    with pytest.raises(UserError, match=message):
        sampler(Rows([(64, 64)]), **options)


def test_other_data_sets_are_refused():
    rows = Rows([(64, 64)])
    for dataset in (PriorPreservation(rows, rows), [1, 2]):
        with pytest.raises(UserError, match=f'sizes of a {type(dataset).__name__}: .* Mixture'):
            BucketSampler(dataset)
    with pytest.raises(UserError, match="no transform of Shapes.* Set image_size='bucket'"):
        BucketSampler(Shapes(length=1, size=64, transforms=[dict(type='PackInputs')]))


def test_a_mixture_shares_its_steps():
    sets = dict(photos=Rows(many(20)), drawings=Rows([(64, 64), (90, 60)] * 3))
    mixture = Mixture(sets, weights=dict(photos=2, drawings=1))
    built = sampler(mixture, per_step=4)
    draws, together = list(islice(built, 4 * 60)), 0
    for start in range(0, len(draws), 4):
        step = draws[start:start + 4]
        assert len({d.size for d in step}) == 1
        samples = [mixture[d] for d in step]
        for draw, sample in zip(step, samples, strict=True):
            image = sample['img']
            nearest = min(built.sizes, key=lambda size: abs(math.log(size[0] / size[1] * image.width / image.height)))
            assert draw.size == nearest
        together += len({s['data_set'] for s in samples}) > 1
    assert together > 5 and len({(d.index, d.epoch) for d in draws}) == len(draws)
    with pytest.raises(UserError, match=r"1 of 3 .*'drawings/0.png' \(64 x 300"):
        BucketSampler(Mixture(dict(photos=Rows([(64, 64)]), drawings=Rows([(64, 300), (64, 64)]))), 64, step=8)
