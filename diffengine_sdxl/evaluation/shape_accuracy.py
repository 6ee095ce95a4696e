"""Is it the shape that was asked for?"""

from diffengine_sdxl.evaluation.base import WordAccuracy
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.scene import SHAPES


@METRICS.register_module()
class ShapeAccuracy(WordAccuracy):
    """Share of pictures whose foreground has the wanted shape; nothing recognised is wrong."""

    name, word, needs, known = 'shape_accuracy', 'shape', ('shape',), SHAPES
