"""Does the shape have the place and size of its mask?"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.shapes_metric import ShapesMetric, observed
from diffengine_sdxl.registry import METRICS
from diffengine_sdxl.shapes.measure import iou


@METRICS.register_module()
class MaskIoU(ShapesMetric):
    """Mean IoU of the measured foreground with the sample's 'shape_mask' [3, H, W] in [0, 1], cut at 0.5."""

    name, needs = 'iou', ('shape_mask',)

    def score(self, image: Tensor, sample: Mapping[str, Any]) -> float:
        """Return intersection over union, 0..1; 0 for an image without foreground.

        Raises:
            UserError: mask and image differ in size.
        """
        wanted, mask = (sample['shape_mask'].float().mean(dim=0) >= 0.5).cpu().numpy(), observed(image).mask
        if wanted.shape != mask.shape:
            raise UserError(f"MaskIoU: the shape_mask of sample '{sample['key']}' is {list(wanted.shape)} and its "
                            f"image {list(mask.shape)} (height, width); set the size of the data set to the images'.")
        return iou(mask, wanted)
