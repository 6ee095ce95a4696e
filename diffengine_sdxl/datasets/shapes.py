"""Shapes: rows drawn by code when they are read; nothing is stored on the disk."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import MapDataset, Sample, Transforms
from diffengine_sdxl.datasets.data_sampler import Draw
from diffengine_sdxl.datasets.row_digests import FileDigest, code_digest
from diffengine_sdxl.errors import UserError, one_of, whole_number
from diffengine_sdxl.registry import DATASETS
from diffengine_sdxl.shapes import draw as drawing
from diffengine_sdxl.shapes import palette
from diffengine_sdxl.shapes import scene as scenes
from diffengine_sdxl.shapes.scene import ATTRIBUTES, BASE_STYLES, COMBINATIONS, STYLES, Scene, draw_scene


@DATASETS.register_module()
class Shapes(MapDataset):
    """Images of one coloured shape on a ground, with the entries of fusing/fill50k: img, conditioning_image, text.

    Row i depends on (seed, split, i) only, at any size.

    Args:
        length: number of rows.
        seed, split: which sequence of scenes; two splits share no draws, and only 'test' has some of the wordings.
        size: side of the images in pixels.
        conditioning: 'outline', 'edge', 'mask' or 'depth', under the key 'conditioning_image'; None: no condition.
        styles: of the shapes; by default those that the shipped base was trained on.
        combinations: of fill and shape: 'seen' by the base in training, 'held_out' from it, or 'all'.
        mentions: what captions name, of scene.ATTRIBUTES: ['shape'] writes 'a star', [] writes ''; None: full captions.
        partial_captions: share of the rows whose captions name a part of the attributes only, each with
            probability 1/2; not beside `mentions`.
        oversize: share of the rows that are drawn at up to 1.5 times `size`, for a random Crop, so that
            micro-conditioning varies.
        reference: add 'reference', another image in the same colours, for an image prompt.
        truth: add what metrics compare with: the words 'shape', 'style', 'fill', 'ground' and 'texture', 'mentioned',
            those that the caption says, separated by spaces, and 'shape_mask', the shape in white on black.
        transforms, variants: see `SampleBuilder`.

    Raises:
        UserError: a number is out of range or a name unknown.
    """

    def __init__(self, length: int = 50000, seed: int = 0, split: str = 'train', size: int = 64,
                 conditioning: str | None = 'outline', styles: str | Sequence[str] = BASE_STYLES,
                 combinations: str = 'seen', mentions: Sequence[str] | None = None, partial_captions: float = 0.0,
                 oversize: float = 0.0, reference: bool = False, truth: bool = False, transforms: Transforms = (),
                 variants: int | None = None) -> None:
        super().__init__(transforms, variants=variants)
        self.length, self.seed = whole_number('Shapes: length', length, 1), whole_number('Shapes: seed', seed)
        self.size = whole_number('Shapes: size', size, 8)
        for name, share in (('oversize', oversize), ('partial_captions', partial_captions)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise UserError(f'Shapes: {name}={share!r} must be a number in [0, 1].')
        if mentions is not None and (isinstance(mentions, str) or partial_captions):
            raise UserError(f'Shapes: mentions={mentions!r} must be a list of {", ".join(ATTRIBUTES)}, or None beside '
                            f'partial_captions={partial_captions}.')
        for attribute in mentions or ():
            one_of('Shapes: mentions', attribute, ATTRIBUTES)
        if not isinstance(split, str) or not split:
            raise UserError(f'Shapes: split={split!r} must be a word.')
        if not isinstance(styles, str | list | tuple) or not styles:
            raise UserError(f'Shapes: styles={styles!r} must be a list of {", ".join(STYLES)}, at least one.')
        self.styles = (styles,) if isinstance(styles, str) else tuple(styles)
        for style in self.styles:
            one_of('Shapes: styles', style, STYLES)
        one_of('Shapes: conditioning', conditioning, (None, *drawing.CONDITIONS))
        one_of('Shapes: combinations', combinations, COMBINATIONS)
        if oversize and transforms and not any('Crop' in str(t) for t in transforms):
            raise UserError(f'Shapes: oversize={oversize} draws images of several sizes; add a Crop of {size} pixels '
                            'to the transforms.')
        self.source = f'Shapes(seed={seed}, split={split!r})'
        self.mentions, self.partial_captions = mentions, partial_captions
        self.split, self.conditioning, self.combinations = split, conditioning, combinations
        self.oversize, self.reference, self.truth = oversize, reference, truth
        self.draws_anew = oversize > 0
        self._last: tuple[int, Scene] | None = None

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        return f'{self.split}/{index}'

    def scene(self, index: int) -> Scene:
        """Return what row `index` shows."""
        if self._last is None or self._last[0] != index:  # kept, as images and texts are asked for one after the other
            self._last = index, draw_scene(self.seed, index, self.styles, self.combinations, self.split)
        return self._last[1]

    def images(self, index: int, draw: Draw) -> Sample:
        """Draw the images."""
        scene, size = self.scene(index), self._size(index, draw)
        sample: Sample = {'img': Image.fromarray(drawing.render(scene, size))}
        if self.conditioning:
            sample['conditioning_image'] = Image.fromarray(drawing.condition(scene, size, self.conditioning))
        if self.reference:
            sample['reference'] = Image.fromarray(drawing.render(self._reference(index), size))
        if self.truth:
            sample['shape_mask'] = Image.fromarray(drawing.condition(scene, size, 'mask'))
        return sample

    def texts(self, index: int, draw: Draw) -> Sample:
        """Return the caption, and the words of the truth."""
        scene = self.scene(index)
        named = self._named(index)
        text = scene.caption if named is None else scene.partial_caption(named, self.split)
        if not self.truth:
            return {'text': text}
        words = {name: getattr(scene, name) for name in ATTRIBUTES}
        if named is None:
            said = {*re.findall(r'\w+', text)}
            named = [name for name in words if words[name] in said]
        return {'text': text, **words, 'mentioned': ' '.join(name for name in words if name in named)}

    def content(self, index: int, draw: Draw, file_digest: FileDigest) -> Any:
        """Return what is drawn, and by which code."""
        shown = repr([self.scene(index), self._reference(index) if self.reference else None])
        return [code_digest(*(module.__name__ for module in (drawing, palette, scenes))), shown,
                self._size(index, draw), self.conditioning, self.truth]

    def _named(self, index: int) -> Sequence[str] | None:
        """Return what the caption names; None for a full one."""
        if self.mentions is not None or not self.partial_captions:
            return self.mentions
        draws = np.random.default_rng(rng.key_seed('shapes is partial', self.seed, self.split, index))
        return scenes.draw_named(self.seed, index, self.split) if draws.random() < self.partial_captions else None

    def _reference(self, index: int) -> Scene:
        return scenes.reference(self.scene(index), self.seed, index, self.split)

    def _size(self, index: int, draw: Draw) -> int:
        """Return the side of the images in pixels."""
        if self.oversize:
            key = rng.key_seed('shapes size', draw.seed, self.key(index), self.variant(draw.epoch))
            draws = np.random.default_rng(key)
            if draws.random() < self.oversize:
                return int(draws.integers(self.size, self.size * 3 // 2, endpoint=True))
        return self.size
