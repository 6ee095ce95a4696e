"""Train, export, kill and resume every kind of adapter, bitwise; alone and beside others."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, ENCODER
from runs import assert_same_run, build, train, weights

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.testing import write_tiny_image_encoder

TRANSFORMS = [
    dict(type='ImagePrompt', source='img', key='reference', size=64),
    dict(type='Resize', size='$resolution'), dict(type='Crop', size='$resolution', mode='random'),
    dict(type='JointDrop', adapters=[], image=0.2, text=0.2, both=0.2), dict(type='ComputeTimeIds'),
    dict(type='PackInputs')]


def options(tiny: dict[str, Any], adapters: dict[str, Any], encoder: Path, dropped: list[str]) -> dict[str, Any]:
    """Return options of a run with these adapters, each image as its own image prompt, and joint drops of `dropped`."""
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


def check_resume(folder: Path, config: dict[str, Any]) -> None:
    """Check that a run equals one that dies after step 3, with its last checkpoint at 2, and is resumed: bitwise."""
    train(folder / 'whole', config)
    train(folder / 'cut', config, die_at=3)
    assert checkpoint.latest(folder / 'cut') == folder / 'cut' / 'step2.pth'
    train(folder / 'cut', config, resume=True)
    assert_same_run(folder / 'whole', folder / 'cut', 4)


@pytest.fixture
def after_deterministic() -> Iterator[None]:
    """Allow all kernels again when the test has ended."""
    yield
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert 'CUBLAS_WORKSPACE_CONFIG' in os.environ and not torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize('kind', CASES)
def test_every_kind_resumes_bitwise(tmp_path: Path, tiny: dict[str, Any], encoder: Path, kind: str,
                                    after_deterministic: None) -> None:
    """With dropout where a kind has it; every trained weight has moved, and the export reads back.

    With `deterministic`, so that torch refuses a kernel of ours that is not, as far as a CPU has such.
    """
    config = dict(CASES[kind].config)
    if kind in ('lora', 'dora', 'loha', 'lokr'):
        config['dropout'] = 0.3
    run = options(tiny, dict(a=config), encoder, ['a'] if config.get('condition_key') else [])
    run['randomness.deterministic'] = True
    check_resume(tmp_path, run)
    state, before = weights(tmp_path / 'whole', 4), weights(tmp_path / 'whole', 2)
    assert state and not any(torch.equal(state[k], before[k]) for k in state)
    loaded = build(tmp_path / 'loaded', {**run, 'load_from': str(tmp_path / 'whole' / 'step4')})
    loaded.load_or_resume()
    assert all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())


def test_several_train_together(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    """A LoRA and a T2I-Adapter, each at its own learning rate, and the LoRA's mid block at another."""
    adapters = dict(style=CASES['lora'].config, control=CASES['t2i_adapter'].config)
    check_resume(tmp_path, {**options(tiny, adapters, encoder, []), 'optim_wrapper.paramwise_cfg': dict(
        lr={'style': 1e-3, 'style.unet.mid_block': 1e-4})})
    groups = torch.load(tmp_path / 'whole' / 'step4.pth')['optimizer']['param_groups']
    assert {g['name']: g['lr'] for g in groups} == {'style': 1e-3, 'style.unet.mid_block': 1e-4, 'control': 1e-2}
    manifest = json.loads((tmp_path / 'whole' / 'step4' / 'manifest.json').read_text())
    assert sorted(manifest['contents']) == ['control', 'style']


KINDS = ('lora', 'ip_adapter', 't2i_adapter', 'textual_inversion', 'controlnet')


@pytest.fixture(scope='module')
def fresh_weights(tiny_options: dict[str, Any], encoder: Path, tmp_path_factory: pytest.TempPathFactory
                  ) -> dict[str, torch.Tensor]:
    """Weights of an untrained model with all of KINDS."""
    adapters = {kind: CASES[kind].config for kind in KINDS}
    model = build(tmp_path_factory.mktemp('fresh'), options(tiny_options, adapters, encoder, [])).model
    return dict(model.named_parameters())


@pytest.mark.parametrize('trained', ['lora', 'ip_adapter', 't2i_adapter', 'textual_inversion'])
def test_one_trains_while_others_are_frozen(tmp_path: Path, tiny: dict[str, Any], encoder: Path, trained: str,
                                            fresh_weights: dict[str, torch.Tensor]) -> None:
    """The frozen ones keep their weights and are not exported."""
    adapters = {kind: dict(CASES[kind].config, trainable=kind == trained) for kind in KINDS}
    runner = train(tmp_path, {**options(tiny, adapters, encoder, []), 'train_cfg.max_iters': 1,
                              'default_hooks.checkpoint.interval': 1})
    assert set(runner.model.trainables()) == {trained}
    assert [p.name for p in (tmp_path / 'step1').iterdir() if p.is_dir()] == [trained]
    for name, parameter in runner.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, fresh_weights[name]), name


def test_drops_of_an_unknown_adapter(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    config = options(tiny, dict(a=CASES['lora'].config), encoder, ['ip'])
    with pytest.raises(UserError, match="drop the input of 'ip', which is not an adapter of the model; it has a"):
        train(tmp_path / 'run', config)


def test_samples_while_an_ip_adapter_trains(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                                            encoder: Path) -> None:
    """Of prompts with one image, and with two."""
    image = str(circles / 'images' / '00000.png')
    for name, images in (('one', image), ('two', [[image, image]])):
        train(tmp_path / name, {
            **options(tiny, dict(a=CASES['ip_adapter'].config), encoder, ['a']), 'train_cfg.max_iters': 1,
            'default_hooks.samples': dict(type='SampleHook', interval=1, prompts=['a circle'],
                                          conditions=dict(a=images), num_images=1, size=32)})
        assert (tmp_path / name / 'samples' / 'step1.png').is_file()


@pytest.mark.parametrize(('config', 'word'), [
    (dict(scale=0.0), "'a' has scale=0, so it changes nothing"), (dict(parts='unet'), r"as parts=\['unet'\]"),
    (dict(targets='to_q'), r"as targets=\['to_q'\]"), (dict(targets=[]), 'targets=\\[\\]'), (dict(alpha=0), 'alpha=0'),
    (dict(blocks={'unet.mid_block': dict(scale='a')}), "scale='a'")])
def test_loras_that_cannot_train(tmp_path: Path, tiny: dict[str, Any], encoder: Path, config: dict[str, Any],
                                 word: str) -> None:
    with pytest.raises(UserError, match=word):
        train(tmp_path / 'run', options(tiny, dict(a={**CASES['lora'].config, **config}), encoder, []))


def test_a_block_of_scale_0_does_not_train(tmp_path: Path, tiny: dict[str, Any], encoder: Path) -> None:
    config = {**CASES['lora'].config, 'blocks': {'unet.mid_block': dict(scale=0.0)}}
    runner = build(tmp_path / 'run', options(tiny, dict(a=config), encoder, []))
    names = [n for n, _ in runner.model.trainables()['a']]
    assert names and not [n for n in names if 'mid_block' in n]
