"""Does an image show the shape, fill, ground and style that its caption names?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffengine_sdxl.errors import UserError, did_you_mean, listed, one_of
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.shapes_metric import ShapesMetric, observed
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.palette import NAMES
from diffengine_sdxl.shapes.scene import ATTRIBUTES, SHAPES, STYLES


class WordAccuracy(ShapesMetric):
    """Share of images that show what one word of their sample says.

    Attributes:
        word: entry of the batch, and attribute of an Observation.
        known: the words that can be observed.
    """

    is_share = True
    word = ''
    known: tuple[str, ...] = ()

    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return 1 if the word is observed, else 0; also 0 if no shape is recognised.

        Raises:
            UserError: the sample's word cannot be observed.
        """
        return float(getattr(observed(image), self.word) == self.wanted(sample[self.word], f"'{sample['key']}'"))

    def wanted(self, word: Any, source: str) -> str:
        """Return `word`; `source` names where it comes from.

        Raises:
            UserError: it cannot be observed.
        """
        if word not in self.known:
            raise UserError(f'{type(self).__name__}: the {self.word} {word!r} of {source} is unknown; choose of '
                            f'{listed(self.known, len(self.known))}.{did_you_mean(str(word), self.known)}')
        return str(word)


@METRICS.register_module()
class ShapeAccuracy(WordAccuracy):
    """Share of images whose foreground has the wanted shape."""

    name, word, needs, known = 'shape_accuracy', 'shape', ('shape',), SHAPES


@METRICS.register_module()
class FillAccuracy(WordAccuracy):
    """Share of images whose foreground has the wanted colour, whatever its shape."""

    name, word, needs, known = 'fill_accuracy', 'fill', ('fill',), NAMES


@METRICS.register_module()
class GroundAccuracy(WordAccuracy):
    """Share of images whose ground has the wanted colour, whatever lies on it."""

    name, word, needs, known = 'ground_accuracy', 'ground', ('ground',), NAMES


@METRICS.register_module()
class CaptionAccuracy(MeanMetric):
    """Share of images that show all that their caption says of shape, style, fill and ground.

    A caption that says nothing of these ('', 'on wavy ground') does not count.
    """

    is_share, hint = True, ShapesMetric.hint
    name, needs = 'caption_accuracy', ('shape', 'style', 'fill', 'ground', 'mentioned')

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float | None]:
        """Return 1, 0 or None of each image.

        Raises:
            UserError: 'mentioned' names something else.
        """
        for words in batch['mentioned']:
            for word in str(words).split():
                one_of(f'{type(self).__name__}: an entry of `mentioned`', word, ATTRIBUTES)
        said = [[word for word in str(words).split() if word != 'texture'] for words in batch['mentioned']]
        return [float(all(getattr(observed(image), word) == batch[word][i] for word in said[i])) if said[i] else None
                for i, image in enumerate(images)]


@METRICS.register_module()
class CleanShape(ShapesMetric):
    """Share of images on which a shape of the world is found, whichever it is."""

    is_share = True
    name = 'clean_shape'

    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return 1 if the foreground is a shape, else 0."""
        return float(observed(image).shape is not None)


@METRICS.register_module()
class StyleScore(WordAccuracy):
    """Share of images whose shape is drawn in the wanted style.

    Args:
        style: wanted of every image; None: of each image its sample's.
        kwargs: see ShapesMetric.

    Raises:
        UserError: the style is unknown.
    """

    name, word, known = 'style_score', 'style', STYLES

    def __init__(self, style: str | None = None, **kwargs: Any) -> None:
        self.style = None if style is None else self.wanted(style, 'the config')
        self.needs = ('style',) if style is None else ()
        super().__init__(**kwargs)

    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return 1 if the measured style is the wanted one, else 0."""
        return super().score(image, sample if self.style is None else {**sample, 'style': self.style})
