"""SIGKILL: the last checkpoint loads, and the resumed run ends bitwise as the one that nobody killed.

benchmarks/kill.py does the same 20 times and prints a table; its parts are used here.
"""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import curves

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def kill() -> Any:
    """benchmarks/kill.py as a module, which the forked runs can import too."""
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        import kill as module
        yield module
    finally:
        sys.path.remove(str(ROOT / 'benchmarks'))


def test_three_kills(kill: Any, tmp_path: Path) -> None:
    """At a random moment, in the middle of a checkpoint, in the middle of an export; the last two hit the same run."""
    whole, seconds = kill.prepare(tmp_path)
    assert [row['step'] for row in curves(whole)] == list(range(1, kill.STEPS + 1))
    moment = random.uniform(0.4, 0.8) * seconds
    moments = {'random': lambda s: s > moment, 'checkpoint': kill.saving(tmp_path / 'run1', after=1),
               'export': kill.saving(tmp_path / 'run1', '.step?.*.part', after=4)}
    hits, lefts = {}, {}
    for name, due in moments.items():
        work_dir = tmp_path / ('run0' if name == 'random' else 'run1')
        hits[name] = kill.kill(tmp_path, work_dir, due)[0]
        lefts[name] = kill.check_left(work_dir)
    # A random moment may come after the end, when the machine is fast; the others are seen happening.
    assert hits['checkpoint'] and hits['export'], (hits, (tmp_path / 'run1.log').read_text()[-2000:])
    assert int(lefts['export'][4:]) >= 4 > int(lefts['checkpoint'][4:]) >= 1
    for work_dir in (tmp_path / 'run0', tmp_path / 'run1'):
        kill.finish(tmp_path, work_dir)
        assert kill.compare(whole, work_dir) == [], work_dir
        assert sorted(p.name for p in work_dir.glob('step*.pth')) == [
            f'step{kill.STEPS - 1}.pth', f'step{kill.STEPS}.pth']


def test_the_comparison_sees_a_bit(kill: Any) -> None:
    import torch
    one = {'a': [torch.zeros(3), 1.0], 'log_scalars': {'train/time': torch.ones(1)}}
    other = {'a': [torch.zeros(3), 1.0], 'log_scalars': {'train/time': torch.zeros(1)}}
    assert list(kill.differences(one, other)) == []
    other['a'][0][1] = 1e-45
    assert len(list(kill.differences(one, other))) == 1
    assert len(list(kill.differences(one, {**one, 'b': None}))) == 0 and len(list(kill.differences(one, {}))) == 2
