"""Going back to an older checkpoint: the abandoned branch is set aside, and what is written next is the newest."""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, build, command, curves, train, weights

from diffengine_sdxl import atomic_files
from diffengine_sdxl.engine import branches
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.loading.trained import resolve_checkpoint

STEPS = (2, 4, 6, 8)


@pytest.fixture(scope='module')
def whole(tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps with checkpoints at 1, 2, 3, 4. Don't write into it."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(folder, {**tiny_options, 'default_hooks.checkpoint.interval': 1})
    return folder


def files(folder: Path) -> dict[str, str]:
    """Every file's content by its path."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob('*')) if p.is_file()}


def look_alike(folder: Path) -> Path:
    """A work_dir's names, each file with its own content."""
    names = ['run.json', 'curves.jsonl', 'curves.png', 'val/pictures.png', 'config.py', '2026/vis_data/scalars.json',
             'best.json', 'samples/steps.png', 'samples/images/base_0_seed0.png', 'metrics.json', 'metrics.csv',
             'test/samples.csv', 'test/images/record.json']
    for step in STEPS:
        names += [f'step{step}.pth', f'step{step}/manifest.json', f'val/step{step}.json', f'samples/step{step}.png',
                  f'val/step{step}.samples.csv', f'samples/images/step{step}_0_seed-1.png']
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{folder.name}/{name}')
    return folder


def test_what_is_later_is_set_aside(tmp_path: Path) -> None:
    """Checkpoints, exports, results, samples, curves, a test; the steps before and the logs stay; nothing is lost."""
    folder = look_alike(tmp_path / 'W')
    before = files(folder)
    line = branches.go_back(folder, folder / 'step2.pth', 2)
    assert line is not None and str(folder / 'abandoned_1') in line and 'step4.pth, step6.pth, step8.pth' in line
    after = files(folder)
    moved = {name.removeprefix('abandoned_1/'): text for name, text in after.items() if name.startswith('abandoned_1/')}
    stayed = {name: text for name, text in after.items() if not name.startswith('abandoned_1/')}
    assert {**moved, **stayed} == before and moved.keys() & stayed.keys() == {'curves.jsonl'}
    assert set(stayed) == {'run.json', 'curves.jsonl', 'config.py', '2026/vis_data/scalars.json', 'step2.pth',
                           'step2/manifest.json', 'val/step2.json', 'samples/step2.png', 'val/step2.samples.csv',
                           'samples/images/base_0_seed0.png', 'samples/images/step2_0_seed-1.png'}
    assert checkpoint.latest(folder) == folder / 'step2.pth'
    # Again, with nothing later: nothing happens. With another branch: it gets a folder of its own.
    assert branches.go_back(folder, folder / 'step2.pth', 2) is None and files(folder) == after
    (folder / 'step4.pth').write_text('new')
    assert 'abandoned_2' in str(branches.go_back(folder, tmp_path / 'W' / 'step2.pth', 2))
    assert (folder / 'abandoned_2' / 'step4.pth').read_text() == 'new'


def test_from_elsewhere_all_steps_are_set_aside(tmp_path: Path) -> None:
    """Also from the branch that was abandoned; the checkpoint becomes one of this work_dir."""
    folder = look_alike(tmp_path / 'W')
    branches.go_back(folder, folder / 'step2.pth', 2)
    (folder / 'step4.pth').write_text('new')
    line = branches.go_back(folder, folder / 'abandoned_1' / 'step6.pth', 6)
    assert line is not None and 'step2.pth, step4.pth' in line
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ['step6.pth']
    assert (folder / 'step6.pth').read_text() == (folder / 'abandoned_1' / 'step6.pth').read_text() == 'W/step6.pth'
    assert sorted(p.name for p in (folder / 'abandoned_2').iterdir()) == [
        'curves.jsonl', 'samples', 'step2', 'step2.pth', 'step4.pth', 'val']
    # Into an empty folder nothing is set aside.
    (tmp_path / 'new').mkdir()
    assert branches.go_back(tmp_path / 'new', folder / 'step6.pth', 6) is None
    assert files(tmp_path / 'new') == {'step6.pth': 'W/step6.pth'}


class KilledError(BaseException):
    pass


@pytest.mark.parametrize('elsewhere', [False, True])
def test_a_kill_at_any_point(elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest checkpoint is the old branch's or the one to go back to, and the next run finishes the move."""
    calls, limit = 0, 0

    def mortal(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KilledError
            return function(*args, **kwargs)
        return call
    expected = points = None
    for limit in (10**9, *range(100)):
        folder = look_alike(tmp_path / f'{limit}' / 'W')
        source = look_alike(tmp_path / f'{limit}' / 'other') / 'step4.pth' if elsewhere else folder / 'step4.pth'
        calls = 0
        with monkeypatch.context() as patch:
            for name in ('replace', 'link', 'unlink'):
                patch.setattr(os, name, mortal(getattr(os, name)))
            try:
                branches.go_back(folder, source, 4)
            except KilledError:
                planned = (folder / checkpoint.PLAN).exists()
                last = checkpoint.latest(folder)
                assert last is not None and last.read_text() == (source.read_text() if planned else 'W/step8.pth')
        if expected is None:
            expected, points = files(folder), calls
            continue
        branches.finish(folder)
        atomic_files.clean(folder)  # as `claim` does
        if (folder / 'abandoned_1').exists():
            assert files(folder) == expected, limit
        else:
            assert limit == 0  # killed before the plan was there
        if limit == points:
            break
    assert points is not None and points > 10


def test_going_back_and_on(whole: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """With one checkpoint kept, the new ones are; the next --resume, test, export and infer take them."""
    folder = tmp_path / 'W'
    shutil.copytree(whole, folder)
    options = {**tiny, 'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.max_keep_ckpts': 1}
    train(folder, options, resume=str(folder / 'step1.pth'), die_at=2)
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ['step2.pth']
    assert resolve_checkpoint(str(folder)) == folder / 'step2.pth'
    assert [row['step'] for row in curves(folder)] == [1, 2]
    assert sorted(p.name for p in folder.glob('step*')) == ['step2', 'step2.pth']
    train(folder, options, resume=True)
    assert_same_run(whole, folder, 4)
    abandoned = folder / 'abandoned_1'
    assert [p.name for p in checkpoint.list_checkpoints(abandoned)] == ['step2.pth', 'step3.pth', 'step4.pth']
    assert [row['step'] for row in curves(abandoned)] == [1, 2, 3, 4] and (abandoned / 'step4' / 'adapter').is_dir()
    with pytest.raises(UserError, match=re.escape(f"set aside when the run went back: '{abandoned / 'step3.pth'}'")):
        build(folder, options, resume=str(folder / 'step3.pth'))


def test_a_checkpoint_of_another_folder_is_not_forgotten(whole: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """The run dies before it saves; --resume alone goes on from there, not from the start."""
    options = {**tiny, 'default_hooks.checkpoint.export': False}
    train(tmp_path / 'W', {**options, 'train_cfg.max_iters': 9, 'default_hooks.checkpoint.interval': 9},
          resume=str(whole / 'step3.pth'), die_at=4)
    train(tmp_path / 'W', options, resume=True)
    assert [row['step'] for row in curves(tmp_path / 'W')] == [4]
    assert all(torch.equal(v, weights(whole, 4)[k]) for k, v in weights(tmp_path / 'W', 4).items())


def test_the_advice_after_a_nan_works(tmp_path: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """To the letter: a new run in the folder, from the checkpoint and with the settings that the message names."""
    options = {**tiny, 'default_hooks.checkpoint.interval': 1, 'default_hooks.poison.type': 'Poison',
               'default_hooks.poison.step': 3}
    assert command(tmp_path / 'W', options) == 1
    advice = capfd.readouterr().err.splitlines()[-1].partition('without --resume, with ')[2]
    words = shlex.split(advice)
    assert words[0] == '--work-dir' and words[2] == '--cfg-options'
    changes = dict(word.split('=', 1) for word in words[3:])
    assert changes == {'load_from': str(tmp_path / 'W' / 'step2.pth'), 'optim_wrapper.optimizer.lr': '0.0001'}
    assert command(Path(words[1]), {**tiny, 'train_cfg.max_iters': 1, **changes}) == 0
    assert f"Loaded weights from '{tmp_path / 'W' / 'step2.pth'}'" in capfd.readouterr().out
