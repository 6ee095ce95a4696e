"""A run of every kind of adapter: trained, exported, killed and resumed bitwise; alone and beside others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import assert_same_run, build, train, weights
from kinds import CASES, ENCODER

from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.testing import write_tiny_image_encoder

TRANSFORMS = [
    dict(type='ImagePrompt', source='img', key='reference', size=64),
    dict(type='Resize', size='$resolution'), dict(type='Crop', size='$resolution', mode='random'),
    dict(type='JointDrop', adapters=[], image=0.2, text=0.2, both=0.2), dict(type='ComputeTimeIds'),
    dict(type='PackInputs')]


def options(tiny: dict[str, Any], adapters: dict[str, Any], encoder: Path, dropped: list[str]) -> dict[str, Any]:
    """The tiny run with these adapters, the image as its own prompt, and joint drops of those that are named."""
    configs = {name: {k: str(encoder) if v == ENCODER else v for k, v in config.items()}
               for name, config in adapters.items()}
    transforms = [{**t, 'adapters': dropped} if t['type'] == 'JointDrop' else t for t in TRANSFORMS
                  if dropped or t['type'] != 'JointDrop']
    return {**tiny, 'model.adapters': dict(_delete_=True, **configs), 'train_cfg.max_iters': 4,
            'train_dataloader.dataset.transforms': transforms, 'optim_wrapper.accumulative_counts': 2,
            'optim_wrapper.optimizer.lr': 1e-2}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_encoder(tmp_path_factory.mktemp('encoder') / 'image_encoder')


def check(folder: Path, given: dict[str, Any]) -> None:
    """Whole, and cut off after step 3 with its last checkpoint at 2: bitwise the same at 4."""
    train(folder / 'whole', given)
    train(folder / 'cut', given, die_at=3)
    assert checkpoint.latest(folder / 'cut') == folder / 'cut' / 'step2.pth'
    train(folder / 'cut', given, resume=True)
    assert_same_run(folder / 'whole', folder / 'cut', 4)


@pytest.mark.parametrize('kind', CASES)
def test_every_kind_resumes_bitwise(tmp_path: Path, tiny: dict[str, Any], encoder: Path, kind: str) -> None:
    """With dropout where a kind has it; all that trains has moved, and the export reads back."""
    config = dict(CASES[kind].config)
    if kind in ('lora', 'dora', 'loha', 'lokr'):
        config['dropout'] = 0.3
    given = options(tiny, dict(a=config), encoder, ['a'] if config.get('reads') else [])
    check(tmp_path, given)
    state, before = weights(tmp_path / 'whole', 4), weights(tmp_path / 'whole', 2)
    assert state and not any(torch.equal(state[k], before[k]) for k in state)
    loaded = build(tmp_path / 'loaded', {**given, 'load_from': str(tmp_path / 'whole' / 'step4')})
    loaded.load_or_resume()
    assert all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())


def test_several_train_together(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    """A LoRA and a T2I-Adapter, each at its own learning rate, and the LoRA's mid block at another."""
    adapters = dict(style=CASES['lora'].config, control=CASES['t2i_adapter'].config)
    given = {**options(tiny, adapters, encoder, []),
             'optim_wrapper.paramwise_cfg': dict(lr={'style': 1e-3, 'style.unet.mid_block': 1e-4})}
    check(tmp_path, given)
    groups = torch.load(tmp_path / 'whole' / 'step4.pth')['optimizer']['param_groups']
    assert {g['name']: g['lr'] for g in groups} == {'style': 1e-3, 'style.unet.mid_block': 1e-4, 'control': 1e-2}
    manifest = json.loads((tmp_path / 'whole' / 'step4' / 'manifest.json').read_text())
    assert sorted(manifest['contents']) == ['control', 'style']


@pytest.mark.parametrize('trained', ['lora', 'ip_adapter', 't2i_adapter', 'textual_inversion'])
def test_one_trains_while_others_are_frozen(tmp_path: Path, tiny: dict[str, Any], encoder: Path, trained: str) -> None:
    """The frozen ones act (another gradient), stay as they are, and are not exported."""
    kinds = ('lora', 'ip_adapter', 't2i_adapter', 'textual_inversion', 'controlnet')
    adapters = {kind: dict(CASES[kind].config, trainable=kind == trained) for kind in kinds}
    runner = train(tmp_path / 'run', options(tiny, adapters, encoder, []))
    assert set(runner.model.trainables()) == {trained}
    assert [p.name for p in (tmp_path / 'run' / 'step4').iterdir() if p.is_dir()] == [trained]
    frozen = {n: p for n, p in runner.model.named_parameters() if not p.requires_grad}
    fresh = build(tmp_path / 'fresh', options(tiny, adapters, encoder, [])).model
    assert all(torch.equal(p, dict(fresh.named_parameters())[n]) for n, p in frozen.items())


def test_drops_of_an_adapter_that_is_not_there(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    given = options(tiny, dict(a=CASES['lora'].config), encoder, ['ip'])
    with pytest.raises(ValueError, match="drop the input of 'ip', and the model has no such adapter; it has a"):
        train(tmp_path / 'run', given)


def test_pictures_while_an_ip_adapter_trains(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                                             encoder: Path) -> None:
    """Of prompts with a picture, and with two."""
    picture = str(circles / 'images' / '00000.png')
    for name, given in (('one', picture), ('two', [[picture, picture]])):
        train(tmp_path / name, {
            **options(tiny, dict(a=CASES['ip_adapter'].config), encoder, ['a']), 'default_hooks.samples': dict(
                type='SampleHook', interval=2, prompts=['a circle'], conditions=dict(a=given), num_images=1, size=32)})
        assert (tmp_path / name / 'samples' / 'step4.png').is_file()


@pytest.mark.parametrize(('config', 'word'), [
    (dict(scale=0.0), "'a' has scale=0, so it changes nothing"), (dict(parts='unet'), r"as parts=\['unet'\]"),
    (dict(targets='to_q'), r"as targets=\['to_q'\]"), (dict(targets=[]), 'targets=\\[\\]'), (dict(alpha=0), 'alpha=0'),
    (dict(blocks={'unet.mid_block': dict(scale='a')}), "scale='a'")])
def test_loras_that_cannot_train(tmp_path: Path, tiny: dict[str, Any], encoder: Path, config: dict[str, Any],
                                 word: str) -> None:
    given = options(tiny, dict(a={**CASES['lora'].config, **config}), encoder, [])
    with pytest.raises(ValueError, match=word):
        train(tmp_path / 'run', given)


def test_a_block_of_scale_0_does_not_train(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    config = {**CASES['lora'].config, 'blocks': {'unet.mid_block': dict(scale=0.0)}}
    runner = train(tmp_path / 'run', options(tiny, dict(a=config), encoder, []))
    names = [n for n, _ in runner.model.trainables()['a']]
    assert names and not [n for n in names if 'mid_block' in n]
