"""Data sets, one file per source, with their samplers and the collate function.

`transforms/` holds what is done to a sample, one file per concern.
"""

from diffengine_sdxl.datasets.cached import CachedLatents
from diffengine_sdxl.datasets.collate import collate, pack
from diffengine_sdxl.datasets.folder import CaptionFolder
from diffengine_sdxl.datasets.huggingface import HFDataset
from diffengine_sdxl.datasets.images import BadImageError
from diffengine_sdxl.datasets.prior import PriorPreservation
from diffengine_sdxl.datasets.sampler import Draw, FiniteSampler, KeyedSampler
from diffengine_sdxl.datasets.shapes import Shapes
from diffengine_sdxl.datasets.streaming import HFStream

__all__ = ['BadImageError', 'CachedLatents', 'CaptionFolder', 'Draw', 'FiniteSampler', 'HFDataset', 'HFStream',
           'KeyedSampler', 'PriorPreservation', 'Shapes', 'collate', 'pack']
