"""Errors: what the user can fix is one sentence; a bug keeps its traceback after a line that says so."""

import errno
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from diffengine_sdxl import commands, errors
from diffengine_sdxl.errors import UserError, one_of, run_command, user_message, whole_number


def command(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a command of this code to the package; return its name."""
    (folder / 'fake_command.py').write_text(code)
    monkeypatch.setattr(commands, '__path__', [*commands.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, 'diffengine_sdxl.commands.fake_command', raising=False)
    return 'fake_command'


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    """Also a ValueError, the base class of UserError."""
    (tmp_path / 'fake.py').write_text('def run(args, cleanup):\n    raise ValueError("ours")\n')
    code = (f'from diffengine_sdxl import commands; commands.__path__.append({str(tmp_path)!r})\n'
            'from diffengine_sdxl.errors import run_command; raise SystemExit(run_command("fake", None))')
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    first, second, *_, last = process.stderr.splitlines()
    assert process.returncode == 1 and process.stdout == ''
    assert first.startswith('internal error in fake: a bug of diffengine_sdxl') and second.startswith('Traceback')
    assert 'ValueError: ours' in process.stderr and 'fake.py", line 2, in run' in process.stderr
    assert last == 'error: internal error in fake: ValueError: ours'


def test_a_mistake_of_the_users_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, with exit code 1, after the cleanup."""
    name = command(tmp_path, 'from diffengine_sdxl.errors import UserError\ndef run(args, cleanup):\n'
                   '    cleanup.callback(print, "cleaned")\n    raise UserError("seed=-1 is bad.")\n', monkeypatch)
    assert run_command(name, Namespace(launcher='none')) == 1
    assert capsys.readouterr() == ('cleaned\n', 'error: seed=-1 is bad.\n')


@pytest.mark.parametrize(('code', 'message'), [
    ('raise KeyboardInterrupt', 'Stopped.'),
    ('STOPPED = "Use --resume."\ndef run(args, cleanup):\n    raise KeyboardInterrupt', 'Use --resume.')])
def test_ctrl_c(code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> None:
    """While the command's module is being imported, and while it runs."""
    assert run_command(command(tmp_path, code, monkeypatch), Namespace()) == 130
    assert capsys.readouterr() == ('', f'{message}\n')


@pytest.mark.parametrize(('error', 'message'), [
    (UserError(' plain. '), 'plain.'),
    (UserError('Caught UserError in DataLoader worker process 0.\nTraceback\ndiffengine_sdxl.errors.UserError: row 3'),
     'row 3'),
    (torch.OutOfMemoryError('CUDA out of memory.\nmore'), 'out of memory (CUDA out of memory.). Use less.'),
    (MemoryError(), 'out of memory (MemoryError). Use less.'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "out of memory (DefaultCPUAllocator: can't allocate memory). Use less."),
    (OSError(errno.ENOSPC, 'No space left on device', 'x.pth'), "[Errno 28] No space left on device: 'x.pth'"),
    (PermissionError(errno.EACCES, 'Permission denied', 'x'), "[Errno 13] Permission denied: 'x'"),
    (ModuleNotFoundError("No module named 'bitsandbytes'", name='bitsandbytes'),
     "a package is missing: No module named 'bitsandbytes' (pip install bitsandbytes)"),
    (ImportError('needs the library cv2'), 'a package is missing: needs the library cv2'),
    # Bugs of this package.
    (ModuleNotFoundError('No module', name='diffengine_sdxl.nothing'), None),
    (ImportError("cannot import name 'x'", name='diffengine_sdxl.errors'), None),
    (ImportError("cannot import name 'x'", name='torch'), None), (ValueError('ours'), None), (KeyError('ours'), None),
    (RuntimeError('shape mismatch'), None), (FileNotFoundError(errno.ENOENT, 'No such file', 'x'), None)])
def test_what_the_user_is_told(error: BaseException, message: str | None) -> None:
    assert user_message(error, 'Use less.') == message


def test_helpers() -> None:
    assert errors.listed(range(4), 3) == '0, 1, 2 ...' and errors.listed('abc') == 'a, b, c'
    assert errors.first_line(ValueError('a\nb')) == 'a' and errors.first_line(ValueError()) == 'ValueError'
    one_of('mode', 'a', ('a', 'b'))
    with pytest.raises(UserError, match=r"mode='scal' is unknown; choose one of 'scale', 'x'\. Did you mean 'scale'\?"):
        one_of('mode', 'scal', {'scale': 1, 'x': 2})
    with pytest.raises(UserError, match=r"^mode=\['a'\] is unknown; choose one of 'a'\.$"):
        one_of('mode', ['a'], {'a'})
    assert whole_number('n', 3.0) == 3 and type(whole_number('n', 3.0)) is int
    for value, message in ((2.5, 'n=2.5 must be a whole number'), ('3', "n='3' must be a whole"), (True, 'n=True must'),
                           (float('nan'), 'n=nan must be a whole number'), (0, 'n=0 must be at least 1')):
        with pytest.raises(UserError, match=message):
            whole_number('n', value, low=1)


@pytest.mark.parametrize(('size', 'who'), [(2, 'process 1 of this run'), (3, 'another process of this run')])
def test_a_process_that_lost_another_one_says_so(size: int, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By gloo's words, as they are when a process is killed; a RuntimeError of another kind stays a bug."""
    for name, value in (('is_initialized', True), ('get_world_size', size), ('get_rank', 0)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    lost = '[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:56014. This is typically'
    message = user_message(RuntimeError(lost)) or ''
    assert message.startswith(who) and '--resume' in message and 'Connection closed by peer' in message
    assert user_message(RuntimeError('The size of tensor a (3) must match')) is None
    assert (user_message(torch.distributed.DistNetworkError('recvBytes')) or '').startswith(who)
