"""The T2I-Adapter: bitwise as in diffusers; on every base that it supports; refused on others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MultiAdapter
from diffusers import T2IAdapter as Network
from parity import (
    PROMPTS,
    generators,
    grads,
    images,
    make_batch,
    picture_batch,
    sampler,
    set_scheduler,
    stock,
    t2i,
    with_t2i,
)
from safetensors.torch import load_file, save_file

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.testing import write_tiny_sdxl

SEEDS = [3, 1]
WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> SDXL:
    return with_t2i(tiny_base)


@pytest.fixture(scope='module')
def exported(model: SDXL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('exported') / 'adapter'
    model.adapters['adapter'].save(folder)
    return folder


@pytest.fixture(scope='module')
def pipeline(tiny_base: Path, exported: Path) -> Any:
    return stock(tiny_base, 'StableDiffusionXLAdapterPipeline', adapter=Network.from_pretrained(exported))


@pytest.fixture(autouse=True)
def as_it_was(model: SDXL, pipeline: Any) -> Any:
    adapter, scheduler = model.adapters['adapter'], pipeline.scheduler
    yield
    adapter.scale, adapter.active_range, pipeline.scheduler = 1.0, (0.0, 1.0), scheduler


def controlled(size: tuple[int, int] = (64, 64), **changes: Any) -> Batch:
    """Two prompts, each with its own control image."""
    fields: dict[str, Any] = dict(conditions={'conditioning_image': images(2, size)})
    return picture_batch(PROMPTS[:2], SEEDS, size, **{**fields, **changes})


def stock_latents(pipeline: Any, batch: Batch, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """diffusers' latents for `batch`."""
    assert batch.size is not None
    return pipeline(batch.text, image=batch.conditions['conditioning_image'], height=batch.size[0],
                    width=batch.size[1], num_inference_steps=steps, generator=generators(SEEDS),
                    **{'output_type': 'latent', **kwargs}).images


@pytest.mark.parametrize('scale', [1.0, 0.7])
@pytest.mark.parametrize('guidance', [5.0, 1.0])
@pytest.mark.parametrize('name', ['EulerDiscreteScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler',
                                  'EulerAncestralDiscreteScheduler', 'LCMScheduler'])
def test_latents_are_bitwise_diffusers(model: SDXL, pipeline: Any, name: str, guidance: float, scale: float) -> None:
    """The exported folder in diffusers' pipeline; scale is adapter_conditioning_scale."""
    set_scheduler(pipeline, name)
    expected = stock_latents(pipeline, controlled(), guidance_scale=guidance, adapter_conditioning_scale=scale)
    model.adapters['adapter'].scale = scale
    assert torch.equal(sampler(name, 3, guidance)(model, controlled()), expected)
    model.adapters['adapter'].scale = 0.5
    assert (sampler(name, 3, guidance)(model, controlled()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize('size', [(48, 80), (64, 64)])
def test_images_and_negative_prompts(model: SDXL, pipeline: Any, size: tuple[int, int]) -> None:
    """Decoded, with negative prompts, at a side that the UNet cannot halve three times (48)."""
    batch = controlled(size, negative_text=['blurry', ''])
    expected = stock_latents(pipeline, batch, negative_prompt=batch.negative_text, output_type='pt')
    assert torch.equal(model.decode(sampler(steps=3)(model, batch)), expected)


@pytest.mark.parametrize('factor', [0.0, 0.25, 0.5, 0.7, 1.0])
def test_the_end_of_the_active_range_is_the_conditioning_factor(model: SDXL, pipeline: Any, factor: float) -> None:
    """active_range=(0, factor) is adapter_conditioning_factor; a factor of 0 is scale 0."""
    expected = stock_latents(pipeline, controlled(), steps=10, adapter_conditioning_factor=factor)
    if factor == 0:
        model.adapters['adapter'].scale = 0.0
    else:
        model.adapters['adapter'].active_range = (0.0, factor)
    assert torch.equal(sampler(steps=10)(model, controlled()), expected)


def test_an_active_range_that_begins_later(model: SDXL, pipeline: Any, tiny_base: Path) -> None:
    """Steps before it are bitwise the base's, all later ones differ."""
    seen: dict[str, list[torch.Tensor]] = {'with': [], 'without': []}
    model.adapters['adapter'].active_range = (0.5, 1.0)
    for kind, one in (('with', model), ('without', SDXL(pretrained=str(tiny_base)))):
        handle = one.unet.register_forward_hook(lambda _m, _a, out, kind=kind: seen[kind].append(out[0]))
        sampler(steps=4)(one, controlled())
        handle.remove()
    same = [torch.equal(a, b) for a, b in zip(seen['with'], seen['without'], strict=True)]
    assert same == [True, True, False, False]


def test_active_ranges_of_second_order_solvers(model: SDXL) -> None:
    """Heun evaluates twice a step: half of the range is half of the steps."""
    used: list[bool] = []
    model.adapters['adapter'].active_range = (0.0, 0.5)
    handle = model.unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: used.append(any(float(f.abs().max()) > 0 for f in
                                               kwargs.get('down_intrablock_additional_residuals') or [])),
        with_kwargs=True)
    sampler('HeunDiscreteScheduler', 4)(model, controlled())
    handle.remove()
    assert len(used) == 7 and used == [True] * 3 + [False] * 4


def test_the_network_runs_once_an_image(model: SDXL) -> None:
    """Not once a step, nor once a guidance branch."""
    rows: list[int] = []
    handle = model.adapters['adapter'].net.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    sampler(steps=3)(model, controlled())
    handle.remove()
    assert rows == [2]


BASES: dict[str, dict[str, Any]] = {
    'wider': dict(channels=(24, 48, 72)),
    'vae of factor 4': dict(vae_blocks=3),
    'fewer layers': dict(transformer_layers_per_block=(1, 1, 1), reverse_transformer_layers_per_block=None,
                         layers_per_block=1),
    'mid block without attention': dict(mid_block_type='UNetMidBlock2D'),
    'no mid block': dict(mid_block_type=None)}


@pytest.mark.parametrize('kind', BASES)
def test_other_bases_of_the_layout(kind: str, tmp_path: Path) -> None:
    """Widths and downscale factor are the base's: fresh, exported, and bitwise in diffusers' pipeline."""
    base = write_tiny_sdxl(tmp_path / 'base', **BASES[kind])
    model = with_t2i(base)
    adapter = model.adapters['adapter']
    widths = model.unet.config.block_out_channels
    expected_widths = [*widths] if kind == 'no mid block' else [*widths, widths[-1]]
    assert list(adapter.net.config.channels) == expected_widths
    assert adapter.size_divisor == model.size_divisor == 2 * model.vae_factor == (8 if 'factor 4' in kind else 16)
    adapter.save(tmp_path / 'adapter')
    pipeline = stock(base, 'StableDiffusionXLAdapterPipeline', adapter=Network.from_pretrained(tmp_path / 'adapter'))
    assert torch.equal(sampler(steps=2)(model, controlled()), stock_latents(pipeline, controlled(), steps=2))
    model.objective = with_objective(base).objective
    _, gradients = grads(model, make_batch())
    assert set(gradients) == {n for n, _ in model.adapters.named_parameters(prefix='adapters')}


def with_objective(base: Path) -> SDXL:
    """A model that trains a T2I-Adapter."""
    return SDXL(pretrained=str(base), adapters=dict(adapter=t2i()), objective=dict(type='Denoise'))


def test_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    """The refiner's four blocks."""
    attention = ['CrossAttnDownBlock2D'] * 2
    refiner = dict(channels=(16, 32, 32, 32), down_block_types=('DownBlock2D', *attention, 'DownBlock2D'),
                   up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
                   num_time_ids=5, cross_attention_dim=64)
    base = write_tiny_sdxl(tmp_path / 'refiner', **refiner)
    with pytest.raises(UserError, match=r"'pose'.*SDXL's block layout.*CrossAttnDownBlock2D.*\(the refiner\)"):
        SDXL(pretrained=str(base), adapters=dict(pose=t2i()))
    odd = write_tiny_sdxl(tmp_path / 'odd', channels=(16, 32), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'))
    with pytest.raises(UserError, match=r"this one has \('DownBlock2D', 'CrossAttnDownBlock2D'\)\."):
        SDXL(pretrained=str(odd), adapters=dict(pose=t2i()))


def damaged(exported: Path, folder: Path, drop: str | None = None, rename: str | None = None,
            **config: Any) -> Path:
    """A copy of the export with a fault."""
    folder.mkdir()
    state = load_file(exported / WEIGHTS)
    if drop:
        del state[drop]
    if rename:
        state[f'{rename}_x'] = state.pop(rename)
    save_file(state, folder / WEIGHTS, metadata={'format': 'pt'})
    settings = json.loads((exported / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**settings, **config}))
    return folder


KEY = 'adapter.body.1.resnets.0.block1.weight'


@pytest.mark.parametrize(('fault', 'message'), [
    (dict(drop=KEY), f'1 missing keys .{KEY}'), (dict(rename=KEY), f'1 missing keys .{KEY}.*1 unexpected.*{KEY}_x'),
    (dict(adapter_type='full_adapter'), 'full_adapter'),
    (dict(channels=[16, 32, 48, 48]), "don't fit|could not be loaded")])
def test_weights_that_do_not_fit_are_refused(tiny_base: Path, model: SDXL, exported: Path, tmp_path: Path,
                                             fault: dict[str, Any], message: str) -> None:
    """As `weights`, and by `load`; the adapter is unchanged."""
    folder = damaged(exported, tmp_path / 'damaged', **fault)
    with pytest.raises(UserError, match=message):
        with_t2i(tiny_base, weights=str(folder))
    before = {k: v.clone() for k, v in model.adapters['adapter'].net.state_dict().items()}
    with pytest.raises(UserError, match=message):
        model.adapters['adapter'].load(folder)
    assert all(torch.equal(v, before[k]) for k, v in model.adapters['adapter'].net.state_dict().items())


@pytest.mark.parametrize(('shape', 'message'), [
    (dict(channels=(8, 16, 24, 24)), r'channels=\(8, 16, 24, 24\)'), (dict(downscale_factor=8), 'downscale_factor=8'),
    (dict(num_res_blocks=1), 'num_res_blocks=1'), (dict(in_channels=1), 'in_channels=1')])
def test_adapters_of_other_shapes(tiny_base: Path, model: SDXL, tmp_path: Path, shape: dict[str, Any],
                                  message: str) -> None:
    """`load` refuses another shape; `weights` may have another depth, but not another base's widths."""
    settings = dict(channels=(16, 32, 64, 64), downscale_factor=16, num_res_blocks=2, adapter_type='full_adapter_xl')
    Network(**{**settings, **shape}).save_pretrained(tmp_path / 'other')
    with pytest.raises(UserError, match=f"fit adapter 'adapter' \\(T2IAdapter\\): it has {message} instead of"):
        model.adapters['adapter'].load(tmp_path / 'other')
    if 'channels' in shape or 'downscale_factor' in shape:
        with pytest.raises(UserError, match="'adapter'.*the base needs.*another base"):
            with_t2i(tiny_base, weights=str(tmp_path / 'other'))
        with pytest.raises(UserError, match='another base'):
            with_t2i(tiny_base, **shape)
    else:
        net = with_t2i(tiny_base, weights=str(tmp_path / 'other')).adapters['adapter'].net
        assert all(net.config[k] == v for k, v in shape.items())


def test_weights_from_a_folder_with_subfolder_and_variant(tiny_base: Path, model: SDXL, exported: Path,
                                                          tmp_path: Path) -> None:
    """subfolder and variant reach diffusers' loader."""
    net = Network.from_pretrained(exported)
    net.save_pretrained(tmp_path / 'step4' / 'adapter', variant='fp16')
    loaded = with_t2i(tiny_base, weights=str(tmp_path / 'step4'), subfolder='adapter', variant='fp16')
    for key, value in model.adapters['adapter'].net.state_dict().items():
        assert torch.equal(loaded.adapters['adapter'].net.state_dict()[key], value)
    with pytest.raises(UserError, match='step4'):
        with_t2i(tiny_base, weights=str(tmp_path / 'step4'))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(conditions={}), "'adapter' reads 'conditioning_image', but the samples hold no conditions"),
    (dict(conditions={'depth': images(2)}), r"the samples hold \['depth'\]"),
    (dict(conditions={'conditioning_image': images(2, channels=1)}), r"images of 3 channels.*shape \(2, 1, 64, 64\)"),
    (dict(conditions={'conditioning_image': images(2, (64, 56))}), "'conditioning_image' is 64 x 56.*divisible by 16"),
    (dict(conditions={'conditioning_image': images(2, (32, 64))}), r"must have the output's size \(64 x 64\)")])
def test_wrong_control_images_are_refused(model: SDXL, change: dict[str, Any], message: str) -> None:
    """In sampling and in training, with a message that names the condition."""
    with pytest.raises(UserError, match=message):
        sampler(steps=1)(model, controlled(**change))
    model.objective = OBJECTIVES.build(dict(type='Denoise'))
    with pytest.raises(UserError, match=message):
        model(make_batch(**change), mode='loss')


def test_a_size_that_cannot_be_divided(model: SDXL) -> None:
    """By the adapter, though the VAE can."""
    with pytest.raises(UserError, match='72 x 64.*16 must divide'):
        sampler(steps=1)(model, controlled((72, 64)))


def test_unused_features_are_an_error(model: SDXL) -> None:
    """diffusers silently ignores a mid feature of a wrong shape."""
    batch = controlled()
    conditioning = model.encode(batch, project=True)
    x, progress = torch.randn(2, 4, 8, 8), torch.zeros(2, 2)
    with torch.no_grad():
        model.predict(x, torch.tensor(5), conditioning, progress)
        conditioning.adapters['adapter']['f3'] = conditioning.adapters['adapter']['f3'][..., :1]
        with pytest.raises(UserError, match=r'used 3 of 4 feature maps; those of shape \[\(64, 2, 1\)\]'):
            model.predict(x, torch.tensor(5), conditioning, progress)


def test_two_adapters_sum_in_any_order(tiny_base: Path, tmp_path: Path) -> None:
    """Bitwise the same in both orders, and bitwise diffusers' MultiAdapter."""
    names = {'depth': t2i(condition_key='depth', scale=0.6), 'pose': t2i(condition_key='pose', scale=1.2)}
    conditions = {'depth': images(2, seed=1), 'pose': images(2, seed=2)}
    batch = controlled(conditions=conditions)
    out, models = [], []
    for order in (['depth', 'pose'], ['pose', 'depth']):
        models.append(SDXL(pretrained=str(tiny_base), adapters={n: names[n] for n in order}))
        assert list(models[-1].adapters) == sorted(order)
        out.append(sampler(steps=2)(models[-1], batch))
    assert torch.equal(*out)
    nets = []
    for name in names:
        models[0].adapters[name].save(tmp_path / name)
        nets.append(Network.from_pretrained(tmp_path / name))
    pipeline = stock(tiny_base, 'StableDiffusionXLAdapterPipeline', adapter=MultiAdapter(nets))
    # One prompt: MultiAdapter takes a list of single images.
    one = picture_batch(PROMPTS[:1], SEEDS[:1], conditions={k: v[:1] for k, v in conditions.items()})
    expected = pipeline(PROMPTS[0], image=[conditions['depth'][:1], conditions['pose'][:1]], height=64, width=64,
                        num_inference_steps=2, generator=generators(SEEDS[:1]), output_type='latent',
                        adapter_conditioning_scale=[0.6, 1.2]).images
    assert torch.equal(sampler(steps=2)(models[0], one), expected)


def test_fresh_weights_are_keyed_by_seed_and_name(tiny_base: Path) -> None:
    """Neither order nor other adapters nor the global generators change them; the seed and the name do."""
    def weights(name: str, seed: int = 1, **adapters: Any) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)
        model = SDXL(pretrained=str(tiny_base), seed=seed, adapters=adapters or {name: t2i()})
        return torch.cat([p.flatten() for p in model.adapters[name].parameters()])

    reference = weights('a')
    assert torch.equal(weights('a', b=t2i(), a=t2i()), reference)
    assert torch.equal(weights('a', a=t2i(), b=t2i()), reference)
    assert not torch.equal(weights('a', seed=2), reference)
    assert not torch.equal(weights('b'), reference)


def test_a_frozen_adapter_acts_but_does_not_train(tiny_base: Path, exported: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), objective=dict(type='Denoise'),
                 adapters=dict(old=t2i(trainable=False, weights=str(exported)), new=t2i()))
    _, gradients = grads(model, make_batch())
    assert gradients and all(n.startswith('adapters.new.') for n in gradients)
    assert set(model.state_dict()) == set(gradients) == {n for n, _ in model.trainables()['new']}
    model.train()
    assert model.adapters['new'].net.training and not model.adapters['old'].net.training


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_scales_in_fp32(tiny_base: Path, precision: str) -> None:
    """An fp32 scale must not promote the features (the UNet fails on them), nor be rounded before it multiplies."""
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    model = SDXL(pretrained=str(tiny_base), mixed_precision=precision, adapters=dict(adapter=t2i(scale=0.7)))
    seen: list[Any] = []
    handle = model.unet.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append([f.clone() for f in kwargs['down_intrablock_additional_residuals']]),
        with_kwargs=True)
    with torch.no_grad():
        conditioning = model.encode(controlled(), project=True)
        out = model.predict(torch.randn(2, 4, 8, 8), torch.tensor(5), conditioning, torch.zeros(2, 2))
    handle.remove()
    features = conditioning.adapters['adapter']
    assert out.dtype == dtype and next(model.adapters.parameters()).dtype == torch.float32
    for i, feature in enumerate(seen[0]):
        assert feature.dtype == features[f'f{i}'].dtype == dtype
        assert torch.equal(feature, (features[f'f{i}'].float() * 0.7).to(dtype))


@pytest.mark.parametrize('active_range', [(0.0, 0.4), (0.4, 1.0)])
def test_the_active_range_gates_each_row_in_training(tiny_base: Path, active_range: tuple[float, float]) -> None:
    """Rows outside it predict as the base does; the others as the adapter without a range does."""
    model, base = with_t2i(tiny_base, active_range=active_range), SDXL(pretrained=str(tiny_base))
    always = with_t2i(tiny_base)
    t = torch.tensor([900, 601, 599, 10])
    batch, x = make_batch(4), torch.randn(4, 4, 8, 8)
    progress = (1 - t / 1000).unsqueeze(1).expand(-1, 2)
    out = {k: m.predict(x, t, m.encode(batch), progress).detach()
           for k, m in dict(gated=model, base=base, always=always).items()}
    inside = torch.tensor([True, True, False, False]) ^ (active_range[0] > 0)
    assert torch.equal(out['gated'][inside], out['always'][inside])
    assert torch.equal(out['gated'][~inside], out['base'][~inside])
    assert not torch.equal(out['base'], out['always'])
    # Outside everywhere, the graph is the same: there are gradients, all zero.
    outside = 999 if active_range[0] else 0
    model.predict(x, torch.full((4,), outside), model.encode(batch),
                  torch.full((4, 2), 1 - outside / 1000)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.adapters.parameters())


@pytest.mark.parametrize('active_range', [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.7, 0.2)])
def test_invalid_active_ranges(tiny_base: Path, active_range: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r'0 <= start < end <= 1'):
        with_t2i(tiny_base, active_range=active_range)


def test_a_dropped_control_image_is_a_black_one(model: SDXL) -> None:
    """drop[name] replaces rows by the null."""
    batch = controlled()
    black = batch.conditions['conditioning_image'].clone()
    black[1] = 0
    dropped = replace(batch, drop={'adapter': torch.tensor([False, True])})
    expected = sampler(steps=2)(model, replace(batch, conditions={'conditioning_image': black}))
    assert torch.equal(sampler(steps=2)(model, dropped), expected)
    assert not torch.equal(sampler(steps=2)(model, batch)[1], expected[1])
