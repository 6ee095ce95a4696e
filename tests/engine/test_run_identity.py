"""A work_dir belongs to one run: its identity is compared, other settings may change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build, train, weights

from diffengine_sdxl import config
from diffengine_sdxl.engine import run_identity as identity
from diffengine_sdxl.errors import UserError


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, tiny_options: dict[str, Any]) -> Path:
    """Two of four steps."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    train(folder, tiny_options, die_at=2)
    return folder


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize(('option', 'words'), [
    ({'model.adapters.adapter.num_res_blocks': 1}, 'model.adapters.adapter.num_res_blocks was None, is now 1'),
    ({'model.vae': 'other'}, "model.vae was None, is now 'other'"),
    ({'model.objective.noise.type': 'OffsetNoise'}, "objective.noise.type was 'PlainNoise', is now 'OffsetNoise'"),
    ({'model.prediction_type': 'v_prediction'}, 'model.prediction_type'),
    ({'train_dataloader.dataset.max_samples': 3}, 'dataset.max_samples was None, is now 3'),
    ({'train_dataloader.batch_size': 1}, 'a step had 2 samples, has now 1'),
    ({'train_dataloader.sampler.shuffle': False}, 'sampler.shuffle was True, is now False'),
    ({'resolution': 64}, 'size was 32, is now 64'),
    ({'proportion_empty_prompts': 0.5}, 'prob was 0.0, is now 0.5'),
    ({'optim_wrapper.optimizer.lr': 0.5}, 'optim_wrapper.optimizer.lr was 0.001, is now 0.5'),
    ({'mixed_precision': 'bf16'}, "mixed_precision was 'no', is now 'bf16'"),
    ({'randomness.seed': 1}, 'seed was 0, is now 1'),
])
def test_another_run_is_refused_with_what_differs(option: dict[str, Any], words: str, run: Path,
                                                  tiny: dict[str, Any]) -> None:
    """Before anything is built or written."""
    before = state_of(run)
    with pytest.raises(UserError, match='belongs to another run') as caught:
        build(run, {**tiny, **option}, resume=True)
    assert words in str(caught.value) and str(run) in str(caught.value) and 'None' not in str(caught.value)[:20]
    assert state_of(run) == before


@pytest.mark.parametrize('option', [
    {'train_cfg.max_iters': 9}, {'default_hooks.checkpoint.interval': 1}, {'default_hooks.logger.interval': 1},
    {'train_dataloader.num_workers': 2}, {'train_dataloader.persistent_workers': False},
    {'model.gradient_checkpointing': True}, {'model.sampler.num_inference_steps': 7},
    {'default_hooks.samples': dict(type='SampleHook', num_from_dataset=1, size=32)}, {'log_level': 'WARNING'},
    {'train_dataloader.dataset.cache_dir': None},
], ids=str)
def test_what_changes_no_number_may_change(option: dict[str, Any], run: Path, tiny: dict[str, Any],
                                           tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / 'run')
    cfg = config.load('tiny_t2i_adapter', {**tiny, **option})
    cfg.work_dir, cfg.resume = str(tmp_path / 'run'), True
    assert identity.claim(config.resolve(cfg)) == 0


def test_a_folder_with_a_run_needs_resume(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Also without its run.json: the checkpoints would be overwritten."""
    before = state_of(run)
    with pytest.raises(UserError, match="already holds a run .'step2.pth'.*--resume"):
        build(run, tiny)
    assert state_of(run) == before
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'run.json').unlink()
    with pytest.raises(UserError, match='already holds a run'):
        build(tmp_path / 'run', tiny)


def test_a_folder_without_run_json_is_resumed(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint holds the identity and the seed too."""
    folder = tmp_path / 'moved'
    folder.mkdir()
    shutil.copy(run / 'step2.pth', folder)
    assert build(folder, {**tiny, 'randomness.seed': None}, resume=True).seed == 0
    (folder / 'run.json').unlink()
    with pytest.raises(UserError, match='optimizer.lr was 0.001'):
        train(folder, {**tiny, 'optim_wrapper.optimizer.lr': 0.5}, resume=True)


def test_a_folder_without_a_checkpoint_starts_over(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """--resume starts a run in an empty folder; a run without a checkpoint does not bind the next one."""
    runner = train(tmp_path / 'new', tiny, resume=True, die_at=1)
    assert runner.iter == 0
    other = {**tiny, 'randomness.seed': 7, 'optim_wrapper.optimizer.lr': 0.5, 'train_cfg.max_iters': 1}
    assert train(tmp_path / 'new', other).seed == 7
    held = json.loads((tmp_path / 'new' / 'run.json').read_text())
    assert held['seed'] == 7 and held['identity']['optim_wrapper']['optimizer']['lr'] == 0.5


def test_a_named_checkpoint_of_another_run_is_refused(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    other = train(tmp_path / 'other', {**tiny, 'randomness.seed': 3, 'train_cfg.max_iters': 2})
    assert other.seed == 3
    with pytest.raises(UserError, match='seed'):
        build(run, {**tiny, 'randomness.seed': None}, resume=str(tmp_path / 'other' / 'step2.pth'))
    with pytest.raises(UserError, match='model.null_prompt'):
        train(tmp_path / 'third', {**tiny, 'model.null_prompt': 'empty'}, resume=str(run / 'step2.pth'))


def test_a_damaged_run_json_is_named(tmp_path: Path, tiny: dict[str, Any]) -> None:
    (tmp_path / 'run.json').write_text('{"seed": ')
    with pytest.raises(UserError, match='run.json'):
        build(tmp_path, tiny, resume=True)


def test_a_refusal_names_the_way_to_new_settings(run: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    """A new learning rate, another number of samples: what to type, and typed it works."""
    with pytest.raises(UserError) as caught:
        build(run, {**tiny, 'optim_wrapper.optimizer.lr': 0.5}, resume=True)
    assert str(caught.value).endswith(
        'Set the config back to continue that run. With other settings, start a new one: another --work-dir, without '
        f'--resume. To begin with its weights: --cfg-options load_from={run}/step2.pth, if they fit the new model.')
    runner = build(tmp_path, {**tiny, 'optim_wrapper.optimizer.lr': 0.5, 'load_from': f'{run}/step2.pth'})
    runner.load_or_resume()
    assert (runner.loaded_step, runner.iter) == (2, 0)
    with pytest.raises(UserError, match='optim_wrapper.accumulative_counts=2 keeps the samples of a step'):
        build(run, {**tiny, 'train_dataloader.batch_size': 1}, resume=True)
    with pytest.raises(UserError, match='samples, has now 3 .*processes.. Set the config back'):
        build(run, {**tiny, 'train_dataloader.batch_size': 3}, resume=True)


def test_the_same_samples_in_another_split(run: Path, tiny: dict[str, Any], tmp_path: Path,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    """Two micro-batches of one sample for one of two: the same run but for rounding, and a line says so."""
    options = {**tiny, 'model.dtype': 'float64', 'default_hooks.checkpoint.export': False}
    train(tmp_path / 'whole', options)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    (tmp_path / 'cut' / 'step4.pth').unlink()
    assert 'bitwise' not in capfd.readouterr().out
    train(tmp_path / 'cut', {**options, 'train_dataloader.batch_size': 1, 'optim_wrapper.accumulative_counts': 2},
          resume=True)
    said = capfd.readouterr().out
    assert 'as batch_size=2 x accumulative_counts=1 x processes=1, and are now as batch_size=1 x accumu' in said
    assert 'not bitwise the run that was not stopped' in said
    one, other = (weights(tmp_path / name, 4) for name in ('whole', 'cut'))
    for key, value in one.items():
        assert torch.allclose(other[key], value, rtol=1e-10, atol=1e-12), key
    with pytest.raises(UserError, match='accumulative_counts'):  # not the same with other processes
        identity.check_same_run({'split': {'batch_size': 2, 'accumulative_counts': 2, 'processes': 3}},
                                {'split': {'batch_size': 2, 'accumulative_counts': 2, 'processes': 1}}, run)
    identity.check_same_run({'split': {'batch_size': 2, 'accumulative_counts': 1, 'processes': 4}},
                            {'split': {'batch_size': 1, 'accumulative_counts': 8, 'processes': 1}}, run)


def test_differences_are_sentences() -> None:
    old, new = {'a': {'b': 1, 'c': [1]}, 'd': None}, {'a': {'b': 2, 'c': [1]}, 'e': 'x'}
    assert identity.differences(old, new) == ['a.b was 1, is now 2', "e was None, is now 'x'"]
    assert identity.differences(old, json.loads(json.dumps(old))) == []
    with pytest.raises(UserError, match='and 3 more'):
        identity.check_same_run({str(i): 0 for i in range(8)}, {}, 'x')
