"""The table that opens a training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build, evaluation, train


class OpenedError(Exception):
    """End a run when its table is there."""


def rows(work_dir: Path, options: dict[str, Any], resume: bool = False) -> dict[str, str]:
    """Return the rows of the table of a run, which ends before its first step."""
    runner = build(work_dir, options, resume)

    def keep(text: str) -> None:
        raise OpenedError(text)
    runner.log_lines = keep
    with pytest.raises(OpenedError) as opened:
        runner.train()
    return parsed(str(opened.value))


def parsed(text: str) -> dict[str, str]:
    """Return name -> text of the rows, and 'model' -> what stands above them; no line is wide."""
    first, *lines = text.splitlines()
    assert first == 'This training:'
    assert all(len(line) <= 100 or len(line.split()) <= 3 for line in lines if 'SDXL' not in line), text
    start = next(i for i, line in enumerate(lines) if line.startswith('  data '))
    found, name = {'model': '\n'.join(line[2:] for line in lines[:start])}, ''
    for line in lines[start:]:
        match = re.fullmatch(r'  (\S+) +(\S.*)', line) if not line.startswith('   ') else None
        if match:
            name = match[1]
            assert name not in found
        found[name] = match[2] if match else f'{found[name]} {line.strip()}'
    return found


def test_the_whole_table(tmp_path: Path, tiny: dict[str, Any], circles: Path, tiny_base: Path,
                         capfd: pytest.CaptureFixture[str]) -> None:
    """Once on the console and once in the log file, before the first step; mmengine's long records in the file only."""
    runner = train(tmp_path, {**tiny, 'default_hooks.logger.interval': 1, 'train_cfg.max_iters': 2,
                              'randomness.seed': 5})
    console = capfd.readouterr().out
    text = re.split(r'\n\d\d/\d\d ', console[console.index('This training:'):])[0]  # a record begins with its date
    assert text in (log := next(tmp_path.glob('*/*.log')).read_text())
    assert log.count('This training:') == console.count('This training:') == 1
    assert console.index('This training:') < console.index('Iter(train) [1/2]')
    for noise in ('System environment', 'Config:', 'Hooks will be executed'):
        assert noise not in console and noise in log
    assert console[:console.index('This training:')].count('\n') == 0
    device = (torch.cuda.get_device_name() if torch.cuda.is_available() else
              f'cpu with {torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)}')
    found = parsed(text)
    assert found['model'] == repr(runner.model) and f"SDXL '{tiny_base}'" in found['model']
    assert f"16 rows: HFDataset(source='{circles}'" in found['data']
    assert "image_column='image'" in found['data'] and "caption_column='text'" in found['data']
    assert "transforms=[Resize(size=32, " in found['data'] and 'ComputeTimeIds' in found['data']
    expected = {
        'batch': '2 x 1 accumulated x 1 process = 2 rows per step', 'steps': '2; 0.25 epochs',
        'precision': 'no autocast; what trains is stored in float32', 'device': device, 'seed': '5',
        'speed': 'not compiled, checkpointing off, base fp32',
        'work_dir': str(tmp_path), 'checkpoints': 'step<N>.pth and step<N>/ every 2 steps and at the end',
        'report': 'report.html at each checkpoint and validation, and at the end'}
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == {'model', 'data', 'optimizer', 'lr', *expected}
    settings = runner.optim_wrapper.optimizer.defaults
    assert found['optimizer'].startswith('AdamW(') and f'weight_decay={settings["weight_decay"]}' in found['optimizer']
    assert 'lr=' not in found['optimizer'] and found['lr'].startswith('0.001; DiffusersLR(')


@pytest.mark.parametrize(('length', 'samples', 'batch', 'accumulation', 'steps'), [
    ({'max_iters': 4}, 16, 2, 3, '4; 1.5 epochs'),
    # Each epoch is rounded up to whole steps, and all rows of a step are read.
    ({'max_iters': None, 'max_epochs': 3}, 5, 2, 1, '9; 3.6 epochs'),
    ({'max_iters': 2000}, 3, 1, 1, '2,000; 667 epochs')])
def test_rows_steps_and_epochs(length: dict[str, Any], samples: int, batch: int, accumulation: int, steps: str,
                               tmp_path: Path, tiny: dict[str, Any]) -> None:
    found = rows(tmp_path, {
        **tiny, **{f'train_cfg.{key}': value for key, value in length.items()}, 'train_dataloader.batch_size': batch,
        'train_dataloader.dataset.max_samples': samples, 'optim_wrapper.accumulative_counts': accumulation})
    assert found['steps'] == steps and found['data'].startswith(f'{samples} rows: ')
    assert found['batch'] == f'{batch} x {accumulation} accumulated x 1 process = {batch * accumulation} rows per step'


def test_a_stream_has_no_length(tmp_path: Path, tiny: dict[str, Any]) -> None:
    found = rows(tmp_path, {**tiny, 'train_dataloader.dataset.type': 'HFStream'})
    assert found['data'].startswith('a stream of unknown length: HFStream(source=') and found['steps'] == '4'


def test_a_resumed_run(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """From which step on; the rate is the schedule's base, and not that of a step."""
    options = {**tiny, 'param_scheduler': dict(_delete_=True, type='DiffusersLR', name='linear', num_warmup_steps=3),
               'auto_scale_lr.enable': True}
    assert rows(tmp_path / 'other', options)['lr'] == "0.002; DiffusersLR(name='linear', num_warmup_steps=3)"
    train(tmp_path / 'run', options, die_at=2)
    found = rows(tmp_path / 'run', {**options, 'train_cfg.max_iters': 6}, resume=True)
    assert found['steps'] == '6, from step 3 on; 0.75 epochs'
    assert found['lr'] == "0.002; DiffusersLR(name='linear', num_warmup_steps=3)"


def test_several_rates_and_none(tmp_path: Path, tiny: dict[str, Any]) -> None:
    options = {**tiny, 'model.adapters.two': dict(type='T2IAdapter'), 'param_scheduler': None}
    assert rows(tmp_path / 'one', options)['lr'] == '0.001'
    found = rows(tmp_path / 'several', {**options, 'optim_wrapper.paramwise_cfg.lr.two': 0.25})
    assert found['lr'] == 'adapter 0.001, two 0.25'
    found = rows(tmp_path / 'none', {**options, 'optim_wrapper.optimizer': dict(_delete_=True, type='Adafactor')})
    assert found['lr'] == 'relative steps' and found['optimizer'] == 'Adafactor'


@pytest.mark.parametrize(('precision', 'base', 'words'), [
    ('bf16', 'bfloat16', 'autocast to bfloat16'), ('fp16', 'float16', 'autocast to float16 with loss scaling')])
def test_mixed_precision(precision: str, base: str, words: str, tmp_path: Path, tiny: dict[str, Any]) -> None:
    found = rows(tmp_path, {**tiny, 'mixed_precision': precision})
    assert found['precision'] == f'{words}; what trains is stored in float32'
    assert f"', {base}, the base is frozen" in found['model']


def test_what_is_saved(tmp_path: Path, tiny: dict[str, Any], circles: Path) -> None:
    del tiny['default_hooks.samples']
    options = {
        **tiny, **evaluation('val', circles, 3), 'train_cfg.val_interval': 3,
        'custom_hooks': [dict(type='EMAHook', decay=0.99, warmup=False)],
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=None, max_keep_ckpts=2, export=False),
        'default_hooks.samples': dict(_delete_=True, type='SampleHook', interval=1500, prompts=['a', 'b', 'c'], size=32,
                                      num_images=2, at_start=True)}
    found = rows(tmp_path / 'a', options)
    assert found['validation'] == 'val/step<N>.json every 3 steps and at the end'
    assert found['ema'] == 'decay 0.99; exported, sampled and validated'
    assert found['checkpoints'] == 'step<N>.pth at the end; the newest 2 are kept'
    assert found['samples'] == ('samples/step<N>.png every 1,500 steps and before the first: 3 prompts x 2 seeds, '
                                '32 x 32 pixels')
    options['default_hooks.samples'] |= dict(prompts=[], num_from_dataset=2, at_start=False)
    found = rows(tmp_path / 'b', {**options, 'train_cfg.val_interval': None, 'custom_hooks': [dict(type='EMAHook')]})
    assert found['samples'] == 'samples/step<N>.png every 1,500 steps: 2 rows of the data x 2 seeds, 32 x 32 pixels'
    assert found['validation'] == 'val/step<N>.json at the end' and 'after a warmup' in found['ema']
    options['default_hooks.samples'] |= dict(num_from_dataset=0)
    assert 'samples' not in rows(tmp_path / 'c', options)


def test_pairs_of_data_sets(tmp_path: Path, tiny: dict[str, Any], circles: Path) -> None:
    """Configs inside others are written as they would be called."""
    (tmp_path / 'data').mkdir()
    for image in sorted((circles / 'images').iterdir())[:3]:
        (tmp_path / 'data' / image.name).write_bytes(image.read_bytes())
    half = dict(type='CaptionFolder', source=str(tmp_path / 'data'), default_caption='a circle', transforms=[
        dict(type='Resize', size=32), dict(type='ComputeTimeIds'), dict(type='PackInputs')])
    found = rows(tmp_path / 'run', {**tiny, 'train_dataloader.dataset': dict(
        _delete_=True, type='PriorPreservation', instance=half, prior=half, weight=0.5)})
    call = (f"CaptionFolder(source='{tmp_path / 'data'}', default_caption='a circle', transforms=[Resize(size=32), "
            'ComputeTimeIds, PackInputs])')
    assert found['data'] == f'3 rows: PriorPreservation(instance={call}, prior={call}, weight=0.5)'
