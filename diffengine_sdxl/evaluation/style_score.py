"""Is the shape drawn in the style that was asked for?"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffengine_sdxl.evaluation.base import WordAccuracy, observed
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.scene import STYLES


@METRICS.register_module()
class StyleScore(WordAccuracy):
    """Share of pictures whose measured style is the wanted one; no shape recognised is wrong.

    Args:
        style: wanted of every picture, whatever its sample is; None takes each sample's own.
        kwargs: see ShapesMetric.

    Raises:
        ValueError: the style is not known.
    """

    name, word, known = 'style_score', 'style', STYLES

    def __init__(self, style: str | None = None, **kwargs: Any) -> None:
        self.style = None if style is None else self.wanted(style, 'the config')
        self.needs = ('style',) if style is None else ()
        super().__init__(**kwargs)

    def score(self, picture: Tensor, sample: Mapping[str, Any]) -> float:
        """1 if the measured style is the wanted one, else 0."""
        if self.style is None:
            return super().score(picture, sample)
        return float(observed(picture).style == self.style)
