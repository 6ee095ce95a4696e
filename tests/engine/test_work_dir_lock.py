"""One training at a time in a work_dir; the lock dies with its process."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import build, train

from diffengine_sdxl import config
from diffengine_sdxl.engine import run_identity, work_dir_lock
from diffengine_sdxl.errors import UserError


def is_free(work_dir: Path) -> bool:
    """Whether another process could lock it now."""
    with open(work_dir / work_dir_lock.FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_second_process_is_refused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Before it writes anything; a test is not; a killed process leaves no lock, though its worker still lives."""
    (ready, tell), (worker_waits, hold) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        work_dir_lock.acquire(tmp_path / 'W')
        if os.fork() == 0:
            os.close(hold)
            os.write(tell, b'1')
            os.read(worker_waits, 1)  # until the test closes its end
            os._exit(0)
        signal.pause()
    os.read(ready, 1)
    try:
        with pytest.raises(UserError, match=f"/W' is in use: process {pid} on .*another --work-dir"):
            build(tmp_path / 'W', tiny)
        assert [p.name for p in (tmp_path / 'W').iterdir()] == ['run.lock']
        without = config.resolve(config.load('tiny_t2i_adapter', tiny))
        without.work_dir, without.train_cfg = str(tmp_path / 'W'), None
        run_identity.claim(without)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        work_dir_lock.acquire(tmp_path / 'W')
        assert not is_free(tmp_path / 'W')
        work_dir_lock.release(tmp_path / 'W')
        assert is_free(tmp_path / 'W')
    finally:
        for pipe in (ready, tell, worker_waits, hold):
            os.close(pipe)


def test_it_is_held_while_a_run_lasts(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """From the moment it is built to its end, or until it fails."""
    runner = build(tmp_path / 'W', {**tiny, 'train_cfg.max_iters': 1, 'default_hooks.checkpoint.export': False})
    assert not is_free(tmp_path / 'W')
    runner.train()
    assert is_free(tmp_path / 'W')
    with pytest.raises(UserError, match='already holds a run'):
        build(tmp_path / 'W', tiny)
    assert is_free(tmp_path / 'W')
    with pytest.raises(UserError, match='learning rate'):
        train(tmp_path / 'V', {**tiny, 'optim_wrapper.optimizer.lr': -1.0})
    assert is_free(tmp_path / 'V')


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, with a warning."""
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')
    said: list[str] = []
    monkeypatch.setattr(fcntl, 'flock', fail)
    monkeypatch.setattr(work_dir_lock, 'print_log', lambda text, **_: said.append(text))
    work_dir_lock.acquire(tmp_path)
    work_dir_lock.release(tmp_path)
    assert len(said) == 1 and 'file system without locks ([Errno 37] No locks' in said[0]
