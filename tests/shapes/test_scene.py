"""Scenes are functions of their keys; captions describe them; held-out pairs stay out."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from diffengine_sdxl.datasets import Shapes
from diffengine_sdxl.shapes import palette
from diffengine_sdxl.shapes import scene as scene_module
from diffengine_sdxl.shapes.scene import (
    ATTRIBUTES,
    BASE_STYLES,
    HELD_OUT,
    MIN_CONTRAST,
    SHAPES,
    STYLES,
    TEMPLATES,
    TEST,
    TEXTURES,
    WITHHELD_STYLES,
    WORDS,
    Scene,
    draw_named,
    draw_scene,
    grounds,
    is_test_caption,
    reference,
)

NUM = 1500
PLAIN = Scene('circle', 'striped', 'cyan', 'brown', 'plain', 0.5, 0.5, 0.3)


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    return [draw_scene(0, i, STYLES, 'all') for i in range(NUM)]


def test_a_scene_is_a_function_of_seed_split_and_index(scenes: list[Scene]) -> None:
    """Whatever was drawn before it, and whatever state numpy's own generator is in."""
    np.random.seed(5)
    backwards = [draw_scene(0, i, STYLES, 'all') for i in reversed(range(50))]
    assert backwards[::-1] == scenes[:50]
    keys = [(seed, split, i) for seed in (0, 1) for split in ('train', TEST, 'val') for i in range(50)]
    others = [draw_scene(seed, i, split=split) for seed, split, i in keys]
    assert len({(other.x, other.y, other.radius) for other in others}) == len(keys)


def test_the_world_is_the_one_that_the_base_was_trained_on() -> None:
    """Draws that another version of the code, of numpy or another machine would have to repeat (not the wording)."""
    expected = [('circle', 'striped', 'red', 'green', 'plain', 0.70534, 0.65940, 0.22918),
                ('star', 'glossy', 'green', 'orange', 'shaded', 0.39375, 0.70211, 0.22597)]
    found = [tuple(draw_scene(0, i).facts.values())[:8] for i in range(2)]
    assert [f[:5] for f in found] == [e[:5] for e in expected]
    np.testing.assert_allclose([f[5:] for f in found], [e[5:] for e in expected], atol=1e-5)


def test_styles_to_choose_from_change_the_style_and_nothing_else(scenes: list[Scene]) -> None:
    """But for the wording, which avoids the test's captions."""
    for styles in (BASE_STYLES, WITHHELD_STYLES, STYLES[:3]):
        others = [draw_scene(0, i, styles, 'all') for i in range(300)]
        assert {other.style for other in others} == set(styles)
        for one, other in zip(scenes, others, strict=False):
            assert replace(one, style='', template=0, wordy=False) == replace(other, style='', template=0, wordy=False)


def test_combinations() -> None:
    """Seen and held out have no pair in common; together they are all; each pair comes about equally often."""
    found = {c: Counter((s.fill, s.shape) for i in range(NUM) for s in [draw_scene(3, i, combinations=c)])
             for c in ('seen', 'held_out', 'all')}
    assert set(found['held_out']) == set(HELD_OUT) and not set(found['seen']) & set(HELD_OUT)
    assert set(found['seen']) | set(HELD_OUT) == set(found['all']) == set(itertools.product(palette.NAMES, SHAPES))
    for counts in found.values():
        mean = NUM / len(counts)
        assert all(abs(count - mean) < 5 * mean ** 0.5 for count in counts.values()), counts
    assert Counter(shape for _, shape in HELD_OUT) == dict.fromkeys(SHAPES, 2)
    assert len({fill for fill, _ in HELD_OUT}) == len(HELD_OUT)


@pytest.mark.parametrize('split', ['train', 'val', TEST])
def test_held_out_pairs_are_held_out_of_every_split(split: str) -> None:
    pairs = {(s.fill, s.shape) for i in range(400) for s in [draw_scene(0, i, split=split)]}
    assert len(pairs) > 30 and not pairs & set(HELD_OUT)


def test_every_value_is_drawn_and_places_fill_the_picture(scenes: list[Scene]) -> None:
    for key, known in (('style', STYLES), ('texture', TEXTURES), ('fill', palette.NAMES), ('ground', palette.NAMES),
                       ('template', range(len(TEMPLATES))), ('wordy', (False, True))):
        assert {getattr(scene, key) for scene in scenes} == set(known), key
    assert 0.4 < np.mean([scene.texture == 'plain' for scene in scenes]) < 0.6
    radii = [scene.radius for scene in scenes]
    assert 0.22 <= min(radii) < 0.23 and 0.37 < max(radii) <= 0.38
    for values in zip(*((s.x, s.y) for s in scenes), strict=True):
        assert min(values) < 0.3 and max(values) > 0.7 and 0.45 < np.mean(values) < 0.55
    for s in scenes:
        assert all(1.15 * s.radius <= place <= 1 - 1.15 * s.radius for place in (s.x, s.y))


def test_fill_and_accent_stand_out_of_the_ground_in_all_its_shades(scenes: list[Scene]) -> None:
    """A texture multiplies the ground by anything from 0.82 to 1."""
    shades = np.linspace(0.82, 1, 37)[:, None]
    for fill in palette.NAMES:
        assert len(grounds(fill)) >= 8 and fill not in grounds(fill)
        own = palette.to_lab([palette.COLOURS[fill], palette.accent(fill)])
        for ground in grounds(fill):
            lab = palette.to_lab(shades * np.array(palette.COLOURS[ground]))
            assert np.linalg.norm(lab[:, None] - own, axis=-1).min() >= MIN_CONTRAST, (fill, ground)
    assert all(scene.ground in grounds(scene.fill) for scene in scenes)


def test_a_caption_names_what_is_drawn_and_nothing_else() -> None:
    """All looks in all wordings: style and texture where they are not the plain ones, or where it is wordy."""
    names = {'style': STYLES, 'fill': palette.NAMES, 'shape': SHAPES, 'texture': TEXTURES}
    look = re.compile(rf"(?:({'|'.join(STYLES)}) )?({'|'.join(palette.NAMES)}) ({'|'.join(SHAPES)})\b")
    behind = re.compile(rf"(?:({'|'.join(TEXTURES)}) )?\b({'|'.join(palette.NAMES)})\b")
    words = {word for known in names.values() for word in known}
    for style, texture, template, wordy in itertools.product(STYLES, TEXTURES, range(len(TEMPLATES)), (False, True)):
        for fill, shape, ground in zip(palette.NAMES, SHAPES * 3, reversed(palette.NAMES), strict=True):
            caption = Scene(shape, style, fill, ground, texture, 0.5, 0.5, 0.3, template, wordy).caption
            found = look.search(caption)
            assert found, caption
            after = behind.search(caption, found.end())
            assert after, caption
            assert found.groups() == (style if style != 'flat' or wordy else None, fill, shape), caption
            assert after.groups() == (texture if texture != 'plain' or wordy else None, ground), caption
            said = [word for word in re.findall(r'\w+', caption) if word in words]
            assert said == [word for word in (*found.groups(), *after.groups()) if word], caption


def test_wordings(scenes: list[Scene]) -> None:
    assert PLAIN.caption == 'a striped cyan circle on brown'
    assert replace(PLAIN, template=2, fill='orange', style='flat', ground='orange').caption == (
        'an orange circle on an orange background')
    assert replace(PLAIN, wordy=True, template=5, style='outlined').caption == (
        'a drawing of an outlined cyan circle on a plain brown ground')
    assert len({replace(PLAIN, template=i).caption for i in range(len(TEMPLATES))}) == len(TEMPLATES)
    for scene in scenes:
        for article, initial in re.findall(r'\b(an?) (\w)', scene.caption):
            assert article == ('an' if initial in 'aeiou' else 'a'), scene.caption
        assert not set('{}') & set(scene.caption) and scene.caption == ' '.join(scene.caption.split())


def test_the_tests_captions_are_its_own() -> None:
    """No other split shows one, whatever its styles, seed and combinations."""
    styles = ('flat', 'outlined')  # few looks, so that captions would meet
    test = {draw_scene(seed, i, styles, 'held_out', TEST).caption for seed in (0, 1) for i in range(300)}
    others = {draw_scene(seed, i, styles, 'held_out', split).caption for seed in (0, 1) for split in ('train', 'val')
              for i in range(NUM)}
    assert len(test) > 300 and len(others) > 2000 and not test & others


def test_a_reference_has_the_colours_and_another_shape(scenes: list[Scene]) -> None:
    found = [reference(scene, 0, i) for i, scene in enumerate(scenes[:300])]
    assert found == [reference(scene, 0, i) for i, scene in enumerate(scenes[:300])]
    for scene, other in zip(scenes, found, strict=False):
        assert (other.fill, other.ground) == (scene.fill, scene.ground) and other.shape != scene.shape
        assert (other.x, other.y, other.radius) != (scene.x, scene.y, scene.radius)
    assert {(s.shape, o.shape) for s, o in zip(scenes, found, strict=False)} == set(itertools.permutations(SHAPES, 2))
    assert {other.style for other in found} == set(BASE_STYLES)
    others = [reference(scenes[0], *key) for key in ((0, 0, 'train'), (1, 0), (0, 1), (0, 0, 'test'), (0, 0, 'val'))]
    assert others[0] == found[0] and len({(other.x, other.y, other.radius) for other in others}) == 5


def test_facts_are_plain_and_give_the_scene_back(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        assert {type(value) for value in scene.facts.values()} == {str, float, int, bool}
        assert Scene(**json.loads(json.dumps(scene.facts))) == scene


def test_partial_captions_say_what_they_name_and_nothing_else() -> None:
    """Every subset of attributes, in words of the closed vocabulary, with all that is named and no other word of it."""
    said = set()
    for i, named in enumerate(itertools.product((False, True), repeat=len(ATTRIBUTES))):
        names = {name for name, is_named in zip(ATTRIBUTES, named, strict=True) if is_named}
        for j in range(12):
            scene = draw_scene(0, 12 * i + j, BASE_STYLES)
            words = re.findall(r'\w+', scene.partial_caption(names))
            others = [*SHAPES, *palette.NAMES, *BASE_STYLES, *TEXTURES]
            assert sorted(w for w in words if w in others) == sorted(getattr(scene, name) for name in names)
            assert set(words) <= set(WORDS) and (words == []) == (not names)
            said.add(' '.join(words))
    assert {'', 'a star', 'circle'} <= said


@pytest.mark.parametrize(('named', 'caption'), [
    ((), ''), (('shape',), 'a star'), (('ground',), 'on blue'), (('texture',), 'on wavy ground'),
    (('fill', 'ground'), 'red on blue'), (('style', 'shape', 'texture'), 'a striped star on wavy ground')])
def test_partial_captions_read_well(named: tuple[str, ...], caption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_module, 'is_test_caption', lambda caption: False)
    scene = Scene('star', 'striped', 'red', 'blue', 'wavy', 0.5, 0.5, 0.3)
    assert scene.partial_caption(named) == caption


def test_partial_captions_avoid_those_of_the_test_split() -> None:
    """Where another wording says the same; and those of that split are its own where it has one."""
    named = ('fill', 'shape', 'ground')
    assert not any(is_test_caption(draw_scene(0, i).partial_caption(named)) for i in range(300))
    own = [is_test_caption(draw_scene(0, i, split='test').partial_caption(named, 'test')) for i in range(300)]
    assert 0.55 < np.mean(own) < 0.75  # 1 - (7/8)^8: all eight wordings may be others'
    scene = draw_scene(0, 5, split='test')
    assert Shapes(length=6, split='test', mentions=named)[5]['text'] == scene.partial_caption(named, 'test')


def test_parts_are_named_half_of_the_time() -> None:
    named = [draw_named(0, i) for i in range(1000)]
    for name in ATTRIBUTES:
        assert 0.45 < sum(name in names for names in named) / len(named) < 0.55
    assert named[3] == draw_named(0, 3) and named != [draw_named(1, i) for i in range(1000)]
