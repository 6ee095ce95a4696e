"""The configs of every kind train on the tiny base; the compositions of the Refiners guide are stock's, bitwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import train, weights
from kinds import CASES, SEEDS, STEPS, build, run, shaken
from parity import PROMPTS, images, picture_batch, sampler, stock

from diffengine_sdxl.engine import config
from diffengine_sdxl.registry import MODELS
from diffengine_sdxl.testing import write_tiny_image_encoder

TRAINED = {
    'stable_diffusion_xl_lora_text_to_image': ['style'], 'stable_diffusion_xl_lora_text_encoders': ['style'],
    'stable_diffusion_xl_lora_blocks': ['style'], 'stable_diffusion_xl_lora_dreambooth': ['thing'],
    'stable_diffusion_xl_ip_adapter': ['ip'], 'stable_diffusion_xl_ip_adapter_plus': ['ip'],
    'stable_diffusion_xl_controlnet_fill50k': ['control'], 'stable_diffusion_xl_textual_inversion': ['word'],
    'stable_diffusion_xl_lora_t2i_adapter': ['adapter', 'style'],
    'stable_diffusion_xl_t2i_adapter_beside_lora': ['adapter']}
COMPOSED = ('stable_diffusion_xl_two_loras', 'stable_diffusion_xl_two_loras_ip_adapter_plus',
            'stable_diffusion_xl_two_loras_ip_adapter_plus_t2i_adapter')


@pytest.fixture(scope='module')
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exported adapters that look trained, and the image encoder of the IP-Adapter."""
    folder = tmp_path_factory.mktemp('parts')
    kinds = {'first': CASES['lora_everywhere'], 'second': CASES['lora'], 'ip': CASES['ip_adapter_plus'],
             'depth': CASES['t2i_adapter']}
    model = shaken(build(tiny_base, {name: {**case.config, 'reads': name} if case.reads else case.config
                                     for name, case in kinds.items()}), *(kinds[name] for name in sorted(kinds)))
    for name, adapter in model.adapters.items():
        adapter.save(folder / name)
    write_tiny_image_encoder(folder / 'encoder')
    return folder


def test_all_are_here() -> None:
    """A config for SDXL in these folders is in one of both lists."""
    found = {p.stem for p in config.installed_configs() if p.parent.name not in ('t2i_adapter', 'shapes', 'tiny')}
    assert found == {*TRAINED, *COMPOSED}


@pytest.mark.parametrize('name', TRAINED)
def test_a_config_trains(name: str, tiny_base: Path, circles: Path, parts: Path, tmp_path: Path) -> None:
    """Two steps; what is exported is what the config says it trains, and it has moved."""
    cfg = config.load(name)
    options: dict[str, Any] = {
        'model.pretrained': str(tiny_base), 'model.vae': None, 'mixed_precision': 'no', 'resolution': 32,
        'train_dataloader.num_workers': 0, 'train_cfg.max_iters': 2, 'default_hooks.checkpoint.interval': 1,
        'default_hooks.samples': None, 'optim_wrapper.accumulative_counts': 1}
    if 'instance_folder' in cfg:
        options |= {'instance_folder': str(circles / 'images'), 'class_folder': str(circles / 'conditioning_images')}
    else:
        sub = 'images' if cfg.train_dataloader.dataset.type == 'CaptionFolder' else ''
        options['train_dataloader.dataset.source'] = str(circles / sub)
    if 'image_prompt_size' in cfg:
        options |= {'image_prompt_size': 64, 'model.adapters.ip.image_encoder': str(parts / 'encoder'),
                    'model.adapters.ip.image_encoder_subfolder': None}
    if 'beside_lora' in name:
        options['model.adapters.style.weights'] = str(parts / 'second')
    train(tmp_path, options, name=name)
    assert sorted(p.name for p in (tmp_path / 'step2').iterdir() if p.is_dir()) == TRAINED[name]
    one, two = weights(tmp_path, 1), weights(tmp_path, 2)
    assert one and sum(torch.equal(one[k], two[k]) for k in one) == 0


@pytest.mark.parametrize('name', COMPOSED)
def test_a_composition_is_stocks(name: str, tiny_base: Path, parts: Path) -> None:
    """Two LoRAs at the guide's scales, then an IP-Adapter plus, then a T2I-Adapter, as the config has them."""
    from diffusers import T2IAdapter
    from transformers import CLIPVisionModelWithProjection
    options: dict[str, Any] = {'model.pretrained': str(tiny_base), 'model.vae': None, 'mixed_precision': 'no',
                               'model.adapters.scifi.weights': str(parts / 'first'),
                               'model.adapters.pixel_art.weights': str(parts / 'second')}
    if 'ip_adapter' in name:
        options |= {f'model.adapters.ip.{key}': value for key, value in dict(
            weights=str(parts / 'ip'), subfolder=None, weight_name=None, image_encoder=str(parts / 'encoder'),
            image_encoder_subfolder=None).items()}
    if 't2i' in name:
        options['model.adapters.depth.weights'] = str(parts / 'depth')
    cfg = config.resolve(config.load(name, options))
    model: Any = MODELS.build(dict(cfg.model))
    scales = {adapter: model.adapters[adapter].scale for adapter in model.adapters}
    reference, depth = images(1, seed=8), images(1, seed=9)
    batch = picture_batch(PROMPTS[:1], SEEDS[:1], conditions={'reference': reference, 'conditioning_image': depth})
    ours = sampler(steps=STEPS)(model, batch)

    extra = {'adapter': T2IAdapter.from_pretrained(parts / 'depth')} if 't2i' in name else {}
    pipeline = stock(tiny_base, 'StableDiffusionXLAdapterPipeline' if extra else 'StableDiffusionXLPipeline', **extra)
    arguments: dict[str, Any] = {}
    if 'ip_adapter' in name:
        net = CLIPVisionModelWithProjection.from_pretrained(parts / 'encoder').requires_grad_(False)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
        pixels = (reference - mean) / std
        embeds = [net(p, output_hidden_states=True).hidden_states[-2] for p in (torch.zeros_like(pixels), pixels)]
        pipeline.load_ip_adapter(str(parts / 'ip'), subfolder='', weight_name='ip_adapter.safetensors',
                                 image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(scales['ip'])
        arguments['ip_adapter_image_embeds'] = [torch.stack(embeds)]
    for adapter, folder in (('pixel_art', 'second'), ('scifi', 'first')):
        pipeline.load_lora_weights(str(parts / folder), adapter_name=adapter)
    pipeline.set_adapters(['pixel_art', 'scifi'], [scales['pixel_art'], scales['scifi']])
    if extra:
        arguments |= {'image': depth, 'adapter_conditioning_scale': scales['depth']}
    expected = run(pipeline, batch, **arguments)
    assert torch.equal(ours, expected)
    guide = {'two_loras': (1.0, 1.4), 'plus': (1.5, 1.55), 't2i_adapter': (1.5, 1.55)}
    assert (scales['scifi'], scales['pixel_art']) == next(v for k, v in guide.items() if name.endswith(k))
    assert scales.get('depth', 0.72) == 0.72 and scales.get('ip', 1.0) == 1.0
