"""What many tests share: a tiny SDXL and a folder of circles, written once a session; one thread, unless told other.

OMP_NUM_THREADS sets the threads, OTHER_KERNELS=1 computes as in `other_kernels.py`; `make parity` uses both.
"""

import gc
import os
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from bitwise import claims
from other_kernels import OtherKernels
from parity import stock

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_circles, write_tiny_sdxl

pytest_plugins = ['run_fixtures']
torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(scope='session')
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL in diffusers' layout. Don't write into it."""
    return write_tiny_sdxl(tmp_path_factory.mktemp('tiny') / 'base')


@pytest.fixture(scope='session')
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 16 circles of 64 pixels with their outlines and captions. Don't write into it."""
    return write_circles(tmp_path_factory.mktemp('circles') / 'data')


@pytest.fixture(scope='module')
def model(tiny_base: Path) -> Any:
    """That SDXL as ours, without adapters."""
    return SDXL(pretrained=str(tiny_base))


@pytest.fixture(scope='module')
def pipeline(tiny_base: Path) -> Any:
    """And as stock's pipeline."""
    return stock(tiny_base)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--bitwise', action='store_true', help='only tests that claim bitwise equality')


def pytest_configure() -> None:
    if os.environ.get('OTHER_KERNELS') == '1':
        OtherKernels().__enter__()  # for good: what fixtures compute belongs to it


def pytest_collection_finish() -> None:
    """Leave what torch and transformers made while imported, half a million objects, out of all garbage collections,
    which are a tenth of the suite's time with them; and collect less often."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)


#: Files of a few long tests, in which packages are installed and commands run. They come first, so that at the end no
#: worker waits for another that has just begun one (with --no-loadscope-reorder).
FIRST = ('test_install.py', 'test_commands.py', 'test_docs.py', 'test_command_inputs.py', 'test_export_command.py',
         'test_checkpoint.py', 'test_resume.py', 'test_test_command.py')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first; leave out what makes no claim, where `--bitwise` asks for that."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if config.getoption('--bitwise'):
        kept = [item for item in items if claims(item.path, getattr(item, 'originalname', item.name))]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by their name: with their address, as pytest has them, two workers would not find the same tests."""
    return getattr(val, '__qualname__', None) if callable(val) and not isinstance(val, type) else None
