"""What the training command says at once; tests/test_commands.py trains and resumes with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tool(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / 'tools' / 'train.py', *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'})


def test_help_comes_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = tool('-h', cwd=tmp_path)
    assert done.returncode == 0 and '--cfg-options' in done.stdout and '--gpus' not in done.stdout
    assert time.monotonic() - begin < 2  # 0.1 s; the imports alone would be 4
    assert list(tmp_path.iterdir()) == []
