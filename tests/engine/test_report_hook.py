"""When the report is written while a run trains, and that it never ends the run."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffengine_sdxl.config.overrides import DEFAULT_HOOKS
from diffengine_sdxl.engine.hooks import report
from diffengine_sdxl.errors import UserError


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    return SimpleNamespace(work_dir=str(tmp_path), max_iters=6, logger=logging.getLogger('report'))


def test_it_is_written_after_a_checkpoint_and_a_validation(runner: Any, tmp_path: Path) -> None:
    (tmp_path / 'val').mkdir()
    (tmp_path / 'step2.pth').touch()
    hook, written = report.ReportHook(), []
    for step, name in ((1, None), (2, 'step2.pth'), (3, None), (4, 'val/step4.json'), (6, 'step6.pth')):
        if name is not None:
            (tmp_path / name).write_text('{}')
        hook.after_step(runner, step)
        if (tmp_path / 'report.html').exists():
            written.append(step)
            (tmp_path / 'report.html').unlink()
    assert written == [2, 4]  # that of the last step is written once, at the end
    hook.after_train(runner)
    assert '6 steps' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), UserError('x'), KeyError('a bug')])
def test_a_report_that_fails_is_a_warning(error: Exception, runner: Any, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Path) -> Path:
        raise error
    monkeypatch.setattr(report, 'write_report', fail)
    report.ReportHook().after_train(runner)
    message, = caplog.messages
    assert str(error) in message and f'diffengine-sdxl report {runner.work_dir}' in message


def test_every_run_has_it() -> None:
    assert DEFAULT_HOOKS['report'] == 'ReportHook'
