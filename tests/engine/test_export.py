"""What a run leaves for others: the adapter in diffusers' format, a fine-tuned base, and where they come from."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from mmengine.config import Config
from runs import assert_same_run, build, train, weights
from safetensors import safe_open

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.engine import export
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.add_adapters import use_caption_chunks
from diffengine_sdxl.registry import ADAPTERS


def test_the_manifest(tmp_path: Path, tiny: dict[str, Any], circles: Path, tiny_base: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, data set, resolved config, versions, seed, command, git commit and step; the card is written from it."""
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(sys, 'argv', ['/bin/diffengine-sdxl', 'train', 'tiny.py', '--local-rank=0', '--cfg-options',
                                      'a=b', 'visualizer.vis_backends.1.init_kwargs.entity=alice'])
    train(tmp_path / 'run', {**tiny, 'randomness.seed': 11, 'train_cfg.max_iters': 2})
    held = json.loads((tmp_path / 'run' / 'step2' / 'manifest.json').read_text())
    assert (held['step'], held['seed'], held['ema'], held['contents']) == (2, 11, False, ['adapter'])
    assert held['base'] == {'pretrained': str(tiny_base), 'unet': None, 'vae': None, 'revision': None, 'variant': None}
    assert held['dataset']['source'] == str(circles) and held['dataset']['transforms'][0]['size'] == 32
    assert (held['rows'], held['hub'], held['command']) == (
        16, [], 'diffengine-sdxl train tiny.py --cfg-options a=b')
    card = (tmp_path / 'run' / 'step2' / 'README.md').read_text()
    assert all(text in card for text in (
        '# run adapter, step 2\n', f'A T2I-Adapter for `{tiny_base.name}`', "T2IAdapter.from_pretrained('step2', sub",
        '| steps | `2 of 2, 0.25 epochs` |', '\ndiffengine-sdxl train tiny.py --cfg-options a=b\n', '| rows | 16 |'))
    assert str(tiny_base.parent) not in card and str(circles.parent) not in card
    assert held['config']['model']['adapters']['adapter']['type'] == 'T2IAdapter' and '$' not in str(held['config'])
    assert held['versions']['torch'] == torch.__version__
    assert {'diffusers', 'transformers', 'mmengine', 'diffengine_sdxl'} <= held['versions'].keys()
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    assert held['git_commit'].removesuffix('-dirty') == commit if commit else held['git_commit'] is None
    monkeypatch.chdir(tmp_path)
    assert export.git_commit() is None


def test_the_headers_of_its_files(tmp_path: Path, tiny: dict[str, Any], tiny_base: Path) -> None:
    """What a user says of it, and without that title, date, base, size; the base's own files have them too.

    And the chunks that captions were read in, which inference takes from there unless its config says otherwise.
    """
    adapters = dict(_delete_=True, word=dict(type='TextualInversion', token='red', init='blue'))
    train(tmp_path / 'cats', {**tiny, 'model.adapters': adapters, 'model.trainable': ['unet'], 'train_cfg.max_iters': 1,
                              'model.caption_chunks': 2,
                              'default_hooks.checkpoint.metadata': dict(license='CC0-1.0', author='me')})
    headers = []
    for name in ('word/learned_embeds.safetensors', 'pipeline/unet/diffusion_pytorch_model.safetensors'):
        with safe_open(tmp_path / 'cats' / 'step1' / name, framework='pt') as file:
            headers.append(file.metadata())
    assert [h['modelspec.title'] for h in headers] == ['cats word, step 1', 'cats, step 1']
    assert [h['modelspec.architecture'].removeprefix('stable-diffusion-xl-v1-base') for h in headers] == [
        '/textual-inversion', '']
    assert headers[0]['modelspec.trigger_phrase'] == 'red' and 'modelspec.trigger_phrase' not in headers[1]
    for header in headers:
        assert header['modelspec.license'] == 'CC0-1.0' and header['modelspec.author'] == 'me'
        assert header['modelspec.resolution'] == '32x32' and header['modelspec.date'].endswith('Z')
        assert header['ss_new_sd_model_hash'] == hashlib.sha256(
            (tiny_base / 'unet' / 'diffusion_pytorch_model.safetensors').read_bytes()).hexdigest()
    step = tmp_path / 'cats' / 'step1'
    for model, loaded in ((dict(adapters=dict(a=dict(weights=str(step), subfolder='word'), b=None)), None),
                          (dict(pretrained=str(step / 'pipeline')), None), ({}, step.with_suffix('.pth')), ({}, step),
                          (dict(unet=str(step / 'pipeline/unet/diffusion_pytorch_model.safetensors')), None)):
        for own, expected in (({}, 2), (dict(caption_chunks=3), 3), (dict(pretrained=str(tiny_base)), 2)):
            cfg = Config(dict(model={**own, **model}))
            use_caption_chunks(cfg, loaded)
            assert cfg.model.caption_chunks == expected
    for model in (dict(pretrained=str(tiny_base)), dict(pretrained='a/b'), dict(adapters=dict(a=dict(
            weights=str(step / 'word'), subfolder='../pipeline')))):
        use_caption_chunks(cfg := Config(dict(model=model)), None)
        assert 'caption_chunks' not in cfg.model
    with pytest.raises(UserError, match="checkpoint.metadata.licence: .*Did you mean 'license'"):
        build(tmp_path / 'other', {**tiny, 'default_hooks.checkpoint.metadata': dict(licence='CC0-1.0')})


def test_the_adapter_in_stock_diffusers(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """`T2IAdapter.from_pretrained(step4, subfolder='adapter')` gives the features that ours gives, bitwise."""
    from diffusers import T2IAdapter
    runner = train(tmp_path, tiny)
    stock = T2IAdapter.from_pretrained(str(tmp_path / 'step4'), subfolder='adapter')
    image = torch.rand(2, 3, 64, 48)
    ours = runner.model.adapters['adapter'].project({'image': image})
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(stock(image), ours.values(), strict=True))


def test_an_export_that_does_not_come_back_is_none(tmp_path: Path, tiny: dict[str, Any],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read again and compared; where it differs nothing is left under its name."""
    runner = build(tmp_path, tiny)
    adapter = runner.model.adapters['adapter']
    honest = type(adapter).save

    def forgetful(self: Any, folder: Path) -> None:
        honest(self, folder)
        from safetensors.torch import load_file, save_file
        path = Path(folder) / 'diffusion_pytorch_model.safetensors'
        state = load_file(path)
        state['adapter.conv_in.bias'] = state['adapter.conv_in.bias'] + 1
        save_file(state, path)
    monkeypatch.setattr(type(adapter), 'save', forgetful)
    with pytest.raises(UserError, match='conv_in.bias'):
        runner.train()
    assert not list(tmp_path.glob('step*')) and not list(tmp_path.glob('.*'))


def test_only_what_trains_is_exported(tmp_path: Path, tiny: dict[str, Any]) -> None:
    train(tmp_path, {**tiny, 'model.adapters.frozen': dict(type='T2IAdapter', trainable=False)})
    assert sorted(p.name for p in (tmp_path / 'step4').iterdir()) == ['README.md', 'adapter', 'manifest.json']
    assert not any('frozen' in key for key in weights(tmp_path, 4))


def full(tiny: dict[str, Any]) -> dict[str, Any]:
    """A fine-tune of the UNet itself."""
    return {**tiny, 'model.adapters.adapter': None, 'model.trainable': ['unet'],
            'train_dataloader.dataset.conditioning_image_column': None}


def test_a_full_fine_tune(tmp_path: Path, tiny: dict[str, Any], tiny_base: Path) -> None:
    """Trains, checkpoints, resumes bitwise, and exports a folder that the stock pipeline loads: equal pictures."""
    from diffusers import StableDiffusionXLPipeline
    options = {**full(tiny), 'optim_wrapper.optimizer.lr': 1e-3}
    runner = train(tmp_path / 'whole', options)
    train(tmp_path / 'cut', options, die_at=3)
    train(tmp_path / 'cut', options, resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut', 4)
    assert {key.partition('.')[0] for key in weights(tmp_path / 'cut', 4)} == {'unet'}
    folder = tmp_path / 'whole' / 'step4' / 'pipeline'
    stock = StableDiffusionXLPipeline.from_pretrained(str(folder))
    stock.set_progress_bar_config(disable=True)
    stock.unet.requires_grad_(False)  # as sampling does; see parity.stock
    base = StableDiffusionXLPipeline.from_pretrained(str(tiny_base))
    trained = dict(stock.unet.named_parameters())
    assert all(torch.equal(trained[k.removeprefix('unet.')], v) for k, v in weights(tmp_path / 'whole', 4).items())
    assert any(not torch.equal(v, trained[k]) for k, v in base.unet.named_parameters())
    assert all(torch.equal(v, dict(stock.vae.named_parameters())[k]) for k, v in base.vae.named_parameters())
    from diffengine_sdxl.models.request_batch import request_batch
    from diffengine_sdxl.request import Request
    runner.model.eval()
    ours = runner.model.sampler(runner.model, request_batch(
        runner.model, [Request(prompt='a red circle', seed=3)], (64, 64)))
    theirs = stock('a red circle', height=64, width=64, num_inference_steps=2, guidance_scale=5.0,
                   generator=torch.Generator().manual_seed(3), output_type='latent').images
    assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / 'whole' / 'step4' / 'manifest.json').read_text())['contents'] == ['pipeline']


def test_a_fine_tune_of_the_text_encoders(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Every parameter that counts as trained gets a gradient; the first encoder's last layer is never read."""
    options = {**full(tiny), 'model.trainable': ['text_encoder', 'text_encoder_2'], 'train_cfg.max_iters': 1,
               'default_hooks.checkpoint.export': False}
    runner = train(tmp_path, options)
    state = torch.load(tmp_path / 'step1.pth', weights_only=True)
    assert len(state['optimizer']['state']) == len(state['state_dict'])
    assert not any(k.startswith('text_encoder.') and 'final_layer_norm' in k for k in state['state_dict'])
    assert [g['name'] for g in runner.optim_wrapper.param_groups] == ['text_encoder', 'text_encoder_2']


class InUNet(Adapter):
    """An adapter whose weight lives in the UNet, as a LoRA's; `honest` says whether it saves it as it is."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.honest = honest

    def attach(self, model: Any) -> None:
        model.unet.register_parameter('added', torch.nn.Parameter(torch.ones(3)))
        self.held = [model.unet.added]

    def trainables(self) -> list[torch.nn.Parameter]:
        return self.held

    def contribute(self, call: Any, tensors: Any) -> None:
        call.sample = call.sample * self.held[0].mean()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir()
        value = self.held[0].detach() * (1 if self.honest else 2)
        torch.save(value, Path(folder) / 'added.pt')

    def load(self, source: str | Path) -> None:
        self.held[0].data.copy_(torch.load(Path(source) / 'added.pt', weights_only=True))


@pytest.mark.parametrize('honest', [True, False])
def test_weights_that_live_in_the_unet(honest: bool, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """They are the adapter's beside a UNet that trains too, and an export of them is compared as any other."""
    if 'InUNet' not in ADAPTERS.module_dict:
        ADAPTERS.register_module(module=InUNet)
    runner = build(tmp_path, {**tiny, 'model.trainable': ['unet'], 'train_cfg.max_iters': 1,
                              'model.adapters.inside': dict(type='InUNet', honest=honest)})
    owned = runner.model.trainables()
    assert [n for n, _ in owned['inside']] == ['unet.added'] and 'unet.added' not in dict(owned['unet'])
    if honest:
        value = runner.model.unet.added
        with torch.no_grad():
            value.fill_(2.0)
        runner.model.adapters['inside'].save(tmp_path / 'inside')
        export._check_adapter(runner.model.adapters['inside'], owned['inside'], tmp_path / 'inside')
        assert torch.equal(value, torch.full((3,), 2.0))
    else:
        with pytest.raises(UserError, match='unet.added'):
            runner.train()


def test_a_finetuned_base_beside_a_lora_is_a_plain_folder(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Layers that a LoRA has wrapped are saved under their own names, and stock's pictures without it are ours."""
    lora = dict(type='LoRA', rank=2, parts=['unet', 'text_encoder', 'text_encoder_2'])
    train(tmp_path, {**tiny, 'model.adapters': dict(_delete_=True, style=lora), 'model.trainable': ['unet']})
    plain = UNet2DConditionModel.from_pretrained(tmp_path / 'step4' / 'pipeline', subfolder='unet').state_dict()
    runner = build(tmp_path / 'again', {**tiny, 'model.adapters': dict(_delete_=True), 'model.trainable': ['unet'],
                                        'model.pretrained': str(tmp_path / 'step4' / 'pipeline')})
    own = runner.model.unet.state_dict()
    assert own.keys() == plain.keys() and all(torch.equal(own[k], plain[k]) for k in own)
    assert (tmp_path / 'step4' / 'style' / 'pytorch_lora_weights.safetensors').is_file()
