"""The cache command: filled ahead is what training finds, bit for bit; shown, verified, pruned; mistakes."""

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import curves, train
from safetensors.torch import load_file, save_file

from diffengine_sdxl import config
from diffengine_sdxl.cache import shards
from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.commands import cache as command
from diffengine_sdxl.commands import cli
from diffengine_sdxl.commands.cache import encode
from diffengine_sdxl.errors import run_command
from diffengine_sdxl.loading.deferred import Deferred

ROOT = Path(__file__).resolve().parents[2]
#: Two crops of three drawn images, with outlines and captions.
SHAPES = """
_base_ = ['diffengine_sdxl::_base_/models/shapes.py', 'diffengine_sdxl::_base_/datasets/shapes.py']
default_scope = 'diffengine_sdxl'
resolution = 32
train_dataloader = dict(batch_size=2, sampler=dict(shuffle=False), dataset=dict(
    length=3, oversize=1.0, variants=2, transforms=[
    dict(type='Crop', size='$resolution', mode='random'), dict(type='ComputeTimeIds'), dict(type='PackInputs')]))
model = dict(objective=dict(type='Denoise'), adapters=dict(adapter=dict(type='T2IAdapter')))
randomness = dict(seed=3)
"""


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config above; its base is set by an override."""
    path = tmp_path_factory.mktemp('configs') / 'shapes.py'
    path.write_text(SHAPES)
    return path


@pytest.fixture
def run(shapes: Path, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command on the config above; return its exit code, output and error."""
    def run(*options: str, folder: Path | None = tmp_path / 'cache', **settings: Any) -> tuple[int, str, str]:
        names = dict(config=str(shapes), folder=None if folder is None else str(folder), num_samples=None, prune=None,
                     verify=False, show=False, launcher='none', cfg_options=[f'model.pretrained={tiny_base}', *options])
        capfd.readouterr()
        code = run_command('cache', argparse.Namespace(**{**names, **settings}))
        return code, *(' '.join(text.split()) for text in capfd.readouterr())
    return run


def entries(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob('*.safetensors') for name, tensor in load_file(path).items()}


def test_all_variants_are_filled_once(run: Callable[..., Any], tmp_path: Path) -> None:
    """Again costs nothing and loads nothing; after a part, the rest; and the entries are those of any other filling."""
    code, out, _ = run(num_samples=1)
    assert code == 0 and 'moments: 0 were there, 2 are new.' in out and 'text: 1 were there, 1 are new.' in out
    code, out, _ = run()
    assert code == 0 and 'moments: 2 were there, 4 are new. sample: 2 were there, 4 are new. text: 4 were there' in out
    assert '15 entries (6 moments, 6 sample, 3 text)' in out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deferred, 'load', lambda self, *_: pytest.fail(f'the {self._name} is loaded'))
        code, out, _ = run()
    assert code == 0 and 'moments: 6 were there, 0 are new.' in out
    assert run('train_dataloader.batch_size=5', folder=tmp_path / 'other')[0] == 0
    found, expected = entries(tmp_path / 'cache'), entries(tmp_path / 'other')
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_processes_share_the_work(shapes: Path, tiny_base: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes every second sample of each variant."""
    cfg = config.resolve(config.load(shapes, {'model.pretrained': str(tiny_base)}))
    numbers = []
    for rank in range(2):
        monkeypatch.setattr(command, 'get_dist_info', lambda rank=rank: (rank, 2))
        store = Store(tmp_path / 'cache')
        encode(cfg, store)
        store.close()
        numbers.append(store.counts['moments'])
    assert numbers == [[0, 4], [0, 2]]


def test_a_run_finds_what_was_filled_ahead(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """By the command lines of both: no encoder is loaded. What it computes: tests/engine/test_cache.py."""
    options = {**tiny, 'randomness.seed': 1, 'train_cfg.max_iters': 1, 'default_hooks.checkpoint': None}
    arguments = [f'{k}={v}' for k, v in options.items() if k.startswith(('model.pre', 'train_data', 'resol', 'random'))]
    assert run_command('cache', argparse.Namespace(
        config='tiny_t2i_adapter', folder=str(tmp_path / 'cache'), num_samples=None, verify=False, prune=None,
        show=False, launcher='none', cfg_options=arguments)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deferred, 'load', lambda self, *_: pytest.fail(f'the {self._name} is loaded'))
        train(tmp_path / 'with', {**options, 'cache': str(tmp_path / 'cache')})
    assert len(curves(tmp_path / 'with')) == 1


def test_wrong_entries_are_found(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared bit by bit on the processor that made them; removed; exit code 1; then the rest is right."""
    monkeypatch.setattr('diffengine_sdxl.cache.store.SHARD_SECONDS', 3600.0)  # one file
    run()
    files = {path: shards.read_header(path) for path in (tmp_path / 'cache').glob('*.safetensors')}
    path, wrong = next((path, entry) for path, listed in files.items() for entry in listed if entry.kind == 'moments')
    listed = files[path]
    store = Store(tmp_path / 'cache')
    tensors = {entry.key: store.get(entry.key) for entry in listed}
    store.close()
    tensors[wrong.key]['mean'][0, 0, 0] += 1e-6  # type: ignore[index]
    path.unlink()
    shards.write(path, {e.key: shards.NewEntry(e.kind, e.device, tensors[e.key]) for e in listed})  # type: ignore[arg-type]
    (tmp_path / 'cache' / 'index.sqlite').unlink()
    code, out, _ = run(verify=True)
    assert code == 1 and 'this config reads, 14 are right, 1 are wrong' in out
    assert f"moments {wrong.key}: 'mean' differs" in out
    code, out, _ = run(verify=True)
    assert code == 0 and '14 are right, 0 are wrong, 1 are not in the cache.' in out
    (path,) = (tmp_path / 'cache').glob('*.safetensors')
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, out, _ = run(verify=True)
    assert code == 1 and '0 are right, 14 are wrong, 1 are not in the cache.' in out, 'also those read before it'


def test_showing_and_pruning(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, 'encode', lambda *_: Store(tmp_path / 'cache').put('ab' * 16, 'text', {
        'x': torch.zeros(3)}))
    (tmp_path / 'cache').mkdir()
    assert run(show=True)[1] == f"Cache '{tmp_path / 'cache'}': empty."
    store = Store(tmp_path / 'cache')
    store.put('ab' * 16, 'text', {'x': torch.zeros(3)})
    store.close()
    assert '1 entries (1 text)' in run(show=True)[1]
    assert '0 files with 0.0 MiB are removed' in run(prune=1)[1]
    with store.index.transaction() as db:
        db.execute('UPDATE shards SET used = used - 2 * 86400')
    store.close()
    code, out, _ = run(prune=1.5)
    assert code == 0 and '1 files with 0.0 MiB are removed.' in out and 'empty' in out


def test_mistakes_are_sentences(run: Callable[..., Any], circles: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder, new = tmp_path / 'cache', tmp_path / 'new'
    for settings in (dict(show=True), dict(verify=True), dict(prune=1.0)):
        code, _, error = run(folder=new, **settings)
        assert code == 1 and f"There is no cache '{new}'." in error
    assert run('model.vae=/nowhere', folder=new)[0] == run('train_dataloader=None', folder=new)[0] == 1
    assert not new.exists()
    for options, words in ((['--prune', 'x'], "argument --prune: 'x' must be a number of days of at least 0."),
                           (['--prune', '-1'], "argument --prune: '-1' must be a number"),
                           (['--show', '--verify'], 'argument --verify: not allowed with argument --show.')):
        with pytest.raises(SystemExit):
            cli.parse('cache', ['C', *options])
        assert words in capfd.readouterr().err
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a').touch()
    Store(folder).close()
    read_only = f'cache=dict(folder={folder},read_only=True)'
    for words, options, settings in (
            ('The config names no cache. Add --folder F', (), dict(folder=None)),
            ("mine' holds something else than a cache (a)", (), dict(folder=tmp_path / 'mine')),
            ('num_samples=0 must be at least 1', (), dict(num_samples=0)),
            ("no file or folder '/nowhere'", ('model.vae=/nowhere',), {}),
            ("Did you mean 'resolution'", ('resolutoin=32',), {}),
            ('A HFStream cannot be read ahead; its training fills the cache', (
                f'train_dataloader.dataset=dict(_delete_=True,type=HFStream,source={circles})',), {}),
            ("The config has no 'train_dataloader.dataset'", ('train_dataloader=None',), {}),
            ('is only read, so it cannot be filled. Set read_only=False.', (read_only,), dict(folder=None)),
            ('is only read, so it cannot be pruned', (read_only,), dict(folder=None, prune=1)),
            ('work in one process', (), dict(prune=1, launcher='pytorch'))):
        if 'launcher' in settings:
            monkeypatch.setattr('os._exit', lambda code: None)
        code, _, error = run(*options, **settings)
        assert code == 1 and error.splitlines()[-1].count('error: ') == 1 and words in error, (words, error)

    with monkeypatch.context() as patch:
        access = os.access
        patch.setattr(os, 'access', lambda path, mode: mode != os.W_OK and access(path, mode))
        assert 'Its folder is not writable here; name another one' in run()[2]
    with monkeypatch.context() as patch:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, 'No space left on device')
        patch.setattr(shards, 'save', full)
        code, out, error = run(num_samples=1)
        assert code == 1 and 'moments: 0 were there, 0 are new.' in out and error.endswith(
            'cannot be used any further: No space left on device. What is in it stays, and the same command goes on.')

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt
    monkeypatch.setattr(command, 'encode', interrupt)
    code, _, error = run()
    assert code == 130 and error == 'Stopped; what was encoded is kept, and the same command goes on.'


def test_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_file({'x': torch.zeros(1)}, tmp_path / 'x.safetensors')
    monkeypatch.setattr(sys, 'argv', ['cache.py', 'tiny_t2i_adapter', '--folder', str(tmp_path), '--show'])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / 'tools' / 'cache.py'), run_name='__main__')
    assert ended.value.code == 1 and 'holds something else than a cache (x.safetensors)' in capsys.readouterr().err
