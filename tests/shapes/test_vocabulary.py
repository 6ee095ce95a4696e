"""The tokenizers of the shapes base: a token for every word that captions have, bytes for all others."""

import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from diffengine_sdxl.loading.strict import shipped
from diffengine_sdxl.shapes import palette
from diffengine_sdxl.shapes.scene import SHAPES, STYLES, TEMPLATES, TEXTURES, Scene

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(str(shipped('diffengine_sdxl::shapes/base')))


@pytest.fixture(scope='module')
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / 'tools' / 'make_shapes_base.py'), run_name='tool')


@pytest.fixture(scope='module', params=['tokenizer', 'tokenizer_2'])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return CLIPTokenizer.from_pretrained(BASE, subfolder=request.param)


def captions() -> list[str]:
    """Every wording of every look; fills and grounds in turn, as they stand at the same places."""
    looks = itertools.product(SHAPES, STYLES, TEXTURES, range(len(TEMPLATES)), (False, True))
    fills = itertools.cycle(palette.NAMES)
    return [Scene(shape, style, next(fills), fill, texture, 0.5, 0.5, 0.3, template, wordy).caption
            for (shape, style, texture, template, wordy), fill in zip(looks, itertools.cycle(palette.NAMES[1:]),
                                                                      strict=False)]


def test_every_word_of_a_caption_is_one_token(tokenizer: Any) -> None:
    """Words, commas, a token at each end; and the caption comes back."""
    texts = captions()
    assert len(set(texts)) > 900
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        words = re.findall(r'\w+|,', text)
        assert len(ids) == len(words) + 2, (text, tokenizer.convert_ids_to_tokens(ids))
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [f'{word}</w>' for word in words]
        assert len(ids) <= tokenizer.model_max_length == 32
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(' ,', ',') == text
    known = {*palette.NAMES, *SHAPES, *STYLES, *TEXTURES, 'background', 'a', 'an', 'on', 'picture', 'drawing', 'front'}
    assert all(f'{word}</w>' in tokenizer.get_vocab() for word in known)


@pytest.mark.parametrize('text', ['photograph of an astronaut', 'zyxwv', 'ünïcödé', '猫', '🐱', '0123', '\x01\x7f',
                                  "it's"])
def test_any_text_can_be_read(tokenizer: Any, text: str) -> None:
    """Byte by byte where it must be, nothing unknown, and it comes back."""
    ids = tokenizer(text).input_ids[1:-1]
    assert ids and tokenizer.unk_token_id not in ids and max(ids) < len(tokenizer)
    assert tokenizer.decode(ids).replace(' ', '') == text.replace(' ', '')


def test_the_two_are_padded_as_sdxls(tokenizer: Any) -> None:
    second = tokenizer.pad_token == '!'
    ids = tokenizer('a star', padding='max_length').input_ids
    assert len(ids) == 32 and ids[4:] == [tokenizer.pad_token_id] * 28
    assert tokenizer.pad_token == ('!' if second else '<|endoftext|>')
    config = json.loads((BASE / ('text_encoder_2' if second else 'text_encoder') / 'config.json').read_text())
    # The pooled embedding is read at the end token, which the encoder knows by its number.
    assert (config['bos_token_id'], config['eos_token_id'], config['pad_token_id']) == (ids[0], ids[3], ids[-1])
    assert config['vocab_size'] == len(tokenizer) and config['max_position_embeddings'] == 32
    assert {CLIPTokenizer.from_pretrained(BASE, subfolder=n).pad_token for n in ('tokenizer', 'tokenizer_2')} == {
        '!', '<|endoftext|>'}


def test_the_shipped_tokenizers_are_the_tools(tool: dict[str, Any], tokenizer: Any) -> None:
    """Which is the same each time: the shipped text encoders know its numbers."""
    vocabulary, merges = tool['vocabulary']()
    assert tool['vocabulary']() == (vocabulary, merges)
    assert tokenizer.get_vocab() == vocabulary and sorted(vocabulary.values()) == list(range(len(vocabulary)))
    path = BASE / ('tokenizer_2' if tokenizer.pad_token == '!' else 'tokenizer') / 'tokenizer.json'
    assert [tuple(pair) for pair in json.loads(path.read_text())['model']['merges']] == merges
