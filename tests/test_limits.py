"""Limits on what comes from outside."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'configs.md'


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = asdict(limits.CURRENT)
    yield
    limits.set_limits(before)


def test_every_limit_is_documented() -> None:
    table = PAGE.read_text().partition('## Limits')[2]
    assert not [field.name for field in fields(limits.Limits) if f'`{field.name}`' not in table]


def test_set() -> None:
    limits.set_limits({'image_bytes': 2**30})
    assert limits.CURRENT.image_bytes == 2**30 and limits.CURRENT.image_pixels == limits.Limits().image_pixels


@pytest.mark.parametrize(('settings', 'words'), [
    ({'image_byte': 1}, "limits.image_byte: there is no such limit. Did you mean 'image_bytes'"),
    ({'image_bytes': 0}, 'limits.image_bytes=0 must be a number above 0'), ({'image_bytes': True}, 'image_bytes=True'),
    ({'image_bytes': '1'}, "image_bytes='1'"), ({'image_bytes': float('nan')}, 'image_bytes=nan')])
def test_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        limits.set_limits(settings)
