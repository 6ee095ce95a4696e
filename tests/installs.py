"""Installing the package into an environment of a test's own, offline, as a wheel and editable."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = 'diffengine_sdxl'
KINDS = {'wheel': [], 'editable': ['-e'], 'strict': ['--config-settings', 'editable_mode=strict', '-e'],
         'compat': ['--config-settings', 'editable_mode=compat', '-e']}


def run(command: Sequence[str | Path], cwd: Path, **env: str) -> str:
    """Its output; fails with it. Neither the caller's PYTHONPATH nor the folder of the tests leaks in."""
    kept = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True,
                          env={**kept, 'PYTHONNOUSERSITE': '1', 'PIP_NO_INPUT': '1', **env})
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def build(kind: str, project: Path) -> Path:
    """A wheel or an sdist of `project`, by the running environment's setuptools."""
    out = project.parent / f'{kind} of {project.name}'
    code = f'import sys; from setuptools import build_meta; print("MADE", build_meta.build_{kind}(sys.argv[1]))'
    out.mkdir(exist_ok=True)
    return out / run([sys.executable, '-c', code, out], project).split('MADE ')[-1].strip()


def copy_checkout(folder: Path) -> Path:
    """A copy of what git would hold."""
    folder.mkdir()
    for name in (NAME, 'configs', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '.mim', '*.egg-info'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md',
                 'model-index.yml', 'constraints.txt'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def environment(folder: Path) -> Path:
    """The python of an environment that sees the running one's packages, but not what their .pth files add."""
    venv.create(folder, with_pip=False)
    python = folder / 'bin' / 'python'
    site = run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], folder).strip()
    running = sysconfig.get_path('purelib')
    Path(site, 'running.pth').write_text(f'{running}\n')
    # mmengine imports distutils, which left Python with 3.12; setuptools has it, by a .pth file, read after the other.
    shutil.copy(Path(running, 'distutils-precedence.pth'), Path(site, 'running_distutils.pth'))
    return python


def install(python: Path, kind: str, package: Path, cwd: Path) -> None:
    """Install a wheel, or a checkout in the editable way `kind`, without its dependencies."""
    run([python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--no-index', '--ignore-installed', '-q',
         *KINDS[kind], package], cwd)
