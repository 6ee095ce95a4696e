"""Has the shape the colour that was asked for?"""

from diffengine_sdxl.evaluation.base import WordAccuracy
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.palette import NAMES


@METRICS.register_module()
class FillAccuracy(WordAccuracy):
    """Share of pictures whose shape has the wanted colour, whatever its shape."""

    name, word, needs, known = 'fill_accuracy', 'fill', ('fill',), NAMES
