"""Loss masks: images that follow the geometry, averaged over each latent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import grads, make_batch, t2i
from PIL import Image

from diffengine_sdxl.datasets.transforms import Crop, LossMask, PackInputs, Resize
from diffengine_sdxl.engine.hooks.first_steps import _rows_that_learn
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.data_preprocessor import images_to_floats
from diffengine_sdxl.models.sdxl import SDXL


def sample(**changes: Any) -> dict[str, Any]:
    """Return an image of 48 x 32 whose mask is white in its left half."""
    white = np.zeros((32, 48), dtype=np.uint8)
    white[:, :24] = 255
    return {'img': Image.new('RGB', (48, 32)), 'loss_mask': Image.fromarray(white).convert('RGB'), 'key': 'row',
            'epoch': 0, 'seed': 0, **changes}


def test_the_mask_follows_the_geometry() -> None:
    """The middle 32 columns are cropped: white up to the 16th."""
    made = PackInputs()(LossMask(outside=0.25)(Crop(32)(Resize(32)(sample()))))
    expected = torch.full((1, 32, 32), 0.25)
    expected[..., :16] = 1
    assert torch.equal(made['mask'], expected) and 'loss_mask' not in made


def test_a_mask_of_bytes_is_no_image() -> None:
    """A data set's own mask of 0 and 1 keeps its values, and the guard of the first steps reads it."""
    mask = torch.ones(2, 1, 8, 8, dtype=torch.uint8)
    mask[1] = 0
    assert images_to_floats({'mask': mask})['mask'] is mask
    assert _rows_that_learn(replace(make_batch(2), mask=mask), []).tolist() == [True, False]


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    return SDXL(pretrained=str(tiny_base), adapters=dict(adapter=t2i()), objective=dict(type='Denoise'),
                dtype='float64')


def test_the_loss_is_weighted(model: SDXL) -> None:
    """A mask of pixels equals one of latents with each one's share of white; compare with a sum over all places."""
    batch = make_batch(2)
    pixels = torch.zeros(2, 1, 64, 64)
    pixels[0, :, :20, :12] = 1
    pixels[1, :, 8:16, :20] = 0.5
    shares = pixels.view(2, 1, 8, 8, 8, 8).mean(dim=(3, 5))
    masked, gradients = grads(model, replace(batch, mask=pixels))
    assert torch.equal(masked, grads(model, replace(batch, mask=shares))[0])
    by_hand = torch.zeros((), dtype=torch.float64)
    for place in shares.nonzero().tolist():
        one = torch.zeros(2, 1, 8, 8)
        one[tuple(place)] = float(shares[tuple(place)])
        with torch.no_grad():
            by_hand += model(replace(batch, mask=one), mode='loss')['loss']
    torch.testing.assert_close(masked, by_hand, rtol=1e-10, atol=0)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize('size', [(32, 64), (60, 60), (4, 4)])
def test_another_size_is_refused(model: SDXL, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f'mask of the loss is {size[0]} x {size[1]} and the latents 8 x 8'):
        model(replace(make_batch(2), mask=torch.ones(2, 1, *size)), mode='loss')


def test_a_missing_mask_is_named() -> None:
    for made in (sample(loss_mask=None), PackInputs()(sample())):
        with pytest.raises(UserError, match="no image 'loss_mask'"):
            LossMask()(made)
