"""Regular expressions from downloaded files: matched as peft does, and never for long."""

import json
from pathlib import Path
from typing import Any

import pytest
from kinds import CASES, build
from peft.utils.other import get_pattern_key

from diffengine_sdxl.adapters import untrusted_patterns
from diffengine_sdxl.adapters.untrusted_patterns import first_matches
from diffengine_sdxl.errors import UserError

#: Takes years on a name of 60 characters; it has no nested quantifier.
HOSTILE = '(.|..)*[!]'


def test_the_first_match_is_pefts() -> None:
    names = ['mid.attn1.to_q', 'mid.attn2.to_q', 'mid.attn2.to_k', 'up.attn2.to_q_x']
    patterns = [r'attn2\.to_q', r'mid\..*', 'to_q|to_k', 'é']
    indexes = first_matches([rf'(.*\.)?({pattern})$' for pattern in patterns], names, 'file')
    assert indexes == [1, 0, 1, None]
    assert [name if i is None else patterns[i] for i, name in zip(indexes, names, strict=True)] == [
        get_pattern_key(patterns, name) for name in names]


@pytest.mark.parametrize(('field', 'value', 'message'), [
    ('target_modules', HOSTILE, 'longer than 2 s'), ('rank_pattern', {HOSTILE: 8}, 'longer than 2 s'),
    ('alpha_pattern', {'(': 8}, r'invalid regular expression .*missing \)')])
def test_a_file_with_a_bad_pattern_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              field: str, value: Any, message: str) -> None:
    model = build(tiny_base, {'a': CASES['loha'].config})
    model.adapters['a'].save(tmp_path)
    config = tmp_path / 'unet' / 'adapter_config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    monkeypatch.setattr(untrusted_patterns, 'TIME_LIMIT', 2)
    with pytest.raises(UserError, match=message):
        model.adapters['a'].load(tmp_path)
