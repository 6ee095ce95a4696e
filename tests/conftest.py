"""What many tests share: a tiny SDXL and a folder of circles, written once a session; one thread."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from other_kernels import OtherKernels
from parity import stock

from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_circles, write_tiny_sdxl

torch.set_num_threads(1)


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
    parser.addoption('--other-kernels', action='store_true', help='compute as in tests/other_kernels.py')


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption('--other-kernels'):
        OtherKernels().__enter__()  # for good: what fixtures compute belongs to it


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by their name: with their address, as pytest has them, two workers would not find the same tests."""
    return getattr(val, '__qualname__', None) if callable(val) and not isinstance(val, type) else None
