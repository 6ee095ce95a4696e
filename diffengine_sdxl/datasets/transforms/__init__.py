"""Transforms: callables that change a sample between its row and the batch.

    caption.py    captions: CaptionDrop, JointDrop, CaptionLine, CaptionShuffle, CaptionTagDrop, CaptionPrefix,
                  CaptionSuffix, CaptionTrigger
    geometry.py   the image and its conditions together: Resize, Crop, Flip; and their time ids: ComputeTimeIds
    condition.py  conditions computed from an image: Canny, Depth, Preprocessor
    pack.py       images to tensors: ImagePrompt, LossMask, and PackInputs, always the last

They change the dict that they are given and return it. Every draw is keyed by (seed, sample key, epoch, purpose).
"""

from diffengine_sdxl.datasets.transforms.caption import (
    CaptionDrop,
    CaptionLine,
    CaptionPrefix,
    CaptionShuffle,
    CaptionSuffix,
    CaptionTagDrop,
    CaptionTrigger,
    JointDrop,
)
from diffengine_sdxl.datasets.transforms.condition import Canny, Depth, Preprocessor
from diffengine_sdxl.datasets.transforms.geometry import ComputeTimeIds, Crop, Flip, Resize
from diffengine_sdxl.datasets.transforms.pack import ImagePrompt, LossMask, PackInputs

__all__ = ['Canny', 'CaptionDrop', 'CaptionLine', 'CaptionPrefix', 'CaptionShuffle', 'CaptionSuffix', 'CaptionTagDrop',
           'CaptionTrigger', 'ComputeTimeIds', 'Crop', 'Depth', 'Flip', 'ImagePrompt', 'JointDrop', 'LossMask',
           'PackInputs', 'Preprocessor', 'Resize']
