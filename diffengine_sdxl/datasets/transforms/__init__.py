"""What is done to a sample between its source and the batch: callables from dict to dict, one file per concern.

They change the dict they are given and return it. Every draw is keyed by (seed, sample key, epoch, what for).
"""

from diffengine_sdxl.datasets.transforms.caption import CaptionDrop, CaptionPrefix, CaptionShuffle
from diffengine_sdxl.datasets.transforms.condition import Canny, Depth, Preprocessor
from diffengine_sdxl.datasets.transforms.geometry import Crop, Flip, Resize
from diffengine_sdxl.datasets.transforms.image_prompt import ImagePrompt
from diffengine_sdxl.datasets.transforms.joint_drop import JointDrop
from diffengine_sdxl.datasets.transforms.loss_mask import LossMask
from diffengine_sdxl.datasets.transforms.pack import PackInputs
from diffengine_sdxl.datasets.transforms.time_ids import ComputeTimeIds

__all__ = ['Canny', 'CaptionDrop', 'CaptionPrefix', 'CaptionShuffle', 'ComputeTimeIds', 'Crop', 'Depth', 'Flip',
           'ImagePrompt', 'JointDrop', 'LossMask', 'PackInputs', 'Preprocessor', 'Resize']
