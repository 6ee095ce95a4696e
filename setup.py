"""The build steps that make `mim` find the configs and tools; all metadata is in pyproject.toml.

mim looks into `<location>/<package>/.mim` for configs, tools and model-index.yml. An editable install has no copy of
the package at its location, so mim is pointed to the checkout instead, where `.mim` holds links.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = 'diffengine_sdxl'
SHIPPED = ('configs', 'tools', 'model-index.yml')


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class BuildWithMim(build_py):
    """Puts `.mim` into the package: copies when building, links into the checkout when editable."""

    def run(self) -> None:
        super().run()
        folder = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / PACKAGE / '.mim'
        folder.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            target, source = folder / name, ROOT / name
            # What an earlier build left there would be shipped again, also after it was renamed.
            remove(target)
            if self.editable_mode:
                os.symlink(os.path.relpath(source, folder), target)
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__', '*.pyc', '.*'))
            elif source.exists():
                shutil.copyfile(source, target)


class EditableWithMim(editable_wheel):
    """Names the package by its absolute folder in top_level.txt.

    mim joins the distribution's location (site-packages, under PEP 660) with that line, and an absolute path wins
    such a join. It has to be written before the wheel is made: pip keeps what was in the dist-info then.
    """

    def run(self) -> None:
        if not self.dist_info_dir:
            self._ensure_dist_info()
        Path(self.dist_info_dir, 'top_level.txt').write_text(f'{ROOT / PACKAGE}\n')
        super().run()


setup(cmdclass={'build_py': BuildWithMim, 'editable_wheel': EditableWithMim})
