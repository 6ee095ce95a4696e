"""SDXLInferencer: output types, batches, refused settings, weights, VAE options."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import BASE, NOISE, PROMPT, SIZE, Refined, asked, conditioned, config, mask, picture
from kinds import CASES, build, shaken
from mmengine.config import Config
from parity import SOLVERS, stock
from runs import train
from safetensors.torch import save_file
from torch import Tensor, nn

import diffengine_sdxl
from diffengine_sdxl import config as configs
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.request import Request
from diffengine_sdxl.samplers.sampler import Sampler
from diffengine_sdxl.testing import draw_circle


def test_output_types(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """Each as stock's; images of several sizes need 'pil'."""
    latents = inferencer(PROMPT, seed=5, output_type='latent', **SIZE)
    assert torch.equal(latents, asked(pipelines[BASE], prompt=PROMPT, output_type='latent',
                                      **SIZE))
    image, = inferencer(PROMPT, seed=5, **SIZE)
    expected = asked(pipelines[BASE], prompt=PROMPT, output_type='pil', **SIZE)[0]
    assert np.array_equal(np.asarray(image), np.asarray(expected)) and image.size == (64, 48)
    array = inferencer(PROMPT, seed=5, output_type='np', **SIZE)
    expected = asked(pipelines[BASE], prompt=PROMPT, output_type='np', **SIZE)
    assert array.dtype == np.float32 and array.shape == (1, 48, 64, 3) and np.array_equal(array, expected)
    with pytest.raises(UserError, match=r"output_type='numpy' is unknown; choose one of 'pil', 'pt', 'np', 'latent'"):
        inferencer(PROMPT, output_type='numpy')
    for kind in ('pt', 'np', 'latent'):
        with pytest.raises(UserError, match=rf"output_type='{kind}'.*sizes.*'pil'"):
            inferencer(['a', 'b'], height=[48, 64], width=64, num_inference_steps=1, output_type=kind)
    assert [i.size for i in inferencer(['a', 'b'], height=[48, 64], width=64)] == [(64, 48), (64, 64)]


def test_batches_give_the_same_pictures_in_order(inferencer: SDXLInferencer) -> None:
    """Of any sizes, tasks, steps, negatives and noise; within 1e-5, as kernels for several rows round differently."""
    call: dict[str, Any] = dict(
        prompt=['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'], height=[48, 64, 48, 48, 48, 48, 48, 48, 64], width=64,
        image=[None, None, picture(0), picture(1), picture(2), None, None, picture(3), None],
        mask_image=[None, None, None, mask(), None, None, None, mask(), None], strength=[None, None, *[0.8] * 3, None,
                                                                                          None, 0.8, None],
        negative_prompt=[None, 'blurry', None, 'ugly', 'blurry', '', None, None, 'ugly'], prompt_2=['x', *[None] * 8],
        guidance_scale=[5.0, 5.0, 5.0, 5.0, 5.0, 2.0, 1.0, 5.0, 5.0], num_images_per_prompt=2,
        crops_coords_top_left=(2, 3), seed=list(range(0, 90, 10)))
    alone, together = inferencer(**call, batch_size=1), inferencer(**call, batch_size=4)
    jobs = list(inferencer.preprocess([inferencer.request(dict(prompt=p, **SIZE)) for p in 'abcde'], 4))
    assert [job.indices for job in jobs] == [[0, 1, 2, 3], [4]]
    for got, expected in zip(together, alone, strict=True):
        assert got.size == expected.size
        # Of 255: one where the 1e-5 lies across a rounding.
        assert np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    pair = dict(prompt=['a', 'b', 'c', 'd'], negative_prompt=['', None, None, 'y'], prompt_2=['x', None, None, 'z'],
                negative_prompt_2=[None, 'x', None, 'z'], seed=[4, 3, 2, 1], output_type='pt', **SIZE)
    alone, together = inferencer(**pair), inferencer(**pair, batch_size=4)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert all((together[k] - alone[k - 1]).abs().max() > 1e-2 for k in range(4))


def test_batches_of_image_prompts(tiny_base: Path, tmp_path: Path, pipelines: dict[str, Any]) -> None:
    """One, several, with a mask or without, for each prompt its own."""
    ours = conditioned('ip_adapter', tiny_base, tmp_path, pipelines).ours
    first, second = picture(1), picture(2)
    given = [first, [first, second], dict(image=first, mask=mask()), second, dict(image=[second, first]),
             dict(image=first)]
    call: dict[str, Any] = dict(prompt=list('abcdef'), conditions=dict(a=given), seed=5, output_type='pt', **SIZE)
    torch.testing.assert_close(ours(**call, batch_size=4), ours(**call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('call', 'sentence'), [
    (dict(prompt=['a', 'b'], seed=[1, 2, 3]), r"There are 2 prompts and 3 of 'seed'; give one per prompt"),
    (dict(prompt=['a', 'b'], negative_prompt=['x']), "2 prompts and 1 of 'negative_prompt'"),
    (dict(prompt=['a', 'b'], image=[picture()]), "2 prompts and 1 of 'image'"),
    (dict(prompt=[]), r'prompt=\[\] holds no prompt'), (dict(prompt=['a', 3]), 'prompt=3 must be a text'),
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(batch_size='2'), "batch_size='2' must"), (dict(batch_size=1.5), 'batch_size=1.5 must'),
    (dict(prompt=3), 'prompt=3 must be a text, or a list of texts'),
    (dict(num_images_per_prompt=0), 'num_images_per_prompt=0'),
    (dict(prompt=['a', 'b'], image=[picture()] * 4), 'image holds 2, and num_images_per_prompt=1'),
    (dict(image=[[picture()]]), 'the image holds a list'),
    (dict(latents=torch.zeros(8, 8)), r'latents must be \[4, h, w\], for one image; it is \[8, 8\]'),
    (dict(image=picture(), mask_image=[picture()] * 2), 'mask_image holds 2, and num_images_per_prompt=1'),
    (dict(latents=NOISE * 1e38), r'not finite from step 1 of 3 on \(timestep \d+\); the first such value'),
    (dict(latents=torch.zeros(4, 5, 5), **SIZE),
     r'must be \[1, 4, 6, 8\] for images of 48 x 64; it is \[1, 4, 5, 5\]'),
    (dict(image=picture(), strength=0.1), 'strength=0.1 leaves none of 3 steps to do'),
    (dict(scheduler='x'), "Unknown setting 'scheduler'"),
    (dict(conditions=dict(x=picture())), "Unknown adapter 'x' in `conditions`"),
    (dict(height=50), '50 x 64 cannot be made: 8 must divide both'),
    (dict(prompt_syntax='x'), "prompt_syntax='x' is unknown"),
    (dict(negative_original_size=(8, 8)), 'negative_original_size=.* goes with negative_target_size where there '),
    (dict(negative_target_size=(8, 8), latents=NOISE), 'negative_target_size=.* goes with negative_original_size'),
    (dict(aesthetic_score=6.0), r'aesthetic_score=6.0 is a setting of a refiner .*the config has none'),
    (dict(negative_aesthetic_score=2), 'negative_aesthetic_score=2.0 is a setting of a refiner'),
    (dict(prompt=['a', 'b'], aesthetic_score=[None, 7], batch_size=2, **SIZE), 'aesthetic_score=7.0 is a setting'),
    (dict(refiner=dict(aesthetic_score=5)), 'aesthetic_score=5 is a setting of a refiner'),
    (dict(clip_skip=2), 'clip_skip=2 must be between 0 and, for these text encoders, 1'),
    (dict(clip_skip=1, prompt_syntax='compel'),
     "clip_skip=1 does not go with prompt_syntax='compel', which reads the penultimate layer; use 'plain' or 'long'"),
    (dict(prompt='a \ud800 b'), r"prompt='a \\ud800 b': character 3 is a lone surrogate"),
    (dict(prompt=['a', 'b'], negative_prompt='\udfff', prompt_syntax='compel', batch_size=2),
     "negative_prompt='.*surrogate"),
    (dict(refiner=dict(strength=0.5)), 'the config has no `refiner`')])
def test_refused_calls(inferencer: SDXLInferencer, call: dict[str, Any], sentence: str) -> None:
    """With an error that names the value."""
    with pytest.raises(UserError, match=sentence):
        inferencer(**{'prompt': PROMPT, **call})


def test_refused_configs(tiny_base: Path) -> None:
    """Before anything loads, also for a Config in memory."""
    for sections, sentence in ((dict(infer_cfg=dict(sede=1)), "infer_cfg: Unknown setting 'sede'.*Did you mean 'seed'"),
                               (dict(infer_cfg=dict(vae_tiling=1)), 'infer_cfg.vae_tiling=1 must be True or False'),
                               (dict(adapters=dict(a=dict(type='LoRA'))), 'does not name the `weights` of a'),
                               (dict(adapters=dict(a=dict(type='LoRA', weigths='x'))), "Did you mean 'weights'"),
                               (dict(refiner=dict(pretrained='x')), 'refiner has no `type`')):
        with pytest.raises(UserError, match=sentence):
            SDXLInferencer(config(tiny_base / 'not there', **sections), device='cpu')
    for model in (None, dict(type='SDXL', pretrained='not there')):
        with pytest.raises(UserError, match='no `model'):
            SDXLInferencer(Config(dict(model=model)), device='cpu')


def test_scales_and_active_ranges_of_one_call(tiny_base: Path, tmp_path: Path, pipelines: dict[str, Any]) -> None:
    """They act as the config's would, and are restored, also after an error."""
    ours = conditioned('t2i_adapter', tiny_base, tmp_path, pipelines, scale=0.5, active_range=(0.0, 0.7)).ours
    fixed = conditioned('t2i_adapter', tiny_base, tmp_path, pipelines, scale=0.9, active_range=(0.3, 1.0)).ours
    call: dict[str, Any] = dict(prompt=PROMPT, conditions=dict(a=draw_circle(3)[1]), seed=5, output_type='pt', **SIZE)
    plain, adapter = ours(**call), ours.model.adapters['a']
    changed = ours(**call, scales=dict(a=0.9), active_ranges=dict(a=(0.3, 1.0)))
    assert torch.equal(changed, fixed(**call)) and not torch.equal(changed, plain)
    assert torch.equal(ours(**call), plain)

    def stop(*_: Any) -> None:
        raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'):
        ours(**call, scales=dict(a=0.9), active_ranges=dict(a=(0.3, 1.0)), on_step=stop)
    for wrong in (dict(scales=dict(b=1.0)), dict(scales=dict(a=0.1), active_ranges=dict(b=(0, 1))),
                  dict(active_ranges=dict(a=(1, 0)))):
        with pytest.raises(UserError, match="there is no adapter 'b'|active_range"):
            ours(**call, **wrong)
    assert adapter.scale == 0.5 and adapter.active_range == (0.0, 0.7) and torch.equal(ours(**call), plain)


def test_on_step(refined: Refined) -> None:
    """(steps done, total steps) of both stages."""
    told: list[tuple[int, int]] = []
    refined.ours(PROMPT, denoising_end=0.5, num_inference_steps=4, on_step=lambda *n: told.append(n), **SIZE)
    assert told == [(1, 2), (2, 2), (1, 2), (2, 2)]


def test_infer_cfg_holds_the_defaults(tiny_base: Path, inferencer: SDXLInferencer) -> None:
    """A call overrides `infer_cfg`; dicts are merged. The caller's Config is unchanged."""
    cfg = config(tiny_base, infer_cfg=dict(prompt=PROMPT, negative_prompt='blurry', seed=5, num_inference_steps=2,
                                           crops_coords_top_left=(1, 2), **SIZE))
    before = cfg.dump()
    ours = SDXLInferencer(cfg, weights='none', device='cpu')
    said = dict(prompt=PROMPT, negative_prompt='blurry', seed=5, num_inference_steps=2, crops_coords_top_left=(1, 2),
                output_type='pt', **SIZE)
    assert torch.equal(ours(output_type='pt'), inferencer(**said))
    assert torch.equal(ours('a cat', seed=6, height=64, output_type='pt'),
                       inferencer(**{**said, 'prompt': 'a cat', 'seed': 6, 'height': 64}))
    assert len(ours(['a', 'b'], num_inference_steps=1)) == 2
    assert cfg.dump() == before


def test_settings_that_need_an_image(tiny_base: Path) -> None:
    """They may be in `infer_cfg` while the call gives the image; without one they are refused."""
    ours = SDXLInferencer(config(tiny_base, infer_cfg=dict(strength=0.8, **SIZE)), device='cpu')
    assert ours(PROMPT, image=picture())[0].size == (64, 48)
    with pytest.raises(UserError, match='strength=0.8 needs an `image`'):
        ours(PROMPT)


def test_configs_by_path_and_name(tiny_base: Path, tmp_path: Path, inferencer: SDXLInferencer) -> None:
    """A file, a name with overrides (text or dict), and a Config are the same model; the package names the class."""
    assert diffengine_sdxl.SDXLInferencer is SDXLInferencer
    path = tmp_path / 'mine.py'
    config(tiny_base).dump(path)
    expected = inferencer(PROMPT, seed=5, output_type='pt', **SIZE)
    plain = {'model.pretrained': str(tiny_base), 'model.sampler.scheduler': SOLVERS['ancestral'],
             'model.sampler.num_inference_steps': 3, 'mixed_precision': 'no'}
    words = [f'model.pretrained={tiny_base}', "model.sampler.scheduler.type=EulerAncestralDiscreteScheduler",
             'model.sampler.num_inference_steps=3', 'mixed_precision=no']
    for name, overrides in ((str(path), ()), ('sdxl_text_to_image', plain), ('sdxl_text_to_image.py', words)):
        ours = SDXLInferencer(name, device='cpu', cfg_options=overrides)
        assert torch.equal(ours(PROMPT, seed=5, output_type='pt', **SIZE), expected)
    with pytest.raises(UserError, match='cfg_options go with the name of a config'):
        SDXLInferencer(config(tiny_base), cfg_options=words)
    with pytest.raises(UserError, match=r"no installed config.*Did you mean.*'sdxl_text_to_image'"):
        SDXLInferencer('sdxl_text_to_imag')


def test_weights(tiny_base: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Of a short training: its folder, checkpoint and exports, an adapter's file, and none."""
    options = {**tiny, 'train_cfg.max_iters': 2, 'optim_wrapper.optimizer.lr': 0.1}
    train(tmp_path / 'W', options)
    call: dict[str, Any] = dict(prompt=PROMPT, seed=5, output_type='pt', num_inference_steps=2, **SIZE)
    shown = dict(conditions=dict(adapter=draw_circle(3)[1]))

    def ours(weights: str | None, **more: Any) -> Tensor:
        made: Tensor = SDXLInferencer('tiny_t2i_adapter', weights, 'cpu', cfg_options={**options, **more})(
            **call, **({} if weights == 'none' else shown))
        return made
    folder = tmp_path / 'W'
    found = [ours(str(folder / name)) for name in ('', 'step2.pth', 'step2', 'step2/adapter')]
    found.append(ours(None, **{'model.adapters.adapter.weights': str(folder / 'step2' / 'adapter')}))
    # A frozen adapter, whose own file is replaced before it is read.
    frozen = {'model.adapters.adapter.weights': 'missing', 'model.adapters.adapter.trainable': False}
    found += [ours(str(folder / name), **frozen) for name in ('', 'step2.pth', 'step2', 'step2/adapter')]
    assert all(torch.equal(one, found[0]) for one in found[1:])
    base = ours('none')
    assert torch.equal(base, asked(stock(tiny_base), 5, 2, prompt=PROMPT, **SIZE))
    assert not torch.equal(base, found[0])
    with pytest.raises(UserError, match=r"does not name the `weights` of adapter; set them"):
        ours(None)
    with pytest.raises(UserError, match=r"no checkpoint '.*step3.pth'. Did you mean 'step2.pth'"):
        ours(str(folder / 'step3.pth'))


def test_the_base_alone_of_a_config_that_conditions(tiny_base: Path, tmp_path: Path, pipelines: dict[str, Any]) -> None:
    """weights='none' removes the adapters and their settings."""
    pair = conditioned('t2i_adapter', tiny_base, tmp_path, pipelines)
    cfg = pair.ours.cfg
    cfg.infer_cfg = dict(conditions=dict(a=draw_circle(3)[1]), scales=dict(a=0.5),
                         active_ranges=dict(a=(0, 0.5)), **SIZE)
    got = SDXLInferencer(cfg, weights='none', device='cpu')(PROMPT, seed=5, output_type='pt')
    assert torch.equal(got, asked(pipelines[BASE], prompt=PROMPT, **SIZE))
    assert all(cfg.model.adapters.values())


def test_the_vae_in_tiles_and_slices(tiny_base: Path) -> None:
    """Tiles are stock's, bitwise; a slice at a time gives the same pictures, within 1e-5 as of batches."""
    made = {}
    for option in ('vae_tiling', 'vae_slicing'):
        ours = SDXLInferencer(config(tiny_base, infer_cfg={option: True}), device='cpu')
        made[option] = ours(['a', 'b'], seed=5, output_type='pt', batch_size=2, height=112, width=104)
        vae = ours.model.vae  # for encoding, too
        assert (vae.use_tiling, vae.use_slicing) == (option == 'vae_tiling', option == 'vae_slicing')
    ours = SDXLInferencer(config(tiny_base), device='cpu')
    call: dict[str, Any] = dict(prompt=['a', 'b'], seed=5, batch_size=2, height=112, width=104)
    torch.testing.assert_close(made['vae_slicing'], ours(**call, output_type='pt'), rtol=1e-5, atol=1e-5)
    image = picture(0, (104, 112))
    whole, tiles = (SDXLInferencer(config(tiny_base, infer_cfg=dict(vae_tiling=tiling)), device='cpu')(
        'a', image=image, strength=0.5, seed=5, output_type='latent') for tiling in (False, True))
    assert not torch.equal(whole, tiles)  # what is encoded, too
    vae = stock(tiny_base).vae
    latents = ours(**call, output_type='latent') / vae.config.scaling_factor
    with torch.no_grad():
        plain = vae.decode(latents).sample
        vae.enable_tiling()
        tiled = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
    assert torch.equal(made['vae_tiling'], tiled) and not torch.equal(tiled, (plain * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_a_vae_that_overflows_decodes_again_in_fp32(tiny_base: Path, dtype: str) -> None:
    """Its last convolution gives 1e6 in between, which fp16 has no number for; it stays in its dtype."""
    cfg = config(tiny_base)
    cfg.model.dtype = dict(vae=dtype)
    ours = SDXLInferencer(cfg, device='cpu')
    # SDXL's own config has it upcast throughout; a VAE that says it need not be is trusted, and found out.
    ours.model.vae.register_to_config(force_upcast=False)
    vae: nn.Module = ours.model.vae
    with torch.no_grad():
        norm, last = vae.get_submodule('decoder.conv_norm_out'), vae.get_submodule('decoder.conv_out')
        norm.weight.mul_(3e4)
        norm.bias.mul_(3e4)
        last.weight.div_(3e4)
    call: dict[str, Any] = dict(prompt=PROMPT, seed=5, output_type='pt', **SIZE)
    if dtype == 'float32':
        assert torch.isfinite(ours(**call)).all()
        with torch.no_grad():
            last.weight.fill_(torch.inf)
        with pytest.raises(UserError, match='The VAE decoded NaN or Inf'):
            ours(**call)
        return
    with pytest.warns(UserWarning, match=r'The VAE overflows in float16, so these images are decoded in fp32'):
        got = ours(**call)
    assert {p.dtype for p in vae.parameters()} == {torch.float16}
    latents = ours(**{**call, 'output_type': 'latent'})
    images = vae.float().decode(latents / 0.13025).sample.detach()
    torch.testing.assert_close(got, (images * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=0)


def test_mmengines_conventions(inferencer: SDXLInferencer) -> None:
    """preprocess, forward, postprocess and visualize, called by hand."""
    requests = [inferencer.request(dict(prompt=p, seed=s, **SIZE)) for p, s in (('a', 5), ('a', 6), ('b', 5))]
    tensors = [t for job in inferencer.preprocess(requests, 2) for t in inferencer.forward(job)]
    images = inferencer.postprocess(tensors)
    grid = inferencer.visualize(requests, images)
    assert len(images) == 3 and grid.width > 2 * 64 and grid.height > 2 * 48


def test_latents_from_a_file(inferencer: SDXLInferencer, tmp_path: Path) -> None:
    """They say how large the picture is, as a tensor does."""
    save_file({'noise': NOISE[0]}, tmp_path / 'noise.safetensors')
    expected = inferencer(PROMPT, latents=NOISE, output_type='pt')
    for source in (tmp_path / 'noise.safetensors', str(tmp_path / 'noise.safetensors')):
        got = inferencer(PROMPT, latents=source, output_type='pt')
        assert got.shape[-2:] == (48, 64) and torch.equal(got, expected)


def test_calls_do_not_change_the_model(inferencer: SDXLInferencer) -> None:
    """It is frozen and in evaluation mode; no setting of a call remains."""
    model: SDXL = inferencer.model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    first = inferencer(PROMPT, seed=5, output_type='pt', **SIZE)
    held = dict(vars(model.sampler))
    inferencer(PROMPT, image=picture(), strength=0.5, guidance_scale=2.0, guidance_rescale=0.5, num_inference_steps=5,
               denoising_end=0.9)
    assert vars(model.sampler) == held and torch.equal(inferencer(PROMPT, seed=5, output_type='pt', **SIZE), first)
    assert configs.to_plain(inferencer.cfg.model.sampler)['num_inference_steps'] == 3


def test_a_sampler_that_stops_early_hands_over(refined: Refined) -> None:
    """By the config as by a call; the refiner starts where it stops."""
    ours = refined.ours
    called = ours(PROMPT, seed=3, denoising_end=0.6, num_inference_steps=5, output_type='pt')
    cfg = copy.deepcopy(ours.cfg)
    cfg.model.sampler.update(denoising_end=0.6, num_inference_steps=5)
    assert torch.equal(SDXLInferencer(cfg, device='cpu')(PROMPT, seed=3, output_type='pt'), called)
    for end in (None, 0.6):
        with pytest.raises(UserError, match=rf'denoising_start=0.7 must be where the base stops .*{end}'):
            ours(PROMPT, denoising_end=end, refiner=dict(denoising_start=0.7))


def test_an_active_range_of_one_call_is_restored(tiny_base: Path, tmp_path: Path) -> None:
    """A LoRA that a range switched off is on again; one in a text encoder refuses a range."""
    parts = ['unet', 'text_encoder']
    model = shaken(build(tiny_base, dict(s=CASES['lora'].config, t={**CASES['lora'].config, 'parts': parts})),
                   CASES['lora'], CASES['lora'])
    loras = {}
    for name, adapter in model.adapters.items():
        adapter.save(tmp_path / name)
        loras[name] = dict(type='LoRA', weights=str(tmp_path / name), trainable=False)
    ours = SDXLInferencer(config(tiny_base, dict(s=loras['s'])), device='cpu')
    before = ours(PROMPT, seed=1, output_type='latent', **SIZE)
    within = ours(PROMPT, seed=1, output_type='latent', active_ranges=dict(s=(0.0, 0.5)), **SIZE)
    assert not torch.equal(before, within)
    assert torch.equal(ours(PROMPT, seed=1, output_type='latent', **SIZE), before)
    ours = SDXLInferencer(config(tiny_base, dict(t=loras['t'])), device='cpu')
    with pytest.raises(UserError, match=r'active_range=\(0.0, 0.5\).*also changes text_encoder'):
        ours(PROMPT, active_ranges=dict(t=(0.0, 0.5)), **SIZE)


def test_later_steps_win() -> None:
    """num_inference_steps, timesteps and sigmas exclude each other."""
    one = Request.of(dict(timesteps=[900, 500]), dict(num_inference_steps=9))
    assert one.timesteps is None and one.num_inference_steps == 9
    assert Request.of(dict(num_inference_steps=9), dict(sigmas=[2.0, 0.5])).num_inference_steps is None
    assert Request.of(dict(timesteps=[900]), dict(num_inference_steps=9, timesteps=None)).timesteps is None
    with pytest.raises(UserError, match='timesteps or sigmas, not both'):
        Request.of(dict(timesteps=[3], sigmas=[1.0, 0.0]))


def test_adapters_in_a_shared_text_encoder(refined: Refined, tiny_base: Path, tmp_path: Path) -> None:
    """A refiner's LoRA in a shared encoder acts on the refiner and not on the base."""
    cfg = copy.deepcopy(refined.ours.cfg)
    case = dict(CASES['lora'].config, parts=['text_encoder_2'])
    shaken(build(tiny_base, dict(s=case)), CASES['lora']).adapters['s'].save(tmp_path / 's')
    plain = SDXLInferencer(cfg, device='cpu')
    cfg.refiner.adapters = dict(s=dict(type='LoRA', weights=str(tmp_path / 's'), trainable=False))
    adapted = SDXLInferencer(cfg, device='cpu')
    steps: list[list[torch.Tensor]] = [[], []]
    for ours, seen in zip((plain, adapted), steps, strict=True):
        job, = ours.preprocess([ours.request(dict(prompt=PROMPT, denoising_end=0.6, num_inference_steps=3, **SIZE))])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, '__call__', lambda self, *a, seen=seen, sample=Sampler.__call__: seen.append(
                sample(self, *a)) or seen[-1])
            ours.forward(job)
    assert torch.equal(steps[0][0], steps[1][0]) and not torch.equal(steps[0][1], steps[1][1])
