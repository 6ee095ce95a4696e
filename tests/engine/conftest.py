"""Runs of the tests here skip what takes a third of their time and only some tests check."""

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from mmengine.config import config

from diffengine_sdxl.engine.hooks import curves

save_curves = curves.save_curves


@pytest.fixture(scope='module', autouse=True)
def quick_runs() -> Iterator[None]:
    """Write configs without formatting them (yapf), and no curves.png."""
    def unformatted(text: str, **_: Any) -> tuple[str, bool]:
        ast.parse(text)
        return text, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, 'FormatCode', unformatted)
        patch.setattr(curves, 'save_curves', lambda *_: None)
        yield


@pytest.fixture
def with_curves_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw curves.png after all."""
    monkeypatch.setattr(curves, 'save_curves', save_curves)
