"""Two processes are one process with the same global batch."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import build, curves, evaluation, first_gradients, plain_arguments, weights, without_training

from diffengine_sdxl.testing import write_circles, write_tiny_image_encoder

ROOT = Path(__file__).resolve().parents[2]
#: Random crops, dropped captions, three micro-batches: all that could tell the ranks apart.
RANDOM = [dict(type='Resize', size=40), dict(type='Crop', size='$resolution', mode='random'),
          dict(type='CaptionDrop', prob=0.5), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
CASES = {'float64': {'model.dtype': 'float64', 'optim_wrapper.accumulative_counts': 3,
                     # One process samples, with weights that are frozen meanwhile, and DDP must not feel it.
                     'default_hooks.samples': dict(type='SampleHook', interval=1, at_start=True, num_from_dataset=1,
                                                   num_images=1, size=32)},
         'float32': {}, 'cached': {'cache': 'cache', 'train_dataloader.dataset.variants': 1},
         'ema': {'custom_hooks': [dict(type='EMAHook', decay=0.5)], 'train_dataloader.num_workers': 1,
                 'train_dataloader.sampler': dict(_delete_=True, type='BucketSampler', step=16,
                                                  resolution='$resolution', max_ratio=4),
                 'train_dataloader.dataset.transforms': [
                     dict(type='Resize', size='bucket'), dict(type='Crop', size='bucket'), *RANDOM[2:]]}}


#: With image prompts, dropped at random.
PROMPTED = [dict(type='ImagePrompt', source='img', key='reference', size=64), *RANDOM[:2],
            dict(type='JointDrop', adapters=['ip'], image=0.3, text=0.3, both=0.3), *RANDOM[3:]]


def kinds_together(encoder: Path) -> dict[str, Any]:
    """All kinds at once; a word that not every prompt holds, a window that not every row is inside of."""
    return dict(
        _delete_=True, style=dict(type='LoRA', rank=2, parts=['unet', 'text_encoder', 'text_encoder_2']),
        dora=dict(type='LoRA', kind='dora', rank=2, active_range=(0.2, 0.8)), control=dict(type='ControlNet'),
        ip=dict(type='IPAdapter', architecture='plus', image_encoder=str(encoder), image_encoder_subfolder=None),
        t2i=dict(type='T2IAdapter'), word=dict(type='TextualInversion', token='red', init='blue'))


def launched(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of a script, as mim starts them."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={port}',
         *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'})


def stretched(folder: Path) -> Path:
    """Write circles, of which every second one is four times as wide as high: two buckets."""
    for path in write_circles(folder).rglob('*.png'):
        if int(path.stem) % 2:
            with Image.open(path) as image:
                image.resize((128, 32)).save(path)
    return folder


@pytest.fixture(scope='module')
def base_options(tiny_base: Path, circles: Path) -> dict[str, Any]:
    return {'model.pretrained': str(tiny_base), 'train_dataloader.dataset.source': str(circles), 'resolution': 32,
            'train_cfg.max_iters': 2, 'optim_wrapper.accumulative_counts': 1, 'default_hooks.checkpoint.interval': 2,
            'train_dataloader.dataset.transforms': RANDOM, 'train_dataloader.batch_size': 2,
            'default_hooks.samples': None}


@pytest.fixture(scope='module')
def results(tmp_path_factory: pytest.TempPathFactory, base_options: dict[str, Any], circles: Path
            ) -> dict[str, tuple[Any, ...]]:
    """Name of a case -> (folder and gradients of one process, folder and gradients of two)."""
    folder = tmp_path_factory.mktemp('distributed')
    cases, results = {}, {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)  # where the two processes have their cache, too
    for name, changes in CASES.items():
        cases[name] = {'work_dir': str(folder / f'{name}-two'), 'options': {**base_options, **changes}, 'resume': False}
    cases['ema']['options']['train_dataloader.dataset.source'] = str(stretched(folder / 'stretched'))
    cases['kinds'] = {'work_dir': str(folder / 'kinds-two'), 'resume': False, 'options': {
        **base_options, 'model.dtype': 'float64', 'train_dataloader.dataset.transforms': PROMPTED,
        # Drawn for each sample; those inside the base are drawn for a micro-batch, of which two processes have two.
        'model.partners': {name: dict(prob=0.5, scale=(0.5, 1.0)) for name in ('control', 'ip', 't2i')},
        'model.adapters': kinds_together(write_tiny_image_encoder(folder / 'encoder'))}}
    cases['resumed'] = {**cases['ema'], 'resume': True,
                        # Its first two steps had batches of two.
                        'options': {**cases['ema']['options'], 'train_cfg.max_iters': 4,
                                    'train_dataloader.batch_size': 1, 'optim_wrapper.accumulative_counts': 2}}
    cases['ema']['options']['default_hooks.val'] = dict(
        type='ValidationLoss', batch_size=2, timesteps=[500], interval=None, dataset=dict(
            type='HFDataset', source=base_options['train_dataloader.dataset.source'], max_samples=5,
            transforms=[dict(type='Resize', size=32), *RANDOM[3:]]))
    # Five batches, the last with one row; begun by one process, of which some images are lost.
    cases['tested'] = {'work_dir': str(folder / 'tested-two'), 'resume': False, 'tests': True, 'options': {
        **without_training(base_options), **evaluation('test', circles, 9, seeds=2),
        'model.sampler.num_inference_steps': 2, 'test_evaluator': [dict(type='MeanRed'), dict(type='Brightness')]}}
    build(folder / 'tested-one', cases['tested']['options']).test()
    shutil.copytree(folder / 'tested-one', folder / 'tested-two')
    for i in (0, 3, 4, 8):
        (folder / f'tested-two/test/images/adapted/{i:06d}_seed1.png').unlink()
    (folder / 'cases.json').write_text(json.dumps(cases))
    done = launched(ROOT / 'tests' / 'two_processes.py', folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case in cases.items():
        if case.get('tests'):
            continue
        batch_size = 2 * case['options']['train_dataloader.batch_size']
        options = {**case['options'], 'train_dataloader.batch_size': batch_size}
        runner = build(folder / f'{name}-one', options)
        one = first_gradients(runner)
        assert runner.cache is None or all(not misses for _, misses in runner.cache.store.counts.values())
        two = [torch.load(folder / f'{name}.{rank}.pt') for rank in range(2)]
        results[name] = (folder / f'{name}-one', one, Path(case['work_dir']), two)
    results['tested'] = folder / 'tested-one', folder / 'tested-two'
    monkeypatch.undo()
    return results


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert one.keys() == other.keys() and one
    square = sum(float((one[k].double() - other[k].double()).square().sum()) for k in one)
    return math.sqrt(square / sum(float(v.double().square().sum()) for v in one.values()))


@pytest.mark.parametrize(('case', 'bound'), [('float64', 1e-10), ('kinds', 1e-10), ('float32', 1e-5)])
def test_gradients(case: str, bound: float, results: dict[str, tuple[Any, ...]]) -> None:
    _, one, _, (first, second) = results[case]
    assert distance(one, first) < bound
    # DDP gave both the same.
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(('case', 'bound'), [('float64', 1e-10), ('float32', 1e-5)])
def test_logged_losses_are_those_of_all(case: str, bound: float, results: dict[str, tuple[Any, ...]]) -> None:
    one, _, two, _ = results[case]
    rows = curves(one), curves(two)
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=bound)


def test_a_cache_changes_no_bit(results: dict[str, tuple[Any, ...]]) -> None:
    """Two processes fill it, without waiting for each other; one reads all of it."""
    runs = [(results[case][1], *results[case][3]) for case in ('cached', 'float32')]
    for cached, without in zip(*runs, strict=True):
        assert cached.keys() == without.keys() and all(torch.equal(cached[k], without[k]) for k in cached)


def test_weights_after_two_steps(results: dict[str, tuple[Any, ...]]) -> None:
    """Of the checkpoint, of the average and of the export."""
    from safetensors.torch import load_file
    for case, bound in (('float64', 1e-9), ('ema', 1e-3)):
        one, _, two, _ = results[case]
        assert distance(weights(one, 2), weights(two, 2)) < bound
        exports = [load_file(f / 'step2/adapter/diffusion_pytorch_model.safetensors') for f in (one, two)]
        assert distance(*exports) < bound
    state = torch.load(results['ema'][2] / 'step2.pth', weights_only=True)
    assert state['ema']['step'] == 2 and state['meta']['samples_per_iter'] == 4
    assert state['meta']['position'] == 8


def test_resumed_on_two_processes(results: dict[str, tuple[Any, ...]]) -> None:
    """Two steps, and two more after a resume, are four steps of one process."""
    one, _, two, _ = results['resumed']
    rows = curves(one), curves(two)
    assert [r['step'] for r in rows[1]] == [1, 2, 3, 4]
    assert [r['loss'] for r in rows[0]] == pytest.approx([r['loss'] for r in rows[1]], rel=1e-4)
    assert distance(weights(one, 4), weights(two, 4)) < 1e-3


def test_validation_losses_do_not_depend_on_the_processes(results: dict[str, tuple[Any, ...]]) -> None:
    """Bitwise, before the first step."""
    one, _, two, _ = results['ema']
    rows = [json.loads((folder / 'val_loss.jsonl').read_text().splitlines()[0]) for folder in (one, two)]
    assert rows[0] == rows[1] and rows[0]['step'] == 0


def test_a_test_of_two_processes_is_that_of_one(results: dict[str, tuple[Any, ...]]) -> None:
    """Bitwise: numbers, table of images, and images, some of which the one and some the two have made."""
    one, two = results['tested']
    names = ['metrics.json', 'metrics.csv', 'test/samples.csv', 'test/pictures.png',
             *(path.relative_to(one) for path in (one / 'test' / 'images').rglob('*.png'))]
    assert len(names) == 4 + 9 * 2 * 2 + 9 and (two / 'report.html').is_file()
    assert not [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()]
    assert not list(two.glob('.*')) and not list((two / 'test').rglob('.*'))
    log = max(two.glob('*/*.log')).read_text()
    assert "11 of 18 images 'adapted'" in log or '29 of 36 images' in log


def test_the_whole_command(tmp_path: Path, base_options: dict[str, Any]) -> None:
    """tools/train.py on two processes without a GPU, and again with --resume, from an empty folder."""
    options = {k: v for k, v in base_options.items() if k != 'train_dataloader.dataset.transforms'}
    arguments = [ROOT / 'tools' / 'train.py', 'stable_diffusion_xl_t2i_adapter_fill50k.py', '--launcher', 'pytorch',
                 '--work-dir', 'W2']
    options |= {'model.vae': None, 'mixed_precision': 'no', 'train_dataloader.num_workers': 0}
    done = launched(*arguments, '--cfg-options', *plain_arguments(options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    # One process speaks.
    assert (done.stdout + done.stderr).count("/W2/step2.pth' and ") == 1
    table = done.stdout[done.stdout.index('This training:'):]
    assert table.count('This training:') == table.count('2 x 1 accumulated x 2 processes = 4 rows per step') == 1
    assert '2; 0.5 epochs' in table
    assert [row['step'] for row in curves(tmp_path / 'W2')] == [1, 2]
    from diffusers import T2IAdapter
    T2IAdapter.from_pretrained(str(tmp_path / 'W2' / 'step2'), subfolder='adapter')
    # A mistake ends both with a sentence and an exit code.
    done = launched(*arguments, '--cfg-options', *plain_arguments(options), cwd=tmp_path)
    assert done.returncode != 0 and "error: 'W2' already holds a run ('step2.pth')" in done.stderr
