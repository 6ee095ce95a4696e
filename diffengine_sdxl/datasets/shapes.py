"""The shapes world as a data set: drawn when it is read, nothing on the disk."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.datasets.base import MapDataset, Sample, Transform
from diffengine_sdxl.datasets.sampler import Draw
from diffengine_sdxl.registry import DATASETS, nearest
from diffengine_sdxl.shapes import draw as pencil
from diffengine_sdxl.shapes.scene import BASE_STYLES, COMBINATIONS, STYLES, Scene, draw_scene, reference


@DATASETS.register_module()
class Shapes(MapDataset):
    """Pictures of one coloured shape on a ground, with what fusing/fill50k has: img, conditioning_image, text.

    Row i is a function of (seed, split, i) alone, at any size.

    Args:
        length: rows.
        seed, split: which sequence of scenes; two splits share none of their draws, and 'test' alone has wordings
            that no other split shows.
        size: side of the pictures, pixels.
        conditioning: 'outline', 'edge', 'mask' or 'depth', under the key 'conditioning_image'; None for none.
        styles: of the shapes; by default those that the shipped base was trained on.
        combinations: of fill and shape: 'seen' by the base in training, 'held_out' from it, or 'all'.
        oversize: share of the rows that are drawn at up to 1.5 times `size`, for a random Crop to cut from, so that
            micro-conditioning has something to tell.
        reference: also 'reference', another picture in the same colours, for an image prompt.
        truth: also what is true of the picture, for metrics: words 'shape', 'style', 'fill', 'ground', 'texture', and
            'shape_mask', the shape in white on black.
        transforms: see `SampleMaker`.

    Raises:
        ValueError: a number is out of range or a name unknown.
    """

    def __init__(self, length: int = 50000, seed: int = 0, split: str = 'train', size: int = 64,
                 conditioning: str | None = 'outline', styles: Sequence[str] = BASE_STYLES,
                 combinations: str = 'seen', oversize: float = 0.0, reference: bool = False, truth: bool = False,
                 transforms: Sequence[dict[str, Any] | Transform] = ()) -> None:
        super().__init__(transforms, 'raise')
        for key, value in {'length': length, 'seed': seed, 'size': size}.items():
            if type(value) is not int:
                raise ValueError(f'Shapes: {key}={value!r} must be a whole number.')
        if not isinstance(oversize, int | float) or not isinstance(split, str) or not split:
            raise ValueError(f'Shapes: oversize={oversize!r} must be a number and split={split!r} a word.')
        if length < 1 or size < 8 or not 0 <= oversize <= 1:
            raise ValueError(f'Shapes: length={length} must be at least 1, size={size} at least 8 pixels, and '
                             f'oversize={oversize} lie in [0, 1].')
        if not isinstance(styles, str | list | tuple):
            raise ValueError(f'Shapes: styles={styles!r} must be a list of {", ".join(STYLES)}.')
        if oversize and transforms and not any('Crop' in str(t) for t in transforms):
            raise ValueError(f'Shapes: oversize={oversize} draws pictures of several sizes; put a Crop of {size} '
                             'pixels among the transforms.')
        styles = (styles,) if isinstance(styles, str) else tuple(styles)
        for key, names, known in (('conditioning', [conditioning] if conditioning else [], pencil.CONDITIONS),
                                  ('styles', styles, STYLES), ('combinations', [combinations], COMBINATIONS)):
            for name in names:
                if name not in known:
                    raise ValueError(f"Shapes: {key}={name!r} is not known; choose of {', '.join(map(repr, known))}."
                                     f'{nearest(str(name), list(known))}')
        if not styles:
            raise ValueError('Shapes: styles is empty; name at least one.')
        self.source = f'Shapes(seed={seed}, split={split!r})'
        self.length, self.seed, self.split, self.size = length, seed, split, size
        self.conditioning, self.styles, self.combinations = conditioning, styles, combinations
        self.oversize, self.reference, self.truth = oversize, reference, truth

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        """The split and the row's number in it."""
        return f'{self.split}/{index}'

    def scene(self, index: int) -> Scene:
        """What row `index` shows."""
        return draw_scene(self.seed, index, self.styles, self.combinations, self.split)

    def load(self, index: int, draw: Draw) -> Sample:
        """Draw row `index`; see the class."""
        scene, size = self.scene(index), self.size
        if self.oversize:
            draws = np.random.default_rng(rng.key_seed('shapes size', draw.seed, self.key(index), draw.epoch))
            if draws.random() < self.oversize:
                size = int(draws.integers(size, size * 3 // 2, endpoint=True))
        sample: Sample = {'img': Image.fromarray(pencil.render(scene, size)), 'text': scene.caption}
        if self.conditioning:
            sample['conditioning_image'] = Image.fromarray(pencil.condition(scene, size, self.conditioning))
        if self.reference:
            sample['reference'] = Image.fromarray(pencil.render(reference(scene, self.seed, index, self.split), size))
        if self.truth:
            sample.update(shape=scene.shape, style=scene.style, fill=scene.fill, ground=scene.ground,
                          texture=scene.texture, shape_mask=Image.fromarray(pencil.condition(scene, size, 'mask')))
        return sample
