"""Scenes of the shapes world: drawn at random from (seed, index), and described by captions."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from diffengine_sdxl import rng
from diffengine_sdxl.shapes import palette

SHAPES = ('circle', 'square', 'triangle', 'star')
#: Styles that the base was trained on, and styles that only adapters learn.
BASE_STYLES = ('flat', 'outlined', 'striped', 'glossy')
WITHHELD_STYLES = ('dotted', 'ringed')
STYLES = (*BASE_STYLES, *WITHHELD_STYLES)
TEXTURES = ('plain', 'shaded', 'wavy')
#: Pairs of fill and shape that the base never saw; two of each shape, one of each of eight fills.
HELD_OUT = (('red', 'star'), ('orange', 'triangle'), ('yellow', 'square'), ('green', 'circle'),
            ('cyan', 'star'), ('blue', 'square'), ('purple', 'circle'), ('pink', 'triangle'))
#: The split whose captions no other split has.
TEST = 'test'
#: Which pairs of fill and shape a sequence is drawn from.
COMBINATIONS = ('seen', 'held_out', 'all')
#: Fill and ground, and the fill's accent and ground, lie at least this far apart in Lab.
MIN_CONTRAST = 30.0

TEMPLATES = ('{a} {look} on {ground}', '{look} on {ground}', '{a} {look} on {a_ground} background',
             'a picture of {a} {look} on {ground}', '{look}, {ground} background', 'a drawing of {a} {look} on '
             '{a_ground} ground', '{a} {look} in front of {ground}', 'one {look} on a background of {ground}')
#: What a caption may name, and a partial one leave out.
ATTRIBUTES = ('style', 'fill', 'shape', 'ground', 'texture')
#: Wordings of captions that name no ground or texture, and of those that name nothing else.
LOOK_TEMPLATES = ('{a} {look}', '{look}', 'a picture of {a} {look}', 'a drawing of {a} {look}', 'one {look}')
GROUND_TEMPLATES = ('on {ground}', '{ground} background', '{a_ground} background', 'on {a_ground} ground',
                    'in front of {ground}', 'on a background of {ground}')
#: The words of all captions without WITHHELD_STYLES: what the base was trained on, and its tokenizers declare as
#: `closed_vocabulary`.
WORDS = tuple(dict.fromkeys([*SHAPES, *palette.NAMES, *BASE_STYLES, *TEXTURES, 'a', 'an', *re.findall(
    r'\w+', re.sub(r'{\w+}', '', ' '.join(TEMPLATES)))]))


@dataclass(frozen=True)
class Scene:
    """One shape on one ground.

    Attributes:
        shape, style, fill, ground, texture: of SHAPES, STYLES, palette.NAMES twice, TEXTURES.
        x, y: the shape's centre, as a fraction of the image's side, from the top left.
        radius: as a fraction of the side.
        template: index of the caption's wording in TEMPLATES.
        wordy: the caption also names a flat style and a plain ground.
    """

    shape: str
    style: str
    fill: str
    ground: str
    texture: str
    x: float
    y: float
    radius: float
    template: int = 0
    wordy: bool = False

    @property
    def caption(self) -> str:
        """Describe the scene, such as 'a striped cyan circle on brown'."""
        look = f'{self.fill} {self.shape}' if self.style == 'flat' and not self.wordy else (
            f'{self.style} {self.fill} {self.shape}')
        ground = self.ground if self.texture == 'plain' and not self.wordy else f'{self.texture} {self.ground}'
        return TEMPLATES[self.template].format(a=_article(look), look=look, ground=ground,
                                               a_ground=f'{_article(ground)} {ground}')

    def partial_caption(self, named: Collection[str], split: str = 'train') -> str:
        """Describe the scene by some of its attributes: 'a star', 'striped on blue', 'in front of wavy ground', ''.

        Of the possible wordings the first one, from `template` on, that is a caption of the split 'test' if `split` is
        that one, else none of it; the first of all where there is none, as of a single word.

        Args:
            named: of ATTRIBUTES; each is named, also a flat style and a plain ground.
        """
        look = ' '.join(getattr(self, name) for name in ('style', 'fill', 'shape') if name in named)
        ground = ' '.join(getattr(self, name) for name in ('texture', 'ground') if name in named)
        if not look and not ground:
            return ''
        templates = TEMPLATES if look and ground else LOOK_TEMPLATES if look else GROUND_TEMPLATES
        # Without a noun an article would stand alone: 'a red on blue'; and so would a texture: 'on wavy'.
        ground += ' ground' if ground and 'ground' not in named else ''
        fitting = [t for t in templates if ('shape' in named or '{a}' not in t) and (
            'ground' in named or 'background' not in t and '} ground' not in t)]
        start = self.template % len(fitting)
        words = dict(a=_article(look or ' '), look=look, ground=ground, a_ground=f'{_article(ground or " ")} {ground}')
        texts = [template.format(**words) for template in (*fitting[start:], *fitting[:start])]
        return next((text for text in texts if is_test_caption(text) == (split == TEST)), texts[0])

    @property
    def facts(self) -> dict[str, Any]:
        """Return all fields as plain values, for a row of metadata."""
        return asdict(self)


def _article(words: str) -> str:
    return 'an' if words[0] in 'aeiou' else 'a'


@cache
def grounds(fill: str) -> tuple[str, ...]:
    """Return the ground colours with enough contrast to this fill and its accent."""
    colours = (palette.COLOURS[fill], palette.accent(fill))
    # Textures darken the ground, to 0.82 at least.
    return tuple(name for name, (r, g, b) in palette.COLOURS.items()
                 if min(palette.distance((k * r, k * g, k * b), colour) for colour in colours for k in (1.0, 0.82))
                 >= MIN_CONTRAST)


def draw_scene(seed: int, index: int, styles: Sequence[str] = BASE_STYLES, combinations: str = 'seen',
               split: str = 'train') -> Scene:
    """Return the scene of sample `index`, a function of the arguments only.

    Except in 'test', another list of several styles changes the style and the wording only.

    Args:
        styles: to choose from.
        combinations: 'seen' excludes the pairs of HELD_OUT, 'held_out' has only those, 'all' both.
        split: each is another sequence; captions of 'test' appear in no other split.
    """
    draws = np.random.default_rng(rng.key_seed('shapes', seed, split, index))
    while True:
        scene = _draw(draws, styles, _pairs(combinations))
        # A generator, as the first wording nearly always fits.
        wordings = (replace(scene, template=t, wordy=w) for w in (scene.wordy, not scene.wordy)
                    for t in (*range(scene.template, len(TEMPLATES)), *range(scene.template)))
        # Other splits avoid the captions of 'test' by another wording; 'test' draws until it has one of its own.
        for candidate in wordings if split != TEST else [scene]:
            if is_test_caption(candidate.caption) == (split == TEST):
                return candidate


def is_test_caption(caption: str) -> bool:
    """Return whether this caption belongs to the split 'test' only: one in eight, by its hash."""
    return rng.key_seed('shapes caption', caption) % 8 == 0


def _draw(draws: np.random.Generator, styles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Scene:
    fill, shape = pairs[int(draws.integers(len(pairs)))]
    ground = str(draws.choice(grounds(fill)))
    style = styles[int(draws.integers(len(styles)))]
    radius = float(draws.uniform(0.22, 0.38))
    x, y = (float(v) for v in draws.uniform(1.15 * radius, 1 - 1.15 * radius, size=2))
    texture = str(draws.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
    return Scene(shape, style, fill, ground, texture, x, y, radius, int(draws.integers(len(TEMPLATES))),
                 bool(draws.random() < 0.5))


def draw_named(seed: int, index: int, split: str = 'train') -> tuple[str, ...]:
    """Return the attributes that a partial caption of sample `index` names: each with probability 1/2."""
    draws = np.random.default_rng(rng.key_seed('shapes partial caption', seed, split, index))
    return tuple(name for name, named in zip(ATTRIBUTES, draws.random(len(ATTRIBUTES)) < 0.5, strict=True) if named)


@cache
def _pairs(combinations: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple((fill, shape) for fill in palette.NAMES for shape in SHAPES)
    chosen = {'seen': tuple(p for p in pairs if p not in HELD_OUT), 'held_out': HELD_OUT, 'all': pairs}
    return chosen[combinations]


def reference(scene: Scene, seed: int, index: int, split: str = 'train') -> Scene:
    """Return the scene of an image prompt: the same colours, another shape; place, size, texture and style are redrawn.

    Fill and shape may be a pair of HELD_OUT.
    """
    draws = np.random.default_rng(rng.key_seed('shapes reference', seed, split, index))
    other = draw_scene(seed, index, split=f'{split} reference')
    shapes = [s for s in SHAPES if s != scene.shape]
    return replace(other, shape=str(draws.choice(shapes)), fill=scene.fill, ground=scene.ground)
