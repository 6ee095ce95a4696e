"""The configs of every kind train on the tiny base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, build, shaken
from runs import train, weights

from diffengine_sdxl import config
from diffengine_sdxl.config_files import installed_configs
from diffengine_sdxl.engine import run_identity
from diffengine_sdxl.testing import write_tiny_image_encoder

TRAINED = {
    'stable_diffusion_xl_lora_text_to_image': ['style'], 'stable_diffusion_xl_lora_text_encoders': ['style'],
    'stable_diffusion_xl_lora_blocks': ['style'], 'stable_diffusion_xl_lora_dreambooth': ['thing'],
    'stable_diffusion_xl_ip_adapter': ['ip'], 'stable_diffusion_xl_ip_adapter_plus': ['ip'],
    'stable_diffusion_xl_controlnet_fill50k': ['control'], 'stable_diffusion_xl_textual_inversion': ['word'],
    'stable_diffusion_xl_lora_t2i_adapter': ['adapter', 'style'],
    'stable_diffusion_xl_t2i_adapter_beside_lora': ['adapter'],
    'stable_diffusion_xl_t2i_adapter_partners': ['adapter'], 'stable_diffusion_xl_repair': ['adapter', 'style']}


@pytest.fixture(scope='module')
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what configs name: an exported LoRA that looks trained, and the image encoder of IP-Adapters."""
    folder = tmp_path_factory.mktemp('parts')
    case = CASES['lora']
    shaken(build(tiny_base, {'style': case.config}), case).adapters['style'].save(folder / 'style')
    case = CASES['t2i_adapter']
    shaken(build(tiny_base, {'layout': case.config}), case).adapters['layout'].save(folder / 'layout')
    write_tiny_image_encoder(folder / 'encoder')
    return folder


def test_all_are_here() -> None:
    """Those of other folders have tests of their own."""
    elsewhere = ('infer', 't2i_adapter', 'shapes', 'tiny')
    there = {p.stem for p in installed_configs() if p.parent.name not in elsewhere}
    assert there == {*TRAINED, 'stable_diffusion_xl_lora_12gb'}


@pytest.mark.parametrize(('name', 'of'), [
    ('lora_12gb', 'lora_text_to_image'), ('t2i_adapter_12gb', 't2i_adapter_fill50k')])
def test_the_configs_for_12_gb_differ_in_memory_only(name: str, of: str) -> None:
    """They train on the same samples, one at a time."""
    small, shipped = (config.resolve(config.load(f'stable_diffusion_xl_{one}')) for one in (name, of))
    assert small.speed.checkpointing == 'full' and small.train_dataloader.batch_size == 1
    assert run_identity.differences(*(run_identity.identity(one) for one in (shipped, small))) == [
        'split.batch_size was 2, is now 1',
        f'split.accumulative_counts was {shipped.optim_wrapper.accumulative_counts}, is now '
        f'{2 * shipped.optim_wrapper.accumulative_counts}']


@pytest.mark.parametrize('name', TRAINED)
def test_a_config_trains(name: str, tiny_base: Path, circles: Path, parts: Path, tmp_path: Path) -> None:
    """Six steps; what is exported is what the config says it trains, and it has moved, to which the guard agrees."""
    cfg = config.load(name)
    options: dict[str, Any] = {
        'model.pretrained': str(tiny_base), 'model.vae': None, 'mixed_precision': 'no', 'resolution': 32,
        'train_dataloader.num_workers': 0, 'train_cfg.max_iters': 6, 'default_hooks.checkpoint.interval': 3,
        'default_hooks.samples': None, 'optim_wrapper.accumulative_counts': 1}
    if 'instance_folder' in cfg:
        options |= {'instance_folder': str(circles / 'images'), 'class_folder': str(circles / 'conditioning_images')}
    else:
        sub = 'images' if cfg.train_dataloader.dataset.type == 'CaptionFolder' else ''
        options['train_dataloader.dataset.source'] = str(circles / sub)
    if 'image_prompt_size' in cfg:
        options |= {'image_prompt_size': 64, 'model.adapters.ip.image_encoder': str(parts / 'encoder'),
                    'model.adapters.ip.image_encoder_subfolder': None}
    if 'weights' in (cfg.model.adapters.get('style') or {}) and cfg.model.adapters.style.weights:
        options['model.adapters.style.weights'] = str(parts / 'style')
    if name.endswith('repair'):
        options['model.adapters.adapter.weights'] = str(parts / 'layout')
        options['model.partners'] = dict(adapter=dict(prob=0.9))
    train(tmp_path, options, name=name)
    assert 'The first steps train all of' in next(tmp_path.glob('*/*.log')).read_text()
    assert sorted(p.name for p in (tmp_path / 'step6').iterdir() if p.is_dir()) == TRAINED[name]
    one, two = weights(tmp_path, 3), weights(tmp_path, 6)
    assert one and sum(torch.equal(one[k], two[k]) for k in one) == 0
