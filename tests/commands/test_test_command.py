"""tools/test.py: every way to name a checkpoint, the base alone, what is left alone, what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Brightness, command, command_test, evaluation, numbers, train

from diffengine_sdxl import atomic_files, config
from diffengine_sdxl.commands.test import to_test_config
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.testing import write_tiny_sdxl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def options(tiny_base: Path, circles: Path) -> dict[str, Any]:
    """A run of four steps with averages, validated and tested on the same samples."""
    return {'model.pretrained': str(tiny_base), 'train_dataloader.dataset.source': str(circles), 'resolution': 32,
            'train_cfg.max_iters': 4, 'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None,
            'default_hooks.checkpoint.interval': 2, 'model.sampler.num_inference_steps': 2,
            'custom_hooks': [dict(type='EMAHook', decay=0.5)], 'train_cfg.val_interval': 2,
            **evaluation('val', circles, 3, image_sets=['base', 'adapted']), **evaluation('test', circles, 3)}


@pytest.fixture(scope='module')
def work_dir(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of that run. Don't write into it."""
    folder = tmp_path_factory.mktemp('run') / 'W'
    train(folder, options)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Without what only `train` would take as it is."""
    return {k: v for k, v in options.items() if not (k.endswith('_cfg') and v == {})}


def test_every_way_to_name_a_checkpoint(options: dict[str, Any], work_dir: Path, tmp_path: Path) -> None:
    """File, work_dir, export and adapter's folder give what the validation of that step gave, with the averages."""
    expected = {step: numbers(work_dir / 'val' / f'step{step}.json') for step in (2, 4)}
    assert expected[2]['base'] == expected[4]['base'] and expected[2]['adapted'] != expected[4]['adapted']
    names = {'file': ('step2.pth', 2), 'work_dir': ('', 4), 'export': ('step4', 4), 'adapter': ('step2/adapter', 2)}
    for kind, (name, step) in names.items():
        assert command_test(tmp_path / kind, plain(options), work_dir / name) == 0
        assert numbers(tmp_path / kind / 'metrics.json') == expected[step], kind
    assert command_test(tmp_path / 'none', plain(options), 'none') == 0
    assert numbers(tmp_path / 'none' / 'metrics.json') == {'base': expected[2]['base']}
    assert sorted(p.name for p in (tmp_path / 'file').iterdir() if not p.name[0].isdigit()) == [
        'metrics.csv', 'metrics.json', 'report.html', 'test']
    assert sorted(p.name for p in (tmp_path / 'file' / 'test').iterdir()) == [
        'images', 'pictures.png', 'run.lock', 'samples.csv', 'tiny_t2i_adapter.py']


def test_two_checkpoints_compared(options: dict[str, Any], work_dir: Path, tmp_path: Path,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    """As two tests give them, and the mean of the differences of each image; the other way round with all signs."""
    measured = {**plain(options), 'test_evaluator': [dict(type='MeanRed')]}
    assert command_test(tmp_path / 'T', measured, work_dir / 'step4', compare=work_dir / 'step2.pth') == 0
    names = [f"'{work_dir / name}', step {step}, EMA weights" for name, step in (('step4', 4), ('step2.pth', 2))]
    assert ', compared with '.join(names) + ', 3 samples' in capfd.readouterr().out
    record = json.loads((tmp_path / 'T/test/images/record.json').read_text())
    assert record['checkpoint'] == str(work_dir / 'step4')
    assert command_test(tmp_path / 'alone', measured, work_dir / 'step2.pth') == 0
    found, alone = numbers(tmp_path / 'T' / 'metrics.json'), numbers(tmp_path / 'alone' / 'metrics.json')
    assert list(found) == ['base', 'adapted', 'compared', 'adapted - base', 'adapted - compared']
    assert found['compared'] == alone['adapted'] != found['adapted'] and found['base'] == alone['base']
    gap = found['adapted - compared']['redness']
    assert gap['value'] == pytest.approx(found['adapted']['redness']['value'] - found['compared']['redness']['value'])
    assert gap['low'] < gap['value'] < gap['high'] and gap['p'] is not None
    # Dumped, so that the config tests both again; and the tested weights are there again for a second test.
    assert "compare='" in (tmp_path / 'T' / 'test' / 'tiny_t2i_adapter.py').read_text()
    assert command_test(tmp_path / 'same', measured, work_dir / 'step2', compare=work_dir / 'step2.pth') == 1
    assert '--compare' in (said := capfd.readouterr().err) and 'these are the weights that are tested' in said
    assert not (tmp_path / 'same' / 'test').exists()
    images = [{p.name: p.read_bytes() for p in (tmp_path / folder / 'test/images' / image_set).iterdir()}
              for folder, image_set in (('T', 'compared'), ('alone', 'adapted'))]
    assert images[0] == images[1] and len(images[0]) == 3


@pytest.mark.parametrize(('checkpoint', 'compare', 'words'), [
    ('none', 'step2.pth', "'none' is the base alone"), ('step4.pth', 'none', "'none' is the base alone"),
    ('step4.pth', 'weights', 'exchange the two: --checkpoint weights --compare'),
    ('step4.pth', 'step3.pth', "There is no checkpoint .*step3.pth.*Did you mean 'step4.pth' or 'step2.pth'")])
def test_what_cannot_be_compared(checkpoint: str, compare: str, words: str, options: dict[str, Any], work_dir: Path
                                 ) -> None:
    checkpoint, compare = (str(work_dir / name) if name.endswith('.pth') else name for name in (checkpoint, compare))
    with pytest.raises(UserError, match=words):
        to_test_config(config.load('tiny_t2i_adapter', plain(options)), checkpoint, compare)


def test_an_exported_base_cannot_be_compared(options: dict[str, Any], work_dir: Path, tmp_path: Path) -> None:
    export = shutil.copytree(work_dir / 'step2', tmp_path / 'step2')
    manifest = json.loads((export / 'manifest.json').read_text())
    (export / 'manifest.json').write_text(json.dumps({**manifest, 'contents': ['pipeline']}))
    with pytest.raises(UserError, match="name its checkpoint, '.*step2.pth'"):
        to_test_config(config.load('tiny_t2i_adapter', plain(options)), str(work_dir / 'step4.pth'), str(export))


def test_data_of_the_training(options: dict[str, Any], work_dir: Path) -> None:
    """A test data set that is that of the training stays, though the training is taken out."""
    cfg = config.load('tiny_t2i_adapter', plain(options))
    cfg.test_dataloader.dataset = '$train_dataloader.dataset'
    tested = to_test_config(cfg, str(work_dir / 'step4.pth'))
    assert tested.test_dataloader.dataset.source == options['train_dataloader.dataset.source']
    assert 'train_dataloader' not in tested


def test_the_weights_themselves_without_averages(options: dict[str, Any], tmp_path: Path) -> None:
    changed = {**options, 'custom_hooks': [], 'train_cfg.max_iters': 2}
    train(tmp_path / 'W', changed)
    assert command_test(tmp_path / 'T', plain(changed), tmp_path / 'W') == 0
    assert numbers(tmp_path / 'T' / 'metrics.json') == numbers(tmp_path / 'W' / 'val' / 'step2.json')


def test_a_runs_folder_stays_its_own(options: dict[str, Any], work_dir: Path, tmp_path: Path,
                                     capfd: pytest.CaptureFixture[str]) -> None:
    """With the run's work_dir: nothing of it changes, it can go on, and the terminal names what was tested."""
    folder = shutil.copytree(work_dir, tmp_path / 'W')
    (folder / '.step9.pth.1.part').write_text('half')
    before = files(folder)
    capfd.readouterr()
    assert command_test(folder, {**plain(options), 'resolution': 64}, folder) == 0
    said = capfd.readouterr()
    assert f"'{folder / 'step4.pth'}', step 4, EMA weights, 3 samples" in said.out and not said.err
    after = files(folder)
    # But for the report, which tells of the test too.
    assert {k for k in before if after[k] != before[k]} <= {'report.html'}
    new = {k for k in after if k not in before and not k[0].isdigit()}
    new = {name for name in new if not name.startswith('test/images/')}
    assert new - {'report.html'} == {'metrics.json', 'metrics.csv', 'test/pictures.png', 'test/run.lock',
                                     'test/samples.csv', 'test/tiny_t2i_adapter.py'}
    first = after['metrics.json']
    assert command_test(folder, plain(options), folder) == 0 and (folder / 'metrics.json').read_bytes() != first
    # The training goes on in it.
    assert command(folder, {**plain(options), 'train_cfg.max_iters': 6}, resume='auto') == 0
    assert (folder / 'step6.pth').is_file()


def test_nothing_that_trains_is_needed(options: dict[str, Any], work_dir: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """No training data, no validation data; hooks that upload or average are not asked."""
    from diffengine_sdxl.engine.hooks.ema import EMAHook
    from diffengine_sdxl.engine.hooks.hub import PushToHubHook
    monkeypatch.setattr(PushToHubHook, 'after_run', lambda *_: pytest.fail('uploaded'))
    monkeypatch.setattr(EMAHook, 'before_run', lambda *_: pytest.fail('averaged'))
    changed = {**plain(options), 'train_dataloader.dataset.source': '/no/such/data', 'optim_wrapper.optimizer.lr': -1,
               'val_dataloader.dataset.source': '/no/such/data', 'custom_hooks': [
                   dict(type='EMAHook'), dict(type='PushToHubHook')]}
    assert command_test(tmp_path, changed, work_dir / 'step2') == 0
    assert list(numbers(tmp_path / 'metrics.json')) == ['base', 'adapted']
    # Nor are the adapters, for the base alone.
    changed['model.adapters.adapter.weights'] = '/no/such/weights'
    assert command_test(tmp_path, changed, 'none') == 0 and list(numbers(tmp_path / 'metrics.json')) == ['base']


def test_a_base_that_was_fine_tuned(options: dict[str, Any], tmp_path: Path) -> None:
    """Its checkpoint and its exported pipeline are the same, and are 'base', as the model has no adapters."""
    changed = {**options, 'model.adapters.adapter': None, 'model.trainable': ['unet'], 'train_cfg.max_iters': 1,
               'val_cfg': {}}
    train(tmp_path / 'W', changed)
    for kind, name in {'file': 'step1.pth', 'export': 'step1', 'none': 'none'}.items():
        assert command_test(tmp_path / kind, plain(changed), tmp_path / 'W' / name if kind != 'none' else name) == 0
    found = {kind: numbers(tmp_path / kind / 'metrics.json') for kind in ('file', 'export', 'none')}
    assert list(found['file']) == ['base'] and found['file'] == numbers(tmp_path / 'W' / 'val' / 'step1.json')
    assert found['export'] == found['file'] != found['none']


# What is refused

@pytest.fixture
def fails(options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; the words of its one error. Nothing is left that looks like a result."""
    def run(name: str | Path, changes: dict[str, Any] | None = None) -> str:
        capfd.readouterr()
        assert command_test(tmp_path / 'T', {**plain(options), **(changes or {})}, name) == 1
        said = capfd.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith('error: ')]
        assert len(errors) == 1 and 'Traceback' not in said.err, said.err[-2000:]
        assert not (tmp_path / 'T' / 'metrics.json').exists() and not list((tmp_path / 'T').glob('.*'))
        return errors[0]
    return run


@pytest.mark.parametrize(('changes', 'words'), [
    ({'test_dataloader': None}, ['no `test_dataloader`', 'docs/evaluation.md', 'one for validation']),
    ({'test_evaluator': None}, ['no `test_evaluator`', 'docs/evaluation.md']),
    ({'test_evaluator': None, 'val_evaluator': None, 'val_dataloader': None}, ['no `test_evaluator`']),
    ({'test_evaluator': [dict(type='Brightnes')]}, ["'Brightnes'", "Did you mean 'Brightness'"]),
    ({'test_cfg.seeds': -3}, ['test_cfg.seeds=-3']),
    ({'test_dataloader.dataset.max_samples': 0}, ['max_samples']),
    ({'test_dataloader.sampler': dict(_delete_=True, type='DefaultSampler')}, ['sampler is DefaultSampler']),
    ({'model.sampler': None}, ['model.sampler']),
    ({'model.adapters.adapter': None}, ["don't fit the model", 'not in the model', 'adapters.adapter.net']),
    ({'model.adapters.adapter.num_res_blocks': 1}, ["don't fit the model"]),
    ({'model.trainable': ['unet']}, ["don't fit the model", 'missing']),
], ids=str)
def test_a_config_that_cannot_be_tested(changes: dict[str, Any], words: list[str], work_dir: Path,
                                        fails: Callable[..., str]) -> None:
    said = fails(work_dir / 'step2.pth', changes)
    assert all(word in said for word in words), said


def test_a_checkpoint_that_is_none(work_dir: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """What is not there, what holds none, what is damaged or foreign."""
    said = fails(work_dir / 'step3.pth')
    assert 'There is no checkpoint' in said and "Did you mean 'step4.pth' or 'step2.pth'" in said
    assert "'none' for the base alone" in fails('nowhere')
    assert not (tmp_path / 'T').exists()
    (tmp_path / 'empty').mkdir()
    assert 'has neither a checkpoint' in fails(tmp_path / 'empty')
    cut = tmp_path / 'step2.pth'
    cut.write_bytes((work_dir / 'step2.pth').read_bytes()[:-100])
    assert 'it is truncated' in fails(cut)
    torch.save({'a': 1}, tmp_path / 'foreign.pth')
    assert 'not a checkpoint of this engine' in fails(tmp_path / 'foreign.pth')


def test_an_export_that_does_not_fit(work_dir: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    export = shutil.copytree(work_dir / 'step2', tmp_path / 'step2')
    two = {'model.adapters.other': dict(type='T2IAdapter')}
    assert "T2IAdapter 'adapter', and the config trains T2IAdapter 'adapter', T2IAdapter 'other'" in fails(export, two)
    said = fails(shutil.copytree(export / 'adapter', tmp_path / 'unknown'), two)
    assert "has 2 adapters (adapter, other) and none is named 'unknown'" in said
    (export / 'adapter' / 'diffusion_pytorch_model.safetensors').unlink()
    assert 'adapter' in fails(export)
    (export / 'manifest.json').write_text('{"step": "x"}')
    assert 'manifest.json' in fails(export)


def test_a_checkpoint_of_another_base(options: dict[str, Any], work_dir: Path, tmp_path: Path,
                                      fails: Callable[..., str]) -> None:
    base = write_tiny_sdxl(tmp_path / 'wide', channels=(16, 32, 32))
    assert "don't fit the model" in fails(work_dir / 'step2.pth', {'model.pretrained': str(base)})
    assert 'does not fit' in fails(work_dir / 'step2', {'model.pretrained': str(base)})


def test_no_room_for_the_results(options: dict[str, Any], work_dir: Path, fails: Callable[..., str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any) -> None:
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(atomic_files, '_flush', full)
    assert "test/images/record.json' could not be written" in fails(work_dir / 'step2.pth')


def test_ctrl_c(options: dict[str, Any], work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(Brightness, 'process', interrupt)
    assert command_test(tmp_path, plain(options), work_dir) == 130
    assert "images stay in the work_dir's test/images" in capfd.readouterr().err
    assert not (tmp_path / 'metrics.json').exists()


# As processes

def tool(*arguments: str | Path, cwd: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, ROOT / 'tools' / 'test.py', *map(str, arguments)], cwd=cwd, text=True,
        capture_output=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1',
                                               'PYTHONPATH': str(ROOT / 'tests')})


def test_help_comes_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = tool('-h', cwd=tmp_path)
    assert done.returncode == 0 and "'none' for the base without adapters" in ' '.join(done.stdout.split())
    assert time.monotonic() - begin < 2 and '--gpus' not in done.stdout and list(tmp_path.iterdir()) == []


def test_the_manifest_of_a_config_says_what_was_tested(options: dict[str, Any], work_dir: Path,
                                                       tmp_path: Path) -> None:
    """The dumped config can be tested again as it lies there, and names its checkpoint."""
    assert command_test(tmp_path / 'T', plain(options), work_dir / 'step2.pth') == 0
    dumped = tmp_path / 'T' / 'test' / 'tiny_t2i_adapter.py'
    assert str(work_dir / 'step2.pth') in dumped.read_text() and 'train_cfg' not in dumped.read_text()
    assert command_test(tmp_path / 'again', {}, work_dir / 'step2.pth', name=str(dumped)) == 0
    assert json.loads((tmp_path / 'again' / 'metrics.json').read_text()) == json.loads(
        (tmp_path / 'T' / 'metrics.json').read_text())


def test_the_weights_that_the_config_names(options: dict[str, Any], work_dir: Path, tmp_path: Path) -> None:
    """Without a checkpoint: the pictures of the export, and a refusal where an adapter has no weights.

    Nearly, as weights that stay where safetensors read them lie elsewhere in memory, and kernels round by that.
    """
    named = {**options, 'model.adapters.adapter.weights': str(work_dir / 'step4' / 'adapter')}
    assert command_test(tmp_path / 'named', plain(named), 'weights') == 0
    found, expected = (numbers(path) for path in (tmp_path / 'named' / 'metrics.json', work_dir / 'val' / 'step4.json'))
    for variant in ('base', 'adapted'):
        assert [found[variant]['brightness'][key] for key in ('value', 'low', 'high')] == pytest.approx(
            [expected[variant]['brightness'][key] for key in ('value', 'low', 'high')], abs=1e-5)
    assert command_test(tmp_path / 'fresh', plain(options), 'weights') == 1
    assert not (tmp_path / 'fresh' / 'metrics.json').exists()
