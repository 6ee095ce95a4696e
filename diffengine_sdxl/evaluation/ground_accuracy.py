"""Has the ground the colour that was asked for?"""

from diffengine_sdxl.evaluation.base import WordAccuracy
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.palette import NAMES


@METRICS.register_module()
class GroundAccuracy(WordAccuracy):
    """Share of pictures whose ground has the wanted colour, whatever lies on it."""

    name, word, needs, known = 'ground_accuracy', 'ground', ('ground',), NAMES
