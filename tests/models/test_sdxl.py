"""The model: adapters by name, what trains and what is saved, its VAE, and the pipeline it writes."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from parity import PROMPTS, generators, grads, images, make_batch, picture_batch, sampler, set_scheduler, stock, t2i
from safetensors.torch import load_file

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.diffusers_pipeline import save_pipeline
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.rng import Draws
from diffengine_sdxl.testing import write_tiny_sdxl

DENOISE = dict(type='Denoise')
PARTS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')


@pytest.mark.parametrize('name', ['type', 'train', '_modules', 'a.b', '', 'unet', 'text', 'pipeline', '1st', 'keys'])
def test_invalid_names_of_adapters(tiny_base: Path, name: str) -> None:
    """Those of torch, of components, and of other folders of an export."""
    with pytest.raises(UserError, match=f"'{name}' cannot name an adapter"):
        SDXL(pretrained=str(tiny_base), adapters={name: t2i()})


def test_none_removes_an_adapter(tiny_base: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=None, b=t2i()))
    assert list(model.adapters) == ['b'] and model.adapters['b'].name == 'b'


def test_an_unknown_kind_of_adapter(tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"'T2IAdaptor'.*Did you mean 'T2IAdapter'.*diffengine_sdxl/adapters"):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='T2IAdaptor')))


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(mixed_precision='fp8'), "mixed_precision='fp8'.*'no', 'fp16', 'bf16'"),
    (dict(null_prompt='zero'), "null_prompt='zero'.*'zeros', 'empty'"),
    (dict(trainable=('unett',)), "trainable='unett'.*'unet'"), (dict(dtype='float8'), "dtype='float8' is unknown"),
    (dict(dtype={'unett': 'float32'}), "dtype='unett'.*'unet'"),
    (dict(attention='flash'), "attention='flash' is unknown"),
    (dict(prediction_type='eps'), "prediction_type='eps' is unknown"),
    (dict(zero_terminal_snr=True), "'epsilon' does not work with zero terminal SNR")])
def test_invalid_settings(tiny_base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SDXL(pretrained=str(tiny_base), **settings)


@pytest.mark.skipif(find_spec('xformers') is not None, reason='xformers is installed, so it cannot be missing')
def test_xformers_not_installed(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="attention='xformers' needs the package xformers.*attention='sdpa'"):
        SDXL(pretrained=str(tiny_base), attention='xformers')


@pytest.mark.parametrize('part', [part for part in PARTS if part != 'vae'])
def test_only_what_is_declared_trains_and_is_saved(tiny_base: Path, part: str) -> None:
    """Exactly the declared parameters get gradients, and exactly they are in the state dict; the base is frozen."""
    model = SDXL(pretrained=str(tiny_base), trainable=(part,), objective=DENOISE, adapters=dict(a=t2i()))
    before = {k: v.clone() for k, v in model.named_parameters()}
    _, gradients = grads(model, make_batch())
    declared = {n: p for parameters in model.trainables().values() for n, p in parameters}
    assert list(model.trainables()) == [part, 'a'] and len(gradients) > 10
    assert set(gradients) == set(declared) == set(model.state_dict())
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    model.train()
    assert {p: getattr(model, p).training for p in PARTS} == {p: p == part for p in PARTS}
    model.eval()
    assert not any(m.training for m in model.modules() if m not in (
        model.data_preprocessor, model.adapters, model.shared_encoders))


def test_denoising_cannot_train_the_vae(tiny_base: Path) -> None:
    """Its latents would be the target of the loss that moves them."""
    model = SDXL(pretrained=str(tiny_base), trainable=('vae',), objective=DENOISE)
    assert not any(n.startswith('vae.decoder') for n, _ in model.trainables()['vae'])
    with pytest.raises(UserError, match="'vae'"):
        model(make_batch(), mode='loss')


def test_state_dict_goes_in_place_and_back(tiny_base: Path) -> None:
    """It carries torch's `_metadata`, also inside another module."""
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=t2i(), b=t2i(trainable=False)))
    state = model.state_dict()
    assert hasattr(state, '_metadata') and all(k.startswith('adapters.a.') for k in state)
    outer = torch.nn.ModuleDict({'module': model})
    assert set(outer.state_dict()) == {f'module.{k}' for k in state}
    other = SDXL(pretrained=str(tiny_base), adapters=dict(a=t2i()), seed=5)
    assert not torch.equal(other.state_dict()['adapters.a.net.adapter.conv_in.weight'],
                           state['adapters.a.net.adapter.conv_in.weight'])
    other.load_state_dict(state, strict=False)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_latents_are_scaled(tiny_base: Path) -> None:
    """mean + std * keyed noise, times the factor; each image alone, as bits go by the batch."""
    model, pipeline = SDXL(pretrained=str(tiny_base)), stock(tiny_base)
    batch = make_batch(2)
    noise = Draws(batch.seed, batch.key, batch.epoch).normal('vae', (4, 8, 8))
    with torch.no_grad():
        dists = [pipeline.vae.encode(image).latent_dist for image in batch.img.split(1)]
    mean, std = (torch.cat([getattr(dist, name) for dist in dists]) for name in ('mean', 'std'))
    latents = model.latents(batch)
    assert torch.equal(latents, (mean + std * noise) * 0.13025)
    assert latents.is_contiguous(memory_format=torch.channels_last)  # as the VAE's output of a batch


@pytest.fixture(scope='module')
def centred(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose VAE has latents_mean and latents_std, as Playground 2.5."""
    folder = tmp_path_factory.mktemp('centred') / 'base'
    shutil.copytree(tiny_base, folder)
    path = folder / 'vae' / 'config.json'
    config = {**json.loads(path.read_text()), 'latents_mean': [-1.6, 1.1, 3.3, -0.5],
              'latents_std': [8.4, 5.9, 6.6, 5.2], 'scaling_factor': 0.5}
    path.write_text(json.dumps(config))
    return folder


def test_a_vae_with_latent_statistics(centred: Path) -> None:
    """Images bitwise those of diffusers; encoding is the inverse of decoding."""
    model, pipeline = SDXL(pretrained=str(centred)), stock(centred)
    expected = pipeline(PROMPTS[:2], height=64, width=64, num_inference_steps=2, generator=generators([1, 2]),
                        output_type='pt').images
    assert torch.equal(model.decode(sampler(steps=2)(model, picture_batch(PROMPTS[:2], [1, 2]))), expected)
    batch = make_batch(2)
    noise = Draws(batch.seed, batch.key, batch.epoch).normal('vae', (4, 8, 8))
    dist = pipeline.vae.encode(batch.img).latent_dist
    mean, std = (torch.tensor(pipeline.vae.config[k]).view(1, 4, 1, 1) for k in ('latents_mean', 'latents_std'))
    # As train_dreambooth_lora_sdxl.py.
    expected = (dist.mean + dist.std * noise - mean) * 0.5 / std
    torch.testing.assert_close(model.latents(batch), expected)


def test_a_vae_that_overflows_decodes_in_fp32(tiny_base: Path) -> None:
    """SDXL's own (force_upcast) gives NaN in fp16; as diffusers, decode it in fp32."""
    model = SDXL(pretrained=str(tiny_base), dtype=dict(vae='float16'))
    assert model.vae.dtype == torch.float16 and model.vae.config.force_upcast
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    upcast = SDXL(pretrained=str(tiny_base)).vae
    upcast.load_state_dict({k: v.half().float() for k, v in upcast.state_dict().items()})
    with torch.no_grad():
        expected = (upcast.decode(latents / 0.13025).sample * 0.5 + 0.5).clamp(0, 1)
    assert torch.equal(model.decode(latents), expected)
    assert model.vae.dtype == torch.float16


def test_a_vae_of_other_channels(tiny_base: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL
    AutoencoderKL(latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4,
                  down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
                  ).save_pretrained(tmp_path / 'vae')
    with pytest.raises(UserError, match=r"'.*vae' has 16 latent channels.*4"):
        SDXL(pretrained=str(tiny_base), vae=str(tmp_path / 'vae'))


def test_a_call_of_the_unet_does_not_walk_its_modules(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' `dtype` and `device` visit each module: 4 ms each on SDXL, 7 s if called for each parameter."""
    calls: list[str] = []
    for name in ('dtype', 'device'):
        getter = getattr(UNet2DConditionModel, name).fget
        monkeypatch.setattr(UNet2DConditionModel, name,
                            property(lambda self, name=name, getter=getter: calls.append(name) or getter(self)))
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=t2i()), mixed_precision='bf16', objective=DENOISE)
    assert len(calls) <= 4
    calls.clear()
    model(make_batch(), mode='loss')
    assert calls == []


@pytest.mark.parametrize('settings', [{}, dict(prediction_type='v_prediction', zero_terminal_snr=True)])
def test_the_pipeline_it_writes(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A fine-tuned base as a diffusers folder: bitwise equal in the diffusers pipeline, and reloaded."""
    model = SDXL(pretrained=str(tiny_base), trainable=PARTS, adapters=dict(a=t2i()), **settings)
    with torch.no_grad():
        for i, part in enumerate(PARTS):
            for parameter in getattr(model, part).parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    model.adapters['a'].scale = 0.0
    model.requires_grad_(False)  # see parity.stock
    save_pipeline(model, tmp_path / 'out')
    batch = picture_batch(PROMPTS, [1, 2, 3], conditions={'conditioning_image': images(3)})
    expected = model.decode(sampler(steps=2)(model, batch))
    pipeline = stock(tmp_path / 'out')
    got = pipeline(PROMPTS, height=64, width=64, num_inference_steps=2, generator=generators([1, 2, 3]),
                   output_type='pt').images
    assert torch.equal(got, expected)
    reloaded = SDXL(pretrained=str(tmp_path / 'out'))
    assert reloaded.schedule.prediction_type == model.schedule.prediction_type
    assert torch.equal(reloaded.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    assert torch.equal(reloaded.decode(sampler(steps=2)(reloaded, batch)), expected)
    for encoder in PARTS[2:]:  # the names that other tools look for
        keys = load_file(tmp_path / 'out' / encoder / 'model.safetensors')
        assert all(k.startswith(('text_model.', 'text_projection.')) for k in keys)


@pytest.mark.parametrize('null_prompt', ['zeros', 'empty'])
def test_the_pipeline_keeps_the_null_prompt(tiny_base: Path, tmp_path: Path, null_prompt: str) -> None:
    model = SDXL(pretrained=str(tiny_base), null_prompt=null_prompt)
    save_pipeline(model, tmp_path)
    got = stock(tmp_path)('a', height=64, width=64, num_inference_steps=2, generator=generators([1]),
                          output_type='latent').images
    assert torch.equal(got, sampler(steps=2)(model, picture_batch(['a'], [1])))


def test_settings_of_the_bases_own_scheduler(tiny_base: Path, tmp_path: Path) -> None:
    """SDXL's file holds keys that Euler doesn't know and DDIM does (clip_sample), and lacks some that both know."""
    shutil.copytree(tiny_base, tmp_path / 'base')
    path = tmp_path / 'base' / 'scheduler' / 'scheduler_config.json'
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ('timestep_type', 'final_sigmas_type')}
    path.write_text(json.dumps({**config, 'clip_sample': False, 'set_alpha_to_one': False, 'skip_prk_steps': True}))
    model, pipeline = SDXL(pretrained=str(tmp_path / 'base')), stock(tmp_path / 'base')
    for name in ('DDIMScheduler', 'PNDMScheduler', 'DPMSolverMultistepScheduler', 'EulerDiscreteScheduler'):
        set_scheduler(pipeline, name)
        expected = pipeline(PROMPTS, height=64, width=64, num_inference_steps=3, generator=generators([1, 2, 3]),
                            output_type='latent').images
        assert torch.equal(sampler(name, 3)(model, picture_batch(PROMPTS, [1, 2, 3])), expected)


def test_a_refiner_is_only_another_config(tmp_path: Path) -> None:
    """One text encoder, five time ids, four blocks: trains and samples without an adapter of SDXL's layout."""
    attention = ['CrossAttnDownBlock2D'] * 2
    base = write_tiny_sdxl(
        tmp_path / 'refiner', channels=(16, 32, 32, 32), down_block_types=('DownBlock2D', *attention, 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), num_time_ids=5,
        cross_attention_dim=32)
    index = json.loads((base / 'model_index.json').read_text())
    index.update(text_encoder=[None, None], tokenizer=[None, None])
    (base / 'model_index.json').write_text(json.dumps(index))
    for part in ('text_encoder', 'tokenizer'):
        shutil.rmtree(base / part)
    model = SDXL(pretrained=str(base), trainable=('unet',), objective=DENOISE)
    assert model.text_encoder is None and model.tokenizer is None and model.is_refiner
    batch = make_batch(2, time_ids=torch.tensor([[64.0, 64, 0, 0, 6.0]] * 2))
    loss, gradients = grads(model, batch)
    assert torch.isfinite(loss) and len(gradients) == len(list(model.unet.parameters()))
    to_sample = picture_batch(['a'], [1], time_ids=torch.tensor([[64.0, 64, 0, 0, 6.0]]),
                              negative_time_ids=torch.tensor([[64.0, 64, 0, 0, 2.5]]))
    latents = sampler(steps=2)(model, to_sample)
    # The img2img pipeline is the one that refiners are for; at strength 1 from our noise it is text-to-image.
    pipeline = stock(base, 'StableDiffusionXLImg2ImgPipeline')
    pipeline.register_to_config(requires_aesthetics_score=True)
    pipeline.scheduler.set_timesteps(2)
    noise = torch.randn((1, 4, 8, 8), generator=generators([1])[0]) * pipeline.scheduler.init_noise_sigma
    expected = pipeline('a', image=torch.zeros(1, 4, 8, 8), latents=noise, strength=1.0, num_inference_steps=2,
                        guidance_scale=5.0, output_type='latent', original_size=(64, 64), target_size=(64, 64),
                        denoising_start=None, generator=generators([1])).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    save_pipeline(model, tmp_path / 'out')
    assert SDXL(pretrained=str(tmp_path / 'out')).text_encoder is None
