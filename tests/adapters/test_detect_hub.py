"""Adapters on the hub are recognized by what is loaded anyway; see test_detect.py. In a process that serves a hub."""

import json
import shutil
from pathlib import Path

import pytest
from hub import fetched, process, serve


@pytest.fixture(scope='module')
def work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """work/served/<name>/main: adapters as `save` writes them, an export, and h94/IP-Adapter's layout."""
    from kinds import CASES, build

    from diffengine_sdxl.testing import write_tiny_image_encoder
    work = tmp_path_factory.mktemp('hub')
    me = work / 'served'
    kinds = {'lora': 'lora/main', 't2i_adapter': 't2i/main', 'ip_adapter': 'ip/main/sdxl_models'}
    model = build(tiny_base, {kind: CASES[kind].config for kind in kinds})
    for kind, folder in kinds.items():
        model.adapters[kind].save(me / folder)
    whole = me / 'ip' / 'main'
    shutil.copy(whole / 'sdxl_models' / 'ip_adapter.safetensors', whole / 'sdxl_models' / 'other.safetensors')
    for name, projection in (('models', 24), ('sdxl_models', 40)):
        write_tiny_image_encoder(whole / name / 'image_encoder', projection=projection)
    export = me / 'export' / 'main'
    shutil.copytree(me / 'lora' / 'main', export / 'a')
    (export / 'manifest.json').write_text(json.dumps({
        'step': 1, 'contents': ['a'], 'ema': False,
        'config': {'model': {'adapters': {'a': {'type': 'LoRA', 'rank': 4, 'trainable': True}}}}}))
    return work


def on_hub(work: Path) -> None:
    """Of a model its config.json is downloaded and no weights; else the weights that the adapter loads."""
    server = serve(work)
    from diffengine_sdxl.adapters.formats.detect import adapter_settings
    assert adapter_settings('me/lora') == {'type': 'LoRA'}
    link = 'https://huggingface.co/me/t2i/blob/main/diffusion_pytorch_model.safetensors'
    assert adapter_settings('me/t2i') == adapter_settings(link) == {'type': 'T2IAdapter'}
    assert adapter_settings('me/export') == {'type': 'LoRA', 'rank': 4, 'subfolder': 'a'}
    assert adapter_settings('me/export', subfolder='a', revision='main') == {'type': 'LoRA', 'rank': 4}
    place = dict(subfolder='sdxl_models', weight_name='other.safetensors')
    ip, at_revision = adapter_settings('me/ip', **place), adapter_settings('me/ip', revision='main', **place)
    assert ip == {'type': 'IPAdapter', 'architecture': 'base', 'image_encoder': 'me/ip',
                  'image_encoder_subfolder': 'models/image_encoder'}
    log = server.take_log()
    assert fetched(log, 'me/lora') == ['pytorch_lora_weights.safetensors']
    assert fetched(log, 'me/t2i') == ['config.json'] and fetched(log, 'me/export') == ['manifest.json']
    assert fetched(log, 'me/ip') == ['models/image_encoder/config.json', 'sdxl_models/image_encoder/config.json',
                                     'sdxl_models/other.safetensors']
    import torch

    from diffengine_sdxl.adapters.frozen_image_encoder import encoder_inside, load_encoder
    assert at_revision['image_encoder'] == 'https://huggingface.co/me/ip/blob/main/models/image_encoder/config.json'
    assert encoder_inside('me/ip') == ('me/ip', 'models/image_encoder')
    for settings in (ip, at_revision):
        assert load_encoder(settings['image_encoder'], settings['image_encoder_subfolder'],
                            torch.float32).width(False) == 24


def test_on_the_hub(work: Path) -> None:
    process(on_hub, work)
