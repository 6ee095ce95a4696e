"""Checkpoints are plain, whole or not there at all, and hold what trains."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from runs import CONFIG, assert_same_run, command, train

from diffengine_sdxl import atomic_files, config
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.loading.trained import apply_weights, load_export, resolve_checkpoint

META = {'step': 0, 'position': 0, 'seed': 0, 'samples_per_iter': 1, 'identity': {}}


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Inside, a write that would make a file larger fails, as on a full disk (EFBIG, Python ignores the signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, circles: Path) -> Path:
    """A finished run of three steps with an EMA, of whose checkpoints the last two are kept."""
    folder = tmp_path_factory.mktemp('run')
    runner = train(folder, {
        'model.pretrained': str(tiny_base), 'train_dataloader.dataset.source': str(circles), 'resolution': 32,
        'train_cfg.max_iters': 3, 'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None,
        'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.max_keep_ckpts': 2,
        'custom_hooks': [dict(type='EMAHook', decay=0.5)]})
    assert runner.iter == 3
    return folder


def test_torch_reads_them_as_they_are(run: Path) -> None:
    """With `weights_only=True` and no allow-list; nothing in them but tensors, numbers, strings, dicts and lists."""
    path = run / 'step3.pth'
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = torch.load(path, weights_only=True)

    def kinds(value: Any) -> set[type]:
        children = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        return {type(value)}.union(*map(kinds, children))
    assert kinds(state) <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert state['meta']['step'] == 3 and state['meta']['position'] == 6 and state['meta']['seed'] == 0


def test_only_what_trains_is_kept(run: Path, tiny_base: Path) -> None:
    state = torch.load(run / 'step3.pth', weights_only=True)
    assert all(key.startswith('adapters.adapter.net.') for key in state['state_dict'])
    exported = sum(p.stat().st_size for p in (run / 'step3' / 'adapter').glob('*.safetensors'))
    # Weights, averages and two moments, each as large as the export; 200 kB of names and numbers.
    assert (run / 'step3.pth').stat().st_size < 4 * exported + 200_000


def test_the_newest_are_kept(run: Path) -> None:
    assert sorted(p.name for p in run.glob('step*')) == ['step2', 'step2.pth', 'step3', 'step3.pth']
    assert checkpoint.latest(run) == run / 'step3.pth'


def test_the_latest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for name in ('step9.pth', 'step10.pth', 'step100.pth.tmp', 'stepx.pth', '.step11.pth.abc.part'):
        (tmp_path / name).touch()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ['step9.pth', 'step10.pth']
    assert checkpoint.latest(tmp_path / 'nowhere') is None


def test_what_numpy_and_mmengine_leave_becomes_plain(tmp_path: Path) -> None:
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 1])
    held = {'a': np.float64(1.5), 'b': np.arange(3), 'c': buffer, 'd': [np.int64(3), (np.bool_(True), None)],
            'e': torch.nn.Parameter(torch.ones(2)), 'state_dict': {}, 'meta': META}
    checkpoint.save(tmp_path / 'x.pth', held)
    loaded = checkpoint.load(tmp_path / 'x.pth')
    assert type(loaded['a']) is float and loaded['a'] == 1.5 and loaded['b'].tolist() == [0, 1, 2]
    assert loaded['d'] == [3, (True, None)] and type(loaded['e']) is torch.Tensor
    again = checkpoint.restore_buffer(loaded['c'])
    assert again.mean() == 2.0 and again.current() == 3.0


def test_logged_scalars_stay_bounded() -> None:
    """mmengine's own history grows with the run, and is copied at each step."""
    buffer = checkpoint.bounded_buffer()
    for i in range(1000):
        buffer.update(float(i))
    assert len(buffer.data[0]) == checkpoint.NUM_SCALARS and buffer.current() == 999
    plain = checkpoint.as_plain_data(HistoryBuffer(list(range(1000)), [1] * 1000))
    assert len(plain['history']) == checkpoint.NUM_SCALARS


@pytest.mark.parametrize('failure', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt(),
                                     RuntimeError('PytorchStreamWriter failed writing file')])
def test_a_write_that_fails_leaves_the_old_file(failure: BaseException, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'step1.pth'
    checkpoint.save(path, {'state_dict': {}, 'meta': {**META, 'step': 1}})

    def half(state: Any, file: Any) -> None:
        file.write(b'half')
        raise failure
    monkeypatch.setattr(checkpoint.torch, 'save', half)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError) as caught:
        checkpoint.save(path, {'state_dict': {}, 'meta': {**META, 'step': 2}})
    if not isinstance(failure, KeyboardInterrupt):
        assert str(path) in str(caught.value) and 'untouched' in str(caught.value) and 'MiB' in str(caught.value)
    assert checkpoint.load(path)['meta']['step'] == 1
    assert os.listdir(tmp_path) == ['step1.pth']


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match='a fault of ours'), atomic_files.replacing(tmp_path / 'x') as path:
        path.write_text('half')
        raise RuntimeError('a fault of ours')
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ('old', 'new'):
        with atomic_files.replacing(tmp_path / 'step1') as path:
            path.mkdir()
            (path / content).touch()
    assert [p.name for p in (tmp_path / 'step1').iterdir()] == ['new'] and os.listdir(tmp_path) == ['step1']


@pytest.mark.parametrize('limit', ['export', 'checkpoint'])
def test_no_room_while_saving(limit: str, tmp_path: Path, tiny: dict[str, Any],
                              capfd: pytest.CaptureFixture[str]) -> None:
    """The disk fills up at step 4: a sentence, exit code 1, the checkpoint of step 2 untouched; with room again the
    resumed run ends as one that never ran out."""
    options = {**tiny, 'default_hooks.checkpoint.export': limit == 'export', 'visualizer.vis_backends': []}
    train(tmp_path / 'whole', tiny)
    train(tmp_path / 'cut', options, die_at=3)
    before = (tmp_path / 'cut' / 'step2.pth').read_bytes()
    # The export is 1.2 MB, the checkpoint three times that.
    with no_file_above({'export': 200_000, 'checkpoint': 2_000_000}[limit]):
        assert command(tmp_path / 'cut', options, resume='auto') == 1
    error = capfd.readouterr().err
    assert 'Traceback' not in error and 'error: ' in error and 'too large' in error.lower()
    assert 'step4' in error and 'What was saved before is untouched' in error
    assert (tmp_path / 'cut' / 'step2.pth').read_bytes() == before
    assert not list((tmp_path / 'cut').glob('step4*')) and not list((tmp_path / 'cut').glob('.*'))
    assert command(tmp_path / 'cut', options, resume='auto') == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut', 4)


@pytest.mark.parametrize('writer', ['curves.jsonl', 'samples'])
def test_no_room_for_the_rest(writer: str, tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
                              capfd: pytest.CaptureFixture[str]) -> None:
    """Logs and pictures end in the same way: a sentence and exit code 1. Another error is not hidden."""
    from diffengine_sdxl.engine.hooks.curves import CurvesHook
    from diffengine_sdxl.engine.hooks.samples import SampleHook
    error = OSError(errno.ENOSPC, 'No space left on device', str(tmp_path / writer))

    def full(*_: Any) -> None:
        raise error
    monkeypatch.setattr(CurvesHook, '_flush', full if writer == 'curves.jsonl' else CurvesHook._flush)
    monkeypatch.setattr(SampleHook, 'draw', full if writer == 'samples' else SampleHook.draw)
    del tiny['default_hooks.samples']
    options = {**tiny, 'default_hooks.samples.interval': 1}
    assert command(tmp_path / 'a', options) == 1
    assert 'No space left on device' in (said := capfd.readouterr().err) and 'Traceback' not in said
    error = OSError(errno.ENOENT, 'a fault of ours')
    assert command(tmp_path / 'b', options) == 1
    said = capfd.readouterr().err
    assert 'Traceback' in said and 'error: internal error in train: FileNotFoundError: ' in said.splitlines()[-1]


def test_a_work_dir_that_cannot_be(tmp_path: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').write_text('mine')
    assert command(tmp_path / 'file' / 'run', tiny) == 1 and command(tmp_path / 'file', tiny) == 1
    said = capfd.readouterr().err
    assert 'Traceback' not in said and said.count(f"error: '{tmp_path}/file") == 2
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('damage', ['cut off', 'empty', 'not a checkpoint', 'a pickle'])
def test_a_damaged_checkpoint_is_named(damage: str, run: Path, tmp_path: Path) -> None:
    path = tmp_path / 'step3.pth'
    whole = (run / 'step3.pth').read_bytes()
    if damage in ('cut off', 'empty'):
        path.write_bytes(whole[:len(whole) // 2 if damage == 'cut off' else 0])
    else:
        torch.save({'weights': 1} if damage == 'not a checkpoint' else {'x': Path('x')}, path)
    with pytest.raises(UserError, match='step3.pth') as caught:
        checkpoint.load(path)
    said = str(caught.value)
    assert said.endswith('. Use that of another step (in a training: --resume PATH).') or "no 'state_dict'" in said
    with pytest.raises(UserError, match='There is no checkpoint'):
        checkpoint.load(tmp_path / 'step4.pth')


def test_loading_is_strict(run: Path) -> None:
    """A key too few, one too many, another shape: each refused by name, and nothing is loaded."""
    module = torch.nn.Linear(2, 3)
    fits = {'weight': torch.ones(3, 2), 'bias': torch.ones(3)}
    for state, words in (({'weight': fits['weight']}, r'1 key missing \(bias\)\.$'),
                         ({**fits, 'more': torch.ones(1)}, r'1 key not in the model \(more\)'),
                         ({**fits, 'bias': torch.ones(4)}, r'1 key of another shape \(bias \(4,\) for \(3,\)\)')):
        before = module.weight.detach().clone()
        with pytest.raises(UserError, match=words):
            checkpoint.load_strict(module, state, 'file.pth')
        assert torch.equal(module.weight, before)
    checkpoint.load_strict(module, fits, 'file.pth')
    assert torch.equal(module.weight, fits['weight'])


def test_load_from_takes_the_ema_weights(run: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """A new run begins with the averages, at step 0; one with other adapters is told which these are."""
    state = torch.load(run / 'step3.pth', weights_only=True)
    options = {**tiny, 'load_from': str(run / 'step3.pth')}
    runner = train(tmp_path / 'new', {**options, 'train_cfg.max_iters': 1, 'optim_wrapper.optimizer.lr': 0.0})
    own = runner.model.state_dict()
    assert runner.iter == 1 and own.keys() == state['ema']['weights'].keys()
    assert all(torch.equal(own[k], v) for k, v in state['ema']['weights'].items())
    assert any(not torch.equal(own[k], v) for k, v in state['state_dict'].items())
    with pytest.raises(UserError, match="the config trains T2IAdapter 'adapter', T2IAdapter 'two'") as caught:
        train(tmp_path / 'other', {**options, 'model.adapters.two': dict(type='T2IAdapter')})
    assert str(run / 'step3.pth') in str(caught.value)


@pytest.mark.parametrize('name', ['step3.pth', '', 'step3', 'step3/adapter'])
def test_weights_of_other_adapters(name: str, run: Path) -> None:
    """Refused by what they are, before a model is built; of one adapter's folder only its type counts."""
    apply_weights(config.load(CONFIG), str(run / name))  # its own
    cfg = config.load('shapes_lora')
    with pytest.raises(UserError, match=r"T2IAdapter 'adapter', and the config trains LoRA 'style'\. Use") as caught:
        apply_weights(cfg, str(run / name))
    assert ' ...' not in str(caught.value)
    cfg.model.adapters = {'style': dict(type='T2IAdapter')}
    with nullcontext() if name == 'step3/adapter' else pytest.raises(UserError, match="trains T2IAdapter 'style'"):
        apply_weights(cfg, str(run / name))
    cfg.model.adapters = None  # what loads them says which keys don't fit
    apply_weights(cfg, str(run / name))


def test_a_folder_that_no_adapter_reads(tmp_path: Path) -> None:
    """Without a manifest that says what it is: which adapter, of which type, should take it."""
    class Style:
        def load(self, folder: Path) -> None:
            raise UserError('no file named config.json.')
    model: Any = SimpleNamespace(adapters={'style': Style()})
    with pytest.raises(UserError, match=f"'{tmp_path}' does not fit adapter 'style' \\(Style\\): no file named"):
        load_export(model, tmp_path)


def test_the_best_step_by_name(tmp_path: Path) -> None:
    """Only best.json says it, whatever else is called so."""
    (tmp_path / 'step2.pth').touch()
    with pytest.raises(UserError, match=f"'{tmp_path}' has no best.json, .*checkpoint.keep_best=METRIC"):
        resolve_checkpoint(str(tmp_path / 'best'))
    (tmp_path / 'best').mkdir()
    (tmp_path / 'best.json').write_text('{"step": 2}')
    assert resolve_checkpoint(str(tmp_path / 'best')) == tmp_path / 'step2.pth'
    for text, words in (('{', "best.json' cannot be read: "), ('{"step": "x"}', r"best.json' is damaged \(ValueError"),
                        ('{"step": 3}', 'names step 3')):
        (tmp_path / 'best.json').write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            resolve_checkpoint(str(tmp_path / 'best'))
        assert 'UserError' not in str(caught.value)
