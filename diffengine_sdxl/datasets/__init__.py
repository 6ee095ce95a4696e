"""Data sets: from a row of a source to a batch.

    sources.py        where the rows come from: open a hub id, folder, parquet, JSON, CSV or Arrow file
    local.py          which files of a local folder are rows, and of which split
    image_rows.py     rows of a folder or a zip archive of images: metadata files
    huggingface.py    HFDataset: such rows by number, downloaded first
    streaming.py      HFStream: such rows as an endless stream
    folder.py         CaptionFolder: images with a .txt caption beside each
    shapes.py         Shapes: rows drawn by code
    cached.py         CachedLatents: rows that `diffengine-sdxl cache` encoded
    prior.py          PriorPreservation: two data sets side by side
    base.py           what all data sets share: skip unreadable rows, set the key, run the transforms
    image_files.py    read and decode an image: file, bytes, URL
    archives.py       members of archives, within limits
    files.py          list a folder, read a file within limits
    data_sampler.py   the order of the rows
    collate.py        samples to a batch
    transforms/       what happens to a sample: captions dropped, images resized, conditions computed
"""

from diffengine_sdxl.datasets.cached import CachedLatents
from diffengine_sdxl.datasets.collate import collate
from diffengine_sdxl.datasets.data_sampler import Draw, FiniteSampler, KeyedSampler
from diffengine_sdxl.datasets.folder import CaptionFolder
from diffengine_sdxl.datasets.huggingface import HFDataset
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.prior import PriorPreservation
from diffengine_sdxl.datasets.shapes import Shapes
from diffengine_sdxl.datasets.streaming import HFStream

__all__ = ['BadImageError', 'CachedLatents', 'CaptionFolder', 'Draw', 'FiniteSampler', 'HFDataset', 'HFStream',
           'KeyedSampler', 'PriorPreservation', 'Shapes', 'collate']
