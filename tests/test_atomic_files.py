"""Files and folders are written whole or not at all, and what killed processes leave goes."""

import os
import signal
import time
from pathlib import Path

import pytest

from diffengine_sdxl import atomic_files


def held_by_a_child(path: Path) -> int:
    """Begin to replace `path` in a forked process, which waits to be killed; return its id."""
    if (child := os.fork()) == 0:
        with atomic_files.replacing(path) as temporary:
            temporary.write_text('half')
            time.sleep(60)
        os._exit(0)
    while not list(path.parent.glob(f'.{path.name}.*.part/{path.name}')):
        time.sleep(0.01)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of a process that still writes, nor of the user, however alike the names."""
    mine = ['.x.png.part', '.notes.part', '.a.abcdefgh.part/b', '.b.abcdefgh.part']
    (tmp_path / '.a.abcdefgh.part').mkdir()
    for name in mine:
        (tmp_path / name).write_text('mine')
    killed, alive = (held_by_a_child(tmp_path / name) for name in ('killed.png', 'alive.png'))
    kill(killed)
    monkeypatch.setattr(atomic_files, '_cleaned', set())
    with atomic_files.replacing(tmp_path / 'next.png') as temporary:
        temporary.write_text('whole')
    rest = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith('.alive.png.'))
    assert rest == sorted({name.split('/')[0] for name in mine} | {'next.png'})
    assert (tmp_path / 'next.png').read_text() == 'whole' and (tmp_path / '.a.abcdefgh.part' / 'b').exists()
    assert len(list(tmp_path.glob('.alive.png.*.part/alive.png'))) == 1
    kill(alive)
    atomic_files.clean(tmp_path)
    assert not list(tmp_path.glob('.alive.png.*')) and (tmp_path / '.notes.part').read_text() == 'mine'


def test_an_old_folder_comes_back(tmp_path: Path) -> None:
    """After a kill between setting the old one aside and moving the new one in, and after an error there."""
    part = tmp_path / '.step1.abcd1234.part'
    for name in ('.old', 'step1'):
        (part / name).mkdir(parents=True)
        (part / name / name).touch()
    atomic_files.clean(tmp_path)
    assert os.listdir(tmp_path) == ['step1'] and os.listdir(tmp_path / 'step1') == ['.old']
    with pytest.raises(FileNotFoundError), atomic_files.replacing(tmp_path / 'step1'):
        pass  # nothing is written, so that nothing can be moved in
    assert os.listdir(tmp_path) == ['step1'] and os.listdir(tmp_path / 'step1') == ['.old']
