"""Data sets: from a row of a source to a batch.

    sources.py        where the rows come from: open a hub id, folder, parquet, JSON, CSV or Arrow file
    local.py          which files of a local folder are rows, and of which split
    image_rows.py     rows of a folder or a zip archive of images: metadata files
    huggingface.py    HFDataset: such rows by number, downloaded first
    streaming.py      HFStream: such rows as an endless stream
    folder.py         CaptionFolder: images with a .txt caption beside each
    shapes.py         Shapes: rows drawn by code
    prior.py          PriorPreservation: two data sets side by side
    mixture.py        Mixture: several data sets by weight or repeats
    report.py         what is known of the data before step 1
    base.py           what all data sets share: skip unreadable rows, set the key, run the transforms
    cached.py         a row through the cache: looked up before it is read
    row_digests.py    what a row's images are made of, without decoding one
    image_files.py    read and decode an image: file, bytes, URL
    archives.py       members of archives, within limits
    files.py          list a folder, read a file within limits
    image_formats.py  which formats are read, and by what
    image_sizes.py    sizes of images from their headers
    data_sampler.py   the order of the rows
    buckets.py        BucketSampler: batches of one shape for images of many
    collate.py        samples to a batch
    transforms/       what happens to a sample: captions dropped, images resized, conditions computed
"""

from diffengine_sdxl.datasets.buckets import BucketSampler
from diffengine_sdxl.datasets.collate import collate
from diffengine_sdxl.datasets.data_sampler import Draw, FiniteSampler, KeyedSampler
from diffengine_sdxl.datasets.folder import CaptionFolder
from diffengine_sdxl.datasets.huggingface import HFDataset
from diffengine_sdxl.datasets.image_files import BadImageError
from diffengine_sdxl.datasets.mixture import Mixture
from diffengine_sdxl.datasets.prior import PriorPreservation
from diffengine_sdxl.datasets.shapes import Shapes
from diffengine_sdxl.datasets.streaming import HFStream

__all__ = ['BadImageError', 'BucketSampler', 'CaptionFolder', 'Draw', 'FiniteSampler', 'HFDataset', 'HFStream',
           'KeyedSampler', 'Mixture', 'PriorPreservation', 'Shapes', 'collate']
