"""Conditions computed from an image, and images packed to tensors."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.datasets.base import SampleBuilder
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import images_to_floats
from diffengine_sdxl.registry import TRANSFORMS


def build(name, **options):
    return TRANSFORMS.build(dict(type=name, **options))


def noise(width=24, height=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(key='a', epoch=0, seed=0, **others):
    return {**dict(text='a, b, c, d', key=key, epoch=epoch, seed=seed, num_skipped=0), **others}


def test_pack_equals_to_tensor_and_normalize():
    image, depth = noise(), noise()
    out = build('PackInputs')(build('Crop', size=16)(sample(img=image, depth=depth)))
    pixels = np.asarray(image)[:, 4:20].transpose(2, 0, 1)
    np.testing.assert_array_equal(out['img'], pixels)
    assert out['img'].dtype == out['depth'].dtype == torch.uint8 and out['img'].is_contiguous()
    floats, array = images_to_floats(collate([out])), pixels.astype(np.float32) / np.float32(255)
    assert floats['img'].dtype == floats['depth'].dtype == torch.float32
    np.testing.assert_array_equal(floats['img'][0], (array - np.float32(0.5)) / np.float32(0.5))
    np.testing.assert_array_equal(floats['depth'][0], array)
    again = images_to_floats(floats)  # of a user's own transforms
    assert again['img'] is floats['img'] and again['depth'] is floats['depth'] and again['key'] == ['a']
    assert not {'crop_top_left', 'original_size', 'canvas_size'} & out.keys()
    with pytest.raises(UserError, match="sample 'a' differ in size .*: img 16 x 24, depth 8 x 12"):
        build('PackInputs')(sample(img=noise(), depth=noise(12, 8)))


def test_a_transform_after_pack_gets_floats():
    """One of a user's own; ours expect none."""
    seen = []
    image, own = noise(16, 16), lambda sample: seen.append(sample) or sample
    for later in ([], [dict(type='CaptionDrop', prob=0.0)], [own]):
        builder = SampleBuilder([dict(type='Crop', size=16), dict(type='PackInputs'), *later])
        out = builder.transform(dict(img=image, depth=image, text='a'), 'a', Draw(0, 0, 0), 0)
        assert out['img'].dtype == (torch.float32 if own in later else torch.uint8)
    floats = images_to_floats(collate([build('PackInputs')(build('Crop', size=16)(sample(img=image)))]))
    assert torch.equal(seen[0]['img'], floats['img'][0]) and seen[0]['img'].min() < 0 <= seen[0]['depth'].min()


def test_canny_equals_opencv_at_the_image_size():
    image = Image.new('RGB', (64, 48), (10, 20, 200))
    image.paste((250, 240, 30), (20, 10, 44, 38))
    out = build('Canny')(sample(img=image))['conditioning_image']
    expected = cv2.Canny(np.asarray(image), 100, 200)
    assert out.mode == 'RGB' and set(np.unique(out)) == {0, 255}
    np.testing.assert_array_equal(np.asarray(out), np.repeat(expected[..., None], 3, axis=2))
    assert not np.asarray(build('Canny', low=5000, high=9000)(sample(img=image))['conditioning_image']).any()
    small = build('Canny', key='edges', detection_resolution=24)(sample(img=image))['edges']
    edges = cv2.Canny(np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR)), 100, 200)
    assert small.size == (64, 48)
    expected = Image.fromarray(edges).convert('RGB').resize((64, 48), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small, expected)
    with pytest.raises(UserError, match="Canny reads the image 'depth', which sample 'a' lacks"):
        build('Canny', source='depth')(sample(img=image))


@pytest.fixture(scope='module')
def dpt(tmp_path_factory):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil
    folder = tmp_path_factory.mktemp('dpt')
    torch.manual_seed(0)
    DPTForDepthEstimation(DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        is_hybrid=False)).save_pretrained(folder)
    DPTImageProcessorPil(size={'height': 32, 'width': 32}).save_pretrained(folder)
    return str(folder)


def test_depth_equals_transformers(dpt):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    image = noise(40, 30)
    model = AutoModelForDepthEstimation.from_pretrained(dpt)
    processor = AutoImageProcessor.from_pretrained(dpt, backend='pil')
    with torch.no_grad():
        depth = model(**processor(images=image, return_tensors='pt')).predicted_depth
    depth = torch.nn.functional.interpolate(depth[None], (30, 40), mode='bicubic', align_corners=False)[0, 0]
    expected = ((depth - depth.min()) / (depth.max() - depth.min()) * 255).round()
    transform = build('Depth', model=dpt)
    assert transform._model is None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    out = np.asarray(transform(sample(img=image))['conditioning_image'])
    assert torch.equal(torch.get_rng_state(), before)
    assert out.shape == (30, 40, 3) and out.min() == 0 and out.max() == 255
    assert np.abs(out[..., 0] - expected.numpy()).max() <= 1
    assert not any(p.requires_grad for p in transform.model.parameters()) and not transform.model.training
    assert pickle.loads(pickle.dumps(transform))._model is None
    inverted = np.asarray(build('Depth', model=dpt, invert=True)(sample(img=image))['conditioning_image'])
    assert np.abs(255 - out.astype(int) - inverted).max() <= 1
    # Also where torchvision is installed, by which transformers would read by default.
    assert transform._processor.backend == 'pil'
    with pytest.raises(UserError, match=r"'Depth\(model=no/such/folder\)' could not be loaded"):
        build('Depth', model='no/such/folder')(sample(img=image))


class Darker:
    """A stand-in for a user's detector."""

    def __init__(self, factor):
        self.factor = factor

    @classmethod
    def from_pretrained(cls, name, factor):
        return cls(factor * len(name))

    def __call__(self, image, add=0):
        return np.asarray(image)[..., 0].astype(np.float32) / 255 * self.factor + add


NUMBER = 3


@pytest.mark.parametrize('options', [
    dict(function='Darker', init=dict(factor=0.5)),
    dict(function='Darker.from_pretrained', init=dict(name='xx', factor=0.25)),
])
def test_preprocessor_by_import_path(options):
    options['function'] = f'{__name__}:{options["function"]}'
    out = build('Preprocessor', key='pose', call=dict(add=0.1), **options)(sample(img=noise()))['pose']
    expected = np.rint((np.asarray(noise())[..., 0].astype(np.float32) / 255 * 0.5 + 0.1) * 255)
    np.testing.assert_array_equal(np.asarray(out), np.repeat(expected[..., None], 3, axis=2).astype(np.uint8))


def test_preprocessor_calls_a_function_and_refuses_other_objects():
    out = build('Preprocessor', function='PIL.ImageOps:invert')(sample(img=noise()))['conditioning_image']
    np.testing.assert_array_equal(np.asarray(out), 255 - np.asarray(noise()))
    for function, message in (('nowhere:f', "'nowhere:f'. cannot be imported"), ('PIL.ImageOps:inv', 'imported'),
                              (f'{__name__}:NUMBER', 'is a int'), ('PIL.ImageOps:', "must be 'package"),
                              ('builtins:repr', 'returned a str'), ('.ImageOps:invert', "must be 'package")):
        with pytest.raises(UserError, match=message):
            build('Preprocessor', function=function)(sample(img=noise()))
    with pytest.raises(UserError, match=r"Darker'\) cannot be built with init=\{'size': 3\}: .*'size'"):
        build('Preprocessor', function=f'{__name__}:Darker', init=dict(size=3))(sample(img=noise()))
    for options in (dict(low='a'), dict(detection_resolution=0), dict(detection_resolution='$resolution')):
        with pytest.raises(UserError, match=next(iter(options))):
            build('Canny', **options)
