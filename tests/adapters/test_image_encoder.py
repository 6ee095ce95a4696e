"""The image encoder is transformers' own: saved, loaded, fed and named as its classes expect."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import assert_same, make_batch, picture_batch, sampler, t2i
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch

SMALL = dict(type='ImageEncoder', image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
             num_attention_heads=2)


def build(base: Path, name: str = 'image_encoder', seed: int = 0, dtype: str | None = None, **options: Any) -> SDXL:
    return SDXL(pretrained=str(base), adapters={name: {**SMALL, **options}}, seed=seed, dtype=dtype)


def encoder(model: SDXL) -> Any:
    return model.adapters['image_encoder']


def weights(model: SDXL) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in encoder(model).net.state_dict().items()}


def smooth_images(num: int, size: tuple[int, int]) -> list[Image.Image]:
    """Smooth images of `size` (height, width) with full contrast, as photographs are."""
    draws = np.random.default_rng(2)
    coarse = draws.integers(0, 256, (num, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC) for array in coarse]


def batch_of(images: list[Image.Image]) -> Batch:
    """As PackInputs makes it."""
    img = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images]) * 2 - 1
    return make_batch(len(images), img.shape[-2:], img=img, conditions={})


def prepared(model: SDXL, batch: Batch) -> Tensor:
    """The network's input."""
    inputs: list[Tensor] = []
    handle = encoder(model).net.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    encoder(model).embed(batch)
    handle.remove()
    return inputs[0]


@torch.no_grad()
def test_what_is_saved_is_transformers_own(tiny_base: Path, tmp_path: Path) -> None:
    """Strictly loaded; bitwise the same embeddings of the same pixels, which the processor beside it prepares."""
    model = build(tiny_base)
    encoder(model).save(tmp_path / 'e')
    theirs, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path / 'e', output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    processor, images = CLIPImageProcessorPil.from_pretrained(tmp_path / 'e'), smooth_images(3, (32, 32))
    batch = batch_of(images)
    assert torch.equal(theirs(prepared(model, batch)).image_embeds, encoder(model).embed(batch))
    pixels = processor(images, return_tensors='pt').pixel_values
    torch.testing.assert_close(prepared(model, batch), pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(pixels).image_embeds, encoder(model).embed(batch), rtol=1e-4, atol=1e-5)
    assert theirs.config.projection_dim == model.text_encoder_2.config.projection_dim
    assert json.loads((tmp_path / 'e' / 'preprocessor_config.json').read_text())['crop_size'] == {
        'height': 32, 'width': 32}


@pytest.mark.parametrize('size', [(64, 64), (48, 80), (80, 52), (24, 24), (32, 45)])
def test_other_sizes_are_scaled_and_cut_as_transformers_does(tiny_base: Path, tmp_path: Path,
                                                             size: tuple[int, int]) -> None:
    """Within the rounding of PIL's bicubic filter to 8 bits."""
    model, images = build(tiny_base), smooth_images(2, size)
    encoder(model).save(tmp_path / 'e')
    expected = CLIPImageProcessorPil.from_pretrained(tmp_path / 'e')(images, return_tensors='pt').pixel_values
    results = prepared(model, batch_of(images))
    assert results.shape == expected.shape
    gray_levels = (results - expected).abs() * torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1) * 255
    assert gray_levels.max() < 2.5 and gray_levels.mean() < 0.5, (gray_levels.max(), gray_levels.mean())


def test_fresh_weights_depend_on_seed_and_name(tiny_base: Path) -> None:
    """Not on what was drawn before them."""
    first = weights(build(tiny_base))
    torch.manual_seed(99)
    assert_same(weights(build(tiny_base)), first)
    other = build(tiny_base, name='other').adapters['other'].net.state_dict()
    for changed in (weights(build(tiny_base, seed=1)), other):
        assert not torch.equal(changed['visual_projection.weight'], first['visual_projection.weight'])
    both = SDXL(pretrained=str(tiny_base), adapters=dict(a=t2i(), image_encoder=SMALL))
    assert_same(weights(both), first)


def test_saved_weights_come_back(tiny_base: Path, tmp_path: Path) -> None:
    """By `load` and by `weights`, from a subfolder, in fp64; bitwise."""
    model = build(tiny_base, seed=5)
    encoder(model).save(tmp_path / 'sub' / 'e')
    given = build(tiny_base, weights=str(tmp_path / 'sub' / 'e'))
    inside = build(tiny_base, weights=str(tmp_path / 'sub'), subfolder='e')
    fresh = build(tiny_base, seed=8)
    assert weights(fresh)['visual_projection.weight'].ne(weights(model)['visual_projection.weight']).any()
    encoder(fresh).load(tmp_path / 'sub' / 'e')
    for other in (given, inside, fresh):
        assert_same(weights(other), weights(model))
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(model.state_dict())
    exact = build(tiny_base, dtype='float64', seed=5)
    with torch.no_grad():
        for parameter in encoder(exact).net.parameters():
            parameter.add_(1e-12)
    before = weights(exact)
    encoder(exact).save(tmp_path / 'fp64')
    encoder(exact).load(tmp_path / 'fp64')
    assert_same(weights(exact), before)
    assert before['visual_projection.weight'].dtype == torch.float64


def test_it_adds_nothing_to_an_image(tiny_base: Path) -> None:
    """Bitwise, also beside another adapter; once detached, it leaves no parameters."""
    batch = picture_batch(['a red star'], [3], (32, 32), conditions={'conditioning_image': torch.rand(1, 3, 32, 32)})
    base = SDXL(pretrained=str(tiny_base))
    model = build(tiny_base)
    expected = sampler(steps=2)(base, batch)
    assert torch.equal(sampler(steps=2)(model, batch), expected)
    beside = [SDXL(pretrained=str(tiny_base), adapters=adapters) for adapters in (
        dict(a=t2i()), dict(a=t2i(), image_encoder=SMALL), dict(image_encoder=SMALL, a=t2i()))]
    latents = [sampler(steps=2)(m, batch) for m in beside]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], expected)
    model.adapters.pop('image_encoder').detach(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}


def test_a_frozen_one_does_not_train(tiny_base: Path) -> None:
    assert not build(tiny_base, trainable=False).trainables()
    owned = build(tiny_base).trainables()
    assert list(owned) == ['image_encoder'] and len(owned['image_encoder']) > 20


def test_a_batch_without_images_is_refused(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="hold no 'img'; an image encoder cannot learn from cached latents"):
        encoder(build(tiny_base)).embed(make_batch(1, img=None))


def test_weights_that_do_not_fit_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Of another base, of other sizes, without a key, without a file; the adapter is unchanged."""
    model = build(tiny_base)
    before = weights(model)
    encoder(model).save(tmp_path / 'e')
    wide = CLIPVisionModelWithProjection(type(encoder(model).net.config)(**{
        **{k: v for k, v in SMALL.items() if k != 'type'}, 'projection_dim': 48, 'intermediate_size': 128}))
    wide.save_pretrained(tmp_path / 'wide')
    with pytest.raises(UserError, match="wide' projects images to 48 numbers; .* text_encoder_2 has 32. Use"):
        build(tiny_base, weights=str(tmp_path / 'wide'))
    with pytest.raises(UserError, match="does not fit adapter 'image_encoder' .* projection_dim=48 instead of 32"):
        encoder(model).load(tmp_path / 'wide')
    encoder(build(tiny_base, patch_size=16)).save(tmp_path / 'coarse')
    with pytest.raises(UserError, match='it has patch_size=16 instead of 8'):
        encoder(model).load(tmp_path / 'coarse')
    shutil.copytree(tmp_path / 'e', tmp_path / 'less')
    state = load_file(tmp_path / 'less' / 'model.safetensors')
    state.pop('visual_projection.weight')
    save_file(state, tmp_path / 'less' / 'model.safetensors', metadata={'format': 'pt'})
    for source, message in (('less', 'visual_projection.weight'), ('nowhere', 'nowhere')):
        with pytest.raises(UserError, match=message):
            encoder(model).load(tmp_path / source)
        with pytest.raises(UserError, match=message):
            build(tiny_base, weights=str(tmp_path / source))
    with pytest.raises(UserError, match="has no folder 'shapes/nothing'"):
        build(tiny_base, weights='diffengine_sdxl::shapes/nothing')
    assert_same(weights(model), before)
