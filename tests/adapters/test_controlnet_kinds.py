"""ControlNets whose config changes what is computed (pooled outputs, guess mode, BGR, one channel), and unions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from parity import PROMPTS, generators, grads, images, make_batch, picture_batch, sampler, stock_like
from PIL import Image

from diffengine_sdxl.adapters.controlnet import CONTROL_TYPES, ControlNet
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing.adapters import write_tiny_adapter, write_tiny_union

SEEDS = [3, 1]


@pytest.fixture(scope='module')
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ControlNet, one that pools, one in BGR, of one channel; unions of 6 and of 8 types."""
    folder = tmp_path_factory.mktemp('kinds')
    for name, changes in (('plain', {}), ('pooled', dict(global_pool_conditions=True)),
                          ('bgr', dict(controlnet_conditioning_channel_order='bgr'))):
        write_tiny_adapter(folder / name, tiny_base, dict(type='ControlNet'))
        rewrite(folder / name, **changes)
        for parameter in (net := theirs(folder / name)).parameters():
            parameter.mul_(2)
        net.save_pretrained(folder / name)
    write_tiny_adapter(folder / 'gray', tiny_base, dict(type='ControlNet', conditioning_channels=1))
    write_tiny_union(folder / 'union', tiny_base)
    write_tiny_union(folder / 'promax', tiny_base, num_control_type=8)
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    """Change a folder's config.json."""
    file = path / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def theirs(folder: Path, cls: Any = ControlNetModel) -> Any:
    """diffusers' network, frozen."""
    return cls.from_pretrained(folder).requires_grad_(False)


def ours(model: SDXL, *folders: Path, **settings: Any) -> SDXL:
    """`model` with frozen ControlNets a, b, ..., which read 'a', 'b', ...; lists in `settings` hold one for each."""
    adapters = {name: dict(type='ControlNet', weights=str(folder), trainable=settings.get('trainable', False),
                           condition_key=name, **{k: v[i] for k, v in settings.items() if isinstance(v, list)})
                for i, (name, folder) in enumerate(zip('abc', folders, strict=False))}
    model._attach(adapters)
    return model


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    """The base; `ours` gives it adapters."""
    return SDXL(pretrained=str(tiny_base), objective=dict(type='Denoise'))


def controlled(num: int = 2) -> Batch:
    """A batch of prompts, each with its own control images a, b and c."""
    return picture_batch(PROMPTS[:num], SEEDS[:num], conditions={n: images(num, seed=i) for i, n in enumerate('abc')})


def stock_latents(pipeline: Any, batch: Batch, keys: str, steps: int = 2, **settings: Any) -> torch.Tensor:
    """diffusers' latents for `batch` with the images `keys`."""
    assert batch.size is not None
    inputs = [batch.conditions[key] for key in keys]
    name = 'control_image' if 'Union' in type(pipeline).__name__ else 'image'
    return pipeline(**{**dict(prompt=batch.text, height=batch.size[0], width=batch.size[1], num_inference_steps=steps,
                              generator=generators(batch.seed.tolist()), output_type='latent'),
                       name: inputs[0] if len(inputs) == 1 else inputs, **settings}).images


@pytest.mark.parametrize(('names', 'guess'), [
    (('pooled',), False), (('pooled', 'pooled'), False), (('plain', 'pooled'), True), (('bgr',), False)])
def test_settings_of_the_config_are_stocks(model: SDXL, pipeline: Any, folder: Path, names: tuple[str, ...],
                                           guess: bool) -> None:
    """Pooled outputs, which act on conditional rows only; guess mode; BGR: bitwise, with and without guidance."""
    nets = [theirs(folder / name) for name in names]
    pipeline = stock_like(pipeline, 'StableDiffusionXLControlNetPipeline',
                          controlnet=MultiControlNetModel(nets) if len(nets) > 1 else nets[0])
    scales = [0.7, 1.3][:len(names)]
    expected: Any = None
    model = ours(model, *[folder / name for name in names], scale=scales, guess_mode=[guess or None] * len(names))
    for num, guidance in ((1, 1.0), (2, 5.0)):
        batch = controlled(num)
        expected = stock_latents(pipeline, batch, 'ab'[:len(names)], guidance_scale=guidance, guess_mode=guess,
                                 controlnet_conditioning_scale=scales if len(scales) > 1 else scales[0])
        assert torch.equal(sampler(steps=2, scale=guidance)(model, batch), expected)
    plain = ours(model, *[folder / 'plain'] * len(names), scale=scales)
    assert (sampler(steps=2, scale=5.0)(plain, controlled()) - expected).abs().max() > 1e-3  # the setting matters


def test_pooled_beside_unpooled(model: SDXL, folder: Path) -> None:
    """Features of one pixel add to those of many; each network keeps its own rows, whatever the other's config says."""
    model = ours(model, folder / 'pooled', folder / 'plain')
    batch = controlled(1)
    with torch.no_grad():
        conditioning = model.encode(batch, ('uncond', 'cond'), project=True)
        x, t = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor(500)
        got = model.predict(x, t, conditioning, torch.zeros(2, 2))
        added = {'text_embeds': conditioning.pooled, 'time_ids': conditioning.time_ids}
        (down, mid), (down_2, mid_2) = (theirs(folder / name)(
            x, t, conditioning.text, batch.conditions[key].repeat(2, 1, 1, 1), added_cond_kwargs=added,
            return_dict=False) for name, key in (('pooled', 'a'), ('plain', 'b')))
        rows = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        expected = model.unet(x, t, conditioning.text, added_cond_kwargs=added,
                              down_block_additional_residuals=[a * rows + b for a, b in zip(down, down_2, strict=True)],
                              mid_block_additional_residual=mid * rows + mid_2).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_training_one_that_pools(model: SDXL, folder: Path) -> None:
    """Pooled features on every row, also those whose prompt is dropped, as its authors trained (cldm.py: p_losses)."""
    model, batch = ours(model, folder / 'pooled', trainable=True), make_batch(2)
    batch.conditions['a'], batch.drop['text'] = images(2, seed=4), torch.tensor([True, False])
    calls: list[dict[str, Any]] = []
    model.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    _, gradients = grads(model, batch)
    call, = calls
    net = theirs(folder / 'pooled')
    down, mid = net(call['sample'], call['timestep'], call['encoder_hidden_states'], batch.conditions['a'],
                    added_cond_kwargs=call['added_cond_kwargs'], return_dict=False)
    assert {d.shape[-2:] for d in (*down, mid)} == {(1, 1)} and not (down[0] == 0).any()
    for got, feature in zip((*call['down_block_additional_residuals'], call['mid_block_additional_residual']),
                            (*down, mid), strict=True):
        torch.testing.assert_close(got, feature, rtol=1e-4, atol=1e-4)
    assert len(gradients) == len(list(net.parameters())) and all(value.any() for value in gradients.values())


def test_one_channel(model: SDXL, folder: Path) -> None:
    """The user's image becomes its brightness; a batch of another number of channels is refused."""
    adapter = ours(model, folder / 'gray').adapters['a']
    image = Image.new('RGB', (8, 8), (255, 0, 0))
    assert adapter.read_image(image, (16, 16)).shape == (1, 16, 16)
    torch.testing.assert_close(adapter.read_image(image, (16, 16)).unique(), torch.tensor([76 / 255]))
    with pytest.raises(UserError, match='images of 1 channels'):
        adapter.encode(controlled())


@pytest.mark.parametrize('name', ['union', 'promax'])
def test_a_union_is_stocks(model: SDXL, pipeline: Any, folder: Path, name: str) -> None:
    """Control types by name: bitwise diffusers' union pipeline, and no two types alike."""
    pipeline = stock_like(pipeline, 'StableDiffusionXLControlNetUnionPipeline',
                          controlnet=theirs(folder / name, ControlNetUnionModel))
    model = ours(model, folder / name, control_type=['openpose'], scale=[0.7])
    batch, made = controlled(), []
    types = ('openpose', 'anime_lineart', 'segment', *(('repaint',) if name == 'promax' else ()))
    for kind in types:
        number = CONTROL_TYPES[kind]
        model.adapters['a'].control_type = number
        made.append(sampler(steps=2)(model, batch))
        assert torch.equal(made[-1], stock_latents(pipeline, batch, 'a', control_mode=number,
                                                   controlnet_conditioning_scale=0.7))
    assert all((made[i] - made[k]).abs().max() > 1e-3 for i in range(len(made)) for k in range(i))


def test_two_types_are_two_adapters(model: SDXL, pipeline: Any, folder: Path) -> None:
    """As diffusers' MultiControlNetUnionModel of the same network twice."""
    pipeline = stock_like(pipeline, 'StableDiffusionXLControlNetUnionPipeline', controlnet=MultiControlNetUnionModel(
        [theirs(folder / 'union', ControlNetUnionModel) for _ in range(2)]))
    model = ours(model, folder / 'union', folder / 'union', control_type=['depth', 4], scale=[0.7, 1.2])
    expected = stock_latents(pipeline, controlled(1), 'ab', control_mode=[1, 4],
                             controlnet_conditioning_scale=[0.7, 1.2])
    assert torch.equal(sampler(steps=2)(model, controlled(1)), expected)


def test_training_a_union(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """Every weight of it gets a gradient, of its types only the one that it reads; its export is diffusers'."""
    model, batch = ours(model, folder / 'union', trainable=True, control_type=['canny']), make_batch(2)
    batch.conditions['a'] = images(2, seed=4)
    _, gradients = grads(model, batch)
    adapter = model.adapters['a']
    names = {n.removeprefix('adapters.a.net.') for n in gradients}
    assert names == set(adapter.net.state_dict()) and all(value.any() for value in gradients.values())
    assert gradients['adapters.a.net.task_embedding'].abs().sum(1).nonzero().flatten().tolist() == [3]
    assert adapter.diffusers_call == "ControlNetUnionModel.from_pretrained('{out}')"
    adapter.save(tmp_path)
    again = theirs(tmp_path, ControlNetUnionModel).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in adapter.net.state_dict().items())
    before = {key: value.clone() for key, value in again.items()}
    adapter.net.task_embedding.data.zero_()
    adapter.load(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in adapter.net.state_dict().items())


@pytest.mark.parametrize(('name', 'settings', 'message'), [
    ('union', {}, 'needs a control_type; set control_type to one of openpose, depth.* or a number below 6'),
    ('union', dict(control_type='tile'), 'has no type 6; .*segment, or a number below 6'),
    ('union', dict(control_type='opnpose'), "'opnpose' is unknown; .*Did you mean 'openpose'"),
    ('union', dict(control_type=-1), '-1 is unknown'), ('union', dict(control_type=True), 'True is unknown'),
    ('union', dict(control_type=['openpose', 'depth']), 'an adapter for each type'),
    ('plain', dict(control_type='canny'), 'is no union ControlNet and takes no control_type')])
def test_a_wrong_control_type_is_refused(model: SDXL, folder: Path, name: str, settings: dict[str, Any],
                                         message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(model, folder / name, **{key: [value] for key, value in settings.items()})


def test_a_fresh_union_is_refused() -> None:
    with pytest.raises(UserError, match='not trained from scratch'):
        ControlNet(control_type='canny')


@pytest.mark.parametrize('num', [1, 2])
def test_a_stock_pipeline_of_unions(model: SDXL, folder: Path, num: int) -> None:
    """`to_diffusers` builds the union pipeline; its latents are ours, bitwise."""
    model = ours(model, *[folder / 'union'] * num, control_type=['depth', 'canny'], scale=[0.7, 1.2])
    model.sampler = sampler(steps=2)
    pipeline = model.to_diffusers()
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(sampler(steps=2)(model, controlled(1)), stock_latents(
        pipeline, controlled(1), 'ab'[:num], **pipeline.call_arguments))
