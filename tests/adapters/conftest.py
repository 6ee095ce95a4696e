"""A base in fp64, in which rules are compared to 1e-10."""

from pathlib import Path

import pytest

from diffengine_sdxl.models.sdxl import SDXL


@pytest.fixture(scope='module')
def model64(tiny_base: Path) -> SDXL:
    return SDXL(pretrained=str(tiny_base), dtype='float64').requires_grad_(False)
