"""Values as people type them: Python literals, brackets and dict(...) without quotes, all else as text."""

import random
from typing import Any

import pytest

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.literals import MAX_DEPTH, parse_literal

#: What is typed -> the value.
VALUES: dict[str, Any] = {
    '0.5': 0.5, '-3': -3, '1e-5': 1e-5, ' 7 ': 7, 'None': None, 'true': True, 'False': False, "'7'": '7', '': '',
    # Text as it stands; a '[' later in it is not a list.
    'a red circle, lit': 'a red circle, lit', "it's": "it's", '/my data/base': '/my data/base', '010': '010',
    'cat.jpg': 'cat.jpg', 'layer[1]': 'layer[1]', 'none': 'none', 'dictionary(a)': 'dictionary(a)', 'a\nb': 'a\nb',
    '\x00': '\x00', '{a: 1}': '{a: 1}', 'a (b': 'a (b', '"a': '"a',
    # Lists and tuples.
    '[]': [], '()': (), '[ ]': [], '(0,0.5)': (0, 0.5), '(a, b c)': ('a', 'b c'), '(a)': ('a',), '[a,]': ['a'],
    '[a red circle, 2,None,true]': ['a red circle', 2, None, True], '[[1,2],[a b,c]]': [[1, 2], ['a b', 'c']],
    '[(a, b), c (d, e)]': [('a', 'b'), 'c (d, e)'], '[[],(),x]': [[], (), 'x'], "['',a]": ['', 'a'],
    # Apostrophes and quotes; a quote begins where a value does.
    "[it's, the dog's (old), b]": ["it's", "the dog's (old)", 'b'], "['a, (b', c d]": ['a, (b', 'c d'],
    '["it\'s, so" , b c]': ["it's, so", 'b c'], r"['it\'s, so', b c]": ["it's, so", 'b c'],
    r"['a\\', b c]": ['a\\', 'b c'], "[[x, 'a, (b'], c d]": [['x', 'a, (b'], 'c d'], "[a 'b', c]": ["a 'b'", 'c'],
    # Dicts.
    'dict()': {}, 'dict(a=1,)': {'a': 1}, '{"a": (1, 2)}': {'a': (1, 2)}, 'dict(a=)': {'a': ''},
    'dict(type=EMAHook, decay=0.999)': {'type': 'EMAHook', 'decay': 0.999}, 'dict(a=b=c)': {'a': 'b=c'},
    'dict( a = x y , b=dict(c=[d e,dict(f=1)],g=(0,h i)))': {'a': 'x y', 'b': {'c': ['d e', {'f': 1}],
                                                                                'g': (0, 'h i')}},
    '[dict(type=A,x=[1,b]),dict(type=B)]': [{'type': 'A', 'x': [1, 'b']}, {'type': 'B'}],
    "dict(a='x, (y',b=\"]\",c=d'e)": {'a': 'x, (y', 'b': ']', 'c': "d'e"}, 'dict(a={"b": 1},c=x y)': {
        'a': {'b': 1}, 'c': 'x y'}}


@pytest.mark.parametrize('text', VALUES)
def test_values(text: str) -> None:
    got = parse_literal(text, 'x')
    assert got == VALUES[text] and repr(got) == repr(VALUES[text])  # True is not 1, a tuple no list


@pytest.mark.parametrize(('text', 'words'), [
    *((text, "brackets( or quotes)? don't match; put text with brackets into quotes")
      for text in ('[1', '[', 'dict(', 'dict(a=1', 'dict(a=1))', '[a)(b]', '[a],[b]', '[a b]]', '[a] b', '(a) and (b)',
                   '[(a b]', '[a [b, c), d]', "['a, b]", "['a']b'", '[dict(a=1]', '[a cat :), b]')),
    *((text, rf"'{entry}' in dict\(...\) must have the form KEY=VALUE, each key once")
      for text, entry in (('dict(a)', 'a'), ('dict(a=1,b)', 'b'), ('dict(1=2)', '1=2'), ('dict(a.b=2)', 'a.b=2'),
                          ("dict('a'=1)", "'a'=1"), ('dict(a=1, a=2)', 'a=2'), ('[dict(=1)]', '=1')))])
def test_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--cfg-options 'k=v': .*{words}"):
        parse_literal(text, "--cfg-options 'k=v'")


@pytest.mark.parametrize(('opening', 'closing'), [('[', ']'), ('(', ')'), ('dict(a=', ')'), ('{', '}'), ('-', '')])
def test_nothing_is_too_deep_to_answer(opening: str, closing: str) -> None:
    """10,000 brackets: a sentence, or text, at once; what a config needs is far from the limit."""
    for inner in ('', 'x y'):
        text = opening * 10000 + inner + closing * 10000
        if opening in '{-':
            assert parse_literal(text, 'x') == text
        else:
            with pytest.raises(UserError, match=f'^x: more than {MAX_DEPTH} brackets inside each other'):
                parse_literal(text, 'x')
    if opening == 'dict(a=':
        value = parse_literal(opening * MAX_DEPTH + 'x y' + closing * MAX_DEPTH, 'x')
        for _ in range(MAX_DEPTH):
            value = value['a']
        assert value == 'x y'


TEXTS = ('a', 'a red circle', 'x, y', "it's", 'say "no"', '''both ' and "''', 'a (b', ']', 'k=v', '\\', '\\\'', 'tab\t',
         'é 🐸', '', ' ', '7', 'None', 'dict(a=1)')


def nested(random: random.Random, depth: int = 0) -> Any:
    """Return a random value of numbers, texts, lists, tuples and dicts."""
    kind = random.randrange(6 if depth < 4 else 3)
    if kind < 3:
        return (random.choice([0, -7, 0.25, 1e-5, True, False, None]), random.choice(TEXTS), random.random())[kind]
    parts = [nested(random, depth + 1) for _ in range(random.randrange(4))]
    return {'a' * (i + 1): part for i, part in enumerate(parts)} if kind == 5 else (list, tuple)[kind - 3](parts)


def written(value: Any) -> str:
    """Return `value` with dict(...) for dicts, as in a config file."""
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={written(part)}" for key, part in value.items())})'
    if isinstance(value, list | tuple):
        text = ', '.join(map(written, value))
        return f'[{text}]' if isinstance(value, list) else f'({text},)' if value else '()'
    return repr(value)


def test_what_python_writes_is_read_back() -> None:
    """Also where it is no literal, for a dict(...) or a bare word beside it."""
    source = random.Random(0)
    for _ in range(500):
        value = nested(source)
        for text, expected in ((repr(value), value), (written(value), value), (f'[a b, {written(value)}]',
                                                                               ['a b', value]),
                               (f'dict(x={value!r}, y=a b)', {'x': value, 'y': 'a b'})):
            got = parse_literal(text, 'x')
            assert got == expected and repr(got) == repr(expected), text
