"""`diffengine-sdxl report W`."""

from pathlib import Path

import pytest

from diffengine_sdxl.commands import cli


def test_it_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'metrics.json').write_text('{"adapted": {"iou": {"value": 0.5, "low": 0.25, "high": 0.75}}}')
    assert cli.main('report', [str(tmp_path)]) == 0
    assert capsys.readouterr().out == f'{tmp_path}/report.html\n' and '0.2500' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize(('name', 'words'), [('nowhere', 'is no folder'), ('.', 'neither a training nor a test')])
def test_a_folder_without_a_run(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main('report', [str(tmp_path / name)]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / 'report.html').exists()
