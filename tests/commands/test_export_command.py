"""tools/export.py: every kind in every format it takes, from any checkpoint; whole and compared, or not at all."""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import stock
from runs import plain_arguments, train
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from diffengine_sdxl import config
from diffengine_sdxl.commands import export as convert
from diffengine_sdxl.errors import UserError, run_command
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_image_encoder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'tiny_t2i_adapter'
LORA = dict(type='LoRA', rank=4, alpha=8.0, parts=['unet', 'text_encoder', 'text_encoder_2'],
            targets=['to_q', 'attn2.to_v', 'q_proj', 'out_proj', 'conv1', 'conv_shortcut'],
            blocks={'unet.mid_block': dict(rank=2, alpha=3.0)})


def shaken(base: Path, folder: Path, **adapter: Any) -> Path:
    """The folder of an adapter whose weights are not the fresh ones."""
    model = SDXL(pretrained=str(base), adapters=dict(adapter=adapter), seed=3)
    with torch.no_grad():
        for parameter in model.adapters['adapter'].trainables():
            random = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    model.adapters['adapter'].save(folder)
    return folder


def configured(base: Path, adapter: dict[str, Any], **options: Any) -> Any:
    """The tiny config with another adapter."""
    loaded = config.load(CONFIG, {'model.pretrained': str(base)})
    loaded.model.adapters = {'adapter': adapter, **options}
    return loaded


def call(*arguments: str, **options: Any) -> int:
    """The exit code of the tool, without its process."""
    names = dict(zip(('config', 'out'), arguments, strict=True))
    return run_command('export', argparse.Namespace(
        **{
        **dict(checkpoint=None, adapter=None, format=None, dtype=None, cfg_options=None), **names,
        'out': Path(names['out']), **options}))


def run(config_: Any, out: Path, **options: Any) -> list[str]:
    """What `convert` says; nothing else may be left beside the file."""
    said = convert.convert(config_, out, **options)
    assert out.exists() and not list(out.parent.glob('.*'))
    return said


def loads(said: list[str], pipeline: Any) -> None:
    """Do what the last sentence says."""
    eval(said[-1].split('loads it: ')[-1].split('too: ')[-1].split(', the pipeline')[0].removesuffix('.'),
         {'pipeline': pipeline})


CONTROL = {'t2i': dict(type='T2IAdapter', condition_key='conditioning_image'), 'controlnet': dict(type='ControlNet')}
WORD = dict(type='TextualInversion', token='<thing>', num_vectors=2)


@pytest.mark.parametrize('kind', CONTROL)
def test_control_by_image(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """diffusers' folder, the same weights; scale and window of the config are no part of it; rounded if asked."""
    import diffusers
    weights = shaken(tiny_base, tmp_path / 'weights', **CONTROL[kind])
    config_ = configured(tiny_base, dict(CONTROL[kind], weights=str(weights), scale=0.0, active_range=(0.0, 0.3)))
    said = run(config_, tmp_path / 'a')
    assert "format 'diffusers'" in said[0] and 'bitwise' in said[1]
    assert f"from_pretrained('{tmp_path / 'a'}')" in said[-1]
    name = 'diffusion_pytorch_model.safetensors'
    before, after = load_file(weights / name), load_file(tmp_path / 'a' / name)
    assert before.keys() == after.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    assert f'{len(before)} tensors' in said[0]
    getattr(diffusers, {'t2i': 'T2IAdapter', 'controlnet': 'ControlNetModel'}[kind]).from_pretrained(tmp_path / 'a')
    said = run(config_, tmp_path / 'half', dtype='float16')
    assert said[1].startswith('Rounding to float16 changes its effect by') and 'bitwise' in said[2]
    assert {v.dtype for v in load_file(tmp_path / 'half' / name).values()} == {torch.float16}


@pytest.mark.parametrize('architecture', ['base', 'plus'])
def test_an_image_prompt(tiny_base: Path, tmp_path: Path, architecture: str) -> None:
    """Blocks that are off and a mask are no part of the file: all of it is compared, and stock loads it as we say."""
    encoder = write_tiny_image_encoder(tmp_path / 'encoder')
    settings = dict(type='IPAdapter', image_encoder=str(encoder), image_encoder_subfolder=None,
                    architecture=architecture)
    weights = shaken(tiny_base, tmp_path / 'weights', **settings)
    config_ = configured(tiny_base, dict(settings, weights=str(weights), mask='where', blocks={'up': 0.0}))
    said = run(config_, tmp_path / 'a')
    assert "format 'original'" in said[0] and 'the same' in said[1]
    pipeline = stock(tiny_base, image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder))
    loads(said, pipeline)
    assert pipeline.unet.encoder_hid_proj is not None
    assert 'bitwise' in run(config_, tmp_path / 'half', dtype='bfloat16', form='diffusers')[2]


def test_a_word(tiny_base: Path, tmp_path: Path) -> None:
    """The prompt that is compared has it."""
    weights = shaken(tiny_base, tmp_path / 'weights', **WORD)
    said = run(configured(tiny_base, dict(WORD, weights=str(weights))), tmp_path / 'a', form='original')
    assert 'bitwise' in said[1] and 'two calls' in said[-1]
    assert set(load_file(tmp_path / 'a' / 'learned_embeds.safetensors')) == {'clip_l', 'clip_g'}


LORAS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    'lora': (LORA, {'diffusers': 'diffusers loads it', 'peft': 'PeftModel', 'kohya': 'one alpha'}),
    'encoder': (dict(type='LoRA', rank=4, parts=['text_encoder'], targets=['q_proj']), {'kohya': 'only if'}),
    'rslora': (dict(LORA, rslora=True, blocks=None), {'diffusers': 'loads it', 'kohya': 'loads it too', 'peft': ''}),
    'dora': (dict(type='LoRA', kind='dora', rank=4), {'diffusers': 'loads it', 'kohya': 'drops the magnitudes'}),
    'dora of an encoder': (dict(LORA, kind='dora'), {'peft': 'PeftModel', 'kohya': 'dora_scale'}),
    'lokr': (dict(LORA, kind='lokr'), {'peft': 'PeftModel', 'kohya': 'not support LoKr'}),
    'oft': (dict(type='LoRA', kind='oft', rank=4), {'peft': 'PeftModel'})}


@pytest.mark.parametrize('kind', LORAS)
def test_a_lora(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Every format that a kind takes, the first by itself; and the others are refused in words."""
    settings, readers = LORAS[kind]
    weights = shaken(tiny_base, tmp_path / 'weights', **settings)
    config_ = configured(tiny_base, dict(type='LoRA', weights=str(weights), scale=0.0))
    for form, said in readers.items():
        out = tmp_path / (f'{form}.safetensors' if form == 'kohya' else form)
        lines = run(config_, out, form=form if form != next(iter(readers)) or form == 'kohya' else None)
        assert f"format '{form}'" in lines[0] and 'the same' in lines[1] and said in lines[-1]
        assert 'bitwise' in lines[1] or kind == 'rslora' and form == 'kohya'
        if 'pipeline.load' in lines[-1]:
            pipeline = stock(tiny_base)
            loads(lines, pipeline)
            assert pipeline.get_active_adapters()
    for form in {'diffusers', 'kohya', 'original'} - readers.keys() - ({'diffusers'} if kind == 'encoder' else set()):
        with pytest.raises(UserError, match="choose (of )?'"):
            convert.convert(config_, tmp_path / 'no.safetensors', form=form)
    if kind in ('lora', 'lokr'):
        with pytest.raises(UserError, match="must end in .safetensors: the format 'kohya' is one file"):
            convert.convert(config_, tmp_path / 'no', form='kohya')
        lines = run(config_, tmp_path / 'half.safetensors', form='kohya', dtype='bfloat16')
        assert float(lines[1].split(' by ')[1].split()[0]) < 0.1
        assert {v.dtype for k, v in load_file(tmp_path / 'half.safetensors').items() if 'alpha' not in k} == {
            torch.bfloat16}


def test_a_lora_of_a_checkpoint_beside_others(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Trained together with another kind around the same layers: each comes out alone."""
    options = {**tiny, 'model.adapters.adapter': None,
               'model.adapters.style': dict(LORA, blocks={'unet.mid_block': dict(rank=2, scale=0.5)}),
               'model.adapters.other': dict(type='LoRA', kind='loha', rank=2), 'train_cfg.max_iters': 2,
               'model.partners': dict(other=dict(prob=0.5))}
    train(tmp_path / 'W', options)
    for i, way in enumerate(('step2.pth', 'step2')):
        out = tmp_path / f'{i}.safetensors'
        run(config.load(CONFIG, options), out, checkpoint=str(tmp_path / 'W' / way), name='style', form='kohya')
        assert all(torch.equal(v, load_file(tmp_path / '0.safetensors')[k]) for k, v in load_file(out).items())
    run(config.load(CONFIG, options), tmp_path / 'other', checkpoint=str(tmp_path / 'W'), name='other')


def test_every_way_to_name_a_checkpoint(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """A file (its averages), a work_dir, an export and an adapter's folder; one of two adapters; a trained base."""
    options = {**tiny, 'custom_hooks': [dict(type='EMAHook', decay=0.5)],
               'model.adapters.other': dict(type='T2IAdapter', condition_key='conditioning_image')}
    train(tmp_path / 'W', options)
    loaded = config.load(CONFIG, options)
    expected = {step: load_file(tmp_path / 'W' / step / 'adapter' / 'diffusion_pytorch_model.safetensors')
                for step in ('step2', 'step4')}
    ways = {'step2.pth': 'step2', 'step2': 'step2', 'step2/adapter': 'step2', '': 'step4'}
    for i, (way, step) in enumerate(ways.items()):
        run(loaded, tmp_path / f'a{i}', checkpoint=str(tmp_path / 'W' / way), name='adapter')
        found = load_file(tmp_path / f'a{i}' / 'diffusion_pytorch_model.safetensors')
        assert all(torch.equal(v, expected[step][k]) for k, v in found.items()), way
    assert not torch.equal(expected['step2']['adapter.conv_in.weight'], expected['step4']['adapter.conv_in.weight'])
    options = {**tiny, 'model.trainable': ['unet'], 'train_cfg.max_iters': 2}
    train(tmp_path / 'B', options)
    assert 'bitwise' in run(config.load(CONFIG, options), tmp_path / 'b', checkpoint=str(tmp_path / 'B' / 'step2'))[1]
    with pytest.raises(UserError, match=r"trained together with its base; name the folder '.*step2'"):
        convert.convert(config.load(CONFIG, options), tmp_path / 'c', checkpoint=str(tmp_path / 'B' / 'step2.pth'))


def test_what_does_not_come_back_is_not_kept(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that changes one weight a little: nothing is left under the name."""
    from diffengine_sdxl.adapters.t2i_adapter import T2IAdapter
    weights = shaken(tiny_base, tmp_path / 'weights', **CONTROL['t2i'])
    honest = T2IAdapter.save

    def forgetful(self: Any, folder: Path) -> None:
        with torch.no_grad():
            self.net.adapter.conv_in.bias[0] += 0.1
        honest(self, folder)
    monkeypatch.setattr(T2IAdapter, 'save', forgetful)
    with pytest.raises(RuntimeError, match="'.*/a' was not kept: loaded again"):
        convert.convert(configured(tiny_base, dict(CONTROL['t2i'], weights=str(weights))), tmp_path / 'a')
    assert [p.name for p in tmp_path.iterdir()] == ['weights']


def test_what_cannot_be_written_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """In a sentence; nothing is overwritten."""
    t2i = CONTROL['t2i']
    weights = str(shaken(tiny_base, tmp_path / 'weights', **t2i))
    for adapters, options, said in (
            (dict(adapter=dict(t2i)), {}, 'no `weights` in the config; name a --checkpoint'),
            (dict(adapter=dict(t2i, weights=weights)), dict(form='kohya'), "is written as 'diffusers', not as 'kohya'"),
            (dict(adapter=dict(t2i, weights=weights)), dict(checkpoint=str(tmp_path / 'no')), 'There is no checkpoint'),
            (dict(adapter=dict(t2i), b=dict(t2i)), {}, r'Name the adapter \(--adapter\). It has adapter, b.'),
            (dict(adapter=dict(t2i)), dict(name='adaptor'), "no adapter 'adaptor'.*adapter"),
            (dict(adapter=dict(type='ImageEncoder')), {}, 'does not change the denoiser'),
            (dict(adapter=None), {}, 'It has none')):
        with pytest.raises(UserError, match=said):
            convert.convert(configured(tiny_base, **{'adapter': None, **adapters}), tmp_path / 'a', **options)
    (tmp_path / 'kept').mkdir()
    with pytest.raises(UserError, match="'.*/kept' exists; name another"):
        convert.convert(configured(tiny_base, dict(t2i, weights=weights)), tmp_path / 'kept')
    fresh = SDXL(pretrained=str(tiny_base), adapters=dict(adapter=dict(type='ControlNet')))
    fresh.adapters['adapter'].save(tmp_path / 'fresh')
    with pytest.raises(UserError, match="does not change the denoiser's output"):
        convert.convert(configured(tiny_base, dict(type='ControlNet', weights=str(tmp_path / 'fresh'))), tmp_path / 'a')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fresh', 'kept', 'weights']


def test_the_tool(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes, a sentence on stderr, and help without heavy imports."""
    weights = shaken(tiny_base, tmp_path / 'weights', **CONTROL['t2i'])
    options = plain_arguments({'model.pretrained': tiny_base, 'model.adapters.adapter.weights': weights})
    assert call(CONFIG, str(tmp_path / 'a'), cfg_options=options) == 0
    assert 'bitwise' in capsys.readouterr().out
    assert call(CONFIG, str(tmp_path / 'a'), cfg_options=options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: '") and 'exists' in error and error.count('\n') == 1
    begin = time.monotonic()
    said = subprocess.run([sys.executable, ROOT / 'tools' / 'export.py', '-h'], capture_output=True, text=True,
                          check=True)
    assert '--format {diffusers,peft,kohya,original}' in ' '.join(said.stdout.split())
    assert time.monotonic() - begin < 2  # 0.1 s; the imports alone would be 4
