"""Image and conditions stay aligned, and the time ids name the crop's place."""

import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import TRANSFORMS


def build(name, **options):
    return TRANSFORMS.build(dict(type=name, **options))


def marked(width, height, x, y):
    """Black, but for a white square of 5 x 5 pixels around (x, y)."""
    array = np.zeros((height, width, 3), np.uint8)
    array[y - 2:y + 3, x - 2:x + 3] = 255
    return Image.fromarray(array)


def centre(image):
    weights = np.asarray(image.convert('L'), dtype=np.float64)
    ys, xs = np.mgrid[:image.height, :image.width]
    return (weights * xs).sum() / weights.sum(), (weights * ys).sum() / weights.sum()


def sample(img, key='a', epoch=0, seed=0, **others):
    return dict(img=img, text='', key=key, epoch=epoch, seed=seed, num_skipped=0, **others)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('size, expected', [((100, 57), (56, 32)), ((57, 100), (32, 56)), ((40, 40), (32, 32)),
                                            ((20, 31), (32, 49))])
def test_resize_is_torchvisions_short_edge_rule(size, expected):
    # torchvision: the short edge becomes 32, the other int(32 * long / short).
    image = noise(*size)
    out = build('Resize', size=32)(sample(image))
    assert out['img'].size == expected
    np.testing.assert_array_equal(out['img'], image.resize(expected, Image.Resampling.BILINEAR))
    assert out['original_size'] == (size[1], size[0])


def test_resize_covers_a_rectangle_and_uses_the_filter():
    image = noise(100, 50)
    out = build('Resize', size=[40, 60], interpolation='lanczos')(sample(image))
    np.testing.assert_array_equal(out['img'], image.resize((80, 40), Image.Resampling.LANCZOS))
    assert build('Resize', size=(20, 60))(sample(image))['img'].size == (60, 30)


def test_condition_of_another_size_is_resized():
    out = build('Resize', size=32)(sample(noise(100, 57), conditioning_image=noise(50, 29), depth=noise(300, 171)))
    assert out['conditioning_image'].size == out['depth'].size == out['img'].size == (56, 32)


@pytest.mark.parametrize('size', [(57, 100), (64, 64), (100, 60), (25, 11)])
def test_condition_of_another_aspect_ratio_is_refused(size):
    with pytest.raises(UserError, match=rf"'depth' of sample 'a' is {size[1]} x {size[0]} and its image 57 x 100"):
        build('Resize', size=32)(sample(noise(100, 57), depth=noise(*size)))


@pytest.mark.parametrize('size', [(64, 43), (64, 42), (1024, 683), (101, 67)])
def test_rounding_is_not_another_aspect_ratio(size):
    build('Resize', size=32)(sample(noise(300, 200), conditioning_image=noise(*size)))


@pytest.mark.parametrize('order', [('Resize', 'Crop', 'Flip'), ('Resize', 'Flip', 'Crop'),
                                   ('Flip', 'Resize', 'Crop')])
def test_marker_stays_aligned_under_random_crop_and_flip(order):
    options = {'Resize': dict(size=64), 'Crop': dict(size=48, mode='random'), 'Flip': dict(prob=0.5)}
    chain = [build(name, **options[name]) for name in order]
    seen, scale = set(), 64 / 90
    for epoch in range(24):
        out = sample(marked(120, 90, 60, 45), epoch=epoch, conditioning_image=marked(240, 180, 120, 90))
        for transform in chain:
            out = transform(out)
        image, condition = centre(out['img']), centre(out['conditioning_image'])
        assert np.allclose(image, condition, atol=0.5)
        # The place in the crop, the crop's place and the scale lead back to the marker in the (mirrored) image.
        top, left = out['crop_top_left']
        mirrored = float(rng_uniform(0, 'a', epoch)) < 0.5
        x = (image[0] + left + 0.5) / scale - 0.5
        assert abs((119 - x if mirrored else x) - 60) < 1 and abs((image[1] + top + 0.5) / scale - 0.5 - 45) < 1
        seen.add((mirrored, left))
    assert {mirrored for mirrored, _ in seen} == {True, False} and len(seen) > 10


def rng_uniform(seed, key, epoch):
    import torch
    return torch.rand((), generator=rng.generator(seed, key, epoch, 'flip'))


def test_crop_draws_are_keyed_and_reach_every_place():
    crop, image = build('Crop', size=(8, 6), mode='random'), noise(9, 10)
    places = [crop(sample(image, epoch=e))['crop_top_left'] for e in range(150)]
    assert {p[0] for p in places} == {0, 1, 2} and {p[1] for p in places} == {0, 1, 2, 3}
    assert places == [crop(sample(image, epoch=e))['crop_top_left'] for e in range(150)]
    others = [[crop(sample(image, **change))['crop_top_left'] for change in changes] for changes in
              ([dict(seed=s) for s in range(20)], [dict(key=str(k)) for k in range(20)])]
    assert all(len(set(places)) > 3 for places in others)


def test_center_crop_and_flip_record_the_place_in_the_mirrored_image():
    image = noise(21, 16)
    out = build('Crop', size=(10, 8))(sample(image))
    # torchvision: int(round((16 - 10) / 2)), int(round((21 - 8) / 2)), rounding half to even
    assert out['crop_top_left'] == (3, 6)
    np.testing.assert_array_equal(out['img'], np.asarray(image)[3:13, 6:14])
    out = build('Flip', prob=1)(out)
    assert out['crop_top_left'] == (3, 7)
    np.testing.assert_array_equal(out['img'], np.asarray(image)[:, ::-1][3:13, 7:15])
    twice = build('Crop', size=4)(build('Crop', size=(10, 8))(sample(image)))
    np.testing.assert_array_equal(twice['img'], np.asarray(image)[6:10, 8:12])
    assert twice['crop_top_left'] == (6, 8)


def test_flip_probability():
    assert 'canvas_size' not in build('Flip', prob=0)(sample(noise(4, 4)))
    flip, image = build('Flip', prob=0.25), noise(4, 4)
    rate = np.mean([flip(sample(image, key=str(k)))['img'] is not image for k in range(400)])
    assert 0.18 < rate < 0.32


@pytest.mark.parametrize('make, message', [
    (lambda: build('Crop', size=32)(sample(noise(40, 30))), 'smaller than the crop of 32 x 32'),
    (lambda: build('Crop', size=8)(sample(noise(40, 30), depth=noise(20, 15))), "'depth' .* put Resize before Crop"),
    (lambda: build('Resize', size=8)(build('Crop', size=8)(sample(noise(9, 9)))), 'Resize must stand before Crop'),
    (lambda: build('Resize', size=0), 'size=0'),
    (lambda: build('Resize', size='$resolution'), r'\$resolution'),
    (lambda: build('Resize', size=8, interpolation='cubic'), "interpolation='cubic' is unknown; .*'bicubic'"),
    (lambda: build('Crop', size=8, mode='centre'), "mode='centre' is unknown; .*Did you mean 'center'"),
    (lambda: build('Flip', prob=1.5), 'prob=1.5'),
    (lambda: build('Flip', prob='half'), "prob='half'"),
    (lambda: build('Crop', size=8)(dict(key='a')), "'a' has no image 'img'"),
])
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_time_ids_by_hand():
    out = build('Crop', size=32)(build('Resize', size=40)(sample(noise(100, 50))))
    # 50 x 100 -> 40 x 80 -> centre 32 x 32 at (4, 24)
    assert build('ComputeTimeIds')(dict(out))['time_ids'].tolist() == [50, 100, 4, 24, 32, 32]
    flipped = build('Flip', prob=1)(build('Crop', size=(32, 30))(build('Resize', size=(40, 1))(sample(noise(100, 51)))))
    # 51 x 100 -> 40 x 78; centre 32 x 30 at (4, 24); mirrored 78 - 24 - 30 = 24
    assert build('ComputeTimeIds')(flipped)['time_ids'].tolist() == [51, 100, 4, 24, 32, 30]
    constant = build('ComputeTimeIds', original_size=1024, crops_coords_top_left=[0, 7], target_size=(512, 256))
    assert constant(dict(out))['time_ids'].tolist() == [1024, 1024, 0, 7, 512, 256]
    assert build('ComputeTimeIds', crops_coords_top_left=0)(dict(out))['time_ids'].tolist() == [50, 100, 0, 0, 32, 32]
    refiner = build('ComputeTimeIds', aesthetic_score=6)(dict(out))['time_ids']
    assert refiner.tolist() == [50, 100, 4, 24, 6] and str(refiner.dtype) == 'torch.float32'


def test_the_size_of_a_bucket():
    image, bucket = noise(100, 51), (24, 40)
    out = build('Resize', size='bucket')(sample(image, bucket=bucket, mask=noise(50, 26)))
    assert out['img'].size == out['mask'].size == (47, 24)
    out = build('ComputeTimeIds')(build('Crop', size='bucket')(out))
    assert out['img'].size == out['mask'].size == (40, 24)
    # 51 x 100 -> 24 x 47; centre 24 x 40 at (0, round(3.5))
    assert out['time_ids'].tolist() == [51, 100, 0, 4, 24, 40]
    for name in ('Resize', 'Crop'):
        with pytest.raises(UserError, match="^Sample 'a' has no bucket for size='bucket': set train_dataloader"):
            build(name, size='bucket')(sample(image))


def test_random_geometry_goes_by_the_variant_in_place_of_the_epoch():
    crop, flip, image = build('Crop', size=8, mode='random'), build('Flip'), noise(60, 60)
    for transform in (crop, flip):
        plain = [transform(sample(image, epoch=e)) for e in range(20)]
        for epoch, one in enumerate(plain):
            other = transform(sample(image, epoch=100 + epoch, variant=epoch))
            assert one.get('crop_top_left') == other.get('crop_top_left')
            np.testing.assert_array_equal(one['img'], other['img'])


def test_what_a_transform_draws_is_told_without_its_image():
    crop, flip, image = build('Crop', size=8, mode='random'), build('Flip'), noise(60, 60)

    def told(transform, **options):
        return transform.draws({k: v for k, v in sample(image, **options).items() if k != 'img'})
    for epoch in range(20):
        assert told(flip, epoch=epoch) == (flip(sample(image, epoch=epoch))['img'] is not image)
    # Equal if and only if the crop is drawn from the same key.
    assert told(crop, epoch=3, variant=1) == told(crop, epoch=1, variant=1) == told(crop, epoch=1)
    different = [{}, dict(epoch=1), dict(seed=1), dict(key='b')]
    assert len({told(crop, **options) for options in different}) == 4 and crop.draws_anew
    assert told(build('Crop', size=8)) == told(build('Crop', size=8), key='b', epoch=9)
    assert not build('Crop', size=8).draws_anew
    for name in ('Crop', 'Resize'):
        assert told(build(name, size='bucket'), bucket=(8, 9)) != told(build(name, size='bucket'), bucket=(9, 8))
    assert told(build('ComputeTimeIds')) is None
    assert {t.reads for t in (crop, flip, build('Resize', size=8), build('ComputeTimeIds'))} == {'images'}


def test_a_strip_is_refused():
    with pytest.raises(UserError, match=r"Sample 'k': An image of 800 x 1, scaled to cover 1024 x 1024, would be "
                                        r'819200 x 1024 pixels .* limits.image_pixels is 67108864'):
        build('Resize', size=1024)(dict(img=Image.new('RGB', (1, 800)), key='k', seed=0, epoch=0))
