"""Validation and test: the images that metrics get, the report, and that training is not affected."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from PIL import Image
from runs import (
    Brightness,
    assert_same_run,
    build,
    command,
    curves,
    evaluation,
    numbers,
    train,
    weights,
    without_training,
)

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import collate
from diffengine_sdxl.engine import complete, report
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import labelled_grid, to_pil
from diffengine_sdxl.registry import HOOKS

EMA = {'custom_hooks': [dict(type='EMAHook', decay=0.5)]}


@pytest.fixture(autouse=True)
def reset_brightness() -> None:
    Brightness.received = []


@pytest.fixture
def validated(tiny: dict[str, Any], circles: Path) -> dict[str, Any]:
    """Four steps with a validation every two."""
    return {**tiny, **evaluation('val', circles), 'train_cfg.val_interval': 2}


def only_test(work_dir: Path, tiny: dict[str, Any], circles: Path, num: int = 5, **cfg: Any) -> Any:
    """A runner that has nothing but a test."""
    return build(work_dir, {**without_training(tiny), **evaluation('test', circles, num, **cfg)})


def eight_bits(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


# The images

def test_each_image_is_that_of_its_sample_and_seed(tmp_path: Path, tiny: dict[str, Any], circles: Path) -> None:
    """Rows of the loader's batch and dicts of the model go together; each is made once for each seed and image set."""
    runner = only_test(tmp_path, tiny, circles, seeds=[7, 3])
    found = runner.test()
    model, dataset = runner.model, runner.test_dataloader.dataset
    seen = []
    for data, samples in Brightness.received:
        assert len(data['key']) == len(samples) and data['img'].device.type == 'cpu'
        for key, text, sample in zip(data['key'], data['text'], samples, strict=True):
            assert (sample['key'], sample['prompt']) == (key, text) and list(sample['images']) == ['base', 'adapted']
            assert sample['noise_seed'] == rng.key_seed('evaluation', sample['seed'], key)
            seen.append((key, sample['seed']))
    # Five samples in batches of two; the last has one.
    assert seen == [('0', 7), ('1', 7), ('0', 3), ('1', 3), ('2', 7), ('3', 7), ('2', 3), ('3', 3), ('4', 7), ('4', 3)]
    data, samples = Brightness.received[3]
    batch = model.data_preprocessor(collate([dataset[2], dataset[3]]))['inputs']
    # Made again from what the table of images says, with which `infer --seed` starts too; in 8 bits.
    batch.seed = torch.tensor([int(row['noise_seed']) for row in report.read_samples(tmp_path / 'test/samples.csv')
                               if row['key'] in '23' and row['seed'] == '3' and row['image_set'] == 'base'])
    expected = model.decode(model.sampler(model, batch)).cpu()
    assert all(torch.equal(s['images']['adapted'], eight_bits(e)) for s, e in zip(samples, expected, strict=True))
    with model.disable_adapters():
        expected = model.decode(model.sampler(model, batch)).cpu()
    assert all(torch.equal(s['images']['base'], eight_bits(e)) for s, e in zip(samples, expected, strict=True))
    assert found['base']['brightness']['num_samples'] == found['adapted']['brightness']['num_samples'] == 10
    assert numbers(tmp_path / 'metrics.json') == found


def test_what_training_drops_stays(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """`Batch.drop` does nothing here."""
    only_test(tmp_path / 'a', tiny, circles, num=2).test()
    runner = only_test(tmp_path / 'b', tiny, circles, num=2)
    process = runner.model.data_preprocessor.forward

    def dropping(data: Any, training: bool = False) -> Any:
        made = process(data, training)
        made['inputs'].drop = {'text': torch.tensor([True, True]), 'adapter': torch.tensor([True, True])}
        return made
    monkeypatch.setattr(runner.model.data_preprocessor, 'forward', dropping)
    runner.test()
    assert (tmp_path / 'a' / 'metrics.json').read_text() == (tmp_path / 'b' / 'metrics.json').read_text()


@pytest.mark.parametrize(('cfg', 'made'), [
    ({}, ['base', 'adapted']), ({'image_sets': ['adapted', 'base']}, ['base', 'adapted']),
    ({'image_sets': ['base']}, ['base']), ({'image_sets': 'adapted'}, ['adapted'])])
def test_the_configured_image_sets(cfg: dict[str, Any], made: list[str], tmp_path: Path, tiny: dict[str, Any],
                                      circles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No others are made or written."""
    runner = only_test(tmp_path, tiny, circles, num=1, seeds=2, **cfg)
    calls = []
    sampler = runner.model.sampler
    monkeypatch.setattr(runner.model, 'sampler', lambda *args: calls.append(args) or sampler(*args))
    runner.test()
    assert list(numbers(tmp_path / 'metrics.json')) == made and len(calls) == 2 * len(made)
    assert sorted(p.name for p in (tmp_path / 'test/images').iterdir() if p.is_dir()) == sorted([*made, 'conditions'])


# Validation

def test_when_a_run_validates(tmp_path: Path, validated: dict[str, Any]) -> None:
    """At the interval and at the end; the model as it stands, nothing twice."""
    for interval, steps in ((2, [2, 3]), (None, [3]), (9, [3])):
        folder = tmp_path / str(interval)
        train(folder, {**validated, 'train_cfg.max_iters': 3, 'train_cfg.val_interval': interval})
        found = {p.name: numbers(p) for p in sorted((folder / 'val').glob('*.json'))}
        assert list(found) == [f'step{s}.json' for s in steps]
        assert all(list(n) == ['adapted'] and n['adapted']['brightness']['num_samples'] == 5 for n in found.values())
        assert not (folder / 'metrics.json').exists() and not list(folder.glob('.*'))


def test_a_validation_does_not_change_the_run(tmp_path: Path, tiny: dict[str, Any], validated: dict[str, Any]) -> None:
    """Checkpoints with and without are the same bitwise: weights, optimizer, averages, logged losses. With an EMA,
    workers, and a metric that draws random numbers."""
    common = {**EMA, 'train_dataloader.num_workers': 1}
    train(tmp_path / 'without', {**tiny, **common})
    train(tmp_path / 'with', {**validated, **common, 'train_cfg.val_interval': 1, 'val_dataloader.num_workers': 2,
                              'val_cfg.seeds': 2, 'val_cfg.image_sets': ['base', 'adapted']})
    assert_same_run(tmp_path / 'with', tmp_path / 'without', 4)
    assert len(list((tmp_path / 'with' / 'val').glob('*.json'))) == 4


def test_it_leaves_mode_and_random_state(tmp_path: Path, validated: dict[str, Any]) -> None:
    """The weights inside are the averages; outside, everything is what it was."""
    runner = train(tmp_path, {**validated, **EMA})
    runner.model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    held = {k: v.clone() for k, v in runner.model.state_dict().items()}
    Brightness.received = []
    inside = []
    hook = Hook()
    hook.before_val_iter = lambda run, **_: inside.append(  # type: ignore[method-assign, misc]
        (run.model.training, {k: v.clone() for k, v in run.model.state_dict().items()}))
    runner.register_hook(hook)
    runner.val_loop.run()
    modes = {name: module.training for name, module in runner.model.named_modules()}
    runner.model.train()
    assert modes == {name: module.training for name, module in runner.model.named_modules()}
    assert runner.model.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert all(torch.equal(v, held[k]) for k, v in runner.model.state_dict().items())
    mode, averages = inside[0]
    assert mode is False and len(inside) == 3
    assert all(torch.equal(v, runner.ema.weights[k]) for k, v in averages.items())
    assert any(not torch.equal(v, held[k]) for k, v in averages.items())


def test_stopped_and_resumed(tmp_path: Path, tiny: dict[str, Any], validated: dict[str, Any]) -> None:
    """A run that dies in its validation goes on as if nothing was, and makes up for the validation."""
    options = {**validated, **EMA, 'val_cfg.image_sets': ['base', 'adapted']}
    train(tmp_path / 'straight', options)

    class DieInside(Hook):
        def before_val_iter(self, run: Any, **_: Any) -> None:  # type: ignore[override]
            if run.iter == 2:
                raise KeyboardInterrupt
    HOOKS.register_module(name='DieInside', module=DieInside, force=True)
    broken = {**options, 'custom_hooks': [*EMA['custom_hooks'], dict(type='DieInside')]}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / 'stopped', broken)
    assert (tmp_path / 'stopped' / 'step2.pth').is_file() and not (tmp_path / 'stopped' / 'val').exists()
    train(tmp_path / 'stopped', options, resume=True)
    train(tmp_path / 'without', {**tiny, **EMA})
    assert_same_run(tmp_path / 'stopped', tmp_path / 'straight', 4)
    assert_same_run(tmp_path / 'stopped', tmp_path / 'without', 4)
    for step in (2, 4):
        one, other = (tmp_path / folder / 'val' / f'step{step}.json' for folder in ('stopped', 'straight'))
        assert one.read_bytes() == other.read_bytes()


def test_results_of_later_steps_are_removed(tmp_path: Path, validated: dict[str, Any]) -> None:
    train(tmp_path, validated)
    stale = [tmp_path / 'val' / f'step900.{suffix}' for suffix in ('json', 'samples.csv')]
    for path in stale:
        path.write_text('{}')
    (tmp_path / 'step4.pth').unlink()
    Brightness.received = []
    train(tmp_path, validated, resume=True)
    assert not any(path.exists() for path in stale)
    assert sorted(p.stem for p in (tmp_path / 'val').glob('*.json')) == ['step2', 'step4']
    # Step 2's was there; only step 4's was made.
    assert len(Brightness.received) == 3


@pytest.mark.usefixtures('with_curves_png')
def test_what_validations_leave(tmp_path: Path, validated: dict[str, Any]) -> None:
    """Scalars and pictures in the visualizer's backends, panels of the curves, curves.jsonl as ever."""
    train(tmp_path, {**validated, 'train_cfg.val_interval': 1})
    logged = [json.loads(line) for p in tmp_path.glob('*/vis_data/scalars.json') for line in p.read_text().splitlines()]
    found = {row['step']: row['val/adapted/brightness'] for row in logged if 'val/adapted/brightness' in row}
    assert found == {s: numbers(tmp_path / 'val' / f'step{s}.json')['adapted']['brightness']['value']
                     for s in (1, 2, 3, 4)}
    assert len(list(tmp_path.glob('*/vis_data/vis_image/val_pictures_*.png'))) == 4
    assert [list(row) for row in curves(tmp_path)] == [['step', 'loss', 'lr']] * 4
    with_panel = Image.open(tmp_path / 'curves.png').size
    (tmp_path / 'val' / 'step2.json').write_text('{')
    with pytest.raises(UserError, match='step2.json. is damaged'):
        report.read(tmp_path / 'val' / 'step2.json')
    train(tmp_path / 'without', {k: v for k, v in validated.items() if 'val_' not in k})
    assert with_panel[1] * 2 == Image.open(tmp_path / 'without' / 'curves.png').size[1] * 3


# The report

def test_the_contact_sheet(tmp_path: Path, tiny: dict[str, Any], circles: Path) -> None:
    """The first samples: prompts, condition, then base beside adapted for each seed."""
    runner = only_test(tmp_path, tiny, circles, num=5, seeds=2, num_pictures=3)
    runner.test()
    cells: dict[str, list[Any]] = {}
    for data, samples in Brightness.received:
        for i, sample in enumerate(samples):
            row = cells.setdefault(sample['prompt'], [to_pil(data['conditioning_image'][i].numpy())])
            row += [to_pil(image.numpy()) for image in sample['images'].values()]
    columns = ['conditioning_image', *(f'{v}, seed {s}' for s in (0, 1) for v in ('base', 'adapted'))]
    expected = labelled_grid(list(cells.items())[:3], columns, 'the weights of the config, 5 samples x 2 seeds')
    made = np.asarray(Image.open(tmp_path / 'test' / 'pictures.png').convert('RGB'))
    assert np.array_equal(made, np.asarray(expected))
    assert not list((tmp_path / 'test').glob('.*'))
    only_test(tmp_path / 'none', tiny, circles, num=1, num_pictures=0).test()
    assert not (tmp_path / 'none' / 'test' / 'pictures.png').exists()


def test_the_table(tmp_path: Path, tiny: dict[str, Any], circles: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner = only_test(tmp_path, tiny, circles, num=2)
    capfd.readouterr()
    found = runner.test()['adapted']['brightness']
    said = capfd.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    low, high = f'{found["low"]:.4f}', f'{found["high"]:.4f}'
    assert ['image_set', 'metric', 'value', '95', '%', 'interval', 'images'] in lines
    assert ['adapted', 'brightness', f'{found["value"]:.4f}', low, 'to', high, '2'] in lines
    assert 'The prefix is not set' not in said.out + said.err
    assert any('adapted    brightness' in p.read_text() for p in tmp_path.glob('*/*.log'))


def test_names_become_groups() -> None:
    """By image set, with or without a metric's prefix; intervals and counts go with their value."""
    flat = {'base/shape': 0.5, 'base/shape/low': 0.25, 'base/shape/high': 0.75, 'base/shape/num_samples': 8,
            'adapted/shape': np.float32(1), 'adapted/fill/red': torch.tensor(0.5), 'p/base/iou': math.nan,
            'p/base/iou/low': math.inf, 'speed': 3, 'base/words': 'many', 'base/list': [1, 2], 'low': 1.0,
            'base/x/low': 0.1, 'adapted - base/shape': 0.5, 'adapted - base/shape/p': 0.25,
            'adapted - base/shape/better': 1}
    found = report.group_by_image_set(flat, ('base', 'adapted', 'adapted - base'))
    alone = {'low': None, 'high': None, 'num_samples': None, 'p': None, 'better': None}
    assert found == {
        'base': {'shape': {**alone, 'value': 0.5, 'low': 0.25, 'high': 0.75, 'num_samples': 8},
                 'p/iou': {'value': None, **alone}, 'x/low': {'value': 0.1, **alone}},
        'adapted - base': {'shape': {**alone, 'value': 0.5, 'p': 0.25, 'better': 1}},
        'adapted': {'shape': {'value': 1.0, **alone}, 'fill/red': {'value': 0.5, **alone}},
        'all': {'speed': {'value': 3.0, **alone}, 'low': {'value': 1.0, **alone}}}
    assert type(found['base']['shape']['num_samples']) is int
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert report.group_by_image_set({'speed': 3}, ('base',)) == {'base': {'speed': {'value': 3.0, **alone}}}
    assert report.group_by_image_set({}, ('base', 'adapted')) == {'base': {}, 'adapted': {}}
    text = report.table(found)
    lines = [line.split() for line in text.splitlines()]
    assert ['base', 'shape', '0.5000', '0.2500', 'to', '0.7500', '8'] in lines and 'none' in text
    assert lines[0][-1] == 'p' and ['adapted', '-', 'base', 'shape', '0.5000', 'not', 'given', '?', '0.2500'] in lines
    assert 'p' not in report.table({'base': found['base']}).splitlines()[0].split()[-1:]


def test_a_custom_evaluator_and_one_metric_without_a_list(tmp_path: Path, tiny: dict[str, Any], circles: Path) -> None:
    for i, given in enumerate((dict(type='Brightness', name='own'), dict(metrics=[dict(type='Brightness', name='own')]),
                               dict(type='Evaluator', metrics=[dict(type='Brightness', name='own', prefix='p')]))):
        runner = only_test(tmp_path / str(i), {**tiny}, circles, num=1)
        runner._test_evaluator = given
        assert list(runner.test()['base']) == ['p/own' if i == 2 else 'own']


# Errors

@pytest.mark.parametrize(('option', 'words'), [
    ({'val_evaluator': None}, ['`val_dataloader`', 'no `val_evaluator`']),
    ({'val_dataloader': None}, ['val_interval is set', 'no `val_dataloader`']),
    ({'val_dataloader': None, 'train_cfg.val_interval': None}, ['`val_evaluator`', 'no `val_dataloader`']),
    ({'val_evaluator': []}, ['no `val_evaluator`']),
    ({'val_evaluator': [dict(type='Brightnes')]}, ['val_evaluator.0', "'Brightnes'", "Did you mean 'Brightness'"]),
    ({'val_evaluator': [dict(type='Brightness', nam='x')]}, ["no key 'nam'", "'name'"]),
    ({'val_evaluator': [dict(name='x')]}, ['val_evaluator.0 has no `type`']),
    ({'val_evaluator': 'Brightness'}, ["val_evaluator='Brightness'"]),
    ({'val_evaluator': dict(metrics=[dict(type='Brightnes')])}, ['val_evaluator.metrics.0', "'Brightnes'"]),
    ({'val_cfg.seed': 3}, ['val_cfg', "no key 'seed'", "Did you mean 'seeds'"]),
    ({'val_cfg.seeds': 0}, ['val_cfg.seeds=0']), ({'val_cfg.seeds': [1, 1]}, ['val_cfg.seeds=[1, 1]']),
    ({'val_cfg.seeds': [-1]}, ['val_cfg.seeds=[-1]']), ({'val_cfg.seeds': 'all'}, ["val_cfg.seeds='all'"]),
    ({'val_cfg.seeds': [0.5]}, ['val_cfg.seeds=[0.5]']),
    ({'val_cfg.image_sets': ['adaptd']}, ["image_sets='adaptd' is unknown", "'base', 'adapted'"]),
    ({'val_cfg.image_sets': []}, ['val_cfg.image_sets is empty']),
    ({'val_cfg.num_pictures': -1}, ['val_cfg.num_pictures=-1']),
    ({'train_cfg.val_interval': 0}, ['train_cfg.val_interval=0']),
    ({'train_cfg.val_intervall': 2}, ["'val_intervall'", "Did you mean 'val_interval'"]),
    ({'val_dataloader.sampler': dict(type='KeyedSampler')}, ['val_dataloader.sampler is KeyedSampler']),
    ({'val_dataloader.drop_last': True}, ['val_dataloader.drop_last']),
    ({'val_dataloader.dataset.on_bad_image': 'skip'}, ['val_dataloader.dataset.on_bad_image', 'twice']),
    ({'val_dataloader.dataset.type': 'HFStream'}, ['val_dataloader.dataset is a stream']),
    ({'val_dataloader.dataset.source': 'nobody/no-such-data'}, ['nobody/no-such-data']),
    ({'val_dataloader.dataset.conditioning_image_column': None}, ["val_dataloader: Adapter 'adapter' reads"]),
    ({'val_dataloader.dataset.transforms': [dict(type='Resize', size=40), dict(type='Crop', size=40),
                                            dict(type='ComputeTimeIds'), dict(type='PackInputs')]},
     ['val_dataloader: Images of 40 x 40']),
    ({'model.sampler': None}, ['`val_dataloader`', 'model.sampler']),
    ({'model.adapters.adapter': None, 'val_cfg.image_sets': ['adapted']}, ['val_cfg.image_sets', 'no adapters']),
], ids=str)
def test_a_mistake_is_a_sentence_before_the_first_step(option: dict[str, Any], words: list[str], tmp_path: Path,
                                                       validated: dict[str, Any], capfd: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    if 'model.adapters.adapter' in option:
        option = {**option, 'model.trainable': ['unet']}
    capfd.readouterr()
    options = {**validated, **option}
    for key in [k for k in options if k.endswith('_cfg') and options[k] == {}]:
        options.pop(key)
    assert command(tmp_path / 'run', options) == 1
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'Traceback' not in said and all(word in errors[0] for word in words), said[-2000:]
    assert not list((tmp_path / 'run').glob('step*')) and not (tmp_path / 'run' / 'val').exists()
    assert not (tmp_path / 'run' / 'curves.jsonl').exists() or curves(tmp_path / 'run') == []


def test_a_training_needs_no_test() -> None:
    """Half of one, as bases of data and recipes leave it, is left out; a test that needs it is refused."""
    half = dict(model=dict(type='SDXL', objective={}), work_dir='W', test_dataloader=dict(batch_size=1),
                test_cfg=dict(seeds=2))
    trains = dict(train_cfg=dict(max_iters=1), train_dataloader=dict(), optim_wrapper=dict())
    for more in ({}, {'test_evaluator': [dict(type='MeanRed')]}):  # then without model.sampler
        config = Config({**half, **more, **trains, 'model': {**half['model'], 'objective': dict(type='X')}})
        complete.fill_loops(config)
        complete.check_complete(config)
        assert not [key for key in config if key.startswith('test_')]
        with pytest.raises(UserError, match='no `test_evaluator`|model.sampler, which makes the images, is not set'):
            complete.check_complete(Config({**half, **more}))


def test_an_error_in_a_validation_costs_no_step(tmp_path: Path, circles: Path, tiny: dict[str, Any],
                                                capfd: pytest.CaptureFixture[str]) -> None:
    """The checkpoint of its step is there, and the averages are not left in the model."""
    import shutil
    data = Path(shutil.copytree(circles, tmp_path / 'data'))
    path = data / 'images' / '00003.png'
    path.write_bytes(path.read_bytes()[:-40])
    options = {**tiny, **evaluation('val', data), 'train_cfg.val_interval': 2, **EMA}
    assert command(tmp_path / 'run', options) == 1
    assert 'row 3' in capfd.readouterr().err
    assert [p.name for p in (tmp_path / 'run').glob('step*.pth')] == ['step2.pth']
    assert weights(tmp_path / 'run', 2) and not (tmp_path / 'run' / 'val').exists()


def test_a_test_right_after_training(tmp_path: Path, validated: dict[str, Any], circles: Path,
                                     capfd: pytest.CaptureFixture[str]) -> None:
    """By one runner: of the weights as they are, the averages, which it says."""
    runner = train(tmp_path, {**validated, **EMA, **evaluation('test', circles, 5, image_sets=['adapted'])})
    capfd.readouterr()
    assert runner.test() == numbers(tmp_path / 'val' / 'step4.json') == numbers(tmp_path / 'metrics.json')
    assert 'step 4, EMA weights, 5 samples' in capfd.readouterr().out
