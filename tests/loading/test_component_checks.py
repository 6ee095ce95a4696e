"""Configs of components that are malformed or absurd: refused in a sentence, before much is built."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.loading.component_checks import check_scheduler, check_types
from diffengine_sdxl.loading.single_file import SDXL_FILES, build_module, empty_model
from diffengine_sdxl.loading.strict import load_pretrained
from diffengine_sdxl.loading.trained import load_trained
from diffengine_sdxl.models.sdxl import SDXL

CLASSES = {'unet': UNet2DConditionModel, 'vae': AutoencoderKL, 'text_encoder': CLIPTextModel, 'adapter': T2IAdapter}


@pytest.fixture(scope='module')
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each component."""
    folder = tmp_path_factory.mktemp('components')
    for name in ('unet', 'vae', 'text_encoder'):
        shutil.copytree(tiny_base / name, folder / name)
    T2IAdapter(channels=[8, 8, 8, 8], num_res_blocks=1, downscale_factor=16, adapter_type='full_adapter_xl'
               ).save_pretrained(folder / 'adapter')
    return folder


def edited(folders: Path, tmp_path: Path, name: str, **settings: Any) -> Path:
    folder = Path(shutil.copytree(folders / name, tmp_path / name))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize(('name', 'settings'), [
    ('adapter', dict(num_res_blocks=10**7)), ('adapter', dict(channels=[10**9] * 4)), ('adapter', dict(in_channels=-1)),
    ('adapter', dict(channels='8')), ('adapter', dict(channels=[])), ('adapter', dict(downscale_factor=[16])),
    ('adapter', dict(adapter_type=None)), ('adapter', dict(num_res_blocks=float('inf'))),
    ('adapter', dict(num_res_blocks=float('nan'))), ('unet', dict(block_out_channels=[10**9, 10**9, 10**9])),
    ('unet', dict(layers_per_block=10**7)), ('unet', dict(transformer_layers_per_block=[1, 2, 10**8])),
    ('unet', dict(norm_num_groups=0)), ('unet', dict(norm_eps='1e-5')), ('unet', dict(in_channels=-1)),
    ('unet', dict(cross_attention_dim=10**12)), ('unet', dict(down_block_types=5)), ('unet', dict(act_fn=['silu'])),
    ('vae', dict(scaling_factor='0.13')), ('vae', dict(latent_channels=10**9)), ('vae', dict(layers_per_block=10**8)),
    ('vae', dict(scaling_factor=float('-inf'))), ('text_encoder', dict(num_hidden_layers=10**7)),
    ('text_encoder', dict(hidden_size=10**9)), ('text_encoder', dict(num_attention_heads=0)),
    ('text_encoder', dict(layer_norm_eps='x')), ('text_encoder', dict(max_position_embeddings=10**10)),
    ('text_encoder', dict(vocab_size=-1))], ids=str)
def test_absurd_settings(folders: Path, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """A UserError within seconds."""
    folder = edited(folders, tmp_path, name, **settings)
    start = time.process_time()
    with pytest.raises(UserError, match=name):
        load_pretrained(CLASSES[name], str(folder))
    assert time.process_time() - start < 5


def test_configs_without_weights_are_bounded(tiny_base: Path, tmp_path: Path) -> None:
    """Random weights, and the configs beside a single file."""
    unet = json.loads((SDXL_FILES / 'unet' / 'config.json').read_text())
    (tmp_path / 'unet').mkdir()
    for settings, build in ((dict(block_out_channels=[10**5] * 3), lambda: build_module('unet', tmp_path, 'unet')),
                            (dict(layers_per_block=10**6), lambda: empty_model('unet', tmp_path))):
        (tmp_path / 'unet' / 'config.json').write_text(json.dumps({**unet, **settings}))
        with pytest.raises(UserError, match='asks for a much larger model than can be built'):
            build()


def test_real_configs_pass() -> None:
    """SDXL's own, and what old ones have: null for False, whole floats, lists for one number."""
    import diffusers
    for name in ('unet', 'vae'):
        config = json.loads((SDXL_FILES / name / 'config.json').read_text())
        check_types(CLASSES[name], config, name)
    check_types(UNet2DConditionModel, dict(
        class_embeddings_concat=None, attention_head_dim=[5, 10, 20], upcast_attention=None, sample_size=[64, 64],
        transformer_layers_per_block=[1, 2, 10], reverse_transformer_layers_per_block=[[1], [2]], norm_eps=1,
        mid_block_scale_factor=1, freq_shift=0.0, block_out_channels=(320, 640), mid_block_type=None,
        only_cross_attention=False, _class_name='x', unheard_of={'a': 1}), 'unet')
    for name in ('EulerDiscreteScheduler', 'DPMSolverMultistepScheduler', 'DDIMScheduler', 'LCMScheduler'):
        cls = getattr(diffusers, name)
        check_scheduler({**cls().config, '_class_name': name}, name)
    check_scheduler({'lambda_min_clipped': -float('inf'), '_class_name': 'DPMSolverMultistepScheduler'}, 's')


@pytest.mark.parametrize('settings', [
    dict(num_train_timesteps=10**9), dict(num_train_timesteps=0), dict(num_train_timesteps='1000'),
    dict(beta_start=[0.1]), dict(prediction_type=None), dict(trained_betas='x'), dict(steps_offset=1.5)], ids=str)
def test_schedulers(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny_base / 'scheduler', tmp_path / 'scheduler'))
    path = folder / 'scheduler_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UserError, match=f"scheduler' has {next(iter(settings))}="):
        loading._scheduler_config(tmp_path, str(tmp_path))


def test_values_of_components(folders: Path, tmp_path: Path) -> None:
    """NaN in one tensor, quantized ones; positions of old text encoders are whole numbers and fine."""
    for name, key, value, words in (
            ('unet', 'conv_in.bias', float('nan'), '1 tensors hold NaN or infinite .*conv_in.bias'),
            ('vae', 'encoder.conv_in.bias', float('inf'), 'NaN or infinite'),
            ('unet', 'conv_in.bias', None, '1 of int8')):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        folder = edited(folders, tmp_path, name)
        path = folder / 'diffusion_pytorch_model.safetensors'
        state = load_file(path)
        state[key] = state[key].to(torch.int8) if value is None else torch.full_like(state[key], value)
        save_file(state, path, metadata={'format': 'pt'})
        with pytest.raises(UserError, match=words):
            load_pretrained(CLASSES[name], str(folder))
    folder = edited(folders, tmp_path, 'text_encoder')
    state = load_file(folder / 'model.safetensors')
    prefix = next(iter(state)).partition('embeddings')[0]
    save_file(state | {f'{prefix}embeddings.position_ids': torch.arange(77)[None]}, folder / 'model.safetensors',
              metadata={'format': 'pt'})
    load_pretrained(CLIPTextModel, str(folder))


def test_other_files_of_settings(folders: Path, tiny_base: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Not JSON, nested, too large, a folder; of models, of tokenizers, and indexes of shards."""
    folder = edited(folders, tmp_path, 'vae')
    for text in ('{', '[1]', '[' * 10**5, 'null', '{"in_channels": NaN}'):
        (folder / 'config.json').write_text(text)
        with pytest.raises(UserError, match='vae'):
            load_pretrained(AutoencoderKL, str(folder))
    weights = folder / 'diffusion_pytorch_model.safetensors'
    weights.rename(folder / 'diffusion_pytorch_model-00001-of-00002.safetensors')
    for index in ('{}', '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": ["b"]}}'):
        (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(index)
        with pytest.raises(UserError, match='vae'):
            load_pretrained(AutoencoderKL, str(folder))
    monkeypatch.setattr('diffengine_sdxl.limits.CURRENT.json_bytes', 1000)
    with pytest.raises(UserError, match=r'tokenizer/.* bytes; settings of up to 1,000'):
        loading._load_tokenizer('tokenizer', tiny_base, 'x')


@pytest.mark.parametrize(('settings', 'words'), [
    (dict(model_max_length='x'), "model_max_length='x'"), (dict(model_max_length=10**9), 'reads 3 to 77 tokens'),
    (dict(model_max_length=0), 'model_max_length=0'), (dict(pad_token=5), 'could not be loaded')], ids=str)
def test_tokenizers(tiny_base: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """What would fill memory with padding, or fail in the first prompt; and a damaged vocabulary."""
    folder = tmp_path / 'base'
    for name in ('tokenizer', 'tokenizer_2'):
        shutil.copytree(tiny_base / name, folder / name)
    path = folder / 'tokenizer' / 'tokenizer_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UserError, match=words):
        SDXL(pretrained=str(tiny_base), tokenizer=str(folder))
    tokenizer = folder / 'tokenizer' / 'tokenizer.json'
    content = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps({**content, 'model': {**content['model'], 'vocab': {'a': 'b'}}}))
    with pytest.raises(UserError, match='could not be loaded'):
        loading._load_tokenizer('tokenizer', folder, 'x')


def test_a_checkpoint_with_a_nan(tmp_path: Path) -> None:
    """What a test or an inference would load."""
    meta = dict(step=1, position=0, seed=0, samples_per_iter=1, identity={})
    torch.save({'meta': meta, 'state_dict': {'style.x': torch.tensor([float('nan')])}}, tmp_path / 'step1.pth')
    with pytest.raises(UserError, match=r'infinite numbers \(style.x\)'):
        load_trained(None, str(tmp_path / 'step1.pth'))  # type: ignore[arg-type]
