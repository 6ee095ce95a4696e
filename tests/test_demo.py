"""The demo removes only demos, and checks its options first; tests/test_docs.py runs it."""

import runpy
import sys
from pathlib import Path

import pytest

from diffengine_sdxl import errors
from diffengine_sdxl.errors import run_command

DEMO = str(Path(__file__).resolve().parents[1] / 'tools' / 'demo.py')


def demo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, 'argv', [DEMO, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(DEMO, run_name='__main__')
    return int(ended.value.code or 0)


def test_a_training_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    training = tmp_path / 'W'
    training.mkdir()
    (training / 'run.json').write_text('{}')
    assert demo(monkeypatch, '--work-dir', str(training)) == 1
    assert "is not a demo's folder" in capsys.readouterr().err and (training / 'run.json').is_file()


def test_a_mistyped_option_removes_no_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(errors, 'run_command', lambda name, args: 0)
    assert demo(monkeypatch, '--work-dir', str(tmp_path / 'D')) == 0
    (tmp_path / 'D' / 'kept').write_text('')
    assert demo(monkeypatch, '--work-dir', str(tmp_path / 'D'), '--cfg-options', 'train_cfg.max_itres=3') == 1
    assert 'max_iters' in capsys.readouterr().err and (tmp_path / 'D' / 'kept').is_file()
    assert demo(monkeypatch, '--work-dir', str(tmp_path / 'D')) == 0
    assert not (tmp_path / 'D' / 'kept').exists()


def test_a_sheet_without_an_export_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace
    args = SimpleNamespace(config='shapes_t2i_adapter', work_dir=str(tmp_path), cfg_options=None, adapter='adapter',
                           scales=[1.0])
    assert run_command('scales', args) == 1
    assert "has no exported adapter 'adapter'" in capsys.readouterr().err
