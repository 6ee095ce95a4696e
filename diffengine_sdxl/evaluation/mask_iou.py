"""Does the shape lie where it was asked for, in its size?"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.evaluation.base import ShapesMetric, observed
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.measure import iou


@METRICS.register_module()
class MaskIoU(ShapesMetric):
    """Mean IoU of the measured foreground with the sample's 'shape_mask' [3, H, W] in [0, 1], cut at 0.5."""

    name, needs = 'iou', ('shape_mask',)

    def score(self, picture: Tensor, sample: Mapping[str, Any]) -> float:
        """Intersection over union, 0..1; a picture without foreground has 0.

        Raises:
            ValueError: mask and picture differ in size.
        """
        wanted, seen = (sample['shape_mask'].float().mean(dim=0) >= 0.5).cpu().numpy(), observed(picture).mask
        if wanted.shape != seen.shape:
            raise ValueError(f"MaskIoU: the shape_mask of sample '{sample['key']}' is {list(wanted.shape)} and its "
                             f"picture {list(seen.shape)} (height, width); give the data set the size of the pictures.")
        return iou(seen, wanted)

    @staticmethod
    def estimate(values: Sequence[float], clusters: Sequence[str]) -> interval.Estimate:
        """Mean and interval of measured values."""
        return interval.mean(values, clusters)
