"""ControlNet: bitwise diffusers, by itself, in pairs and beside a T2I-Adapter; fp64 gradients; what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from parity import PROMPTS, generators, grads, images, make_batch, picture_batch, sampler, stock

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.controlnet import ControlNet
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing import write_tiny_sdxl

SEEDS = [3, 1]
CONTROLNET = dict(type='ControlNet')


def build(base: Path, **adapters: Any) -> SDXL:
    """A model whose ControlNets look trained: the zero convolutions at their outputs are not zero."""
    model = SDXL(pretrained=str(base), adapters=adapters, objective=dict(type='Denoise'))
    with torch.no_grad():
        for name, parameters in model.trainables().items():
            for i, (_, parameter) in enumerate(parameters):
                noise = torch.randn(parameter.shape, generator=rng.generator('shaken', name, i))
                parameter.add_(0.05 * noise.to(parameter.dtype))
    return model


@pytest.fixture(scope='module')
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ControlNets that look trained, exported: a and b."""
    folder = tmp_path_factory.mktemp('controlnets')
    model = build(tiny_base, a=CONTROLNET, b=CONTROLNET)
    for name, adapter in model.adapters.items():
        adapter.save(folder / name)
    return folder


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' network, frozen, as torch chooses other kernels for weights that require gradients."""
    return ControlNetModel.from_pretrained(folder, torch_dtype=dtype).requires_grad_(False)


def ours(base: Path, folder: Path, trainable: bool = False, **settings: Any) -> SDXL:
    """A model with the exported ControlNet a."""
    config = {**CONTROLNET, 'weights': str(folder / 'a'), 'trainable': trainable, **settings}
    return SDXL(pretrained=str(base), adapters=dict(a=config), objective=dict(type='Denoise'))


def controlled(num: int = 2, size: tuple[int, int] = (64, 64), **changes: Any) -> Batch:
    """A batch of prompts, each with its own control image."""
    conditions = {'conditioning_image': images(num, size), 'another': images(num, size, seed=8)}
    return picture_batch(PROMPTS[:num], SEEDS[:num], size, **{'conditions': conditions, **changes})


def stock_latents(pipeline: Any, batch: Batch, steps: int = 3, **settings: Any) -> torch.Tensor:
    """diffusers' latents for `batch`."""
    assert batch.size is not None
    return pipeline(**{**dict(
        prompt=batch.text, image=batch.conditions['conditioning_image'], height=batch.size[0], width=batch.size[1],
        num_inference_steps=steps, generator=generators(batch.seed.tolist()), output_type='latent'), **settings}).images


@pytest.mark.parametrize('trainable', [False, True])
def test_latents_are_bitwise_diffusers(tiny_base: Path, folder: Path, trainable: bool) -> None:
    """Numbers of prompts, guidance, sizes, negative prompts, scales, active ranges; frozen and trainable."""
    pipeline = stock(tiny_base, 'StableDiffusionXLControlNetPipeline', controlnet=theirs(folder / 'a'))
    model = ours(tiny_base, folder, trainable)
    adapter = model.adapters['a']
    for num, size, guidance, scale in ((1, (64, 64), 5.0, 0.7), (2, (64, 64), 5.0, 1.0), (2, (64, 64), 5.0, -0.5),
                                       (2, (48, 80), 1.0, 0.7)):
        batch = controlled(num, size, negative_text=['blurry', ''][:num])
        adapter.scale = scale
        expected = stock_latents(pipeline, batch, negative_prompt=batch.negative_text, guidance_scale=guidance,
                            controlnet_conditioning_scale=scale)
        assert torch.equal(sampler(steps=3, scale=guidance)(model, batch), expected)
        adapter.scale = 0.0
        assert (sampler(steps=3, scale=guidance)(model, batch) - expected).abs().max() > 1e-2
    adapter.scale = 0.7
    for active_range in ((0.0, 0.5), (0.25, 1.0), (0.2, 0.8)):
        adapter.active_range = active_range
        expected = stock_latents(pipeline, controlled(), 5, controlnet_conditioning_scale=0.7,
                            control_guidance_start=active_range[0], control_guidance_end=active_range[1])
        assert torch.equal(sampler(steps=5)(model, controlled()), expected)


def test_two_controlnets_sum(tiny_base: Path, folder: Path) -> None:
    """As diffusers' MultiControlNet, each with its own image and scale."""
    nets = [theirs(folder / name) for name in 'ab']
    pipeline = stock(tiny_base, 'StableDiffusionXLControlNetPipeline', controlnet=nets)
    batch = controlled()
    control_images = [batch.conditions['conditioning_image'], batch.conditions['another']]
    expected = stock_latents(pipeline, batch, image=control_images, controlnet_conditioning_scale=[0.7, 1.3])
    configs = {name: dict(CONTROLNET, weights=str(folder / name), trainable=False, scale=scale, condition_key=reads)
               for name, scale, reads in (('b', 1.3, 'another'), ('a', 0.7, 'conditioning_image'))}
    assert torch.equal(sampler(steps=3)(SDXL(pretrained=str(tiny_base), adapters=configs), batch), expected)


def test_beside_a_t2i_adapter(tiny_base: Path, folder: Path) -> None:
    """diffusers has no pipeline for both: they are in one call of its UNet, written by hand."""
    config = dict(CONTROLNET, weights=str(folder / 'a'), trainable=False, scale=0.6, condition_key='another')
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=config, t=dict(type='T2IAdapter', scale=0.8)))
    batch, x, t = controlled(), torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    with torch.no_grad():
        conditioning = model.encode(batch)
        got = model.predict(x, t, conditioning, torch.zeros(2, 2))
        unet = UNet2DConditionModel.from_pretrained(tiny_base / 'unet').requires_grad_(False)
        added = {'text_embeds': conditioning.pooled, 'time_ids': conditioning.time_ids}
        down, mid = theirs(folder / 'a')(x, t, conditioning.text, batch.conditions['another'], 0.6,
                                         added_cond_kwargs=added, return_dict=False)
        features = [f * 0.8 for f in model.adapters['t'].net(batch.conditions['conditioning_image'])]
        expected = unet(x, t, conditioning.text, added_cond_kwargs=added, down_block_additional_residuals=down,
                        mid_block_additional_residual=mid, down_intrablock_additional_residuals=features).sample
    assert torch.equal(got, expected)


@pytest.mark.parametrize('active_range', [(0.0, 1.0), (0.5, 1.0)])
def test_gradients_in_fp64(tiny_base: Path, folder: Path, active_range: tuple[float, float]) -> None:
    """As of a call of ControlNetModel and UNet by hand; a row outside the active range has none."""
    config = dict(CONTROLNET, weights=str(folder / 'a'), scale=0.75, active_range=active_range)
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=config), dtype='float64')
    batch, t = make_batch(2), torch.tensor([900, 100])
    x, target = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    conditioning = model.encode(batch)
    progress = (1 - t / 1000).unsqueeze(1).expand(2, 2)
    (model.predict(x, t, conditioning, progress) - target).square().mean().backward()
    got = {n: p.grad for n, p in model.adapters['a'].net.named_parameters()}
    net = theirs(folder / 'a', dtype=torch.float64).requires_grad_(True)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / 'unet', torch_dtype=torch.float64)
    added = {'text_embeds': conditioning.pooled, 'time_ids': conditioning.time_ids}
    down, mid = net(x, t, conditioning.text, batch.conditions['conditioning_image'].double(), added_cond_kwargs=added,
                    return_dict=False)
    rows = torch.tensor([0.75 if active_range == (0, 1) else 0.0, 0.75]).view(2, 1, 1, 1)
    out = unet(x, t, conditioning.text, added_cond_kwargs=added, mid_block_additional_residual=mid * rows,
               down_block_additional_residuals=[d * rows for d in down]).sample
    (out - target).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert got[name].any(), name
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-16)


def test_fresh_is_the_base_and_its_weights(tiny_base: Path) -> None:
    """It has the base's latents, bitwise, and the base's encoder; the rest is drawn from seed and name."""
    base, model = SDXL(pretrained=str(tiny_base)), SDXL(pretrained=str(tiny_base), adapters=dict(a=CONTROLNET))
    assert torch.equal(sampler(steps=2)(model, controlled()), sampler(steps=2)(base, controlled()))
    stocks = ControlNetModel.from_unet(base.unet)
    net = model.adapters['a'].net
    configs = [{k: v for k, v in one.config.items() if not k.startswith('_')} for one in (net, stocks)]
    assert configs[0] == configs[1]
    embedding = [k for k in net.state_dict() if k.startswith('controlnet_cond_embedding') and k.endswith('weight')]
    for name, value in stocks.state_dict().items():
        same = name not in embedding or 'conv_out' in name
        assert torch.equal(net.state_dict()[name], value) == same or 'bias' in name
    again = SDXL(pretrained=str(tiny_base), adapters=dict(a=CONTROLNET, t=dict(type='T2IAdapter')))
    other = SDXL(pretrained=str(tiny_base), adapters=dict(a=CONTROLNET), seed=1)
    for name in embedding:
        value = net.state_dict()[name]
        assert torch.equal(again.adapters['a'].net.state_dict()[name], value)
        assert not value.any() or not torch.equal(other.adapters['a'].net.state_dict()[name], value)


def test_fresh_beside_loras_in_the_unet(tiny_base: Path) -> None:
    """Attached to a UNet that peft has wrapped twice, convolutions too: the base's own weights."""
    from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
    model = SDXL(pretrained=str(tiny_base))
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    inject_adapter_in_model(LoraConfig(r=2, target_modules=['to_q', 'conv1', 'conv_in']), model.unet, 'x')
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=['to_k', 'conv2']), model.unet, 'y')
    adapter = ControlNet()
    adapter.attach(model)
    copied = [k for k in adapter.net.state_dict() if not k.startswith('controlnet_')]
    assert len(copied) > 100 and all(torch.equal(adapter.net.state_dict()[k], before[k]) for k in copied)


def test_outside_its_active_range_it_does_not_run(tiny_base: Path, folder: Path) -> None:
    """In sampling; in training it always does, so that the graph is the same."""
    model, calls = ours(tiny_base, folder, trainable=True, active_range=(0.5, 1.0)), []
    model.adapters['a'].net.register_forward_hook(lambda *_: calls.append(1))
    sampler(steps=4)(model, controlled())
    assert len(calls) == 2
    _, gradients = grads(model, make_batch(2))
    assert len(calls) == 3 and len(gradients) == len(list(model.adapters['a'].net.parameters()))


def test_it_recomputes_where_the_base_does(tiny_base: Path, folder: Path) -> None:
    """Gradient checkpointing, which the model enables after attaching, reaches it; bitwise the same gradients."""
    results, ran = [], []
    for checkpointing in (True, False):
        model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(CONTROLNET, weights=str(folder / 'a'))),
                     objective=dict(type='Denoise'), gradient_checkpointing=checkpointing)
        count: list[int] = []
        model.adapters['a'].net.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *_, c=count: c.append(1))
        results.append(grads(model, make_batch(2)))
        ran.append(len(count))
    assert ran == [2, 1]
    assert results[0][0] == results[1][0] and results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())
    model.unet.enable_gradient_checkpointing()
    grads(model, make_batch(2))
    model.unet.disable_gradient_checkpointing()
    grads(model, make_batch(2))
    assert len(count) == 1 + 2 + 1


def test_half_precision(tiny_base: Path, folder: Path) -> None:
    """What trains is fp32 beside a half-precision base; a frozen one has the base's dtype and is bitwise diffusers'."""
    config = dict(CONTROLNET, weights=str(folder / 'a'))
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=config), objective=dict(type='Denoise'),
                 mixed_precision='bf16')
    assert {p.dtype for p in model.adapters['a'].parameters()} == {torch.float32}
    loss, gradients = grads(model, make_batch(2))
    full, reference = grads(ours(tiny_base, folder, trainable=True), make_batch(2))
    assert abs(loss - full) < 0.02 and all(v.dtype == torch.float32 and v.isfinite().all() for v in gradients.values())
    near = [torch.nn.functional.cosine_similarity(gradients[k].flatten(), v.flatten(), dim=0)
            for k, v in reference.items() if k.endswith('weight')]
    assert sum(near) / len(near) > 0.98
    plain = SDXL(pretrained=str(tiny_base), dtype='bfloat16', adapters=dict(a=config))
    assert sampler(steps=1)(plain, controlled()).isfinite().all()
    frozen = SDXL(pretrained=str(tiny_base), dtype='bfloat16',
                  adapters=dict(a=dict(config, trainable=False, scale=0.7)))
    assert {p.dtype for p in frozen.adapters['a'].parameters()} == {torch.bfloat16}
    batch, x, t = controlled(), torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor(500)
    with torch.no_grad():
        conditioning = frozen.encode(batch)
        got = frozen.predict(x, t, conditioning, torch.zeros(2, 2))
        added = {'text_embeds': conditioning.pooled, 'time_ids': conditioning.time_ids}
        down, mid = theirs(folder / 'a', dtype=torch.bfloat16)(
            x, t, conditioning.text, batch.conditions['conditioning_image'].bfloat16(), 0.7, added_cond_kwargs=added,
            return_dict=False)
        expected = frozen.unet(x, t, conditioning.text, added_cond_kwargs=added, down_block_additional_residuals=down,
                               mid_block_additional_residual=mid).sample
    assert torch.equal(got, expected)


def test_other_bases(tmp_path: Path) -> None:
    """A VAE of another factor, four blocks as in the refiner: built, trained, saved, read. No middle block: refused."""
    with pytest.raises(UserError, match='no middle block'):
        build(write_tiny_sdxl(tmp_path / 'no_mid', mid_block_type=None), a=CONTROLNET)
    for name, settings in (('factor', dict(vae_blocks=3)), ('four', dict(channels=(16, 32, 32, 64)))):
        base = write_tiny_sdxl(tmp_path / name, **settings)
        model = build(base, a=CONTROLNET)
        factor = model.vae_factor
        batch = make_batch(2)
        _, gradients = grads(model, batch)
        assert all(v.any() for v in gradients.values()) and factor == (4 if name == 'factor' else 8)
        model.adapters['a'].save(tmp_path / 'a')
        again = ours(base, tmp_path, trainable=True)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def rewrite(path: Path, **changes: Any) -> None:
    """Change a folder's config.json."""
    file = path / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_does_not_fit_is_refused(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    """Another base by its widths, another image size, other channels, another network, a broken folder."""
    wide = write_tiny_sdxl(tmp_path / 'wide', channels=(32, 32, 64), vae_blocks=3)
    with pytest.raises(UserError, match=r"block_out_channels=\(16, 32, 64\) instead of \(32, 32, 64\).*8 times larger "
                                         'than latents instead of 4 times.*another base'):
        ours(wide, folder)
    model = ours(tiny_base, folder)
    before = {k: v.clone() for k, v in model.adapters['a'].net.state_dict().items()}
    build(wide, a=CONTROLNET).adapters['a'].save(tmp_path / 'other')
    with pytest.raises(UserError, match=r"other' does not fit adapter 'a' \(ControlNet\): .*block_out_channels="):
        model.adapters['a'].load(tmp_path / 'other')
    gray = build(tiny_base, a=dict(CONTROLNET, conditioning_channels=1))
    gray.adapters['a'].save(tmp_path / 'gray')
    with pytest.raises(UserError, match='conditioning_channels=1 instead of 3'):
        model.adapters['a'].load(tmp_path / 'gray')
    rewrite(tmp_path / 'gray', conditioning_channels=3)
    with pytest.raises(UserError, match='conv_in'):
        model.adapters['a'].load(tmp_path / 'gray')
    assert all(torch.equal(v, before[k]) for k, v in model.adapters['a'].net.state_dict().items())
    for batch, message in ((controlled(conditions={}), "reads 'conditioning_image'"), (controlled(
            conditions={'conditioning_image': images(2, channels=1)}), '3 channels'), (controlled(
                conditions={'conditioning_image': images(2, (32, 64))}), 'size .64 x 64.; it is 32 x 64')):
        with pytest.raises(UserError, match=message):
            sampler(steps=1)(model, batch)
